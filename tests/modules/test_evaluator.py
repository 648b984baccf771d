"""The base, or what update it wears, measured on a domain of the small world."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from places import SHAPES_CLIP
from references import quiet_trainer
from torchmetrics.classification import MulticlassCalibrationError

from sap_lightning.data import DomainDataModule
from sap_lightning.io.adapter import Adapter, read_adapter, sha256_of
from sap_lightning.merging import Average
from sap_lightning.models.clip import load_base
from sap_lightning.models.layers import layer_shapes
from sap_lightning.modules.evaluator import CLIPEvaluator
from sap_lightning.results import Results


@pytest.fixture
def evaluator() -> CLIPEvaluator:
    module = CLIPEvaluator(SHAPES_CLIP)
    module.configure_model()
    return module


@pytest.fixture
def adapters(uploads, evaluator) -> list[Adapter]:
    return [read_adapter(upload, layer_shapes(evaluator.tower)) for upload in uploads]


@pytest.fixture
def last(adapters) -> list[Adapter]:
    """Adapters whose first layer is one of the last encoder layer."""
    kept = [{name: layer for name, layer in one.layers.items() if ".layers.3." in name} for one in adapters]
    return [Adapter(one.name, layers, sha256_of(layers)) for one, layers in zip(adapters, kept, strict=True)]


@pytest.fixture
def sketches(world) -> DomainDataModule:
    return DomainDataModule(str(world / "domains"), "sketch", base=SHAPES_CLIP, batch_size=16, cache=False)


def outcome_of(module: CLIPEvaluator, data: DomainDataModule) -> dict[str, torch.Tensor]:
    """What a test leaves behind, and its metrics."""
    (metrics,) = quiet_trainer().test(module, datamodule=data, verbose=False)
    left = {**module.predictions._asdict(), "features": module.tested_features}
    return left | {name: torch.tensor(value) for name, value in metrics.items()}


def test_an_empty_update_gives_the_base_back_bit_for_bit(evaluator, adapters):
    base = dict(load_base(SHAPES_CLIP).tower.state_dict())
    evaluator.set_update(adapters[0].layers)
    assert any(not torch.equal(weight, base[name]) for name, weight in evaluator.tower.state_dict().items())
    evaluator.set_update({})
    torch.testing.assert_close(dict(evaluator.tower.state_dict()), base, atol=0, rtol=0)


def test_a_test_leaves_what_was_said_of_every_image_in_the_order_of_the_domain(evaluator, adapters, sketches):
    evaluator.set_update(Average().merge(adapters))
    left = outcome_of(evaluator, sketches)
    sketches.batch_size = len(left["labels"])
    (batch,) = sketches.test_dataloader()
    assert left["images"].tolist() == batch.indices.tolist() and left["labels"].tolist() == batch.labels.tolist()
    with torch.no_grad():
        expected = evaluator(sketches.on_after_batch_transfer(batch, 0).images).softmax(1)
    torch.testing.assert_close(left["probabilities"], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(left["features"].norm(dim=1), torch.ones(len(batch.labels)))
    assert evaluator.predictions.correct.float().mean() == pytest.approx(float(left["accuracy"]))
    error = MulticlassCalibrationError(left["probabilities"].shape[1])(left["probabilities"], left["labels"])
    assert float(left["ece"]) == pytest.approx(float(error), abs=1e-6)


def test_a_domain_may_have_one_image(evaluator, tmp_path, world):
    for number, folder in enumerate(sorted((world / "domains" / "sketch").iterdir())):
        (tmp_path / "sketch" / folder.name).mkdir(parents=True)
        if not number:
            shutil.copy(min(folder.iterdir()), tmp_path / "sketch" / folder.name)
    names = [folder.name for folder in (world / "domains" / "sketch").iterdir()]
    left = outcome_of(evaluator, DomainDataModule(str(tmp_path), "sketch", names, base=SHAPES_CLIP, cache=False))
    assert left["probabilities"].shape == (1, len(names)) and left["labels"].shape == left["images"].shape == (1,)


def test_a_remembered_stem_changes_no_bit_whatever_the_update(evaluator, last, sketches):
    updates = [{}, last[0].layers, Average().merge(last)]
    plain = []
    for update in updates:
        evaluator.set_update(update)
        plain.append(outcome_of(evaluator, sketches))
    assert not torch.equal(plain[0]["probabilities"], plain[2]["probabilities"])
    calls: list[int] = []
    evaluator.tower.vision_model.encoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    evaluator.remember_stem(last)
    for update, expected in zip(updates, plain, strict=True):
        evaluator.set_update(update)
        found = outcome_of(evaluator, sketches)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    batches = -(-len(plain[0]["labels"]) // 16)
    assert len(calls) == batches, "the stem is gone through once for all three"


def test_a_stem_is_passed_over_where_an_update_changes_an_earlier_layer(evaluator, adapters, last, sketches):
    evaluator.set_update(adapters[0].layers)
    expected = outcome_of(evaluator, sketches)
    evaluator.set_update({})
    evaluator.remember_stem(last)
    outcome_of(evaluator, sketches)
    evaluator.set_update(adapters[0].layers)
    assert torch.equal(outcome_of(evaluator, sketches)["probabilities"], expected["probabilities"])


def test_another_domain_s_batches_are_remembered_anew(evaluator, last, sketches):
    photos = sketches.for_domain("photo")
    evaluator.remember_stem(())
    expected = outcome_of(evaluator, photos)
    evaluator.remember_stem(last)
    outcome_of(evaluator, sketches)
    evaluator.remember_stem(last)
    assert torch.equal(outcome_of(evaluator, photos)["probabilities"], expected["probabilities"])


def test_an_evaluation_agrees_with_the_federation_s_table(finished, run, uploads, capsys):
    stored = {row.place[:2]: row.metrics for row in Results(finished).rows if row.unseen == "sketch"}
    for model, options in {
        ("zero-shot", "zero-shot"): [],
        ("client", "client photo"): [f"--uploads={uploads[2]}"],
        ("merge", "average"): [f"--uploads={finished / 'merged' / 'sketch' / 'average'}"],
        ("merge", "sap"): [f"--uploads={finished / 'merged' / 'sketch' / 'sap'}"],
    }.items():
        capsys.readouterr()
        run("test", "--data.domain=sketch", *options)
        shown = re.search(r"macro_accuracy\W+([\d.]+)", capsys.readouterr().out)
        assert float(shown[1]) == pytest.approx(stored[model]["macro_accuracy"], abs=1e-6)
