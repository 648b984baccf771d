import io

import numpy as np
import pytest
from pictures import noise
from PIL import Image

from sap_lightning.data.images import decode


def encoded(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK"])
def test_opaque_modes_become_what_pil_makes_of_them(mode):
    kind = "jpeg" if mode == "CMYK" else "png"
    data = encoded(noise(0).convert(mode), kind)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(decode(data), expected)


def test_transparent_pixels_become_white():
    image = noise(0).convert("RGBA")
    image.putpixel((3, 2), (0, 0, 0, 0))
    decoded = decode(encoded(image))
    assert decoded.getpixel((3, 2)) == (255, 255, 255)
    assert decoded.getpixel((4, 2)) == image.getpixel((4, 2))[:3]


def test_a_transparent_palette_entry_becomes_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    decoded = decode(encoded(image, transparency=0))
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((1, 1)) == (0, 0, 255)


def test_sixteen_bit_greys_keep_their_brightness():
    levels = np.array([[0, 128 * 257, 65535]], np.uint16)
    decoded = decode(encoded(Image.fromarray(levels)))
    np.testing.assert_array_equal(np.asarray(decoded)[0, :, 0], [0, 128, 255])


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff"])
def test_an_image_is_upright_as_its_exif_orientation_says(kind):
    image, exif = noise(0, 24, 20), Image.Exif()
    exif[0x0112] = 6
    plain, turned = encoded(image, kind), encoded(image, kind, exif=exif)
    np.testing.assert_array_equal(decode(turned), np.rot90(decode(plain), -1))


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: b"not an image", lambda data: data[: len(data) // 2]]
)
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp"])
def test_damaged_files_raise(damage, kind):
    with pytest.raises(Exception):  # noqa: B017 (PIL's decoders share no base class)
        decode(damage(encoded(noise(0), kind)))


def test_decompression_bombs_raise(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Image.DecompressionBombError):
        decode(encoded(noise(0)))
