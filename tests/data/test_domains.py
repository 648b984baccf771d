import logging

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from pictures import noise
from transformers import AutoImageProcessor

from sap_lightning.data.domains import DomainDataModule, match_classes
from sap_lightning.errors import InputError


class Recorder(LightningModule):
    """Keeps every batch it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.trained: list = []
        self.validated: list = []
        self.tested: list = []

    def training_step(self, batch, batch_idx):
        self.trained.append((self.current_epoch, batch))
        return (self.weight * batch.images.mean()).sum()

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch)

    def test_step(self, batch, batch_idx):
        self.tested.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def make_trainer(**options) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        **options,
    )


def fit(data: DomainDataModule, epochs: int = 2, ckpt_path=None, **options) -> Recorder:
    recorder = Recorder()
    make_trainer(max_epochs=epochs, **options).fit(recorder, datamodule=data, ckpt_path=ckpt_path)
    return recorder


@pytest.fixture
def make_data(root, base):
    def make(**settings) -> DomainDataModule:
        return DomainDataModule(str(root), **{"domain": "photo", "base": base, "batch_size": 4} | settings)

    return make


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        i == j and torch.equal(x.indices, y.indices) and torch.equal(x.images, y.images)
        for (i, x), (j, y) in zip(a, b, strict=True)
    )


def by_image(trained: list, epoch: int) -> dict[int, torch.Tensor]:
    return {
        int(index): image
        for at, batch in trained
        for index, image in zip(batch.indices, batch.images, strict=True)
        if at == epoch
    }


@pytest.mark.parametrize("cache", [True, False])
def test_evaluation_images_equal_the_processor_and_cover_the_domain(root, base, make_data, cache):
    recorder = Recorder()
    make_trainer().test(recorder, datamodule=make_data(cache=cache), verbose=False)
    files = [root / "photo" / label / f"{number}.png" for label in ("big_cat", "dog") for number in range(10)]
    processor = AutoImageProcessor.from_pretrained(base, backend="pil")
    expected = processor([noise(seed) for seed in range(20)], return_tensors="pt")["pixel_values"]
    assert torch.cat([batch.indices for batch in recorder.tested]).tolist() == list(range(len(files)))
    assert torch.cat([batch.labels for batch in recorder.tested]).tolist() == [0] * 10 + [1] * 10
    torch.testing.assert_close(torch.cat([batch.images for batch in recorder.tested]), expected, atol=1e-6, rtol=1e-6)


def test_train_and_validation_parts_share_the_domain(make_data):
    data = make_data()
    recorder = fit(data)
    trained, validated = set(by_image(recorder.trained, 0)), [int(i) for b in recorder.validated for i in b.indices]
    assert data.num_samples == 16
    assert len(trained) == 16
    assert trained.isdisjoint(validated)
    assert sorted(trained | set(validated)) == list(range(20))
    assert len(validated) == 2 * 4


def test_validation_during_fit_is_not_augmented(make_data):
    during, alone = fit(make_data()), Recorder()
    make_trainer().validate(alone, datamodule=make_data(), verbose=False)
    for fitted in during.validated[:1], during.validated[1:]:
        assert torch.equal(fitted[0].images, alone.validated[0].images)


def test_the_split_follows_the_seed(make_data):
    def part(seed: int) -> set[int]:
        return set(by_image(fit(make_data(seed=seed), epochs=1).trained, 0))

    assert part(0) == part(0)
    assert part(0) != part(1)


def test_training_repeats_by_seed_and_changes_by_epoch(make_data):
    first, again, other = (fit(make_data(seed=seed)).trained for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)
    before, after = by_image(first, 0), by_image(first, 1)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[index], after[index]) for index in before)
    assert [b.indices.tolist() for e, b in first if e == 0] != [b.indices.tolist() for e, b in first if e == 1]


def test_augmentation_does_not_depend_on_the_batch(make_data):
    small, large = (by_image(fit(make_data(batch_size=size), epochs=1).trained, 0) for size in (2, 8))
    assert small.keys() == large.keys()
    for index in small:
        torch.testing.assert_close(small[index], large[index])


def test_resumed_training_sees_what_an_uninterrupted_one_sees(make_data, tmp_path):
    whole = fit(make_data(), epochs=3).trained
    recorder = Recorder()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(recorder, datamodule=make_data())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = fit(make_data(), epochs=3, ckpt_path=tmp_path / "one.ckpt")
    assert same(recorder.trained + resumed.trained, whole)


def test_training_after_some_epochs_sees_what_an_uninterrupted_one_sees(make_data):
    whole, data = fit(make_data(), epochs=3).trained, make_data()
    after = fit(data.for_domain(data.domain, first_epoch=2), epochs=1).trained
    assert same(after, [(0, batch) for epoch, batch in whole if epoch == 2])


def test_without_augmentation_every_epoch_shows_the_same_images(make_data):
    trained = fit(make_data(augment=False)).trained
    before, after = by_image(trained, 0), by_image(trained, 1)
    assert all(torch.equal(before[index], after[index]) for index in before)


def test_images_follow_the_trainer_precision(make_data):
    recorder = fit(make_data(), epochs=1, precision="64-true")
    assert recorder.trained[0][1].images.dtype == torch.float64


def test_a_domain_smaller_than_the_batch_is_one_batch(make_data):
    assert [len(batch.labels) for _, batch in fit(make_data(batch_size=100), epochs=1).trained] == [16]


def test_a_validation_fraction_of_zero_trains_on_everything(make_data):
    data = make_data(val_fraction=0.0)
    recorder = fit(data)
    assert data.num_samples == 20
    assert recorder.validated == []


def test_nothing_left_to_train_on_is_refused(make_data):
    with pytest.raises(InputError, match="leaves none to train on"):
        make_data(val_fraction=0.99).setup("fit")


@pytest.mark.parametrize(
    "settings", [{"batch_size": 0}, {"val_fraction": 1.0}, {"val_fraction": -0.1}, {"crop_scale": 0.0}]
)
def test_impossible_settings_are_refused_at_once(make_data, settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        make_data(**settings)


@pytest.mark.parametrize(
    ("domain", "message"),
    [(None, "data.domain is not set; choose one of"), ("clipart", "no domain 'clipart'; it has")],
)
def test_a_missing_domain_lists_those_there_are(make_data, domain, message):
    data = make_data(domain=domain)
    assert data.domains == ["photo", "sketch"]
    assert data.class_names == ["big cat", "dog"]
    with pytest.raises(InputError, match=f"{message} photo, sketch"):
        data.setup("fit")


def test_for_domain_keeps_the_settings_and_reads_the_other_images(make_data):
    photo = make_data(class_names=["dog", "big cat"], augment=False)
    photo.setup("test")
    sketch = photo.for_domain("sketch")
    sketch.setup("test")
    assert (photo.domain, sketch.domain) == ("photo", "sketch")
    assert sketch.class_names == ["dog", "big cat"]
    photo_batch, sketch_batch = next(iter(photo.test_dataloader())), next(iter(sketch.test_dataloader()))
    assert photo_batch.labels.tolist() == sketch_batch.labels.tolist() == [1, 1, 1, 1]
    assert not torch.equal(photo_batch.images, sketch_batch.images)


def test_other_labels_reach_training_alone_and_no_other_domain(make_data):
    domain = make_data().domain
    data = make_data().for_domain(domain, relabel=lambda labels, num_classes: num_classes - 1 - labels)
    data.setup("fit")  # the trainer sets up again, and must not swap the labels back
    recorder = fit(data, epochs=2)
    make_trainer().test(recorder, datamodule=data, verbose=False)
    for wrong, batches in (
        (True, [batch for _, batch in recorder.trained]),
        (False, recorder.validated + recorder.tested),
        (False, [batch for _, batch in fit(data.for_domain("photo")).trained]),
    ):
        indices, labels = (torch.cat([getattr(batch, part) for batch in batches]) for part in ("indices", "labels"))
        assert torch.equal(labels, (indices >= 10).long() ^ wrong), "the first ten images are of the first class"


def test_a_client_never_reads_another_domain(root, make_data):
    for file in (root / "sketch").rglob("*.png"):
        file.write_bytes(b"")
    fit(make_data(), epochs=1)


def test_an_image_changed_between_two_uses_is_read_again(root, make_data):
    data = make_data()
    data.setup("test")
    before = next(iter(data.test_dataloader())).images
    noise(99).save(root / "photo" / "big_cat" / "0.png")
    data.setup("test")
    after = next(iter(data.test_dataloader())).images
    assert (before != after).flatten(1).any(1).tolist() == [True, False, False, False]


@pytest.fixture
def large_root(tmp_path):
    folder = tmp_path / "large" / "photo" / "dog"
    folder.mkdir(parents=True)
    for number in range(200):
        noise(number, 8, 8).save(folder / f"{number:03}.png")
    return tmp_path / "large"


def test_few_corrupt_images_are_skipped_and_named(large_root, base, caplog):
    files = sorted((large_root / "photo" / "dog").iterdir())
    files[7].write_bytes(b"")
    files[9].write_bytes(files[9].read_bytes()[:60])
    data = DomainDataModule(str(large_root), "photo", ["dog", "horse"], base=base)
    with caplog.at_level(logging.WARNING):
        data.setup("test")
    assert "2 of 200 images cannot be decoded" in caplog.text
    assert "photo/dog/007.png" in caplog.text and "photo/dog/009.png" in caplog.text
    indices = torch.cat([batch.indices for batch in data.test_dataloader()]).tolist()
    assert indices == [index for index in range(200) if index not in (7, 9)]
    assert data.num_samples == 198 - round(198 * 0.2)


def test_many_corrupt_images_are_refused(large_root, base):
    for file in sorted((large_root / "photo" / "dog").iterdir())[:3]:
        file.write_bytes(b"not an image")
    data = DomainDataModule(str(large_root), "photo", ["dog", "horse"], base=base)
    for _ in range(2):
        with pytest.raises(InputError, match=r"3 of 200 images .*photo/dog/000\.png .*replace or remove"):
            data.setup("test")


def test_default_class_names_have_spaces():
    assert match_classes(["alarm_clock", "dog"], None) == (["alarm clock", "dog"], {"alarm_clock": 0, "dog": 1})


@pytest.mark.parametrize(("found", "given"), [(["car"], None), (["car", "Car"], None), (["car"], ["car"])])
def test_one_class_is_refused_with_the_way_out(found, given):
    with pytest.raises(InputError, match=r"^one class only \(car\); a classifier needs two: .* data\.class_names"):
        match_classes(found, given)


def test_spellings_of_one_class_share_its_label():
    names, labels = match_classes(["Dog", "alarm clock", "alarm_clock", "dog"], None)
    assert names == ["Dog", "alarm clock"]
    assert labels == {"Dog": 0, "dog": 0, "alarm clock": 1, "alarm_clock": 1}
    assert set(match_classes(["cafe\u0301", "caf\xe9", "dog"], None)[1].values()) == {0, 1}


def test_given_names_that_match_set_the_order_and_may_be_more():
    names, labels = match_classes(["alarm_clock", "dog"], ["zebra", "Dog", "Alarm Clock"])
    assert names == ["zebra", "Dog", "Alarm Clock"]
    assert labels == {"alarm_clock": 2, "dog": 1}


def test_given_names_of_equal_number_are_positional():
    names, labels = match_classes(["n01", "n02", "n03"], ["a hen", "a cock", "a dog"])
    assert names == ["a hen", "a cock", "a dog"]
    assert labels == {"n01": 0, "n02": 1, "n03": 2}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["dog"], "1 names for 2 classes and none for: cat"),
        (["dog", "kitten"], "none for: cat"),
        (["dog", "cat", "Dog"], "a name twice"),
        ([], "none for: cat, dog"),
        (["dog", "cat\u200b"], r"data\.class_names: class 'cat.u200b': a name has printable"),
    ],
)
def test_given_names_that_do_not_fit_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        match_classes(["cat", "dog"], given)
