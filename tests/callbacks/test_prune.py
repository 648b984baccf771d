"""Scoring and pruning by real validation runs on the uploads of a finished federation."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from places import SHAPES_CLIP
from references import quiet_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close
from transformers import AutoTokenizer, CLIPModel

from sap_lightning.callbacks import SaliencyPruneCallback
from sap_lightning.data import AnchorDataModule, DomainDataModule
from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer, Update, dense
from sap_lightning.io.adapter import read_adapter, write_adapter
from sap_lightning.merging import SAP, Average, LiNeS
from sap_lightning.models.clip import load_base
from sap_lightning.models.layers import layer_shapes
from sap_lightning.modules import CLIPLoRAModule, MergeModule

SPACES = ["factor", "delta", "singular"]


@pytest.fixture(scope="module")
def anchors(world: Path) -> AnchorDataModule:
    return AnchorDataModule(str(world / "anchors"), num_pairs=8, base=SHAPES_CLIP, cache=False)


@pytest.fixture(scope="module")
def uploads(finished: Path) -> list[Path]:
    return [finished / "uploads" / domain for domain in ("cartoon", "photo")]


@pytest.fixture
def validated(uploads: list[Path], anchors: AnchorDataModule):
    """Validates the uploads with a callback of these settings and returns the module and its anchor loss."""

    def run_validation(data: AnchorDataModule = anchors, **settings: Any) -> tuple[MergeModule, float]:
        module = MergeModule(SHAPES_CLIP)
        module.use(module.read_uploads(uploads))
        return module, validate(module, data, SaliencyPruneCallback(**settings))

    return run_validation


@pytest.fixture
def merged(validated):
    """The merge of the uploads by a callback of these settings."""
    return lambda **settings: validated(**settings)[0].merged


def validate(module: MergeModule, data: AnchorDataModule, *callbacks: L.Callback, **options: Any) -> float:
    """The module's anchor loss."""
    trainer = quiet_trainer(*callbacks, **options)
    trainer.validate(module, data, verbose=False)
    return float(trainer.callback_metrics["anchor_loss"])


def zeros_and_size(update: Update) -> tuple[int, int]:
    """Of the parameters of an update: how many are zero, and how many there are."""
    if isinstance(update, torch.Tensor):
        return int((update == 0).sum()), update.numel()
    return int((update.A == 0).sum() + (update.B == 0).sum()), update.A.numel() + update.B.numel()


def empty_triplets(update: LoRALayer) -> tuple[int, int]:
    return int((update.B == 0).all(0).sum()), update.rank


@pytest.mark.parametrize(("space", "scope"), product(SPACES, ["global", "layer"]))
def test_exactly_the_asked_share_is_zeroed(merged, space, scope):
    merge = merged(sparsity=0.7, space=space, scope=scope)
    count = empty_triplets if space == "singular" else zeros_and_size
    for adapter in merge.adapters:
        counts = [count(update) for update in merge.prepared.pruned(adapter).values()]
        assert len(counts) == 16
        if scope == "global":
            counts = [tuple(map(sum, zip(*counts, strict=True)))]
        assert [zeros for zeros, _ in counts] == [round(0.7 * size) for _, size in counts]


def test_what_is_kept_keeps_its_value(merged):
    merge = merged(sparsity=0.7)
    for adapter in merge.adapters:
        for name, update in merge.prepared.pruned(adapter).items():
            delta = adapter.layers[name].delta()
            assert torch.equal(update, torch.where(update == 0, 0, delta))


@pytest.mark.parametrize("space", SPACES)
def test_sparsity_0_leaves_the_adapters_whole(merged, space):
    merge = merged(sparsity=0, space=space, rescale="none")
    for name, update in merge.update.items():
        mean = sum(adapter.layers[name].delta() for adapter in merge.adapters) / 2
        assert_close(dense(update), mean, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("space", "rescale"),
    [*product(SPACES, ["l2"]), *product(["delta"], ["none", "l1", "inverse_keep"]), ("factor", "robust")],
)
def test_sparsity_1_gives_the_base_back(validated, space, rescale):
    module, _ = validated(sparsity=1, space=space, rescale=rescale)
    assert_close(dict(module.tower.state_dict()), dict(load_base(SHAPES_CLIP).tower.state_dict()), atol=0, rtol=0)


@torch.no_grad()
def test_the_anchor_loss_is_one_minus_the_cosine_of_clip_s_own_features(validated, anchors):
    clip, tokenizer = CLIPModel.from_pretrained(SHAPES_CLIP).eval(), AutoTokenizer.from_pretrained(SHAPES_CLIP)
    texts = clip.get_text_features(**tokenizer(anchors.captions, padding=True, return_tensors="pt")).pooler_output
    images = clip.get_image_features(anchors.images()).pooler_output
    _, loss = validated(sparsity=1)
    assert loss == pytest.approx(float((1 - cosine_similarity(images, texts)).mean()), abs=1e-6)


@pytest.mark.parametrize("space", SPACES)
def test_scoring_does_not_change_the_base(validated, space):
    module, _ = validated(sparsity=0.7, space=space)
    base = dict(load_base(SHAPES_CLIP).tower.state_dict())
    assert any(not torch.equal(weight, base[name]) for name, weight in module.tower.state_dict().items())
    module.set_update({})
    assert_close(dict(module.tower.state_dict()), base, atol=0, rtol=0)


def test_the_tower_wears_the_merge_when_it_is_measured(validated):
    module, loss = validated(sparsity=0.7)
    base = dict(load_base(SHAPES_CLIP).tower.state_dict())
    update = {f"{name}.weight": dense(layer) for name, layer in module.merged.update.items()}
    for name, weight in module.tower.state_dict().items():
        assert torch.equal(weight, base[name] + update[name] if name in update else base[name]), name
    assert loss == pytest.approx(module.probe().loss(module.merged.update), abs=1e-6)


def test_scoring_leaves_no_hooks_and_no_gradients(validated):
    module, _ = validated(sparsity=0.7)
    assert not any(part._forward_hooks for part in module.tower.modules())
    assert all(weight.grad is None for weight in module.tower.parameters())


@pytest.mark.parametrize("space", SPACES)
def test_the_anchors_batch_size_does_not_change_what_is_kept(validated, world, space):
    kept = []
    for batch_size in (8, 3):
        data = AnchorDataModule(str(world / "anchors"), 8, SHAPES_CLIP, batch_size, cache=False)
        module, loss = validated(data, sparsity=0.7, space=space)
        pruned = [module.merged.prepared.pruned(adapter) for adapter in module.adapters]
        kept.append((torch.cat([dense(u).flatten() for p in pruned for u in p.values()]) != 0, loss))
    assert (kept[0][0] != kept[1][0]).float().mean() < 1e-4, "but for scores that differ in their last bits"
    assert kept[0][1] == pytest.approx(kept[1][1], rel=1e-5)


def test_the_same_anchors_give_the_same_bits(merged):
    one, other = (merged(sparsity=0.7) for _ in range(2))
    assert all(torch.equal(update, other.update[name]) for name, update in one.update.items())


def test_an_adapter_is_scored_once_however_often_it_is_merged(uploads, anchors, finished):
    prune = SaliencyPruneCallback(sparsity=0.7)
    module = MergeModule(SHAPES_CLIP)
    everything = module.read_uploads([*uploads, finished / "uploads" / "sketch"])
    passes: list[int] = []
    module.tower.register_forward_hook(lambda *_: passes.append(1))

    def forward_passes(count: int, callback: SaliencyPruneCallback = prune) -> int:
        passes.clear()
        module.use(everything[:count])
        validate(module, anchors, callback)
        return len(passes)

    scored, reported, measured = 1, 1, 1
    assert forward_passes(2) == 2 * (scored + reported) + measured
    assert forward_passes(2) == measured
    first = dict(module.merged.update)
    assert forward_passes(3) == scored + reported + measured + 3, "of three, one may stand out"
    assert forward_passes(2) == measured
    assert all(torch.equal(update, first[name]) for name, update in module.merged.update.items())
    another = SaliencyPruneCallback(sparsity=0.9, rescale="l1")
    assert forward_passes(2, another) == 2 * reported + measured, "what was scored is the module's to remember"


def test_the_settings_stand_in_the_merged_model_s_record(finished):
    configured = yaml.safe_load((finished / "config.yaml").read_text())["prune"]
    assert configured.keys() == {
        "sparsity", "space", "scope", "reduction", "rescale", "rescale_scope", "rescale_cap", "mean_of",
        "consensus", "scale", "loss", "sign_aware",
    }  # fmt: skip
    for domain in ("photo", "sketch"):
        record = json.loads((finished / "merged" / domain / "sap" / "merge.json").read_text())
        assert record["method"] == "sap"
        assert record["settings"] == configured
        assert (configured["rescale"], configured["rescale_scope"], configured["scale"]) == ("l2", "layer", 1.0)
        average = json.loads((finished / "merged" / domain / "average" / "merge.json").read_text())
        assert (average["method"], average["settings"]) == ("average", {})


def test_masks_tell_what_is_kept(merged):
    merge = merged(sparsity=0.7)
    for adapter in merge.adapters:
        masks = merge.prepared.kept(adapter)
        for name, update in merge.prepared.pruned(adapter).items():
            assert torch.equal(update, adapter.layers[name].delta() * masks[name][0])


def test_the_module_merges_by_sap_as_the_callback_says(validated):
    settings = {
        "sparsity": 0.7,
        "space": "factor",
        "scope": "layer",
        "reduction": "square",
        "rescale": "l1",
        "rescale_scope": "global",
        "rescale_cap": 20.0,
        "consensus": "mean",
        "mean_of": "delta",
        "scale": 1.5,
        "loss": "contrastive",
        "sign_aware": False,
    }
    module, _ = validated(**settings)
    assert isinstance(module.merge_method, SAP)
    assert module.merge_method.settings == settings
    assert module.merge_method == SaliencyPruneCallback(**settings).method == module.merged.prepared.method
    assert module.method is None, "it stays without a method of its own"


def test_a_method_of_the_module_s_own_stays_and_nothing_is_scored(uploads, anchors):
    own = Average()
    module = MergeModule(SHAPES_CLIP, method=own)
    module.use(module.read_uploads(uploads))
    validate(module, anchors, SaliencyPruneCallback())
    assert module.method is module.merged.method is own
    assert module.probe().memory == {}
    for name, update in module.merged.update.items():
        assert_close(dense(update), sum(a.layers[name].delta() for a in module.adapters) / 2, atol=1e-6, rtol=0)


def test_settings_beside_another_method_of_the_module_s_own_are_refused(uploads, anchors):
    for own in (Average(), SAP(sparsity=0.5)):
        module = MergeModule(SHAPES_CLIP, method=own)
        module.use(module.read_uploads(uploads))
        with pytest.raises(
            InputError, match=rf"the module merges by {own.name}, this callback by sap at other settings"
        ):
            validate(module, anchors, SaliencyPruneCallback(sparsity=0.7))
    validate(module, anchors, SaliencyPruneCallback(sparsity=0.5))
    assert module.merged.method == SAP(sparsity=0.5)
    module.use(module.adapters, Average())
    with pytest.raises(InputError, match="the module merges by average, this callback by sap at other settings"):
        validate(module, anchors, SaliencyPruneCallback(sparsity=0.5))


def test_every_validation_follows_its_own_callback(validated, anchors):
    module, _ = validated(sparsity=0.7)
    for settings in ({"sparsity": 0.9}, {"sparsity": 0.9, "rescale": "none"}):
        validate(module, anchors, SaliencyPruneCallback(**settings))
        assert module.merge_method == module.merged.method == SAP(**settings)


@pytest.mark.parametrize("change", [{"loss": "contrastive"}, {"sign_aware": True, "reduction": "mean_then_abs"}])
def test_another_loss_or_sign_keeps_other_parameters_but_as_many(merged, change):
    plain = merged(sparsity=0.7, reduction=change.get("reduction", "abs_then_mean"))
    other = merged(sparsity=0.7, **change)
    for adapter in plain.adapters:
        kept = [
            torch.cat([mask.flatten() for masks in merge.prepared.kept(adapter).values() for mask in masks])
            for merge in (plain, other)
        ]
        assert kept[0].sum() == kept[1].sum()
        assert (kept[0] != kept[1]).float().mean() > 0.01


def test_pruning_by_sign_without_the_mean_gradient_is_refused():
    with pytest.raises(InputError, match=r"prune\.sign_aware needs prune\.reduction mean_then_abs, got abs_then_mean"):
        SaliencyPruneCallback(sign_aware=True)


def test_the_figures_show_each_client_s_loss_before_and_after_pruning(uploads, anchors, tmp_path):
    module = MergeModule(SHAPES_CLIP)
    module.use(module.read_uploads(uploads))
    logger = TensorBoardLogger(tmp_path, name="", version="")
    validate(module, anchors, SaliencyPruneCallback(sparsity=0.7), logger=logger)
    events, merge = EventAccumulator(str(tmp_path)).Reload(), module.merged
    for adapter in merge.adapters:
        for name, layers in (("before", adapter.layers), ("after", merge.prepared.pruned(adapter))):
            alone = MergeModule(SHAPES_CLIP)
            alone.configure_model()
            alone.set_update(layers)
            (shown,) = events.Scalars(f"anchor_loss_{name}_pruning/{adapter.name}")
            assert shown.value == pytest.approx(validate(alone, anchors), rel=1e-5)


def test_sap_under_another_method_is_shown_too(uploads, anchors, tmp_path):
    module = MergeModule(SHAPES_CLIP, method=LiNeS(SAP(0.7)))
    module.use(module.read_uploads(uploads))
    logger = TensorBoardLogger(tmp_path, name="", version="")
    validate(module, anchors, SaliencyPruneCallback(), logger=logger)
    shown = EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]
    assert {f"anchor_loss_after_pruning/{one.name} (lines)" for one in module.adapters} <= set(shown)


def test_a_merge_is_shown_once_however_often_it_is_validated(validated, anchors, tmp_path):
    module, _ = validated(sparsity=0.7)
    prune = SaliencyPruneCallback(sparsity=0.7)
    for version in ("first", "again"):
        validate(module, anchors, prune, logger=TensorBoardLogger(tmp_path, name="", version=version))
    tags = [EventAccumulator(str(tmp_path / name)).Reload().Tags()["scalars"] for name in ("first", "again")]
    names = {f"anchor_loss_{when}_pruning/{one.name}" for when in ("before", "after") for one in module.adapters}
    assert names <= set(tags[0]) and not names & set(tags[1])


def test_other_modules_validate_as_without_it(world):
    measured = []
    for callbacks in ([], [SaliencyPruneCallback()]):
        data = DomainDataModule(str(world / "domains"), "photo", base=SHAPES_CLIP, cache=False)
        measured.append(quiet_trainer(*callbacks).validate(CLIPLoRAModule(SHAPES_CLIP), data, verbose=False))
    assert measured[0] == measured[1]


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, math.nan])
def test_a_sparsity_that_is_no_share_is_refused(sparsity):
    with pytest.raises(InputError, match=r"prune\.sparsity must lie in \[0, 1\]"):
        SaliencyPruneCallback(sparsity=sparsity)


def test_weights_too_large_to_score_are_refused_by_the_upload_s_name(uploads, anchors, tmp_path):
    layers = read_adapter(uploads[0], layer_shapes(load_base(SHAPES_CLIP).tower)).layers
    huge = {name: layer._replace(B=layer.B * 1e30) for name, layer in layers.items()}
    module = MergeModule(SHAPES_CLIP)
    module.use(module.read_uploads([write_adapter(tmp_path / "huge", huge, SHAPES_CLIP), *uploads]))
    with pytest.raises(InputError, match="upload 'huge': its saliency on the anchors is not finite"):
        validate(module, anchors, SaliencyPruneCallback())


def test_robust_rescaling_is_refused_before_anything_is_scored():
    with pytest.raises(InputError, match=r"prune\.space factor"):
        SaliencyPruneCallback(sparsity=0.7, space="delta", rescale="robust")


def test_scoring_sees_the_very_images_that_validation_does(finished, world):
    module = MergeModule(SHAPES_CLIP)
    module.use(module.read_uploads([finished / "uploads" / "photo"]))
    data = AnchorDataModule(str(world / "anchors"), base=SHAPES_CLIP)
    measured = validate(module, data, SaliencyPruneCallback(sparsity=0, space="factor"))
    (adapter,) = module.adapters
    assert module.merged.prepared.answer(adapter).loss == pytest.approx(measured, abs=1e-5)
