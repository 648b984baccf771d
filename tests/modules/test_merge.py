"""The server's merge against dense arithmetic and PEFT, by the real commands."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from places import SHAPES_CLIP
from references import quiet_trainer, randn
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPVisionModelWithProjection

from sap_lightning.data import AnchorDataModule, DomainDataModule
from sap_lightning.errors import InputError
from sap_lightning.federation import poison
from sap_lightning.federation.poison import Poison
from sap_lightning.functional.lora import dense
from sap_lightning.io.adapter import Adapter, read_adapter, sha256_of
from sap_lightning.io.manifest import DIGEST
from sap_lightning.merging import SAP, TIES, Average, Krum, LiNeS, Median, RegMean, SAPAuto
from sap_lightning.merging.selection import losses_alone
from sap_lightning.models.clip import load_base
from sap_lightning.models.layers import layer_shapes, linear_weight
from sap_lightning.modules.clip_lora import CLIPLoRAModule
from sap_lightning.modules.merge import MergeModule

UNPRUNED = ["--prune.sparsity=0", "--prune.rescale=none"]


@pytest.fixture
def images() -> torch.Tensor:
    return randn(0, 4, 3, 64, 64)


@pytest.fixture
def merge(run, tmp_path):
    """Runs the command merge and returns the folder that it wrote."""

    def run_merge(uploads: Sequence[str | Path], *options: str, output: str = "out") -> Path:
        folder = tmp_path / output
        run("merge", *options, f"--merge.output={folder}", "--uploads", *map(str, uploads))
        return folder

    return run_merge


@pytest.fixture
def module(uploads) -> MergeModule:
    """Averages the uploads; nothing is merged yet."""
    module = MergeModule(SHAPES_CLIP, method=Average())
    module.use(module.read_uploads(uploads))
    return module


@pytest.fixture
def plain(uploads, tmp_path) -> Path:
    """The first upload as PEFT leaves it, without our manifest."""
    folder = Path(shutil.copytree(uploads[0], tmp_path / "plain"))
    (folder / "manifest.json").unlink()
    return folder


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
    module.use(module.read_uploads([folder]))
    module.merge()
    return module.tower(images).image_embeds


def mean_of(clients: Sequence[Mapping[str, torch.Tensor]], name: str) -> torch.Tensor:
    return sum(client[name] for client in clients) / len(clients)


def moved(folder: str | Path, name: str) -> torch.Tensor:
    """What the full model in a folder adds to a layer of the base, in float64."""
    model = CLIPModel.from_pretrained(folder)
    return linear_weight(model, name).double() - linear_weight(plain_tower(), name).double()


def same_files(one: Path, other: Path) -> bool:
    return {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in other.iterdir()}


def test_peft_loads_an_upload_to_the_same_features(uploads, images):
    torch.testing.assert_close(features_with(uploads[0], images), our_features(uploads[0], images), atol=1e-5, rtol=0)
    assert (features_with(uploads[0], images) - plain_tower()(images).image_embeds).abs().max() > 1e-3


@pytest.mark.parametrize("space", ["factor", "singular"])
def test_peft_loads_a_merged_adapter_to_the_same_features(merge, uploads, images, space):
    out = merge(uploads, f"--prune.space={space}")
    torch.testing.assert_close(features_with(out, images), our_features(out, images), atol=1e-5, rtol=0)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 3 * 8


def test_the_same_merge_as_adapter_and_as_model_gives_the_same_features(merge, uploads, images):
    adapter, whole = (
        merge(uploads, "--prune.space=factor", f"--merge.format={form}", output=form) for form in ("adapter", "model")
    )
    model = CLIPModel.from_pretrained(whole).eval()
    with torch.no_grad():
        features = model.get_image_features(images).pooler_output
    torch.testing.assert_close(features_with(adapter, images), features, atol=1e-5, rtol=0)


def test_several_adapters_unpruned_average_to_the_dense_mean(merge, uploads):
    merged, clients = deltas(merge(uploads, *UNPRUNED, "--prune.space=factor")), [deltas(upload) for upload in uploads]
    for name, delta in merged.items():
        torch.testing.assert_close(delta, mean_of(clients, name), atol=1e-6, rtol=0)


def test_several_adapters_unpruned_in_delta_space_average_to_the_dense_mean(merge, uploads):
    out, clients = merge(uploads, *UNPRUNED, "--prune.space=delta"), [deltas(upload) for upload in uploads]
    for name in clients[0]:
        torch.testing.assert_close(moved(out, name), mean_of(clients, name), atol=1e-6, rtol=0)


@pytest.mark.parametrize("space", ["factor", "singular"])
def test_a_single_adapter_unpruned_merges_to_itself(merge, uploads, space):
    merged = deltas(merge(uploads[:1], *UNPRUNED, f"--prune.space={space}"))
    for name, delta in deltas(uploads[0]).items():
        torch.testing.assert_close(merged[name], delta, atol=1e-6, rtol=0)


@pytest.mark.parametrize("space", ["factor", "delta", "singular"])
def test_the_order_of_uploads_does_not_matter(merge, uploads, space):
    one, other = (
        merge(order, f"--prune.space={space}", output=name) for name, order in (("a", uploads), ("b", uploads[::-1]))
    )
    assert same_files(one, other)


def test_weights_follow_the_number_of_samples(merge, uploads, tmp_path):
    few = Path(shutil.copytree(uploads[0], tmp_path / "few"))
    manifest = json.loads((few / "manifest.json").read_text())
    count = manifest["num_samples"]
    del manifest[DIGEST]
    (few / "manifest.json").write_text(json.dumps(manifest | {"num_samples": 3 * count}))
    out = merge([few, uploads[1]], *UNPRUNED, "--prune.space=factor", "--merge.weights=samples")
    first, second = deltas(few), deltas(uploads[1])
    for name, delta in deltas(out).items():
        torch.testing.assert_close(delta, 0.75 * first[name] + 0.25 * second[name], atol=1e-6, rtol=0)


def test_a_plain_peft_folder_is_an_upload(merge, uploads, plain):
    assert (merge([plain, uploads[1]]) / "adapter_model.safetensors").is_file()


def test_samples_without_a_manifest_are_refused_by_name(merge, plain, tmp_path):
    with pytest.raises(InputError, match=r"plain.*number of samples"):
        merge([plain], "--merge.weights=samples")
    assert not (tmp_path / "out").exists()


def test_a_rank_compresses_a_dense_merge_and_reports_the_error(merge, uploads):
    errors = []
    for rank in (4, 64):
        folder = merge(uploads, "--prune.space=delta", f"--merge.rank={rank}", output=f"rank{rank}")
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == rank
        errors.append(json.loads((folder / "merge.json").read_text())["relative_error"])
    assert 1 > errors[0] > errors[1] > 0


@pytest.mark.parametrize("method", ["--merge.method=median", "--merge.method=krum", "--prune.consensus=median"])
def test_numbers_of_images_are_refused_where_clients_count_alike(merge, uploads, method):
    with pytest.raises(InputError, match=r"merge\.weights samples: clients count alike in (median|krum|sap)"):
        merge(uploads, method, "--merge.weights=samples")


@pytest.mark.parametrize("method", [Median(), LiNeS(Median(), alpha=1.0), SAP(consensus="median"), Krum()])
def test_methods_in_which_clients_count_alike_say_so(method):
    assert not method.uses_weights


@pytest.mark.parametrize("settings", [{"rank": 0}, {"rank": 4, "format": "model"}])
def test_a_rank_that_cannot_be_is_refused(settings):
    with pytest.raises(InputError, match=rf"merge\.rank {settings['rank']}: must be at least 1, and is for"):
        MergeModule(SHAPES_CLIP, **settings)


def test_a_standing_output_is_not_overwritten(merge, uploads, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="not overwritten"):
        merge(uploads)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_same_upload_twice_is_refused(merge, uploads, tmp_path):
    copy = shutil.copytree(uploads[0], tmp_path / "copy")
    with pytest.raises(InputError, match="same adapter"):
        merge([uploads[0], copy])


def test_an_upload_of_another_base_is_refused(merge, uploads, tmp_path):
    other = Path(shutil.copytree(SHAPES_CLIP, tmp_path / "base"))
    model = CLIPModel.from_pretrained(other)
    model.vision_model.post_layernorm.weight.data += 1
    model.save_pretrained(other)
    with pytest.raises(InputError, match="fingerprint"):
        merge(uploads, f"--model.base={other}")


def test_robust_rescaling_needs_factor_space(merge, uploads):
    with pytest.raises(InputError, match=r"prune\.space factor"):
        merge(uploads, "--prune.rescale=robust", "--prune.space=delta")
    assert load_file(merge(uploads, "--prune.rescale=robust") / "adapter_model.safetensors")


def test_a_method_without_anchors_merges_without_any(merge, uploads, capsys):
    out = merge(uploads, "--merge.method=ties", "--merge.method.sparsity=0.5", "--anchors.root=/nowhere")
    assert f"Merged 3 uploads by ties: {out}" in capsys.readouterr().out
    for name, update in TIES(sparsity=0.5).merge(MergeModule(SHAPES_CLIP).read_uploads(uploads)).items():
        torch.testing.assert_close(moved(out, name), update.double(), atol=1e-6, rtol=0)


def test_the_record_says_what_was_merged_how_and_what_was_measured(merge, uploads, capsys):
    out = merge(uploads, "--merge.method=regmean")
    record = json.loads((out / "merge.json").read_text())
    assert (record["base"], record["method"]) == ("shapes_clip", "regmean")
    assert record["settings"] == RegMean().settings
    shapes = layer_shapes(load_base(SHAPES_CLIP).tower)
    hashes = {Path(upload).name: read_adapter(upload, shapes).sha256 for upload in uploads}
    assert {source["name"]: source["sha256"] for source in record["sources"]} == hashes
    assert [source["weight"] for source in record["sources"]] == [1 / 3] * 3
    shown = re.search(r"by regmean, anchor loss ([\d.]+)", capsys.readouterr().out)
    assert record["metrics"] == {"anchor_loss": pytest.approx(float(shown[1]), abs=1e-4)}
    assert record["relative_error"] == 0
    assert "regmean" in (out / "README.md").read_text()


def test_a_report_has_a_row_for_every_layer(merge, uploads, capsys):
    merge(uploads, "--merge.method=average", "--merge.report=true")
    shown = capsys.readouterr().out
    assert len(re.findall(r"layers\.\d\.self_attn|\d\.self_attn", shown)) == len(deltas(uploads[0]))


def test_a_module_s_own_method_merges_and_saves(module, uploads, tmp_path):
    merged = module.merge()
    assert module.merged is merged
    assert (merged.method, merged.adapters, merged.weights) == (module.method, module.adapters, [1 / 3] * 3)
    expected = Average().merge(module.adapters)
    assert merged.update.keys() == expected.keys()
    for name, update in merged.update.items():
        torch.testing.assert_close(dense(update), dense(expected[name]), atol=0, rtol=0)
        worn = linear_weight(plain_tower(), name) + dense(update)
        torch.testing.assert_close(linear_weight(module.tower, name), worn, atol=0, rtol=0)
    assert module.save(tmp_path / "out", {"accuracy": 0.5}) == tmp_path / "out"
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["metrics"] == {"accuracy": 0.5}
    clients = [deltas(upload) for upload in uploads]
    for name, delta in deltas(tmp_path / "out").items():
        torch.testing.assert_close(delta, mean_of(clients, name), atol=1e-6, rtol=0)


def test_what_is_used_may_bring_its_method_which_goes_before_the_module_s_own(module):
    first = module.merge()
    module.use(module.adapters[:2], TIES(0.5))
    module.offer(Average())
    second = module.merge()
    assert (second.method, len(second.adapters)) == (TIES(0.5), 2)
    module.use(first.adapters)
    assert module.merged is None, "what was merged before is not taken for a merge of these"
    assert (module.merge().method, len(module.merged.adapters)) == (Average(), 3)
    assert (first.method, len(first.adapters)) == (Average(), 3), "an earlier merge stays as it was"


def test_nothing_is_classified_by_an_earlier_merge_nor_before_the_first(module, world):
    """It would be told as the accuracy of a model that it is not."""
    data = DomainDataModule(str(world / "domains"), "photo", base=SHAPES_CLIP, cache=False)
    base = quiet_trainer().test(MergeModule(SHAPES_CLIP), data, verbose=False)
    for again in (False, True):
        with pytest.raises(InputError, match="the adapters in use are not merged yet; merge them, or validate on anch"):
            quiet_trainer().test(module, data, verbose=False)
        module.merge()
        assert quiet_trainer().test(module, data, verbose=False) != base
        module.use(() if again else module.adapters[:1])
    assert quiet_trainer().test(module, data, verbose=False) == base, "without adapters it is zero-shot"


def test_without_adapters_anchors_are_shown_to_the_base(module, world):
    anchors = AnchorDataModule(str(world / "anchors"), 8, SHAPES_CLIP, cache=False)
    base = quiet_trainer().validate(MergeModule(SHAPES_CLIP), anchors, verbose=False)
    module.merge()
    module.use(())
    assert quiet_trainer().validate(module, anchors, verbose=False) == base


def test_what_cannot_be_used_changes_nothing(module):
    merged, adapters = module.merge(), module.adapters
    with pytest.raises(InputError, match="is no adapter"):
        module.use([*adapters, "uploads/photo"])
    assert module.adapters == adapters and module.merged is merged


@pytest.mark.parametrize(
    ("used", "said"),
    [
        ((["uploads/photo"],), "'uploads/photo': is no adapter; use takes what read_uploads gives"),
        (((), None, 3.0), r"sparsity must lie in \[0, 1\], got 3.0"),
    ],
)
def test_what_cannot_be_merged_is_not_taken(module, used, said):
    with pytest.raises(InputError, match=said):
        module.use(*used)


@pytest.mark.parametrize("kind", [str, Path])
def test_one_folder_in_place_of_a_list_is_not_read_letter_by_letter(module, uploads, kind):
    with pytest.raises(InputError, match="is one upload; give a list of them"):
        module.read_uploads(kind(uploads[0]))


@pytest.mark.parametrize("settings", [{"weights": "sample"}, {"format": "peft"}])
def test_a_setting_that_is_none_of_the_choices_is_refused(settings):
    ((name, value),) = settings.items()
    with pytest.raises(InputError, match=f"merge.{name} '{value}': it takes one of"):
        MergeModule(SHAPES_CLIP, **settings)


def test_the_class_of_a_method_in_its_place_is_refused():
    with pytest.raises(InputError, match=r"merge\.method <class .*Average'>: give a method, such as TIES"):
        MergeModule(SHAPES_CLIP, method=Average)
    with pytest.raises(InputError, match=r"merge\.method\.method <class .*Average'>: give a method"):
        LiNeS(Average)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (SAP(consensus="men"), r"sap.consensus 'men': it takes one of mean, elected, median"),
        (LiNeS(SAP(consensus="men")), "sap.consensus 'men'"),
        (SAPAuto(spaces=("delta", "delt")), "sap_auto.spaces 'delt': it takes one of factor, delta, singular"),
    ],
    ids=["itself", "under another", "among others"],
)
def test_a_method_s_setting_that_is_none_of_the_choices_is_refused(module, method, message):
    """Which no parser has seen."""
    module.use(module.adapters, method)
    with pytest.raises(InputError, match=message):
        module.merge()


def test_images_that_are_made_for_another_base_are_refused(module, world, tmp_path):
    other = Path(shutil.copytree(SHAPES_CLIP, tmp_path / "other"))
    config = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(config | {"image_mean": [0.9, 0.1, 0.9]}))
    copy = Path(shutil.copytree(SHAPES_CLIP, tmp_path / "copy"))
    saved = config | {"image_processor_type": "CLIPImageProcessorFast", "default_to_square": False}
    (copy / "preprocessor_config.json").write_text(json.dumps(saved))
    module.merge()
    for base, refused in ((other, True), (copy, False)):
        anchors = AnchorDataModule(str(world / "anchors"), 4, str(base), cache=False)
        domain = DomainDataModule(str(world / "domains"), "photo", base=str(base), cache=False)
        trainer = quiet_trainer(max_epochs=1, limit_train_batches=1)
        for ask, asked, data in (
            (trainer.validate, module, anchors),
            (trainer.test, module, domain),
            (trainer.fit, CLIPLoRAModule(SHAPES_CLIP), domain),
            (trainer.validate, CLIPLoRAModule(SHAPES_CLIP), domain),
        ):
            said = f"makes images for {other}, and .* asks for others; give it base="
            with pytest.raises(InputError, match=said) if refused else nullcontext():
                ask(asked, datamodule=data)


def test_a_trainer_without_a_data_module_is_told_to_have_one(module):
    with pytest.raises(InputError, match="the trainer has no data module"):
        quiet_trainer().validate(module, dataloaders=torch.utils.data.DataLoader([1]), verbose=False)


def test_a_module_without_a_method_merges_by_what_is_offered_last(module):
    module.method = None
    for method in (TIES(0.5), Average()):
        module.offer(method)
        assert module.merge_method is module.merge().method is method


def test_weights_of_uploads_that_the_module_did_not_read_are_refused(module):
    weighted = MergeModule(SHAPES_CLIP, method=Average(), weights=[0.5, 0.3, 0.2])
    weighted.use(module.adapters)
    with pytest.raises(InputError, match=r"merge\.weights .*in the order of read_uploads, which did not read"):
        weighted.merge()


def test_nothing_to_merge_or_nothing_to_merge_by_is_refused(uploads, tmp_path):
    module = MergeModule(SHAPES_CLIP, method=Average())
    with pytest.raises(InputError, match="nothing to merge"):
        module.merge()
    module.use(module.read_uploads(uploads))
    with pytest.raises(InputError, match="nothing was merged yet"):
        module.save(tmp_path / "out")
    module.method = None
    with pytest.raises(InputError, match=r"merge\.method is not set"):
        module.merge()
    module.method = RegMean()
    with pytest.raises(InputError, match=r"merge\.method regmean looks at anchors"):
        module.merge()
    assert module.merged is None and not (tmp_path / "out").exists()
    torch.testing.assert_close(dict(module.tower.state_dict()), dict(plain_tower().state_dict()), atol=0, rtol=0)


def test_an_empty_update_gives_the_base_back_bit_for_bit(module):
    module.merge()
    base = dict(plain_tower().state_dict())
    assert any(not torch.equal(weight, base[name]) for name, weight in module.tower.state_dict().items())
    module.set_update({})
    torch.testing.assert_close(dict(module.tower.state_dict()), base, atol=0, rtol=0)


# Anchors and outliers


@pytest.fixture
def anchors(world) -> AnchorDataModule:
    return AnchorDataModule(str(world / "anchors"), num_pairs=8, base=SHAPES_CLIP, cache=False)


def test_validation_without_adapters_measures_the_base(uploads, anchors):
    base, whole = MergeModule(SHAPES_CLIP), MergeModule(SHAPES_CLIP, method=Average())
    losses = []
    for module in (base, whole):
        trainer = quiet_trainer()
        trainer.validate(module, anchors, verbose=False)
        losses.append(float(trainer.callback_metrics["anchor_loss"]))
    assert losses[0] == losses[1] and base.merged is None
    assert losses[0] == pytest.approx(base.probe().loss({}), abs=1e-6)


def test_validation_merges_anew_and_measures_what_it_merged(module, anchors):
    losses = []
    for adapters in (module.adapters, module.adapters[:1]):
        module.use(adapters)
        trainer = quiet_trainer()
        trainer.validate(module, anchors, verbose=False)
        losses.append(float(trainer.callback_metrics["anchor_loss"]))
        assert module.merged.adapters == adapters
        assert losses[-1] == pytest.approx(module.probe().loss(module.merged.update), abs=1e-6)
    assert losses[0] != losses[1]


def with_harmful_painting(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The clients, one of which sends a thousand times its update."""
    painting = next(adapter for adapter in adapters if adapter.name == "painting")
    layers = {name: layer._replace(B=1000 * layer.B) for name, layer in painting.layers.items()}
    harmful = Adapter("painting", layers, sha256_of(layers))
    return [harmful if adapter.name == "painting" else adapter for adapter in adapters]


def test_an_outlier_is_rejected_and_the_merge_is_that_of_the_others(module, uploads, anchors, caplog):
    caplog.set_level("WARNING", logger="sap_lightning")
    module.reject_outliers = True
    clients = with_harmful_painting(module.adapters)
    module.use(clients)
    quiet_trainer().validate(module, anchors, verbose=False)
    assert module.merged.rejected == ["painting"]
    assert "painting left out" in [record.getMessage().split(":")[0] for record in caplog.records]
    others = MergeModule(SHAPES_CLIP, method=Average())
    others.use(a for a in others.read_uploads(uploads) if a.name != "painting")
    others.merge()
    assert sorted(adapter.name for adapter in module.merged.adapters) == ["cartoon", "photo"]
    assert module.merged.weights == [0.5, 0.5]
    assert module.adapters == clients, "who is left out of a merge is still there for the next"
    for name, weight in module.tower.state_dict().items():
        assert torch.equal(weight, others.tower.state_dict()[name]), name


def test_without_rejection_an_outlier_is_merged_with_a_warning(module, anchors, caplog):
    caplog.set_level("WARNING", logger="sap_lightning")
    for clients, doubted in ((with_harmful_painting(module.adapters), ["painting"]), (module.adapters, [])):
        caplog.clear()
        module.use(clients)
        quiet_trainer().validate(module, anchors, verbose=False)
        assert [doubt.split("'")[1] for doubt in module.merged.doubts if "anchors" in doubt] == doubted
        assert [record.getMessage() for record in caplog.records] == list(module.merged.doubts)
        assert len(module.merged.adapters) == len(clients)


def test_without_rejection_or_an_outlier_nobody_is_left_out(module, anchors):
    honest, clients = module.adapters, with_harmful_painting(module.adapters)
    of_two = [adapter for adapter in clients if adapter.name != "photo"]
    for rejects, adapters in ((False, clients), (True, honest), (True, of_two)):
        module.reject_outliers = rejects
        module.use(adapters)
        quiet_trainer().validate(module, anchors, verbose=False)
        assert list(module.merged.rejected) == [] and module.merged.adapters == adapters, "of two none is the odd one"


def test_adapters_that_all_break_the_base_are_refused(module, anchors):
    module.reject_outliers = True
    broken = []
    for number, adapter in enumerate(module.adapters):
        layers = {name: layer._replace(B=1e22 * layer.B) for name, layer in adapter.layers.items()}
        broken.append(Adapter(str(number), layers, sha256_of(layers)))
    module.use(broken)
    with pytest.raises(InputError, match="no upload gives finite features on the anchors"):
        quiet_trainer().validate(module, anchors, verbose=False)


def test_the_losses_alone_are_those_of_each_adapter_s_own_merge(module, anchors):
    clients, trainer, alone = module.adapters, quiet_trainer(), []
    for adapter in clients:
        module.use([adapter])
        trainer.validate(module, anchors, verbose=False)
        alone.append(float(trainer.callback_metrics["anchor_loss"]))
    assert losses_alone(clients, module.probe()) == pytest.approx(alone, abs=1e-6)
    known = replace(module.probe(), patched=None)  # nothing is worn for them again
    assert losses_alone(clients[::-1], known) == pytest.approx(alone[::-1], abs=1e-6)


def test_rejection_without_anchors_is_refused(module):
    module.reject_outliers = True
    with pytest.raises(InputError, match=r"anchors"):
        module.merge()


def test_the_command_merge_rejects_too_and_says_whom(merge, uploads, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(poison, "SCALE", 1000.0)  # ten times what one short epoch learned does little harm
    caplog.set_level("WARNING", logger="sap_lightning")
    harmful = Poison("painting", "scale").rewrite(Path(uploads[1]), tmp_path / "painting")
    others = [uploads[0], uploads[2]]
    rejecting = ["--merge.method=average", "--merge.reject_outliers=true", f"--federation.run_dir={tmp_path / 'run'}"]
    out, two = merge([harmful, *others], *rejecting), merge(others, "--merge.method=average", output="two")
    assert any(record.getMessage().startswith("painting left out") for record in caplog.records)
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (out, two))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    record = json.loads((out / "merge.json").read_text())
    assert sorted(source["name"] for source in record["sources"]) == ["cartoon", "photo"]
    assert record["rejected"] == ["painting"]
