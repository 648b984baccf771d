from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sap_lightning.errors import InputError
from sap_lightning.results import (
    Predictions,
    Result,
    Results,
    Spread,
    TableRow,
    difference,
    interval_text,
    left_out,
    markdown_table,
    rich_table,
    tabulate,
)

UNSEEN = ["photo", "sketch"]
IMAGES = 8


def answers(right: int, seed: int = 0) -> Predictions:
    """Of 8 images with label 0, the first so many are classified right."""
    predicted = (torch.arange(IMAGES) >= right).long()
    probabilities = torch.eye(2)[predicted] * 0.8 + 0.1
    return Predictions(probabilities, torch.zeros(IMAGES, dtype=torch.long), torch.arange(IMAGES))


def result(model: str, unseen: str, right: int, **changed: Any) -> Result:
    """A model that has classified so many of 8 images right; its measurement depends on model, domain and seed."""
    known = Result(
        model,
        unseen,
        "",
        metrics={"accuracy": right / IMAGES, "macro_accuracy": right / IMAGES / 2, "ece": right / 100},
    )
    changed.setdefault("measurement", f"{model}-{unseen}-{changed.get('seed', 0)}-{right}")
    return Result(**{**vars(known), **changed})


def measure(results: Results, *rows: Result) -> None:
    """Adds results with the predictions they were measured by."""
    for row in rows:
        results.keep_predictions(row.measurement, answers(round(row.metrics["accuracy"] * IMAGES)))
        results.add(row)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Of both clients only the one that has not seen the domain is measured on it."""
    results = Results(tmp_path)
    measure(
        results,
        result("sap", "sketch", 6),
        result("sap", "photo", 4),
        result("client sketch", "photo", 5),
        result("client photo", "sketch", 3),
        result("zero-shot", "photo", 2),
        result("zero-shot", "sketch", 4),
    )
    return results


def cells(rows: Sequence[TableRow]) -> dict[str, list[str]]:
    return {row.label: [str(cell) for cell in [*row.cells, row.mean]] for row in rows}


@pytest.mark.parametrize(
    ("known", "label"),
    [
        (Result("sap", "photo", "m"), "sap"),
        (Result("sap", "photo", "m", sparsity=0.95), "sap"),
        (Result("sap", "photo", "m", sparsity=0.95, swept=True), "sap ρ=0.95"),
        (Result("sap", "photo", "m", sparsity=0.0, swept=True), "sap ρ=0"),
        (Result("average", "photo", "m", variant={"anchors.num_pairs": 4}), "average, num_pairs=4"),
        (Result("average", "photo", "m", variant={"trainer.lr": 1e-3, "model.rank": 2}), "average, lr=0.001, rank=2"),
        (Result("sap", "photo", "m", variant={"model.targets": ["q", "v"]}), "sap, targets=q+v"),
        (Result("sap", "photo", "m", variant={"anchors.root": "/data/coco/"}), "sap, root=coco"),
        (Result("sap", "photo", "m", seed=3, sparsity=0.5, swept=True), "sap ρ=0.5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_label_is_the_model_and_what_a_sweep_changed_but_not_the_seed(known: Result, label: str) -> None:
    assert known.label == label


def test_a_point_is_known_by_its_measurement_row_domain_and_seed(results: Results, tmp_path: Path) -> None:
    measured = result("sap", "photo", 4)
    for each in (results, Results(tmp_path)):
        assert each.has(measured)
        for other in ({"measurement": "other"}, {"model": "average"}, {"unseen": "cartoon"}, {"seed": 1}):
            assert not each.has(Result(**{**vars(measured), **other})), other
        assert not each.has(Result(**{**vars(measured), "sparsity": 0.5, "swept": True}))
        assert not each.has(Result(**{**vars(measured), "variant": {"anchors.num_pairs": 4}}))


def test_what_was_measured_under_another_name_need_not_be_measured_again(results: Results) -> None:
    known = results.measured(result("sap", "photo", 4).measurement)
    assert known is not None and known.metrics["accuracy"] == 0.5
    assert results.measured("other") is None


def test_a_result_whose_predictions_are_gone_is_not_known(results: Results, tmp_path: Path) -> None:
    measured = result("sap", "photo", 4)
    (tmp_path / "predictions" / f"{measured.measurement}.safetensors").unlink()
    assert not results.has(measured)
    assert results.measured(measured.measurement) is None


def test_a_new_result_takes_the_place_of_the_old_one_of_the_same_point(results: Results) -> None:
    point = result("sap", "photo", 4)
    measure(results, replace(point, metrics={**point.metrics, "accuracy": 0.875}))
    assert len(results.rows) == 6
    assert [row.metrics["accuracy"] for row in results.of("sap") if row.unseen == "photo"] == [0.875]


def test_points_of_other_settings_are_kept_and_a_table_is_of_those_asked_for(results: Results) -> None:
    points = {
        scale: [result("ties", unseen, right, settings={"scale": scale}) for unseen in UNSEEN]
        for scale, right in ((1.0, 3), (2.0, 4))
    }
    for measured in points.values():
        measure(results, *measured)
    assert len(results.of("ties")) == 4
    for scale, right in ((1.0, "0.375"), (2.0, "0.500")):
        part = results.only(points[scale])
        assert part.rows == points[scale]
        assert cells(tabulate(part, UNSEEN)) == {"ties": [right] * 3}


def test_the_clients_left_out_are_told_once_for_all_merges_of_a_condition(results: Results) -> None:
    assert left_out(results) == []
    for model in ("average", "sap"):
        measure(results, result(model, "photo", 3, condition="rejecting outliers", rejected=["sketch", "cartoon"]))
    assert left_out(results) == [
        "Left out of the merges for unseen photo, seed 0 (rejecting outliers): sketch, cartoon."
    ]


def test_seeds_variants_and_sparsities_stand_beside_each_other(results: Results) -> None:
    points = [
        {"seed": 0},
        {"seed": 1},
        {"seed": 0, "variant": {"model.rank": 2}, "settings": {"anchors": 4}},
        {"seed": 0, "sparsity": 0.5, "swept": True, "settings": {"sparsity": 0.5}},
    ]
    measure(results, *(result("ties", "photo", 3, **point) for point in points))
    assert [row.model for row in results.rows].count("ties") == 4


def test_the_order_of_rows_is_zero_shot_clients_and_merges_as_measured(results: Results) -> None:
    measure(results, result("average", "photo", 4))
    assert results.labels == ["zero-shot", "client photo", "client sketch", "sap", "average"]


def test_every_result_is_on_disk_as_soon_as_it_is_added(results: Results, tmp_path: Path) -> None:
    row = result("own", "photo", 1, variant={"model.rank": 2}, rejected=["cartoon"], provenance={"commit": "abc"})
    measure(results, row)
    again = Results(tmp_path)
    assert again.rows == results.rows and row in again.rows
    written = again.json.read_bytes(), again.csv.read_bytes()
    again.write()
    assert (again.json.read_bytes(), again.csv.read_bytes()) == written


def test_the_csv_has_a_line_for_each_point_with_all_that_it_was_made_with(tmp_path: Path) -> None:
    results = Results(tmp_path)
    measure(
        results,
        result("zero-shot", "photo", 2),
        result(
            "sap",
            "photo",
            4,
            seed=3,
            sparsity=0.5,
            swept=True,
            variant={"model.rank": 2, "anchors.num_pairs": 4},
            settings={"space": "delta", "sparsity": 0.5},
            sources=["a", "b"],
            rejected=["cartoon", "sketch"],
            provenance={"config": "c0ffee", "commit": "abc-dirty", "versions": "torch 2, peft 1"},
            measurement="m",
        ),
    )
    with results.csv.open() as lines:
        zero_shot, sap = csv.DictReader(lines)
    assert sap == {
        "row": results.rows[1].label,
        "model": "sap",
        "sparsity": "0.5",
        "unseen": "photo",
        "seed": "3",
        "condition": "",
        "variant": '{"anchors.num_pairs": 4, "model.rank": 2}',
        "accuracy": "0.500000",
        "macro_accuracy": "0.250000",
        "ece": "0.040000",
        "rejected": "cartoon;sketch",
        "settings": '{"space": "delta", "sparsity": 0.5}',
        "sources": "a;b",
        "measurement": "m",
        "config": "c0ffee",
        "commit": "abc-dirty",
        "versions": "torch 2, peft 1",
    }
    assert {zero_shot[name] for name in ("sparsity", "variant", "rejected", "settings", "sources", "commit")} == {""}
    assert (zero_shot["model"], zero_shot["accuracy"]) == ("zero-shot", "0.250000")


def test_predictions_come_back_as_they_were_and_say_what_is_correct(results: Results, tmp_path: Path) -> None:
    row = result("sap", "photo", 4)
    kept = Results(tmp_path).predictions(row)
    for stored, given in zip(kept, answers(4), strict=True):
        assert torch.equal(stored, given) and stored.dtype == given.dtype
    assert kept.correct.tolist() == [True] * 4 + [False] * 4
    assert [path.suffix for path in (tmp_path / "predictions").iterdir()] == [".safetensors"] * 6


@pytest.mark.parametrize(
    "content",
    [
        '[{"model": "sap", "unseen": "photo", "sources": [], "metrics": {}, "settings": {}}]',
        '[{"model": "sap", "unseen": "photo", "measurement": "m", "of_later": 1}]',
        '{"sap": 0.5}',
        "[1",
        "",
    ],
    ids=["before sweeps", "later", "no list", "cut", "empty"],
)
def test_results_of_another_version_are_refused_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(
        InputError, match=r"results\.json: not results of this version .*--federation\.run_dir"
    ) as refused:
        Results(tmp_path)
    assert "\n" not in str(refused.value)


def test_the_table_has_the_best_client_of_each_domain_after_the_clients(results: Results) -> None:
    measure(results, result("client cartoon", "photo", 6), result("client cartoon", "sketch", 1))
    table = cells(tabulate(results, UNSEEN))
    assert list(table) == ["zero-shot", "client cartoon", "client photo", "client sketch", "best client", "sap"]
    assert table["best client"] == ["0.750", "0.375", "0.562"]
    assert table["client photo"] == ["None", "0.375", "0.375"]


def test_the_table_can_be_of_some_domains(results: Results) -> None:
    assert cells(tabulate(results, ["sketch"]))["sap"] == ["0.750", "0.750"]


def test_a_poisoned_client_is_never_the_best_one(results: Results) -> None:
    measure(results, *(result("client photo", unseen, 8, condition="photo noise") for unseen in UNSEEN))
    table = cells(tabulate(results, UNSEEN))
    assert table["client photo, photo noise"] == ["1.000"] * 3
    assert table["best client"] == ["0.625", "0.375", "0.500"]


def test_a_best_client_is_of_its_own_seed_and_variant(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for seed, rights in enumerate([(5, 2), (1, 4)]):
        for name, right in zip(["client a", "client b"], rights, strict=True):
            measure(results, result(name, "photo", right, seed=seed))
    measure(results, result("client a", "photo", 8, variant={"model.rank": 2}))
    table = cells(tabulate(results, ["photo"]))
    assert table["best client"] == ["0.562 ± 0.088", "0.562 ± 0.088"], "5/8 of seed 0 and 4/8 of seed 1"
    assert table["best client, rank=2"] == ["1.000", "1.000"]


def test_the_spread_is_over_seeds_of_the_mean_over_domains(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for seed, rights in enumerate([(2, 4), (4, 6), (6, 8)]):
        measure(results, *(result("sap", unseen, n, seed=seed) for unseen, n in zip(UNSEEN, rights, strict=True)))
    (row,) = tabulate(results, UNSEEN)
    assert row.cells == [Spread(0.5, 0.25, 3), Spread(0.75, 0.25, 3)]
    assert row.mean == Spread(0.625, 0.25, 3)
    assert str(row.mean) == "0.625 ± 0.250"
    assert row.ece == pytest.approx(0.05)


def test_a_difference_is_paired_over_the_images_domains_and_seeds_of_both(results: Results) -> None:
    rows = {row.label: row for row in tabulate(results, UNSEEN)}
    assert rows["sap"].over_zero_shot.difference == pytest.approx((2 / 8 + 2 / 8) / 2)
    assert rows["client sketch"].over_zero_shot.difference == pytest.approx(3 / 8), "on photo alone"
    assert rows["zero-shot"].over_zero_shot is None
    assert rows["sap"].over_average is None, "no average was measured"
    low, high = rows["sap"].over_zero_shot[1:]
    assert 0 <= low < 0.25 < high <= 1


def test_a_difference_is_to_the_reference_of_the_same_variant_and_seed(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for variant, average, sap in (({}, 1, 8), ({"model.rank": 2}, 4, 5)):
        name = str(variant)
        measure(
            results,
            result("average", "photo", average, variant=variant, measurement=f"average{name}"),
            result("sap", "photo", sap, variant=variant, measurement=f"sap{name}"),
        )
    measure(results, result("sap", "photo", 0, seed=1))
    rows = {row.label: row for row in tabulate(results, ["photo"])}
    assert rows["sap"].over_average.difference == pytest.approx(7 / 8), "seed 1 has no average to be compared with"
    assert rows["sap, rank=2"].over_average.difference == pytest.approx(1 / 8)
    assert difference(results, results.of("sap"), []) is None


def test_an_interval_is_in_points() -> None:
    assert interval_text(None) == "–"
    (of_all,) = [difference_of(8, 0)]
    assert interval_text(of_all) == "+100.0 [100.0, 100.0]"


def difference_of(right: int, reference: int):
    from sap_lightning.functional.statistics import bootstrap_difference

    return bootstrap_difference([answers(right).correct[None]], [answers(reference).correct[None]])


def test_markdown_has_a_dash_where_a_client_is_at_home_and_the_best_in_bold(results: Results) -> None:
    lines = markdown_table(tabulate(results, UNSEEN), UNSEEN).splitlines()
    assert lines[:2] == [
        "| model | photo | sketch | mean | ECE | over average [95 %] | over zero-shot [95 %] |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    assert lines[2] == "| zero-shot | 0.250 | 0.500 | 0.375 | 0.030 | – | – |"
    assert lines[3].startswith("| client photo | – | 0.375 | 0.375 | 0.030 | – | -12.5 [")
    assert lines[-1].startswith("| sap | 0.500 | **0.750** | **0.625** | 0.050 | – | +25.0 [")


def test_the_terminal_s_table_has_the_best_of_each_column_in_bold(results: Results) -> None:
    table = rich_table(tabulate(results, UNSEEN), UNSEEN)
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["zero-shot", "client photo", "client sketch", "best client", "sap"]
    assert columns[1] == ["0.250", "–", "[bold]0.625[/bold]", "[bold]0.625[/bold]", "0.500"]
    assert columns[2] == ["0.500", "0.375", "–", "0.375", "[bold]0.750[/bold]"]
    assert columns[3][-1] == "[bold]0.625[/bold]"


def test_the_terminal_s_table_fits_eighty_columns(results: Results) -> None:
    console = Console(width=80)
    with console.capture() as shown:
        console.print(rich_table(tabulate(results, UNSEEN), UNSEEN))
    assert "top-1 accuracy on unseen domains" in shown.get()
    assert "client sketch │ 0.625 │      – │ 0.625" in shown.get()
    assert "its mean leaves it out" in shown.get()


def test_json_is_a_list_of_every_point(results: Results) -> None:
    rows = json.loads(results.json.read_text())
    assert [(row["model"], row["unseen"]) for row in rows] == [(row.model, row.unseen) for row in results.rows]
    assert rows[0]["metrics"] == {"accuracy": 0.75, "macro_accuracy": 0.375, "ece": 0.06}
