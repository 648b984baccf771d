"""The table of a run: rows, spreads and paired differences, on the terminal and in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from reporting.samples import UNSEEN, add, answers, client, measure, result, two_clients
from rich.console import Console
from safetensors.torch import load_file

from sap_lightning import results as stored
from sap_lightning.functional.statistics import Interval, Spread, bootstrap_difference
from sap_lightning.reporting.table import (
    MANY,
    TableRow,
    best_cells,
    bytes_text,
    difference,
    interval_text,
    left_out,
    markdown_table,
    rich_table,
    tabulate,
)
from sap_lightning.results import Results


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return two_clients(tmp_path)


def cells(rows: Sequence[TableRow]) -> dict[str, list[str]]:
    return {row.label: [str(cell) for cell in [*row.cells, row.mean]] for row in rows}


def test_a_table_is_of_the_points_asked_for(results: Results) -> None:
    points = {
        scale: [result("ties", unseen, right, settings={"scale": scale}) for unseen in UNSEEN]
        for scale, right in ((1.0, 3), (2.0, 4))
    }
    for measured in points.values():
        measure(results, *measured)
    for scale, right in ((1.0, "0.375"), (2.0, "0.500")):
        assert cells(tabulate(results.only(points[scale]), UNSEEN)) == {"ties": [right] * 3}


def test_the_clients_left_out_are_told_once_for_all_merges_of_a_condition(results: Results) -> None:
    assert left_out(results) == []
    for model in ("average", "sap"):
        measure(results, result(model, "photo", 3, condition="rejecting outliers", rejected=["sketch", "cartoon"]))
    assert left_out(results) == [
        "Left out of the merges for unseen photo, seed 0 (rejecting outliers): sketch, cartoon."
    ]


def test_the_table_has_the_best_client_of_each_domain_after_the_clients(results: Results) -> None:
    measure(results, client("cartoon", "photo", 6), client("cartoon", "sketch", 1))
    rows = tabulate(results, UNSEEN)
    table = cells(rows)
    assert list(table) == ["zero-shot", "client cartoon", "client photo", "client sketch", "best client", "sap"]
    assert [row.kind for row in rows] == ["zero-shot", "client", "client", "client", "client", "merge"]
    assert table["best client"] == ["0.750", "0.375", "0.562"]
    assert table["client photo"] == ["None", "0.375", "0.375"]


def test_many_merge_methods_are_in_the_order_of_their_means_and_few_in_their_own(results: Results) -> None:
    few = [f"method {k:02}" for k in range(MANY)]
    for k, name in enumerate(few[1:]):
        measure(results, *(result(name, unseen, k % 7) for unseen in UNSEEN))
    before = [row.label for row in tabulate(results, UNSEEN)]
    assert [label for label in before if label.startswith("method")] == few[1:]
    measure(results, *(result("one more", unseen, 8) for unseen in UNSEEN))
    rows = tabulate(results, UNSEEN)
    merges = [row for row in rows if row.kind == "merge"]
    assert [row.label for row in rows[: -len(merges)]] == before[: -len(few)], "the others stay where they were"
    assert len(merges) == MANY + 1 and merges[0].label == "one more"
    assert [row.mean.mean for row in merges] == sorted((row.mean.mean for row in merges), reverse=True)


def test_a_merge_that_is_called_like_a_client_is_none(results: Results) -> None:
    measure(results, result("client of all", "photo", 8), result("client of all", "sketch", 8))
    rows = {row.label: row for row in tabulate(results, UNSEEN)}
    assert list(rows) == ["zero-shot", "client photo", "client sketch", "best client", "sap", "client of all"]
    assert (rows["client of all"].kind, rows["client of all"].model) == ("merge", "client of all")
    assert cells([rows["best client"]])["best client"] == ["0.625", "0.375", "0.500"]


def test_the_table_can_be_of_some_domains(results: Results) -> None:
    assert cells(tabulate(results, ["sketch"]))["sap"] == ["0.750", "0.750"]


def test_a_poisoned_client_is_never_the_best_one(results: Results) -> None:
    measure(results, *(client("photo", unseen, 8, condition="photo noise") for unseen in UNSEEN))
    table = cells(tabulate(results, UNSEEN))
    assert table["client photo, photo noise"] == ["1.000"] * 3
    assert table["best client"] == ["0.625", "0.375", "0.500"]


def test_a_best_client_is_of_its_own_seed_and_variant(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for seed, rights in enumerate([(5, 2), (1, 4)]):
        for name, right in zip("ab", rights, strict=True):
            measure(results, client(name, "photo", right, seed=seed))
    measure(results, client("a", "photo", 8, variant={"model.rank": 2}))
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


def test_a_difference_to_the_average_is_under_the_same_condition(results: Results) -> None:
    measure(results, result("average", "photo", 2))
    poisoned = {"condition": "photo noise"}
    for model, right in (("average", 1), ("sap", 5)):
        measure(results, result(model, "photo", right, **poisoned))
    rows = {row.label: row for row in tabulate(results, ["photo"])}
    assert rows["sap"].over_average.difference == pytest.approx(2 / 8)
    assert rows["sap, photo noise"].over_average.difference == pytest.approx(4 / 8)
    assert rows["average, photo noise"].over_average is None


def test_the_predictions_of_a_result_are_read_from_disk_once_for_a_table(results: Results, monkeypatch) -> None:
    measure(results, *(result(model, unseen, 5) for model in ("average", "ties") for unseen in UNSEEN))
    reads: Counter[str] = Counter()

    def load(file: Path) -> dict:
        reads[Path(file).stem] += 1
        return load_file(file)

    monkeypatch.setattr(stored, "read_tensors", load)
    part = Results(results.folder).only(results.rows)
    rows = tabulate(part, UNSEEN)
    assert all(row.over_zero_shot for row in rows if row.model not in ("zero-shot", "client photo"))
    assert reads == dict.fromkeys((row.measurement for row in results.rows), 1)
    assert tabulate(part, UNSEEN) == rows
    assert set(reads.values()) == {1}


def test_an_interval_is_in_points() -> None:
    assert interval_text(None) == "–"
    assert interval_text(difference_of(8, 0)) == "+100.0 [100.0, 100.0]"
    assert interval_text(Interval(-0.0123, -0.05, 0.0)) == "-1.2 [-5.0, 0.0]"


def difference_of(right: int, reference: int) -> Interval:
    return bootstrap_difference([answers(right).correct[None]], [answers(reference).correct[None]])


def test_the_best_of_a_column_is_so_as_printed_and_the_best_mean_is_over_all_domains(results: Results) -> None:
    rows = tabulate(results, UNSEEN)
    assert best_cells(rows) == [0.625, 0.75, 0.625]
    partial = [row for row in rows if row.label == "client sketch"]
    assert best_cells(partial) == [0.625, 0.0, 0.0]


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
    assert list(map(str, columns[0])) == ["zero-shot", "client photo", "client sketch", "best client", "sap"]
    assert columns[1] == ["0.250", "–", "[bold]0.625[/bold]", "[bold]0.625[/bold]", "0.500"]
    assert columns[2] == ["0.500", "0.375", "–", "0.375", "[bold]0.750[/bold]"]
    assert columns[3][-1] == "[bold]0.625[/bold]"


def test_names_are_shown_as_they_are_written_on_a_terminal_and_in_markdown(tmp_path: Path) -> None:
    results, unseen = Results(tmp_path), "[red]|*a*"
    measure(results, result("client <b>x\n", unseen, 4))
    rows = tabulate(results, [unseen])
    console = Console(width=100)
    with console.capture() as shown:
        console.print(rich_table(rows, [unseen]))
    assert unseen in shown.get() and r"client <b>x\n" in shown.get()
    head, line, row = markdown_table(rows, [unseen]).splitlines()
    assert head.count("|") == line.count("|") == row.count("|") == 7
    assert "| &#91;red&#93;&#124;&#42;a&#42; |" in head
    assert row.startswith("| client &#60;b&#62;x&#92;n |")


def test_the_terminal_s_table_fits_eighty_columns(results: Results) -> None:
    console = Console(width=80)
    with console.capture() as shown:
        console.print(rich_table(tabulate(results, UNSEEN), UNSEEN))
    assert "top-1 accuracy on unseen domains" in shown.get()
    assert "client sketch │ 0.625 │      – │ 0.625" in shown.get()
    assert "its mean leaves it out" in shown.get()


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_184_000, "1.18 MB"), (94_400_000_000, "94.4 GB")]
)
def test_bytes_are_in_decimal_units(count: int, text: str) -> None:
    assert bytes_text(count) == text


def test_where_there_were_several_rounds_the_table_says_how_many_and_what_they_took(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for rounds, sizes in ((1, (1000, 3000)), (5, (9000, 11_000))):
        for unseen, size in zip(UNSEEN, sizes, strict=True):
            variant = {"federation.rounds": rounds}
            add(results, "sap", {unseen: 10 + rounds}, variant=variant, rounds=rounds, bytes=size)
    head, _, one, five = markdown_table(tabulate(results, UNSEEN), UNSEEN).splitlines()
    assert head.endswith("| rounds | bytes |")
    assert one.startswith("| sap, rounds=1 |") and one.endswith("| 1 | 2 kB |")
    assert five.startswith("| sap, rounds=5 |") and five.endswith("| 5 | 10 kB |")


def test_what_was_measured_before_bytes_were_counted_has_none(tmp_path: Path) -> None:
    results = Results(tmp_path)
    add(results, "sap", {"photo": 10}, rounds=2)
    (row,) = tabulate(results, ["photo"])
    assert row.bytes is None
    assert markdown_table([row], ["photo"]).splitlines()[-1].endswith("| 2 | – |")
