import logging
import os

import numpy as np
import pytest
from pictures import noise
from PIL import Image

from sap_lightning.data import cache
from sap_lightning.data.cache import load_pixels
from sap_lightning.data.preprocess import Preprocess
from sap_lightning.data.sources import ImageFolder
from sap_lightning.errors import InputError


def load(root, base, use_cache=True):
    samples = ImageFolder(root).samples("photo")
    return load_pixels(samples.pictures, samples.fingerprint, Preprocess(base), use_cache)


def cached_files(cache_dir):
    return sorted((cache_dir / "images").iterdir())


def test_cached_and_uncached_pixels_are_equal(root, base, cache_dir):
    uncached = load(root, base, use_cache=False)
    assert not cache_dir.exists()
    built, opened = load(root, base), load(root, base)
    assert uncached.images.shape == (20, 3, 16, 16)
    np.testing.assert_array_equal(built.images, uncached.images)
    np.testing.assert_array_equal(opened.images, uncached.images)
    assert isinstance(opened.images, np.memmap)


def test_pixels_come_in_the_order_of_the_pictures(root, base, monkeypatch):
    monkeypatch.setattr(cache, "_BLOCK", 3)
    preprocess = Preprocess(base)
    images = load(root, base).images
    for position, seed in enumerate(range(20)):
        np.testing.assert_array_equal(images[position], preprocess.pixels(noise(seed)))


def test_a_second_load_decodes_nothing(root, base, monkeypatch):
    load(root, base)
    monkeypatch.setattr(cache, "_decode_one", None)
    assert load(root, base).images.shape == (20, 3, 16, 16)


def test_a_file_changed_in_place_with_size_and_mtime_kept_is_decoded_anew(root, base):
    file = root / "photo" / "dog" / "3.png"
    noise(99).save(file.with_suffix(".bmp"))
    file.unlink()
    file = file.with_suffix(".bmp")
    before, stat = load(root, base).images, file.stat()
    noise(100).save(file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    after = load(root, base).images
    assert [int(i) for i in np.flatnonzero((before != after).any(axis=(1, 2, 3)))] == [13]


@pytest.mark.parametrize("changes", [{"resample": 2}, {"size": {"shortest_edge": 20}}])
def test_another_geometry_is_another_cache(root, write_base, cache_dir, changes):
    before = load(root, write_base()).images
    after = load(root, write_base(**changes)).images
    assert (before != after).any()
    assert len(cached_files(cache_dir)) == 4


def test_mean_and_std_share_one_cache(root, write_base, cache_dir):
    load(root, write_base())
    load(root, write_base(image_mean=[0.5, 0.5, 0.5]))
    assert len(cached_files(cache_dir)) == 2


@pytest.mark.parametrize("suffix", [".npy", ".json"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[:-100], lambda data: b"", lambda data: b"garbage", lambda data: data[:-5] + b"wrong"]
)
def test_a_damaged_cache_is_built_again(root, base, cache_dir, caplog, suffix, damage):
    expected = load(root, base).images.copy()
    file = next(path for path in cached_files(cache_dir) if path.suffix == suffix)
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(load(root, base).images, expected)
    assert "damaged" in caplog.text
    caplog.clear()
    load(root, base)
    assert not caplog.text


def test_a_failed_build_leaves_nothing_behind(root, base, cache_dir):
    samples = ImageFolder(root).samples("photo")
    (root / "photo" / "dog" / "3.png").unlink()
    with pytest.raises(InputError, match=r"photo/dog/3\.png: cannot be read"):
        load_pixels(samples.pictures, samples.fingerprint, Preprocess(base), True)
    assert cached_files(cache_dir) == []


def test_an_unusable_cache_folder_means_memory_and_a_warning(root, base, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SAP_LIGHTNING_CACHE", str(tmp_path / "file" / "below"))
    with caplog.at_level(logging.WARNING):
        images = load(root, base).images
    np.testing.assert_array_equal(images, load(root, base, use_cache=False).images)
    assert "decoding to memory" in caplog.text


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_picture_that_is_too_large_is_corrupt_and_pil_does_not_warn(root, base, use_cache, recwarn, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    monkeypatch.setattr("sap_lightning.data.images.MAX_PIXELS", 400)
    noise(0, 20, 20).save(root / "photo" / "big_cat" / "4.png")
    corrupt = load(root, base, use_cache).corrupt
    assert corrupt[0] == "24 × 20 pixels are more than 400; make it smaller"
    assert sorted(corrupt) == [0, 1, 2, 3, *range(5, 20)]
    assert not recwarn.list


def test_too_little_memory_is_no_fault_of_a_picture(root, base, cache_dir, monkeypatch):
    def decode(data: bytes) -> None:
        raise MemoryError

    monkeypatch.setattr(cache, "decode", decode)
    with pytest.raises(InputError, match=r"photo/big_cat/0\.png: too little memory to decode it"):
        load(root, base)
    assert cached_files(cache_dir) == []


@pytest.mark.parametrize("use_cache", [True, False])
def test_corrupt_images_are_reported_by_position(root, base, use_cache):
    (root / "photo" / "big_cat" / "4.png").write_bytes(b"")
    for _ in range(2):
        pixels = load(root, base, use_cache)
        assert list(pixels.corrupt) == [4]
        assert not pixels.images[4].any()
