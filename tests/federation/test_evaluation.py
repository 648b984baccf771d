"""Points are measured once, merges prepared once, and merged models kept as they were measured."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
from federation.runs import DOMAINS, SCALED, lines_of, outcome, rows_of, shown_rows, stored, table, times
from places import SHAPES_CLIP
from references import contents
from safetensors.torch import load_file

from sap_lightning.data.anchors import AnchorDataModule
from sap_lightning.data.domains import DomainDataModule
from sap_lightning.federation import poison
from sap_lightning.federation.one_shot import OneShotFederation
from sap_lightning.federation.points import Plan
from sap_lightning.federation.poison import Poison
from sap_lightning.functional.lora import Update, dense
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging import SAP, Average, Magnitude, MergeMethod
from sap_lightning.models.probe import AnchorProbe
from sap_lightning.modules.clip_lora import CLIPLoRAModule
from sap_lightning.modules.merge import MergeModule
from sap_lightning.results import Results


def cpu_trainer(**overrides: Any) -> L.Trainer:
    return L.Trainer(accelerator="cpu", devices=1, enable_model_summary=False, **overrides)


@pytest.fixture
def federation(world, copy, tmp_path):
    """A federation of the finished run's uploads, whose results are kept apart from that run's."""

    def of(*methods: MergeMethod, sparsities: tuple[float, ...] = (), **others: Any) -> OneShotFederation:
        return OneShotFederation(
            CLIPLoRAModule(SHAPES_CLIP),
            DomainDataModule(str(world / "domains"), base=SHAPES_CLIP),
            AnchorDataModule(str(world / "anchors"), num_pairs=8, base=SHAPES_CLIP),
            MergeModule(SHAPES_CLIP),
            cpu_trainer,
            str(copy),
            plan=Plan({method.name: method for method in methods}, sparsities, keeps_models=False),
            **{"unseen": ["photo", "sketch"], "results": Results(tmp_path / "apart"), **others},
        )

    return of


@pytest.fixture
def prepared(monkeypatch) -> list[tuple[str, tuple[str, ...]]]:
    """The method and the clients of every merge that was prepared since."""
    calls: list[tuple[str, tuple[str, ...]]] = []

    def watch(method: type[MergeMethod]) -> None:
        prepare = method.prepare

        def counted(self: MergeMethod, adapters: list[Adapter], *rest: Any) -> Any:
            calls.append((self.name, tuple(sorted(adapter.name for adapter in adapters))))
            return prepare(self, adapters, *rest)

        monkeypatch.setattr(method, "prepare", counted)

    for method in (Average, SAP, Magnitude):
        watch(method)
    return calls


WITHOUT_PHOTO, WITHOUT_SKETCH = ("cartoon", "painting", "sketch"), ("cartoon", "painting", "photo")


def test_a_method_is_prepared_once_for_all_sparsities_of_the_same_clients(federation, prepared):
    results = federation(Average(), Magnitude(), SAP(), sparsities=(0.0, 0.5, 0.9)).run()
    assert prepared == [
        (name, clients) for clients in (WITHOUT_PHOTO, WITHOUT_SKETCH) for name in ("average", "magnitude", "sap")
    ]
    assert Counter(row.model for row in results.rows if row.kind == "merge") == {"average": 2, "magnitude": 6, "sap": 6}


def test_honest_and_poisoned_clients_are_prepared_apart(federation, prepared):
    federation(Magnitude(), sparsities=(0.0, 0.5), unseen=["sketch"], poison=Poison("photo", "scale")).run()
    assert prepared == [("magnitude", WITHOUT_SKETCH)] * 2


def test_a_poison_that_changes_nothing_leaves_honest_clients_and_merges(federation, prepared):
    of = federation(Average(), unseen=["sketch"], poison=Poison("photo", "scale", 0.0))
    results = of.run()
    assert results.labels == ["zero-shot", "client cartoon", "client painting", "client photo", "average"]
    assert prepared == [("average", WITHOUT_SKETCH)]
    assert not any(point.poisoned for point in of.points_on("sketch"))
    assert [of.sent.label_of(adapter) for adapter in of.sent.adapters] == [""] * 3


def test_the_anchors_are_asked_once_about_each_client(federation, monkeypatch):
    asked, gradients = [], AnchorProbe.gradients

    def counted(self: AnchorProbe, *rest: Any) -> Any:
        asked.append(1)
        return gradients(self, *rest)

    monkeypatch.setattr(AnchorProbe, "gradients", counted)
    federation(SAP(), sparsities=(0.0, 0.5)).run()
    assert len(asked) == len(DOMAINS), "whatever the sparsity and the unseen domain"


def test_a_sparsity_is_measured_the_same_among_others_and_alone(federation, tmp_path):
    among = federation(SAP(), sparsities=(0.0, 0.9, 0.5), unseen=["sketch"]).run()
    alone = federation(SAP(0.5), unseen=["sketch"], results=Results(tmp_path / "alone")).run()
    (one,), (other,) = among.of("sap ρ=0.5"), alone.of("sap")
    assert one.measurement == other.measurement and one.metrics == other.metrics
    for together, apart in zip(among.predictions(one), alone.predictions(other), strict=True):
        assert torch.equal(together, apart)


def test_what_is_known_is_not_measured_again_under_whatever_name(federation, prepared, monkeypatch, tmp_path):
    first = federation(Average(), unseen=["sketch"]).run()
    again = federation(Average(), unseen=["sketch"])
    monkeypatch.setattr(again.evaluator, "test", lambda *_, **__: pytest.fail("all of it is known"))
    again.plan = Plan({"mean": Average()}, keeps_models=False)
    renamed = again.run()
    assert prepared == [("average", WITHOUT_SKETCH)]
    (known,), (mean,) = first.of("average"), renamed.of("mean")
    assert mean == replace(known, model="mean")
    assert len(rows_of(tmp_path / "apart")) == 1 + 3 + 2


def test_the_merge_module_becomes_zero_shot_a_client_and_a_merge_and_the_base_again(federation):
    of = federation(Average(), SAP(0.5), unseen=["sketch"])
    of.run()
    base = MergeModule(SHAPES_CLIP)
    base.configure_model()
    zero_shot, cartoon, *_, average, sap = of.points_on("sketch")

    def assert_is_base_and(update: Mapping[str, Update]) -> None:
        for name, weight in base.tower.state_dict().items():
            layer = name.removesuffix(".weight")
            expected = weight + dense(update[layer]) if layer in update else weight
            assert torch.equal(of.merge.tower.state_dict()[name], expected), name

    assert of.evaluation.become(cartoon) is None
    assert_is_base_and(cartoon.adapters[0].layers)
    for point in (sap, average, sap):
        merged = of.evaluation.become(point)
        assert merged.method == point.method and list(merged.adapters) == list(point.adapters)
        assert_is_base_and(merged.update)
    assert of.evaluation.become(zero_shot) is None
    assert_is_base_and({})


def test_predictions_are_those_that_the_accuracy_was_measured_by(finished):
    results = Results(finished)
    for row in results.rows:
        predictions = results.predictions(row)
        assert float(predictions.correct.float().mean()) == pytest.approx(row.metrics["accuracy"], abs=1e-6)
        assert predictions.images.tolist() == sorted(set(predictions.images.tolist()))
        torch.testing.assert_close(predictions.probabilities.sum(1), torch.ones(len(predictions.labels)))


def test_another_merge_method_in_a_finished_run_adds_a_row_and_leaves_the_others(copy, finished, run):
    kept = {name: content for part in ("clients", "uploads", "merged", "predictions")
            for name, content in contents(copy, f"{part}/**/*").items()}  # fmt: skip
    written = times(copy, "merged/*/*/*")
    run("fit", "--merge.method=ties", "--merge.method.sparsity=0.5", f"--federation.run_dir={copy}")
    before, after = table(finished), table(copy)
    assert sorted(after) == sorted([*before, "ties"])
    assert {row: after[row] for row in before} == before
    assert list(after["ties"]) == DOMAINS
    now = contents(copy)
    assert {name: now[name] for name in kept} == kept
    assert times(copy, "merged/*/*/*").items() >= written.items()
    for domain in DOMAINS:
        record = json.loads((copy / "merged" / domain / "ties" / "merge.json").read_text())
        assert (record["method"], record["settings"]["sparsity"]) == ("ties", 0.5)
        assert record["metrics"][f"accuracy on {domain}"] == pytest.approx(after["ties"][domain], abs=1e-6)


def test_a_merge_method_with_other_settings_takes_the_place_of_its_row_and_of_its_models(copy, run):
    shown = []
    for sparsity in (0.5, 1, 0.5):
        run("fit", "--merge.method=ties", f"--merge.method.sparsity={sparsity}", "--federation.unseen=photo",
            f"--federation.run_dir={copy}")  # fmt: skip
        record = json.loads((copy / "merged" / "photo" / "ties" / "merge.json").read_text())
        assert record["settings"]["sparsity"] == sparsity
        shown.append(shown_rows(copy))
    assert shown[0]["ties"] == shown[2]["ties"]
    assert shown[1]["ties"] == shown[1]["zero-shot"], "nothing of the adapters is left at sparsity 1"
    of_ties = [line for line in lines_of(copy) if line["model"] == "ties"]
    assert sorted(float(line["sparsity"]) for line in of_ties) == [0.5, 1], "what was measured is kept"
    assert sorted(row.settings["sparsity"] for row in Results(copy).of("ties")) == [0.5, 1]


def test_running_another_merge_method_again_changes_nothing(copy, run):
    again = ["--merge.method=median", "--federation.unseen=photo", f"--federation.run_dir={copy}"]
    run("fit", *again)
    before = contents(copy)
    run("fit", *again)
    assert contents(copy) == before


def test_a_merged_model_that_is_gone_from_disk_is_merged_again(copy, run):
    before, rows = outcome(copy), table(copy)
    shutil.rmtree(copy / "merged" / "photo" / "sap")
    run("fit", f"--federation.run_dir={copy}")
    merged = {name: content for name, content in outcome(copy).items() if name.startswith("merged/")}
    assert merged == {name: content for name, content in before.items() if name.startswith("merged/")}
    assert table(copy) == rows


def test_the_merged_model_of_poisoned_clients_is_not_kept(copy, finished, run):
    run("fit", *SCALED, "--federation.unseen=sketch", f"--federation.run_dir={copy}")
    assert contents(copy, "merged/**/*") == contents(finished, "merged/**/*")


def test_a_rejected_client_has_no_part_in_the_merge(copy, run, monkeypatch):
    monkeypatch.setattr(poison, "SCALE", 1000.0)  # ten times what one short epoch learned does little harm
    rejecting = [
        *SCALED,
        "--federation.poison.domain=painting",
        "--merge.reject_outliers=true",
        "--federation.unseen=sketch",
    ]
    run("fit", *rejecting, f"--federation.run_dir={copy}")
    rejected = {
        model: stored(copy, f"{model}, painting scale, rejecting outliers", "sketch") for model in ("average", "sap")
    }
    assert [row["rejected"] for row in rejected.values()] == [["painting"], ["painting"]]
    assert [
        line["rejected"] for line in lines_of(copy) if line["condition"] == "painting scale, rejecting outliers"
    ] == ["painting"] * 2
    honest = stored(copy, "sap, rejecting outliers", "sketch")["rejected"]
    assert honest == [], "it is the scaled update that stands out"
    run("fit", "--federation.clients=[cartoon,photo]", "--federation.unseen=sketch", f"--federation.run_dir={copy}")
    for model, row in rejected.items():
        without = stored(copy, model, "sketch")
        assert len(without["sources"]) == 2 and without["metrics"] == row["metrics"], model
        together, apart = (load_file(copy / "predictions" / f"{r['measurement']}.safetensors") for r in (row, without))
        assert all(torch.equal(together[name], apart[name]) for name in apart), model
