from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from places import SHAPES_CLIP
from references import contents
from torch import Tensor

from sap_lightning.data.domains import DomainDataModule
from sap_lightning.errors import InputError
from sap_lightning.federation.poison import Poison, PoisonKind, shuffled, wrong_classes
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.adapter import read_adapter
from sap_lightning.io.upload_files import MANIFEST_FILE
from sap_lightning.modules.merge import MergeModule

EACH_LABEL_KIND = pytest.mark.parametrize("kind", ["label_flip", "label_shuffle"])
EACH_ADAPTER_KIND = pytest.mark.parametrize("kind", ["noise", "scale"])


@pytest.fixture(scope="module")
def photo(world) -> DomainDataModule:
    return DomainDataModule(str(world / "domains"), "photo", base=SHAPES_CLIP, cache=False, augment=False)


@pytest.fixture(scope="module")
def upload(run, tmp_path_factory) -> Path:
    """What an honest client sent."""
    folder = tmp_path_factory.mktemp("honest")
    run("client", "--data.domain=photo", f"--federation.run_dir={folder}")
    return folder / "uploads" / "photo"


def labels_of(loader) -> dict[int, int]:
    """Label by image."""
    batches = list(loader)
    indices, labels = (torch.cat([getattr(batch, part) for batch in batches]) for part in ("indices", "labels"))
    return dict(zip(indices.tolist(), labels.tolist(), strict=True))


def training_labels(data: DomainDataModule) -> dict[int, int]:
    data.batch_size = 1  # so that no last batch is dropped
    data.setup("fit")
    return labels_of(data.train_dataloader())


def norms(layers: dict[str, LoRALayer]) -> Tensor:
    return torch.stack([layer.delta().norm() for layer in layers.values()])


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_exactly_the_share_of_the_training_labels_is_wrong(photo, fraction):
    honest = training_labels(photo.for_domain("photo"))
    flipped = training_labels(Poison("photo", "label_flip", fraction).relabelled(photo))
    assert flipped.keys() == honest.keys()
    wrong = sum(flipped[image] != honest[image] for image in honest)
    assert wrong == round(fraction * len(honest))


@EACH_LABEL_KIND
def test_validation_and_test_labels_stay_right(photo, kind):
    honest, poisoned = photo.for_domain("photo"), Poison("photo", kind).relabelled(photo)
    assert training_labels(honest) != training_labels(poisoned)
    assert labels_of(honest.val_dataloader()) == labels_of(poisoned.val_dataloader())
    assert labels_of(honest.test_dataloader()) == labels_of(poisoned.test_dataloader())


@EACH_LABEL_KIND
def test_wrong_labels_follow_the_seed(photo, kind):
    def labels(seed: int) -> list[int]:
        data = photo.for_domain("photo")
        data.seed = seed
        relabelled = Poison("photo", kind, 0.5).relabelled(data)
        return list(dict(sorted(training_labels(relabelled).items())).values())

    assert labels(0) == labels(0)
    assert labels(0) != labels(1)


@pytest.mark.parametrize(
    ("num_classes", "expected"), [(2, [1, 0]), (3, [2, 2, 0]), (4, [3, 2, 1, 0]), (5, [4, 3, 3, 1, 0])]
)
def test_flipped_classes_are_mirrored_and_never_right(num_classes, expected):
    flipped = wrong_classes(torch.arange(num_classes), num_classes, 1.0, seed=0)
    assert flipped.tolist() == expected


def test_shuffling_keeps_the_classes_counts_and_the_images_not_chosen():
    labels = torch.arange(100)  # all different: a label that stands elsewhere was moved
    moved = shuffled(labels, 100, 0.2, seed=0)
    assert moved.sort().values.equal(labels)
    assert 15 <= int((moved != labels).sum()) <= 20, "a permutation of 20 seldom leaves more than a few in place"


@EACH_ADAPTER_KIND
def test_the_server_accepts_a_rewritten_upload_as_of_the_same_client(kind, upload, tmp_path):
    poisoned = Poison("photo", kind).rewrite(upload, tmp_path / "poisoned")
    # Both at once: two adapters of the same content would be refused.
    accepted = MergeModule(base=SHAPES_CLIP).read_uploads([upload, poisoned])
    assert [adapter.name for adapter in accepted] == ["photo", "photo"]
    before, after = (json.loads((folder / MANIFEST_FILE).read_text()) for folder in (upload, poisoned))
    for digest in ("tensors_sha256", "fields_sha256"):
        assert before.pop(digest) != after.pop(digest)
    assert before == after


def test_scaling_sends_ten_times_the_update(upload, tmp_path):
    honest, scaled = read_adapter(upload), read_adapter(Poison("photo", "scale").rewrite(upload, tmp_path / "scaled"))
    for name, layer in honest.layers.items():
        torch.testing.assert_close(scaled.layers[name].delta(), 10 * layer.delta())


def test_noise_has_the_spread_of_each_factor_and_nothing_of_its_content(upload, tmp_path):
    honest, noise = read_adapter(upload), read_adapter(Poison("photo", "noise").rewrite(upload, tmp_path / "noise"))
    for name, layer in honest.layers.items():
        for factor in "AB":
            before, after = getattr(layer, factor), getattr(noise.layers[name], factor)
            # The standard deviation of n normal values has a relative error of 1/√2n; 5 of these are never passed.
            assert after.std() / before.std() == pytest.approx(1, abs=5 / math.sqrt(2 * before.numel()))
            cosine = torch.cosine_similarity(before.flatten(), after.flatten(), dim=0)
            assert abs(cosine) < 5 / math.sqrt(before.numel())
        assert noise.layers[name].scale == layer.scale


@EACH_ADAPTER_KIND
@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_a_share_of_the_layers_is_spoilt_and_the_others_are_sent_as_they_are(kind, fraction, upload):
    honest = read_adapter(upload).layers
    poisoned = Poison("photo", kind, fraction).layers(honest, seed=3)
    assert list(poisoned) == list(honest)
    spoilt = [name for name in honest if not torch.equal(poisoned[name].B, honest[name].B)]
    assert len(spoilt) == round(fraction * len(honest))
    again, other = (Poison("photo", kind, fraction).layers(honest, seed) for seed in (3, 4))
    assert norms(poisoned).equal(norms(again))
    assert not norms(poisoned).equal(norms(other))


@EACH_ADAPTER_KIND
def test_an_upload_is_rewritten_to_the_same_bits(kind, upload, tmp_path):
    one, two = (contents(Poison("photo", kind).rewrite(upload, tmp_path / name)) for name in ("one", "two"))
    assert one == two
    assert contents(Poison("photo", kind, 0.0).rewrite(upload, tmp_path / "nothing")) == contents(upload)


def test_an_upload_without_manifest_is_refused(upload, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    for name, content in contents(upload).items():
        if name != MANIFEST_FILE:
            (plain / name).write_bytes(content)
    with pytest.raises(InputError, match=r"plain: no manifest\.json"):
        Poison("photo", "noise").rewrite(plain, tmp_path / "poisoned")


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_an_impossible_fraction_is_refused(fraction):
    with pytest.raises(InputError, match=r"federation\.poison\.fraction must lie in \[0, 1\], got"):
        Poison("photo", fraction=fraction)


@pytest.mark.parametrize(
    ("kind", "fraction", "name"), [("label_flip", 1.0, "photo-label_flip-1"), ("noise", 0.25, "photo-noise-0.25")]
)
def test_the_name_says_client_kind_and_share(kind: PoisonKind, fraction, name):
    assert Poison("photo", kind, fraction).name == name


def test_it_is_an_argument_group_of_the_command_line():
    class Federation:
        def __init__(self, poison: Poison = Poison()) -> None:  # noqa: B008  # it cannot be changed
            self.poison = poison

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Federation, "federation")

    def parsed(*line: str) -> Poison:
        return parser.instantiate_classes(parser.parse_args(list(line))).federation.poison

    assert parsed() == Poison()
    assert parsed("--federation.poison.domain=photo", "--federation.poison.kind=noise") == Poison("photo", "noise")
    assert "its adapter's layers" in " ".join(parser.format_help().split())
