"""What is measured: the points of a federation, and what each one's measurement depends on."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapters import reaching
from federation.runs import rows_of
from torch import nn

from sap_lightning.federation.points import Plan, Point, Points, Sent
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.adapter import Adapter, sha256_of
from sap_lightning.merging import SAP, TIES, Average, CoreSpace, LiNeS, Magnitude, MergeMethod, SAPAuto
from sap_lightning.modules import MergeModule
from sap_lightning.results import Result


def adapter(name: str, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(2, 4, generator=generator), torch.randn(3, 2, generator=generator)
    layers = {"fc": LoRALayer(A, B)}
    return Adapter(name, layers, sha256_of(layers))


HONEST = [adapter(name, seed) for seed, name in enumerate(["sketch", "photo", "cartoon", "painting"])]
HARMFUL = adapter("photo", 9)
POISONED = Sent(HONEST, [HARMFUL], "photo noise")


def points(plan: Plan, sent: Sent = Sent(HONEST), **changed: Any) -> Points:  # noqa: B008  # it cannot be changed
    """Points of a federation whose parts have as much as points look at, but for what is changed."""
    data = {"class_names": ["dog", "cat"], "fingerprint": lambda unseen: f"images of {unseen}", "seed": 0}
    anchors = {"root": "anchors", "num_pairs": 8, "noise": False, "batch_size": 4, "fingerprint": "pairs"}
    texts = SimpleNamespace(model=nn.Linear(2, 2), projection=nn.Linear(2, 2))
    for parameter in nn.ModuleList([texts.model, texts.projection]).parameters():
        nn.init.ones_(parameter)
    merge = {"base": "clip", "base_fingerprint": "b", "templates": ("a {}",), "texts": texts, "logit_scale": 100.0}
    merge |= {"weights": None, "max_share": None, "reject_outliers": False}
    precision, provenance = "32-true", {"commit": "abc"}
    for name, value in changed.items():
        next(part for part in (data, anchors, merge) if name in part)[name] = value
    parts = [SimpleNamespace(**part) for part in (data, anchors, merge)]
    parts[2].weights_in = partial(MergeModule.weights_in, parts[2])
    return Points(plan, sent, *parts, precision, provenance)


def plan_of(*methods: MergeMethod, **settings: Any) -> Plan:
    return Plan({method.name: method for method in methods}, **settings)


def labels(found: list[Point]) -> list[str]:
    return [point.result.label for point in found]


def test_the_server_gets_adapters_in_the_order_of_their_content():
    by_content = sorted(HONEST, key=lambda adapter: adapter.sha256)
    assert [one.name for one in by_content] != [one.name for one in HONEST], "or the order would show nothing"
    for given in (HONEST, HONEST[::-1]):
        assert Sent(given).adapters == by_content
    assert Sent(HONEST).all == HONEST


def test_a_poisoned_adapter_takes_the_place_of_the_honest_one():
    expected = sorted([HONEST[0], *HONEST[2:], HARMFUL], key=lambda adapter: adapter.sha256)
    assert POISONED.adapters == expected
    assert POISONED.all == [*HONEST, HARMFUL]
    assert POISONED.label_of(HARMFUL) == "photo noise"
    assert [POISONED.label_of(adapter) for adapter in HONEST] == [""] * 4


@pytest.mark.parametrize(
    ("method", "sparsities", "expected", "swept"),
    [
        (Average(), (), [None], False),
        (Average(), (0.0, 0.5), [None], False),
        (SAPAuto(), (0.0, 0.5), [None], False),
        (SAP(0.9), (), [0.9], False),
        (SAP(0.9), (0.0, 0.5), [0.0, 0.5], True),
        (TIES(0.3), (0.5,), [0.5], True),
        (Magnitude(0.0), (), [0.0], False),
    ],
    ids=lambda value: value.name if isinstance(value, MergeMethod) else str(value),
)
def test_a_plan_measures_a_method_at_its_sparsities_if_it_prunes_or_at_its_own(method, sparsities, expected, swept):
    plan = plan_of(method, sparsities=sparsities)
    assert list(plan.sparsities_of(method)) == expected
    assert plan.sweeps(method) is swept
    merges = [point.result for point in points(plan).on("photo") if point.method]
    assert [(merge.sparsity, merge.swept) for merge in merges] == [(sparsity, swept) for sparsity in expected]


def test_every_unseen_domain_has_zero_shot_the_other_clients_by_name_and_merges_of_them():
    found = list(points(plan_of(Average(), SAP(), sparsities=(0.0, 0.5))).on("photo"))
    assert labels(found) == [
        "zero-shot", "client cartoon", "client painting", "client sketch", "average", "sap ρ=0", "sap ρ=0.5",
    ]  # fmt: skip
    assert [point.result.kind for point in found] == ["zero-shot", *["client"] * 3, *["merge"] * 3]
    others = [one for one in HONEST if one.name != "photo"]
    assert [list(point.adapters) for point in found[4:]] == [others] * 3
    for point in found:
        assert point.result.sources == [one.sha256 for one in point.adapters]
        assert point.result.unseen == "photo" and not point.poisoned
        assert point.result.metrics == {} and point.result.provenance == {"commit": "abc"}
    assert all(point.method is None for point in found[:4])


def test_a_poisoned_client_is_measured_beside_the_honest_one_alone_and_in_each_merge():
    found = list(points(plan_of(Average(), TIES()), POISONED).on("sketch"))
    assert labels(found) == [
        "zero-shot",
        "client cartoon",
        "client painting",
        "client photo",
        "client photo, photo noise",
        "average",
        "average, photo noise",
        "ties",
        "ties, photo noise",
    ]
    assert [point.poisoned for point in found] == ["noise" in point.result.condition for point in found]
    for honest, harmful in ((found[5], found[6]), (found[7], found[8])):
        assert set(harmful.result.sources) - set(honest.result.sources) == {HARMFUL.sha256}
        assert harmful.result.sources == sorted(harmful.result.sources)
    assert len({point.result.key for point in found}) == len(found)


def test_on_its_own_domain_a_poisoned_client_has_no_part():
    found = list(points(plan_of(Average()), POISONED).on("photo"))
    assert labels(found) == ["zero-shot", "client cartoon", "client painting", "client sketch", "average"]


def test_a_merge_that_looks_at_batches_is_another_with_other_batches():
    by_batch = SAP(reduction="mean_then_abs", loss="contrastive_symmetric")
    for method, matters in ((by_batch, True), (SAP(), False)):
        one, other = (list(points(plan_of(method), batch_size=size).on("photo"))[-1].result for size in (4, 8))
        assert ("batch_size" in one.settings["anchors"]) is (one.measurement != other.measurement) is matters


def test_a_merge_that_rejects_outliers_says_so_in_its_condition():
    found = list(points(plan_of(Average()), POISONED, reject_outliers=True).on("sketch"))
    assert labels(found)[-2:] == ["average, rejecting outliers", "average, photo noise, rejecting outliers"]
    settings = found[-1].result.settings
    assert settings["reject_outliers"] is True and settings["anchors"]["num_pairs"] == 8
    assert labels(found)[:2] == ["zero-shot", "client cartoon"]


def test_the_variant_of_a_sweep_is_in_every_point():
    plan = replace(plan_of(Average()), variant={"anchors.num_pairs": 4})
    assert {str(point.result.variant) for point in points(plan).on("photo")} == {"{'anchors.num_pairs': 4}"}


def results(**changed: Any) -> dict[str, Result]:
    """Zero-shot, a client, a merge that looks at no anchors and one that does."""
    found = points(plan_of(Average(), SAP()), **changed).on("photo")
    return {label: point.result for point in found if (label := point.result.label) != "client painting"}


ALL, MERGES, SCORED = {"zero-shot", "client cartoon", "client sketch", "average", "sap"}, {"average", "sap"}, {"sap"}
OTHER_TEXTS = SimpleNamespace(model=nn.Linear(2, 2), projection=nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("changed", "remeasured"),
    [
        ({"class_names": ["cat", "dog"]}, ALL),
        ({"fingerprint": lambda unseen: "other images"}, ALL),
        ({"templates": ("a photo of a {}",)}, ALL),
        ({"texts": OTHER_TEXTS}, ALL),
        ({"logit_scale": 50.0}, ALL),
        ({"base": "other clip"}, ALL),
        ({"base_fingerprint": "c"}, ALL),
        ({"weights": "samples"}, MERGES),
        ({"max_share": 0.5}, MERGES),
        ({"reject_outliers": True}, MERGES),
        ({"num_pairs": 4}, SCORED),
        ({"noise": True}, SCORED),
        ({"root": "elsewhere"}, SCORED),
        ({"seed": 1}, set()),
    ],
    ids=lambda value: "+".join(sorted(value)) if isinstance(value, dict) else "",
)
def test_a_model_is_measured_again_when_something_that_its_metrics_depend_on_changes(changed, remeasured):
    before, after = ({of.model: of.measurement for of in each.values()} for each in (results(), results(**changed)))
    assert {model for model in before if before[model] != after[model]} == remeasured
    assert len(set(before.values())) == len(before)


def test_a_method_s_settings_and_sparsity_are_in_its_measurement():
    plans = [
        plan_of(SAP(0.8)),
        plan_of(SAP(0.9)),
        plan_of(SAP(0.8, space="factor")),
        plan_of(SAP(0.1), sparsities=[0.85]),
    ]
    merges = [list(points(plan).on("photo"))[-1].result for plan in plans]
    assert len({merge.measurement for merge in merges}) == 4
    assert [merge.settings["sparsity"] for merge in merges] == [0.8, 0.9, 0.8, 0.85]
    known = list(points(plan_of(SAP(0.1), sparsities=[0.8])).on("photo"))[-1].result
    assert known.measurement == merges[0].measurement, "ρ is what it is measured at, wherever it was set"
    assert known.key != merges[0].key


def test_a_method_on_top_of_another_is_measured_apart_from_it():
    methods = [Average(), CoreSpace("average"), LiNeS("average"), LiNeS("ties"), LiNeS(TIES(0.9)), LiNeS(TIES(0.7))]
    merges = [list(points(plan_of(method)).on("photo"))[-1].result for method in methods]
    assert len({merge.measurement for merge in merges}) == len(methods)
    assert (merges[1].settings["method"], merges[1].settings["method.method"]) == ("core_space", "average")
    assert merges[4].settings["method.method"]["settings"]["sparsity"] == merges[4].settings["sparsity"] == 0.9


def test_how_clients_count_by_themselves_and_when_it_is_asked_for_is_one_measurement():
    saying = Sent([reaching(one) for one in HONEST])
    for method, sent, own in (
        (SAPAuto(), saying, "reach"),
        (LiNeS(SAPAuto()), saying, "reach"),
        (SAPAuto(), Sent(HONEST), "uniform"),
        (SAP(), saying, "uniform"),
    ):
        merges = [list(points(plan_of(method), sent, weights=way).on("photo"))[-1].result for way in (None, own)]
        assert merges[0].measurement == merges[1].measurement
        assert merges[0].settings["weights"] == own


def test_the_images_of_a_domain_are_looked_up_once():
    looked_up: Counter[str] = Counter()

    def fingerprint(unseen: str) -> str:
        looked_up[unseen] += 1
        return unseen

    of = points(plan_of(Average(), SAP(), sparsities=(0.0, 0.5)), fingerprint=fingerprint)
    for unseen in ("photo", "sketch", "photo"):
        assert len(list(of.on(unseen))) == 7
    assert looked_up == {"photo": 1, "sketch": 1}


def test_a_line_of_the_results_says_what_its_model_was_made_from(finished):
    rows = rows_of(finished)
    kinds = {(row["model"], row["unseen"]): row["kind"] for row in rows}
    assert kinds["zero-shot", "photo"] == "zero-shot" and kinds["client photo", "sketch"] == "client"
    assert kinds["average", "photo"] == kinds["sap", "photo"] == "merge"
    sources = {(row["model"], row["unseen"]): row["sources"] for row in rows}
    assert sources["zero-shot", "photo"] == []
    assert len(sources["sap", "photo"]) == 3
    assert not set(sources["sap", "photo"]) & set(sources["client photo", "sketch"])
    settings = {(row["model"], row["unseen"]): row["settings"] for row in rows}
    assert settings["zero-shot", "photo"] == settings["client photo", "sketch"] == {}
    assert settings["average", "photo"] == {"method": "average", "weights": "uniform"}
    assert settings["sap", "photo"]["sparsity"] == 0.9
    assert settings["sap", "photo"]["anchors"]["num_pairs"] == 8
