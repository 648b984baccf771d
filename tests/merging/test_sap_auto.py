"""SAPAuto: what it tries on the anchors, what it chooses, and that this is what it applies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping

import pytest
import torch
from adapters import adapter_of, reaching
from probes import captions, images, model_of, probe, relative_gap, tower, unlike_clients
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import Update, dense
from sap_lightning.io.adapter import Adapter
from sap_lightning.io.upload_files import WEIGHTS_FILE
from sap_lightning.merging.clients import client_weights
from sap_lightning.merging.distances import mean_cosine
from sap_lightning.merging.pruning import Pruning
from sap_lightning.merging.reach import reach_of
from sap_lightning.merging.sap import SAP
from sap_lightning.merging.sap_auto import SAPAuto, Trial
from sap_lightning.models.probe import AnchorProbe

WEIGHTS = [0.5, 0.3, 0.2]


def auto() -> SAPAuto:
    return SAPAuto(sparsities=[0.0, 0.5, 0.9], spaces=["delta", "factor"], scales=[0.5, 1.0, 1.5])


def disagreeing() -> list[Adapter]:
    """Clients of which the second wants the opposite of the first, but half as much."""
    first, _, third = unlike_clients()
    layers = {name: layer._replace(B=-layer.B / 2) for name, layer in first.layers.items()}
    return [first, adapter_of(layers, "contrary"), third]


def agreeing() -> list[Adapter]:
    """Two clients of which the second wants more of what the first does."""
    first = unlike_clients()[0]
    layers = {name: layer._replace(B=layer.B * 1.5) for name, layer in first.layers.items()}
    return [first, adapter_of(layers, "more of it")]


@pytest.fixture(scope="module")
def prepared() -> Pruning:
    return auto().prepare(disagreeing(), WEIGHTS, probe())


@pytest.fixture
def tried(prepared) -> list[Trial]:
    return [Trial(**trial) for trial in prepared.findings["tried"]]


@pytest.fixture
def chosen(prepared) -> Trial:
    return Trial(**prepared.findings["chosen"])


def test_every_space_is_tried_with_every_sparsity_and_then_the_scales_of_the_best(tried):
    grid = [(space, sparsity, 1.0) for space in ("delta", "factor") for sparsity in (0.0, 0.5, 0.9)]
    best = min(tried[:6], key=lambda trial: trial.loss)
    assert [trial[:3] for trial in tried] == [*grid, *((best.space, best.sparsity, scale) for scale in (0.5, 1.5))]


def test_one_half_of_the_anchors_scores_and_the_other_judges(tried, chosen):
    for trial in tried:
        scored = SAP(trial.sparsity, trial.space).merge(disagreeing(), WEIGHTS, scoring_half())
        update = {name: trial.scale * dense(layer) for name, layer in scored.items()}
        assert trial.loss == pytest.approx(held_out_loss(update), abs=1e-5)
    assert chosen.loss == min(trial.loss for trial in tried)


def scoring_half() -> AnchorProbe:
    """A probe to which every other anchor does not exist."""
    return probe(batches=lambda: [(images(8)[::2], torch.arange(4))], captions=captions(8)[::2])


@torch.no_grad()
def held_out_loss(update: Mapping[str, Update]) -> float:
    precise, _ = model_of({})
    weights = {
        f"{name}.weight": tower().get_submodule(name).weight.double() + dense(layer).double()
        for name, layer in update.items()
    }
    features = functional_call(precise, weights, (images(8).double()[1::2],)).image_embeds
    return float((1 - torch.cosine_similarity(features, captions(8).double()[1::2])).mean())


def test_half_is_kept_and_the_mean_lengthened_where_the_clients_agree():
    prepared = auto().prepare(agreeing(), WEIGHTS[:2], probe())
    assert prepared.findings["agreement"] == pytest.approx(1)
    expected = SAP(sparsity=0.5, scale=1.2).merge(agreeing(), WEIGHTS[:2], probe())
    assert relative_gap(prepared.apply(), {name: dense(update) for name, update in expected.items()}) == 0
    (trial,) = prepared.findings["tried"]
    assert trial == prepared.findings["chosen"]
    assert trial == {"space": "delta", "sparsity": 0.5, "scale": 1.2, "loss": pytest.approx(probe().loss(expected))}
    assert prepared.findings["loss_without_merge"] == pytest.approx(probe().loss({}))


def test_where_the_clients_agree_its_own_sparsity_and_scale_are_kept():
    method = SAPAuto(agreed_sparsity=0.7, agreed_scale=0.9, reduction="square")
    expected = SAP(0.7, scale=0.9, reduction="square").merge(agreeing(), WEIGHTS[:2], probe())
    assert relative_gap(method.merge(agreeing(), WEIGHTS[:2], probe()), expected) == 0


def test_where_clients_say_how_far_they_reach_the_merge_is_as_long_as_that():
    adapters = [reaching(one, [0.2, 0.3, 0.4, 0.3, 0.1]) for one in disagreeing()]
    prepared = auto().prepare(adapters, WEIGHTS, probe())
    plain = SAP(sparsity=0.65).merge(adapters, WEIGHTS, probe())
    wanted = reach_of(adapters, WEIGHTS).length
    size = sum(float(dense(update).double().square().sum()) for update in plain.values()) ** 0.5
    expected = {name: wanted / size * dense(update) for name, update in plain.items()}
    assert relative_gap(prepared.apply(), expected) < 1e-5
    assert prepared.findings["transfers"] is False
    assert prepared.findings["length"] == pytest.approx(wanted)


def test_clients_count_by_what_they_win_elsewhere_unless_it_is_said_otherwise():
    said = [0.25, 0.25, 0.25, 0.25, 0.75], [0.25, 0.25, 0.25, 0.25, 0.5]
    adapters = [reaching(one, of) for one, of in zip(agreeing(), said, strict=True)]
    method = auto()
    assert (method.own_weights(adapters), method.own_weights(agreeing())) == ("reach", "uniform")
    assert SAP().own_weights(adapters) == "uniform"
    by_reach = method.merge(adapters, client_weights(adapters, "reach"), probe())
    assert relative_gap(method.merge(adapters, anchors=probe()), by_reach) == 0
    assert relative_gap(method.merge(adapters, [0.5, 0.5], probe()), by_reach) > 0.01


def test_its_sparsity_at_that_length_is_kept():
    adapters = [reaching(one) for one in agreeing()]
    few, many = (SAPAuto(reach_sparsity=rho).merge(adapters, WEIGHTS[:2], probe()) for rho in (0.95, 0.1))
    kept = [sum(int(dense(update).count_nonzero()) for update in merged.values()) for merged in (few, many)]
    assert kept[0] < kept[1] / 4


def test_where_nothing_carries_over_the_merge_is_the_base_and_the_log_says_so(caplog):
    adapters = [reaching(one, [0.6, 0.5, 0.4, 0.3, 0.3]) for one in agreeing()]
    with caplog.at_level("WARNING"):
        merged = auto().merge(adapters, WEIGHTS[:2], probe())
    assert "nothing that the clients learned carries over" in caplog.text
    assert merged and all(not dense(update).any() for update in merged.values())


def test_the_agreement_is_the_mean_cosine_of_the_clients(prepared):
    assert prepared.findings["agreement"] == mean_cosine(disagreeing()) < 0


def test_what_was_chosen_is_applied_and_can_be_applied_at_other_sparsities(prepared, chosen):
    scored = SAP(chosen.sparsity, chosen.space).prepare(disagreeing(), WEIGHTS, scoring_half())
    for sparsity in (None, 0.3):
        expected = {name: chosen.scale * dense(layer) for name, layer in scored.apply(sparsity).items()}
        assert relative_gap(prepared.apply(sparsity), expected) < 1e-5


def test_how_it_prunes_is_sap_at_what_was_chosen(prepared, chosen):
    assert prepared.method == SAP(chosen.sparsity, chosen.space, scale=chosen.scale)
    scored = SAP(chosen.sparsity, chosen.space).prepare(disagreeing(), WEIGHTS, scoring_half())
    for one in disagreeing():
        masks, expected = prepared.kept(one), scored.kept(one)
        different = sum(int((a != b).sum()) for n in expected for a, b in zip(masks[n], expected[n], strict=True))
        assert different <= 2, "but for scores that differ in their last bits"


def test_every_client_is_scored_once_in_every_space_whatever_is_tried(asked):
    anchors = probe()
    auto().prepare(disagreeing(), WEIGHTS, anchors)
    assert len(asked) == 2 * 3
    auto().prepare(disagreeing()[:2], WEIGHTS[:2], anchors)
    assert len(asked) == 2 * 3, "the halves share the memory of the probe they are of"


def test_the_findings_are_json_and_name_every_trial(prepared):
    findings = json.loads(json.dumps(prepared.findings))
    assert findings == prepared.findings
    assert findings["chosen"] in findings["tried"]
    assert len(findings["tried"]) == 2 * 3 + 2
    assert findings["tried"][0].keys() == {"space", "sparsity", "scale", "loss"}


def record_of(run, uploads, tmp_path):
    """What sap_auto found of these uploads, as the command writes it down."""
    run(
        "merge",
        "--merge.method=sap_auto",
        "--merge.method.sparsities=[0.5,0.9]",
        "--merge.method.spaces=[delta]",
        "--merge.method.scales=[1.0,2.0]",
        f"--merge.output={tmp_path / 'out'}",
        "--uploads",
        *map(str, uploads),
    )
    return json.loads((tmp_path / "out" / "merge.json").read_text())


def test_the_command_leaves_the_findings_in_the_record(run, finished, tmp_path):
    uploads = [shutil.copytree(finished / "uploads" / "photo", tmp_path / name) for name in ("one", "opposite")]
    for upload in uploads:
        (upload / "manifest.json").unlink()
    factors = load_file(uploads[1] / WEIGHTS_FILE)
    save_file({key: -value if "lora_B" in key else value for key, value in factors.items()}, uploads[1] / WEIGHTS_FILE)
    record = record_of(run, uploads, tmp_path)
    assert len(record["findings"]["tried"]) == 3
    assert record["findings"]["chosen"]["loss"] == min(trial["loss"] for trial in record["findings"]["tried"])
    assert record["settings"]["sparsities"] == [0.5, 0.9]


def test_the_command_leaves_how_far_the_clients_reach_in_the_record(run, finished, tmp_path):
    record = record_of(run, [finished / "uploads" / name for name in ("cartoon", "photo")], tmp_path)
    assert record["findings"]["transfers"] in (True, False)
    assert record["findings"]["carried_over"]["0.0"] == 0


def test_it_needs_two_anchors_and_something_to_try():
    with pytest.raises(InputError, match="holds out half of the anchors"):
        auto().prepare(disagreeing(), WEIGHTS, probe(1))
    auto().prepare(disagreeing(), WEIGHTS, probe(2))
    with pytest.raises(InputError, match=r"sap_auto looks at anchors; give --anchors\.root"):
        auto().prepare(disagreeing(), WEIGHTS)
    for empty in ("sparsities", "spaces", "scales"):
        with pytest.raises(InputError, match="something to try"):
            SAPAuto(**{empty: []})
    with pytest.raises(InputError, match=r"sparsities must lie in \[0, 1\]"):
        SAPAuto(sparsities=[0.5, 2])
    with pytest.raises(InputError, match=r"merge\.method\.scales must be above 0, got 0"):
        SAPAuto(scales=[1.0, 0.0])
    with pytest.raises(InputError, match=r"merge\.method\.agreed_sparsity must lie in \[0, 1\]"):
        SAPAuto(agreed_sparsity=1.5)
    with pytest.raises(InputError, match=r"merge\.method\.agreed_scale must be above 0"):
        SAPAuto(agreed_scale=-1.0)
