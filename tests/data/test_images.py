import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from pictures import noise
from PIL import Image
from places import REPOSITORY

from sap_lightning.data import images
from sap_lightning.data.images import FORMATS, FORMATS_IN_WORDS, MAX_PIXELS, decode, file_picture, is_image
from sap_lightning.errors import InputError


def encoded(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def head_of_png(width: int, height: int) -> bytes:
    """The beginning of a picture of that size, and nothing of its pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + b"\0\0\0\0IDAT"


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGB", "png"), ("L", "png"), ("1", "png"), ("P", "png"), ("CMYK", "jpeg"), ("CMYK", "tiff"), ("YCbCr", "tiff")],
)
def test_opaque_modes_become_what_pil_makes_of_them(mode, kind):
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


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff", "mpo"])
def test_of_several_frames_the_first_one_is_taken(kind):
    black, white = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "white")
    several = encoded(black, kind, save_all=True, append_images=[white])
    assert Image.open(io.BytesIO(several)).n_frames == 2
    assert decode(several).getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize("kind", ["eps", "avif", "ico", "jpeg2000", "tga", "pdf"])
def test_a_format_that_is_not_in_the_list_is_not_opened_whatever_its_file_is_called(kind, monkeypatch):
    data = encoded(noise(0), kind)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("another program was started"))
    with pytest.raises(ValueError, match=rf"is not one of {', '.join(FORMATS)}$"):
        decode(data)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("HEIC", b"\0\0\0\x18ftypheic\0\0\0\0"),
        ("AVIF", encoded(noise(0), "avif")),
        ("SVG", b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg xmlns="http://www.w3.org/2000/svg"/>'),
        ("EPS", encoded(noise(0), "eps")),
        ("the file", b"notes"),
    ],
)
def test_an_image_of_another_format_is_called_by_its_name(name, data):
    with pytest.raises(ValueError, match=f"^{name} is not one of JPEG, PNG, "):
        decode(data)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((1, 1_000_000), "1 × 1000000 pixels one side is over 100 times the other"),
        ((1_000_000, 1), "1000000 × 1 pixels one side is over 100 times the other"),
        ((13_000, 13_000), f"13000 × 13000 pixels are more than {MAX_PIXELS}"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_size_out_of_bounds_is_told_by_the_head_alone(size, said):
    with pytest.raises(ValueError, match=said):
        decode(head_of_png(*size))


def test_a_picture_within_the_bounds_is_decoded():
    assert decode(encoded(noise(0, 400, 4))).size == (400, 4)


def test_a_file_that_is_too_large_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 1000)
    noise(0, 50, 50).save(tmp_path / "0.bmp")
    data = file_picture(tmp_path / "0.bmp", tmp_path).read()
    assert len(data) == 1001
    with pytest.raises(ValueError, match="the file is larger than"):
        decode(data)


def test_integers_of_32_bits_have_no_brightness_either():
    with pytest.raises(ValueError, match="integers of 32 bits of an unknown range"):
        decode(encoded(Image.fromarray(np.full((2, 2), 200, np.int32)), "tiff"))


def test_floating_point_pixels_have_no_brightness():
    with pytest.raises(ValueError, match="floating-point numbers of an unknown range"):
        decode(encoded(Image.fromarray(np.full((2, 2), 0.5, np.float32)), "tiff"))


def test_an_image_is_a_file_with_the_suffix_of_one(tmp_path):
    noise(0).save(tmp_path / "0.PNG", "png")
    (tmp_path / "1.heic").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "link.png").symlink_to("0.PNG")
    os.mkfifo(tmp_path / "pipe.png")
    assert sorted(path.name for path in filter(is_image, tmp_path.iterdir())) == ["0.PNG", "1.heic", "link.png"]


@pytest.mark.parametrize("target", ["nowhere.png", "loop.png"])
def test_a_link_to_no_image_is_refused_as_a_domain_would_shrink_unseen(tmp_path, target):
    (tmp_path / "loop.png").symlink_to(target)
    with pytest.raises(InputError, match=r"loop\.png: a link that leads to no file"):
        is_image(tmp_path / "loop.png")


def test_a_file_s_name_that_is_no_utf_8_can_be_written(tmp_path):
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    noise(0).save(file)
    picture = file_picture(file, tmp_path)
    assert picture.name == r"caf\xe9.png" and decode(picture.read()).size == (24, 20)


@pytest.mark.parametrize("document", ["README.md", "docs/data.md"])
def test_the_documents_name_the_formats(document):
    words = (REPOSITORY / document).read_text(encoding="utf-8").split()
    assert FORMATS_IN_WORDS in " ".join(words)
