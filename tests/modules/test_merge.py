"""The server's merge against dense arithmetic and PEFT, by the real commands."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from peft import PeftModel
from places import SHAPES_CLIP
from safetensors.torch import load_file
from torchmetrics.classification import MulticlassCalibrationError
from transformers import CLIPModel, CLIPVisionModelWithProjection

from sap_lightning.data import AnchorDataModule, DomainDataModule
from sap_lightning.errors import InputError
from sap_lightning.federation.poison import Poison, boosted
from sap_lightning.io.adapter import Adapter, read_adapter, sha256_of
from sap_lightning.merging import TIES, Average, RegMean
from sap_lightning.models.clip import load_base
from sap_lightning.models.layers import layer_shapes, linear_weight
from sap_lightning.modules.merge import MergeModule

DOMAINS = ["cartoon", "painting", "photo"]


@pytest.fixture(scope="module")
def uploads(finished) -> list[str]:
    return [str(finished / "uploads" / domain) for domain in DOMAINS]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def deltas(folder: str | Path) -> dict[str, torch.Tensor]:
    shapes = layer_shapes(load_base(SHAPES_CLIP).tower)
    return {name: layer.delta().double() for name, layer in read_adapter(folder, shapes).layers.items()}


def plain_tower() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection.from_pretrained(SHAPES_CLIP).eval()


@torch.no_grad()
def features_with(folder: str | Path, images: torch.Tensor) -> torch.Tensor:
    return PeftModel.from_pretrained(plain_tower(), folder).eval()(images).image_embeds


@torch.no_grad()
def our_features(folder: str | Path, images: torch.Tensor) -> torch.Tensor:
    module = MergeModule(SHAPES_CLIP, method=Average())
    module.adapters = module.read_uploads([folder])
    module.merge()
    return module.tower(images).image_embeds


def same_files(one: Path, other: Path) -> bool:
    return {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in other.iterdir()}


def test_peft_loads_an_upload_to_the_same_features(uploads, images):
    torch.testing.assert_close(features_with(uploads[0], images), our_features(uploads[0], images), atol=1e-5, rtol=0)
    assert (features_with(uploads[0], images) - plain_tower()(images).image_embeds).abs().max() > 1e-3


@pytest.mark.parametrize("space", ["factor", "singular"])
def test_peft_loads_a_merged_adapter_to_the_same_features(run, uploads, images, tmp_path, space):
    run("merge", f"--prune.space={space}", f"--merge.output={tmp_path / 'out'}", "--uploads", *uploads)
    ours = our_features(tmp_path / "out", images)
    torch.testing.assert_close(features_with(tmp_path / "out", images), ours, atol=1e-5, rtol=0)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 3 * 8


def test_the_same_merge_as_adapter_and_as_model_gives_the_same_features(run, uploads, images, tmp_path):
    for form in ("adapter", "model"):
        options = ["--prune.space=factor", f"--merge.format={form}", f"--merge.output={tmp_path / form}"]
        run("merge", *options, "--uploads", *uploads)
    model = CLIPModel.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        features = model.get_image_features(images).pooler_output
    torch.testing.assert_close(features_with(tmp_path / "adapter", images), features, atol=1e-5, rtol=0)


def test_several_adapters_unpruned_average_to_the_dense_mean(run, uploads, tmp_path):
    options = ["--prune.sparsity=0", "--merge.rescale=none", f"--merge.output={tmp_path / 'out'}"]
    run("merge", *options, "--prune.space=factor", "--uploads", *uploads)
    merged, clients = deltas(tmp_path / "out"), [deltas(upload) for upload in uploads]
    for name, delta in merged.items():
        torch.testing.assert_close(delta, sum(c[name] for c in clients) / 3, atol=1e-6, rtol=0)


def test_several_adapters_unpruned_in_delta_space_average_to_the_dense_mean(run, uploads, tmp_path):
    options = ["--prune.sparsity=0", "--merge.rescale=none", f"--merge.output={tmp_path / 'out'}"]
    run("merge", *options, "--uploads", *uploads)
    base, model = plain_tower(), CLIPModel.from_pretrained(tmp_path / "out")
    clients = [deltas(upload) for upload in uploads]
    for name in clients[0]:
        moved = linear_weight(model, name).double() - linear_weight(base, name).double()
        torch.testing.assert_close(moved, sum(c[name] for c in clients) / 3, atol=1e-6, rtol=0)


@pytest.mark.parametrize("space", ["factor", "singular"])
def test_a_single_adapter_unpruned_merges_to_itself(run, uploads, tmp_path, space):
    options = ["--prune.sparsity=0", "--merge.rescale=none", f"--prune.space={space}"]
    run("merge", *options, f"--merge.output={tmp_path / 'out'}", "--uploads", uploads[0])
    merged = deltas(tmp_path / "out")
    for name, delta in deltas(uploads[0]).items():
        torch.testing.assert_close(merged[name], delta, atol=1e-6, rtol=0)


@pytest.mark.parametrize("space", ["factor", "delta", "singular"])
def test_the_order_of_uploads_does_not_matter(run, uploads, tmp_path, space):
    for name, order in (("a", uploads), ("b", uploads[::-1])):
        run("merge", f"--prune.space={space}", f"--merge.output={tmp_path / name}", "--uploads", *order)
    assert same_files(tmp_path / "a", tmp_path / "b")


def test_weights_follow_the_number_of_samples(run, uploads, tmp_path):
    few = tmp_path / "few"
    shutil.copytree(uploads[0], few)
    manifest = json.loads((few / "manifest.json").read_text())
    count = manifest["num_samples"]
    (few / "manifest.json").write_text(json.dumps(manifest | {"num_samples": 3 * count}))
    options = ["--prune.sparsity=0", "--merge.rescale=none", "--prune.space=factor", "--merge.weights=samples"]
    run("merge", *options, f"--merge.output={tmp_path / 'out'}", "--uploads", str(few), uploads[1])
    first, second, merged = deltas(few), deltas(uploads[1]), deltas(tmp_path / "out")
    for name, delta in merged.items():
        torch.testing.assert_close(delta, 0.75 * first[name] + 0.25 * second[name], atol=1e-6, rtol=0)


def test_a_plain_peft_folder_is_an_upload(run, uploads, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(uploads[0], plain)
    (plain / "manifest.json").unlink()
    run("merge", f"--merge.output={tmp_path / 'out'}", "--uploads", str(plain), uploads[1])
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_samples_without_a_manifest_are_refused_by_name(run, uploads, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(uploads[0], plain)
    (plain / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"plain.*number of samples"):
        run("merge", "--merge.weights=samples", f"--merge.output={tmp_path / 'out'}", "--uploads", str(plain))
    assert not (tmp_path / "out").exists()


def test_a_rank_compresses_a_dense_merge_and_reports_the_error(run, uploads, tmp_path):
    errors = []
    for rank in (4, 64):
        folder = tmp_path / f"rank{rank}"
        run("merge", f"--merge.rank={rank}", f"--merge.output={folder}", "--uploads", *uploads)
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == rank
        errors.append(json.loads((folder / "merge.json").read_text())["relative_error"])
    assert 1 > errors[0] > errors[1] > 0


def test_a_standing_output_is_not_overwritten(run, uploads, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="not overwritten"):
        run("merge", f"--merge.output={tmp_path / 'out'}", "--uploads", *uploads)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_same_upload_twice_is_refused(run, uploads, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(uploads[0], copy)
    with pytest.raises(InputError, match="same adapter"):
        run("merge", f"--merge.output={tmp_path / 'out'}", "--uploads", uploads[0], str(copy))


def test_an_upload_of_another_base_is_refused(run, uploads, tmp_path):
    other = tmp_path / "base"
    shutil.copytree(SHAPES_CLIP, other)
    model = CLIPModel.from_pretrained(other)
    model.vision_model.post_layernorm.weight.data += 1
    model.save_pretrained(other)
    with pytest.raises(InputError, match="fingerprint"):
        run("merge", f"--model.base={other}", f"--merge.output={tmp_path / 'out'}", "--uploads", *uploads)


def test_robust_rescaling_needs_factor_space(run, uploads, tmp_path):
    with pytest.raises(InputError, match=r"prune\.space factor"):
        run("merge", "--merge.rescale=robust", f"--merge.output={tmp_path / 'out'}", "--uploads", *uploads)
    run(
        "merge",
        "--merge.rescale=robust",
        "--prune.space=factor",
        f"--merge.output={tmp_path / 'out'}",
        "--uploads",
        *uploads,
    )
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")


def test_a_method_without_anchors_merges_without_any(run, uploads, tmp_path, capsys):
    options = ["--merge.method=ties", "--merge.method.sparsity=0.5", "--anchors.root=/nowhere"]
    run("merge", *options, f"--merge.output={tmp_path / 'out'}", "--uploads", *uploads)
    assert f"Merged 3 uploads by ties: {tmp_path / 'out'}" in capsys.readouterr().out
    base, model = plain_tower(), CLIPModel.from_pretrained(tmp_path / "out")
    merged = TIES(sparsity=0.5).merge(MergeModule(SHAPES_CLIP).read_uploads(uploads))
    for name, update in merged.items():
        moved = linear_weight(model, name) - linear_weight(base, name)
        torch.testing.assert_close(moved, update, atol=1e-6, rtol=0)


def test_the_record_says_what_was_merged_how_and_what_was_measured(run, uploads, tmp_path, capsys):
    run("merge", "--merge.method=regmean", f"--merge.output={tmp_path / 'out'}", "--uploads", *uploads)
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert (record["base"], record["method"]) == (SHAPES_CLIP, "regmean")
    assert record["settings"] == RegMean().settings
    shapes = layer_shapes(load_base(SHAPES_CLIP).tower)
    hashes = {Path(upload).name: read_adapter(upload, shapes).sha256 for upload in uploads}
    assert {source["name"]: source["sha256"] for source in record["sources"]} == hashes
    assert [source["weight"] for source in record["sources"]] == [1 / 3] * 3
    shown = re.search(r"by regmean, anchor loss ([\d.]+)", capsys.readouterr().out)
    assert record["metrics"] == {"anchor_loss": pytest.approx(float(shown[1]), abs=1e-4)}
    assert record["relative_error"] == 0
    assert "regmean" in (tmp_path / "out" / "README.md").read_text()


def test_a_report_has_a_row_for_every_layer(run, uploads, tmp_path, capsys):
    options = ["--merge.method=average", "--merge.report=true", f"--merge.output={tmp_path / 'out'}"]
    run("merge", *options, "--uploads", *uploads)
    shown = capsys.readouterr().out
    assert len(re.findall(r"layers\.\d\.self_attn|\d\.self_attn", shown)) == len(deltas(uploads[0]))


def test_a_module_s_own_method_merges_and_saves(uploads, tmp_path):
    module = MergeModule(SHAPES_CLIP, method=Average())
    module.adapters = module.read_uploads(uploads)
    module.merge()
    merged = module.merged({"accuracy": 0.5})
    assert (merged.method, merged.adapters, merged.weights) == (module.method, module.adapters, [1 / 3] * 3)
    assert dict(merged.update) == module.update
    assert module.save(tmp_path / "out", {"accuracy": 0.5}) == tmp_path / "out"
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["metrics"] == {"accuracy": 0.5}
    written = deltas(tmp_path / "out")
    for name, delta in written.items():
        torch.testing.assert_close(delta, sum(deltas(upload)[name] for upload in uploads) / 3, atol=1e-6, rtol=0)


def test_nothing_to_merge_or_nothing_to_merge_by_is_refused(uploads):
    module = MergeModule(SHAPES_CLIP, method=Average())
    with pytest.raises(InputError, match="nothing to merge"):
        module.merge()
    module.adapters, module.method = module.read_uploads(uploads), None
    with pytest.raises(InputError, match=r"merge\.method is not set"):
        module.merge()
    module.method = RegMean()
    with pytest.raises(InputError, match=r"merge\.method regmean looks at anchors"):
        module.merge()
    assert module.update == {}


def test_an_empty_update_gives_the_base_back_bit_for_bit(uploads):
    module = MergeModule(SHAPES_CLIP, method=Average())
    module.adapters = module.read_uploads(uploads)
    module.merge()
    base = dict(plain_tower().state_dict())
    assert any(not torch.equal(weight, base[name]) for name, weight in module.tower.state_dict().items())
    module.set_update({})
    torch.testing.assert_close(dict(module.tower.state_dict()), base, atol=0, rtol=0)


def test_an_evaluation_agrees_with_the_federation_s_table(finished, run, uploads, capsys):
    stored = {(r["model"], r["unseen"]): r["metrics"] for r in json.loads((finished / "results.json").read_text())}
    for row, options in {
        "zero-shot": [],
        "client photo": [f"--adapter={uploads[2]}"],
        "average": [f"--adapter={finished / 'merged' / 'sketch' / 'average'}"],
        "sap": [f"--adapter={finished / 'merged' / 'sketch' / 'sap'}"],
    }.items():
        capsys.readouterr()
        run("test", "--data.domain=sketch", *options)
        shown = re.search(r"macro_accuracy\W+([\d.]+)", capsys.readouterr().out)
        assert float(shown[1]) == pytest.approx(stored[row, "sketch"]["macro_accuracy"], abs=1e-6)


# Measuring: predictions, the stem of the tower, outliers


def quiet_trainer(*callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=list(callbacks),
    )


@pytest.fixture
def sketches(world) -> DomainDataModule:
    return DomainDataModule(str(world / "domains"), "sketch", base=SHAPES_CLIP, batch_size=16, cache=False)


@pytest.fixture
def anchors(world) -> AnchorDataModule:
    return AnchorDataModule(str(world / "anchors"), num_pairs=8, base=SHAPES_CLIP, cache=False)


def outcome_of(module: MergeModule, data: DomainDataModule) -> dict[str, torch.Tensor]:
    """What a test leaves behind, and its metrics."""
    (metrics,) = quiet_trainer().test(module, datamodule=data, verbose=False)
    left = {**module.predictions._asdict(), "features": module.tested_features}
    return left | {name: torch.tensor(value) for name, value in metrics.items()}


def only_last(adapter: Adapter) -> Adapter:
    """An adapter whose first layer is one of the last encoder layer."""
    layers = {name: layer for name, layer in adapter.layers.items() if ".layers.3." in name}
    return Adapter(adapter.name, layers, sha256_of(layers))


def test_a_test_leaves_what_was_said_of_every_image_in_the_order_of_the_domain(uploads, sketches):
    module = MergeModule(SHAPES_CLIP, method=Average())
    module.adapters = module.read_uploads(uploads)
    module.merge()
    left = outcome_of(module, sketches)
    sketches.batch_size = len(left["labels"])
    (batch,) = sketches.test_dataloader()
    assert left["images"].tolist() == batch.indices.tolist() and left["labels"].tolist() == batch.labels.tolist()
    with torch.no_grad():
        expected = module(sketches.on_after_batch_transfer(batch, 0).images).softmax(1)
    torch.testing.assert_close(left["probabilities"], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(left["features"].norm(dim=1), torch.ones(len(batch.labels)))
    assert module.predictions.correct.float().mean() == pytest.approx(float(left["accuracy"]))
    error = MulticlassCalibrationError(left["probabilities"].shape[1])(left["probabilities"], left["labels"])
    assert float(left["ece"]) == pytest.approx(float(error), abs=1e-6)


def test_a_remembered_stem_changes_no_bit_whatever_the_update(uploads, sketches):
    module = MergeModule(SHAPES_CLIP, method=Average())
    module.adapters = [only_last(adapter) for adapter in module.read_uploads(uploads)]
    updates = [{}, module.adapters[0].layers, Average().merge(module.adapters)]
    plain = []
    for update in updates:
        module.set_update(update)
        plain.append(outcome_of(module, sketches))
    assert not torch.equal(plain[0]["probabilities"], plain[2]["probabilities"])
    calls: list[int] = []
    module.tower.vision_model.encoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    module.remember_stem(module.adapters)
    for update, expected in zip(updates, plain, strict=True):
        module.set_update(update)
        found = outcome_of(module, sketches)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    batches = -(-len(plain[0]["labels"]) // 16)
    assert len(calls) == batches, "the stem is gone through once for all three"


def test_a_stem_is_passed_over_where_an_update_changes_an_earlier_layer(uploads, sketches):
    module = MergeModule(SHAPES_CLIP, method=Average())
    whole = module.read_uploads(uploads)
    module.set_update(whole[0].layers)
    expected = outcome_of(module, sketches)
    module.set_update({})
    module.remember_stem([only_last(adapter) for adapter in whole])
    outcome_of(module, sketches)
    module.set_update(whole[0].layers)
    assert torch.equal(outcome_of(module, sketches)["probabilities"], expected["probabilities"])


def test_another_domain_s_batches_are_remembered_anew(uploads, sketches):
    module = MergeModule(SHAPES_CLIP, method=Average())
    last = [only_last(adapter) for adapter in module.read_uploads(uploads)]
    photos = sketches.for_domain("photo")
    module.remember_stem(())
    expected = outcome_of(module, photos)
    module.remember_stem(last)
    outcome_of(module, sketches)
    module.remember_stem(last)
    assert torch.equal(outcome_of(module, photos)["probabilities"], expected["probabilities"])


def boosted_painting(module: MergeModule, uploads: list[str]) -> list[Adapter]:
    """Three clients, one of which sends ten times its update."""
    adapters = module.read_uploads(uploads)
    layers = {name: boosted(layer) for name, layer in next(a for a in adapters if a.name == "painting").layers.items()}
    harmful = Adapter("painting", layers, sha256_of(layers))
    return [harmful if adapter.name == "painting" else adapter for adapter in adapters]


def test_an_outlier_is_rejected_and_the_merge_is_that_of_the_others(uploads, anchors, caplog):
    caplog.set_level("WARNING", logger="sap_lightning")
    module = MergeModule(SHAPES_CLIP, method=Average(), reject_outliers=True)
    module.adapters = boosted_painting(module, uploads)
    quiet_trainer().validate(module, anchors, verbose=False)
    assert module.rejected == ["painting"]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["painting left out"]
    others = MergeModule(SHAPES_CLIP, method=Average())
    others.adapters = [a for a in others.read_uploads(uploads) if a.name != "painting"]
    others.merge()
    assert sorted(adapter.name for adapter in module.adapters) == ["cartoon", "photo"]
    assert module.client_weights() == [0.5, 0.5]
    for name, weight in module.tower.state_dict().items():
        assert torch.equal(weight, others.tower.state_dict()[name]), name


def test_without_rejection_or_an_outlier_nobody_is_left_out(uploads, anchors):
    module = MergeModule(SHAPES_CLIP, method=Average())
    module.adapters = boosted_painting(module, uploads)
    quiet_trainer().validate(module, anchors, verbose=False)
    assert module.rejected == [] and len(module.adapters) == 3
    module.reject_outliers, module.adapters = True, module.read_uploads(uploads)
    quiet_trainer().validate(module, anchors, verbose=False)
    assert module.rejected == [] and len(module.adapters) == 3
    module.adapters = [adapter for adapter in boosted_painting(module, uploads) if adapter.name != "photo"]
    quiet_trainer().validate(module, anchors, verbose=False)
    assert module.rejected == [], "of two none is the odd one"


def test_adapters_that_all_break_the_base_are_refused(uploads, anchors):
    module = MergeModule(SHAPES_CLIP, method=Average(), reject_outliers=True)
    for number, adapter in enumerate(module.read_uploads(uploads)):
        layers = {name: layer._replace(B=1e22 * layer.B) for name, layer in adapter.layers.items()}
        module.adapters.append(Adapter(str(number), layers, sha256_of(layers)))
    with pytest.raises(InputError, match="no upload has a finite anchor loss"):
        quiet_trainer().validate(module, anchors, verbose=False)


def test_the_losses_alone_are_those_of_each_adapter_s_own_merge(uploads, anchors):
    module = MergeModule(SHAPES_CLIP, method=Average())
    trainer = quiet_trainer()
    alone = []
    for adapter in module.read_uploads(uploads):
        module.adapters = [adapter]
        trainer.validate(module, anchors, verbose=False)
        alone.append(float(trainer.callback_metrics["anchor_loss"]))
    module.adapters = module.read_uploads(uploads)
    probe = module.probe()
    assert module.losses_alone(probe) == pytest.approx(alone, abs=1e-6)
    module.adapters.reverse()
    probe.wear = None  # they are known, and nothing is worn for them again
    assert module.losses_alone(probe) == pytest.approx(alone[::-1], abs=1e-6)


def test_rejection_without_anchors_is_refused(uploads):
    module = MergeModule(SHAPES_CLIP, method=Average(), reject_outliers=True)
    module.adapters = module.read_uploads(uploads)
    with pytest.raises(InputError, match=r"anchors"):
        module.merge()


def test_the_command_merge_rejects_too_and_says_whom(run, uploads, tmp_path, caplog):
    caplog.set_level("WARNING", logger="sap_lightning")
    harmful = Poison("painting", "scale").rewrite(Path(uploads[1]), tmp_path / "painting")
    others = [uploads[0], uploads[2]]
    rejecting = ["--merge.method=average", "--merge.reject_outliers=true", f"--federation.run_dir={tmp_path / 'run'}"]
    run("merge", *rejecting, f"--merge.output={tmp_path / 'out'}", "--uploads", str(harmful), *others)
    run("merge", "--merge.method=average", f"--merge.output={tmp_path / 'two'}", "--uploads", *others)
    assert any(record.getMessage().startswith("painting left out") for record in caplog.records)
    one, two = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("out", "two"))
    assert all(torch.equal(one[name], two[name]) for name in two)
    sources = json.loads((tmp_path / "out" / "merge.json").read_text())["sources"]
    assert sorted(source["name"] for source in sources) == ["cartoon", "photo"]
