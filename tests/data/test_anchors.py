import json

import datasets
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from pictures import noise
from transformers import AutoImageProcessor

from sap_lightning.data.anchors import AnchorDataModule
from sap_lightning.errors import InputError


class Recorder(LightningModule):
    """Keeps every batch it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list = []

    def validation_step(self, batch, batch_idx):
        self.seen.append(batch)


@pytest.fixture
def folder(tmp_path):
    for number in range(5):
        noise(number).save(tmp_path / f"{number}.png")
    return tmp_path


def write(folder, *lines: object) -> None:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "captions.jsonl").write_text(text, encoding="utf-8")


def entry(number: int, **changes: object) -> dict[str, object]:
    return {"file_name": f"{number}.png", "captions": [f"caption {number}", "another"]} | changes


def test_hugging_face_s_listing_of_a_folder_of_images_is_read_too(folder, base):
    write(folder, *[{"file_name": f"{number}.png", "text": f"caption {number}"} for number in (2, 0)])
    (folder / "captions.jsonl").rename(folder / "metadata.jsonl")
    assert AnchorDataModule(str(folder), num_pairs=2, base=base).captions == ["caption 2", "caption 0"]
    expected = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")["text"]
    assert sorted(filter(None, expected)) == ["caption 0", "caption 2"]


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_a_line_ends_where_json_lines_do_and_nowhere_else(folder, base, odd):
    lines = [json.dumps(entry(0)), "", json.dumps(entry(1, captions=[f"one{odd}two"]), ensure_ascii=False), "  "]
    for end, encoding in (("\n", "utf-8"), ("\r\n", "utf-8-sig")):
        (folder / "captions.jsonl").write_bytes((end.join(lines) + end).encode(encoding))
        assert AnchorDataModule(str(folder), num_pairs=2, base=base).captions == ["caption 0", f"one{odd}two"]


def test_validate_yields_the_first_pairs_in_order(folder, base):
    write(folder, *[entry(number) for number in (3, 1, 4, 0)])
    data = AnchorDataModule(str(folder), num_pairs=3, base=base, batch_size=2)
    recorder = Recorder()
    Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).validate(
        recorder, datamodule=data, verbose=False
    )
    assert data.captions == ["caption 3", "caption 1", "caption 4"]
    assert [batch.indices.tolist() for batch in recorder.seen] == [[0, 1], [2]]
    processor = AutoImageProcessor.from_pretrained(base, backend="pil")
    expected = processor([noise(3), noise(1), noise(4)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(torch.cat([batch.images for batch in recorder.seen]), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(data.images(), expected, atol=1e-6, rtol=1e-6)


def test_a_single_caption_string_will_do(folder, base):
    lines = [{"file_name": f"{number}.png", "caption": f"caption {number}"} for number in range(2)]
    write(folder, *lines)
    assert AnchorDataModule(str(folder), 2, base).captions == ["caption 0", "caption 1"]


@pytest.mark.parametrize("column", ["captions", "text"])
def test_a_saved_dataset_gives_pairs(tmp_path, folder, base, column):
    rows = {"image": [str(folder / f"{number}.png") for number in range(3)]}
    rows[column] = [[f"caption {n}", "another"] if column == "captions" else f"caption {n}" for n in range(3)]
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "set")
    data = AnchorDataModule(str(tmp_path / "set"), 2, base)
    assert data.captions == ["caption 0", "caption 1"]
    processor = AutoImageProcessor.from_pretrained(base, backend="pil")
    expected = processor([noise(0), noise(1)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(data.images(), expected, atol=1e-6, rtol=1e-6)


def test_a_dataset_without_captions_is_refused(tmp_path, folder, base):
    rows = {"image": [str(folder / "0.png")] * 2}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "set")
    with pytest.raises(InputError, match=r"no column captions or caption .* among image"):
        _ = AnchorDataModule(str(tmp_path / "set"), 2, base).captions


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 2: not JSON"),
        ("[]", "line 2: expected a JSON object, got list"),
        ({"captions": ["x"]}, "line 2: file_name must be"),
        ({"file_name": 7, "captions": ["x"]}, "line 2: file_name must be"),
        ({"file_name": "1.png"}, "line 2: needs a caption"),
        (entry(1, captions=[]), "line 2: needs a caption"),
        (entry(1, captions=[7]), "line 2: needs a caption"),
        (entry(1, captions="  "), "line 2: needs a caption"),
        (entry(1, file_name="missing.png"), "line 2: image 'missing.png' is missing"),
        (entry(1, file_name="../1.png"), "line 2: file_name '../1.png' points out"),
        (entry(1, file_name="/etc/hostname"), "line 2: file_name '/etc/hostname' points out"),
        ("[" * 100_000, "line 2: not JSON: maximum recursion depth"),
        ("x" * 10**7, "line 2: not JSON"),
        (entry(1, file_name="a" * 300 + ".png"), "line 2: image 'aaa.* is missing"),
        (entry(1, file_name="a" * 10**7), "line 2: image 'aaa.* is missing"),
        (entry(1, file_name="\ud800.png"), "line 2: image .* is missing"),
        (entry(1, file_name="\0.png"), "line 2: image .* is missing"),
        (entry(1, captions="a" * 10**7), "line 2: the caption has 10000000 characters; shorten it to at most 10000"),
        (entry(1, captions=[["a" * 10**7]]), "line 2: needs a caption"),
        (entry(1, captions="\ud800 dog"), "line 2: the caption .* holds half a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(folder, base, line, message):
    write(folder, entry(0), line)
    with pytest.raises(InputError, match=message) as refused:
        _ = AnchorDataModule(str(folder), 2, base).captions
    assert len(str(refused.value)) < 500 and str(refused.value).isprintable()


def labelled(folder, **images: int):
    """Folders class/image with so many images each; image i of class c is noise(10·c + i)."""
    for position, (label, count) in enumerate(images.items()):
        (folder / label).mkdir(parents=True)
        for number in range(count):
            noise(10 * position + number).save(folder / label / f"{number}.png")
    return folder


def test_class_folders_take_turns(tmp_path, base):
    folder = labelled(tmp_path / "photo", zebra=3, big_cat=1, dog=2)
    (folder / "dog" / "notes.txt").write_text("no image")
    (folder / ".hidden").mkdir()
    noise(99).save(folder / ".hidden" / "0.png")
    data = AnchorDataModule(str(folder), num_pairs=5, base=base)
    captions = [f"a photo of a {label}." for label in ("big cat", "dog", "zebra", "dog", "zebra")]
    assert data.captions == captions
    processor = AutoImageProcessor.from_pretrained(base, backend="pil")
    images = [noise(seed) for seed in (10, 20, 0, 21, 1)]
    expected = processor(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(data.images(), expected, atol=1e-6, rtol=1e-6)
    assert AnchorDataModule(str(folder), 3, base).captions == captions[:3]


def test_a_listing_goes_before_class_folders(folder, base):
    labelled(folder / "more", dog=3)
    write(folder, entry(0), entry(1))
    assert AnchorDataModule(str(folder), 2, base).captions == ["caption 0", "caption 1"]


def test_too_few_images_in_class_folders_are_refused(tmp_path, base):
    folder = labelled(tmp_path / "photo", cat=1, dog=2)
    with pytest.raises(InputError, match=r"photo: anchors\.num_pairs is 4, but the class folders have 3 images"):
        _ = AnchorDataModule(str(folder), 4, base).captions


def test_a_folder_with_neither_listing_nor_class_folders_is_refused(folder, base):
    with pytest.raises(InputError, match=r"neither a captions\.jsonl .* nor images class/image, each JPEG \(\.jpg"):
        _ = AnchorDataModule(str(folder), 2, base).captions


@pytest.mark.parametrize("cache", [True, False])
def test_noise_takes_the_place_of_the_images_and_leaves_the_captions(folder, base, cache):
    write(folder, *[entry(number) for number in range(5)])
    pictures = AnchorDataModule(str(folder), 5, base, cache=cache)
    control = AnchorDataModule(str(folder), 5, base, cache=cache, noise=True)
    assert control.captions == pictures.captions
    before = pictures.images()
    torch.manual_seed(3)
    images = control.images()
    assert images.shape == before.shape and images.dtype == before.dtype
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.48, 0.45, 0.40], [0.26, 0.27, 0.28]))
    levels = ((images * std + mean) * 255).round()
    # Uniform on 0…255: every value occurs, each about as often.
    histogram = levels.flatten().histc(256, 0, 255)
    expected = levels.numel() / 256
    assert (histogram - expected).square().sum() / expected < 350  # χ² of 255 degrees of freedom, p < 1e-4
    assert len(levels.flatten(1).unique(dim=0)) == 5
    # The same whatever the global generator's state, and the pictures behind the cache stay what they were.
    torch.manual_seed(4)
    assert torch.equal(AnchorDataModule(str(folder), 5, base, cache=cache, noise=True).images(), images)
    assert torch.equal(AnchorDataModule(str(folder), 5, base, cache=cache).images(), before)


def test_more_pairs_than_there_are_is_refused(folder, base):
    write(folder, entry(0), entry(1))
    with pytest.raises(InputError, match="num_pairs is 3, but the file has 2"):
        _ = AnchorDataModule(str(folder), 3, base).captions


def test_fewer_than_two_pairs_is_refused(folder, base):
    with pytest.raises(InputError, match="at least 2, got 1"):
        AnchorDataModule(str(folder), 1, base)


@pytest.mark.parametrize("cache", [True, False])
def test_a_corrupt_anchor_is_named(folder, base, cache):
    write(folder, entry(0), entry(1))
    (folder / "1.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"anchor 1\.png cannot be decoded"):
        AnchorDataModule(str(folder), 2, base, cache=cache).setup("validate")
