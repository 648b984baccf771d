import io

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import noise
from PIL import Image

from sap_lightning.data.images import decode
from sap_lightning.data.sources import open_source
from sap_lightning.data.tables import table_fingerprint, table_pictures
from sap_lightning.errors import InputError

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "domain": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["dog", "big_cat"]),
    }
)


def png(seed: int) -> dict[str, bytes | str]:
    buffer = io.BytesIO()
    noise(seed).save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": f"{seed}.png"}


def table(features: datasets.Features | None = FEATURES, label=(0, 1, 1, 0)) -> datasets.Dataset:
    rows = {
        "image": [png(seed) for seed in range(4)],
        "domain": ["sketch", "photo", "photo", "sketch"],
        "label": list(label),
    }
    return datasets.Dataset.from_dict(rows, features=features)


def save_to_disk(folder):
    table().save_to_disk(folder)


def save_splits_to_disk(folder):
    halves = {"train": table().select(range(3)), "test": table().select([3])}
    datasets.DatasetDict(halves).save_to_disk(folder)


def save_parquet(folder):
    (folder / "data").mkdir(parents=True)
    table().select(range(3)).to_parquet(folder / "data" / "part-0.parquet")
    table().select([3]).to_parquet(folder / "data" / "part-1.parquet")


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


def decoded(picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture.read())))


@pytest.mark.parametrize("save", [save_to_disk, save_splits_to_disk, save_parquet])
def test_a_dataset_on_disk_gives_domains_classes_and_pictures(tmp_path, save):
    save(tmp_path / "set")
    source = open_source(str(tmp_path / "set"), "domain", "label")
    assert source.domains == ["photo", "sketch"]
    assert source.classes == ["dog", "big_cat"]
    samples = source.samples("sketch")
    assert samples.classes == ["dog", "dog"]
    for picture, seed in zip(samples.pictures, (0, 3), strict=True):
        np.testing.assert_array_equal(decoded(picture), noise(seed))


def test_string_labels_are_sorted(tmp_path):
    features = FEATURES | {"label": datasets.Value("string")}
    table(datasets.Features(features), ("dog", "cat", "cat", "dog")).save_to_disk(tmp_path / "set")
    source = open_source(str(tmp_path / "set"), "domain", "label")
    assert source.classes == ["cat", "dog"]
    assert source.samples("photo").classes == ["cat", "cat"]


@pytest.mark.parametrize("save", [save_to_disk, save_parquet])
def test_a_dataset_written_anew_has_another_fingerprint(tmp_path, save):
    def fingerprint():
        return open_source(str(tmp_path / "set"), "domain", "label").samples("photo").fingerprint

    save(tmp_path / "set")
    first = fingerprint()
    assert fingerprint() == first
    for file in (tmp_path / "set").rglob("*"):
        if file.suffix in {".arrow", ".parquet"}:
            file.write_bytes(file.read_bytes())
    assert fingerprint() != first


def test_untagged_parquet_of_bytes_and_paths_gives_pictures(tmp_path):
    rows = {"image": [png(0)], "domain": ["photo"], "label": ["dog"]}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    samples = open_source(str(tmp_path), "domain", "label").samples("photo")
    np.testing.assert_array_equal(decoded(samples.pictures[0]), noise(0))


def test_a_missing_image_file_that_a_dataset_points_to_is_named(tmp_path):
    rows = {"image": [str(tmp_path / "gone.png")], "domain": ["photo"], "label": [0]}
    pointing = datasets.Dataset.from_dict(rows, features=FEATURES)
    with pytest.raises(InputError, match=r"gone\.png: cannot be read"):
        table_fingerprint(pointing, "image")


def test_an_image_file_that_a_dataset_points_to_counts_for_the_fingerprint(tmp_path):
    noise(0).save(tmp_path / "outside.png")
    rows = {"image": [str(tmp_path / "outside.png")], "domain": ["photo"], "label": [0]}
    pointing = datasets.Dataset.from_dict(rows, features=FEATURES)
    first = table_fingerprint(pointing, "image")
    noise(1).save(tmp_path / "outside.png")
    assert table_fingerprint(pointing, "image") != first
    np.testing.assert_array_equal(decoded(table_pictures(pointing, "image", [0])[0]), noise(1))


def test_folders_are_sorted_and_everything_else_is_passed_over(root):
    (root / "photo" / "dog" / "notes.txt").touch()
    (root / "photo" / "dog" / ".hidden.png").touch()
    (root / "photo" / "empty").mkdir()
    (root / "docs").mkdir()
    (root / ".git" / "objects").mkdir(parents=True)
    (root / "photo" / "dog" / "3.png").rename(root / "photo" / "dog" / "3.PNG")
    source = open_source(str(root), "domain", "label")
    assert source.domains == ["photo", "sketch"]
    assert source.classes == ["big_cat", "dog"]
    samples = source.samples("photo")
    assert [picture.name for picture in samples.pictures[:2]] == ["photo/big_cat/0.png", "photo/big_cat/1.png"]
    assert samples.classes == ["big_cat"] * 10 + ["dog"] * 10


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="no images; expected domain/class/image"):
        open_source(str(tmp_path), "domain", "label")


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=rf"neither a folder .*there is no {tmp_path}/nowhere\) nor a readable dataset"
    ):
        open_source(str(tmp_path / "nowhere"), "domain", "label")


@pytest.mark.parametrize(("domain", "label"), [("style", "label"), ("domain", "class")])
def test_a_missing_column_is_named_with_those_there_are(tmp_path, domain, label):
    save_to_disk(tmp_path / "set")
    with pytest.raises(InputError, match=r"no column '(style|class)'; set .* to one of image, domain, label"):
        open_source(str(tmp_path / "set"), domain, label)


def test_a_dataset_without_images_is_refused(tmp_path):
    table().remove_columns("image").save_to_disk(tmp_path / "set")
    with pytest.raises(InputError, match="no image column among domain, label"):
        open_source(str(tmp_path / "set"), "domain", "label")


def test_rows_without_label_are_refused(tmp_path):
    table(label=(0, 1, -1, 0)).save_to_disk(tmp_path / "set")
    with pytest.raises(InputError, match="row 2 has no 'label'"):
        open_source(str(tmp_path / "set"), "domain", "label")


def test_number_labels_without_names_are_refused(tmp_path):
    features = datasets.Features(FEATURES | {"label": datasets.Value("int64")})
    table(features).save_to_disk(tmp_path / "set")
    with pytest.raises(InputError, match=r"strings or class labels, got Value.*int64"):
        open_source(str(tmp_path / "set"), "domain", "label")


def test_several_labels_of_an_image_are_refused(tmp_path):
    features = datasets.Features(FEATURES | {"label": datasets.List(datasets.Value("string"))})
    rows = table(datasets.Features(FEATURES)).to_dict()
    rows["label"] = [["a", "b"]] * len(rows["label"])
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    with pytest.raises(InputError, match="strings or class labels, got List"):
        open_source(str(tmp_path / "set"), "domain", "label")


def test_broken_parquet_is_refused(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match="nor a readable dataset"):
        open_source(str(tmp_path), "domain", "label")


def test_folders_named_by_numbers_are_classes_in_counting_order(tmp_path):
    for name in ("0", "1", "10", "2"):
        (tmp_path / "photo" / name).mkdir(parents=True)
        (tmp_path / "photo" / name / "0.png").write_bytes(png(0)["bytes"])
    assert open_source(str(tmp_path), "domain", "label").classes == ["0", "1", "2", "10"]
    (tmp_path / "photo" / "10").rename(tmp_path / "photo" / "ten")
    assert open_source(str(tmp_path), "domain", "label").classes == ["0", "1", "2", "ten"]


@pytest.mark.parametrize("suffix", [".TIF", ".tiff", ".gif", ".ppm", ".pgm", ".jfif", ".webp", ".bmp"])
def test_every_format_of_an_image_is_read(tmp_path, suffix):
    (tmp_path / "photo" / "dog").mkdir(parents=True)
    image = noise(0).convert("L")
    image.save(tmp_path / "photo" / "dog" / f"0{suffix}", "jpeg" if suffix == ".jfif" else None)
    (picture,) = open_source(str(tmp_path), "domain", "label").samples("photo").pictures
    assert decode(picture.read()).size == image.size


@pytest.mark.parametrize(("domain", "label", "kind"), [("pho\xa0to", "dog", "domain"), ("photo", "dog ", "class")])
def test_an_odd_name_is_refused_in_a_folder_and_in_a_table(tmp_path, domain, label, kind):
    (tmp_path / "root" / domain / label).mkdir(parents=True)
    noise(0).save(tmp_path / "root" / domain / label / "0.png")
    rows = {"image": [png(0)], "domain": [domain], "label": [label]}
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "set" / "rows.parquet")
    for root in ("root", "set"):
        with pytest.raises(InputError, match=rf"{root}: {kind} '.*': a name has printable characters only"):
            open_source(str(tmp_path / root), "domain", "label")


def test_domains_that_differ_in_spelling_alone_are_refused(tmp_path):
    for domain in ("photo", "Photo"):
        (tmp_path / domain / "dog").mkdir(parents=True)
        noise(0).save(tmp_path / domain / "dog" / "0.png")
    with pytest.raises(InputError, match="domains 'Photo' and 'photo' differ in spelling alone"):
        open_source(str(tmp_path), "domain", "label")
