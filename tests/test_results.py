"""What was measured, as it is kept: results.jsonl, results.csv and predictions."""

from __future__ import annotations

import csv
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reporting.samples import UNSEEN, answers, client, measure, result, two_clients, zero_shot
from safetensors.torch import save_file

from sap_lightning.errors import InputError
from sap_lightning.fingerprints import unsealed
from sap_lightning.results import Result, Results


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return two_clients(tmp_path)


def lines_of(results: Results) -> list[dict[str, Any]]:
    """What each line of results.jsonl says; the file ends with a whole one."""
    *lines, rest = results.file.read_text(encoding="utf-8").split("\n")
    assert rest == ""
    return [json.loads(line) for line in lines]


def merge(model: str, **known: Any) -> Result:
    return Result("merge", model, "photo", "m", **known)


@pytest.mark.parametrize(
    ("known", "label"),
    [
        (merge("sap"), "sap"),
        (merge("sap", sparsity=0.95), "sap"),
        (merge("sap", sparsity=0.95, swept=True), "sap ρ=0.95"),
        (merge("sap", sparsity=0.0, swept=True), "sap ρ=0"),
        (merge("average", variant={"anchors.num_pairs": 4}), "average, num_pairs=4"),
        (merge("average", variant={"trainer.lr": 1e-3, "model.rank": 2}), "average, lr=0.001, rank=2"),
        (merge("sap", variant={"model.targets": ["q", "v"]}), "sap, targets=q+v"),
        (merge("sap", variant={"anchors.root": "/data/coco/"}), "sap, root=coco"),
        (merge("sap", seed=3, sparsity=0.5, swept=True), "sap ρ=0.5"),
        (merge("sap", sparsity=0.5, swept=True, condition="photo noise"), "sap ρ=0.5, photo noise"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_label_is_the_model_and_what_a_sweep_changed_but_not_the_seed(known: Result, label: str) -> None:
    assert known.label == label


def test_a_point_is_known_by_its_measurement_row_domain_and_seed(results: Results, tmp_path: Path) -> None:
    measured = result("sap", "photo", 4)
    for each in (results, Results(tmp_path)):
        assert each.has(measured)
        for other in (
            {"measurement": "other"},
            {"model": "average"},
            {"kind": "client"},
            {"unseen": "cartoon"},
            {"seed": 1},
            {"condition": "photo noise"},
            {"sparsity": 0.5, "swept": True},
            {"variant": {"anchors.num_pairs": 4}},
        ):
            assert not each.has(replace(measured, **other)), other


ALIKE = {
    "paths": ({"variant": {"anchors.root": "/a/coco"}}, {"variant": {"anchors.root": "/b/coco"}}),
    "types": ({"variant": {"model.rank": 4}}, {"variant": {"model.rank": "4"}}),
    "groups": ({"variant": {"model.base": "clip"}}, {"variant": {"anchors.base": "clip"}}),
    "long numbers": ({"sparsity": 0.12345671, "swept": True}, {"sparsity": 0.12345674, "swept": True}),
    "commas": ({"model": "ties, noise"}, {"model": "ties", "condition": "noise"}),
    "kinds": ({"model": "client art"}, {"model": "client art", "kind": "client"}),
}


@pytest.mark.parametrize("alike", ALIKE.values(), ids=ALIKE.keys())
def test_points_whose_labels_look_alike_are_two_points(tmp_path: Path, alike: tuple[dict[str, Any], ...]) -> None:
    one, other = (result(**{"model": "ties", "unseen": "photo", "right": 3, **known}) for known in alike)
    assert one.label == other.label and one.key != other.key
    results = Results(tmp_path)
    measure(results, one)
    assert results.has(one) and not results.has(other)
    measure(results, other)
    for each in (results, Results(tmp_path)):
        assert each.rows == [one, other]
        assert each.has(one) and each.has(other)
        assert each.only([other]).rows == [other]


def test_what_was_measured_under_another_name_need_not_be_measured_again(results: Results) -> None:
    known = results.measured(result("sap", "photo", 4).measurement)
    assert known is not None and known.metrics["accuracy"] == 0.5
    assert results.measured("other") is None


def test_a_result_whose_predictions_are_gone_is_not_known(results: Results, tmp_path: Path) -> None:
    measured = result("sap", "photo", 4)
    (tmp_path / "predictions" / f"{measured.measurement}.safetensors").unlink()
    assert not results.has(measured)
    assert results.measured(measured.measurement) is None


@pytest.mark.parametrize("metrics", [5, {}, {"accuracy": "x"}])
def test_a_line_that_somebody_has_written_by_hand_is_damaged(results: Results, tmp_path: Path, metrics: object) -> None:
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    said = json.loads(lines[0]) | {"metrics": metrics}
    del said["sha256"]
    (tmp_path / "results.jsonl").write_text("\n".join([json.dumps(said), *lines[1:], ""]))
    assert len(Results(tmp_path).rows) == len(results.rows) - 1


def test_predictions_that_somebody_has_put_there_are_none(results: Results, tmp_path: Path) -> None:
    measured = result("sap", "photo", 4)
    for tensors in ({"other": torch.zeros(3)}, {"labels": torch.zeros(3), "images": torch.zeros(2)}):
        save_file(tensors, tmp_path / "predictions" / f"{measured.measurement}.safetensors")
        assert not Results(tmp_path).has(measured)


def test_a_new_result_takes_the_place_of_the_old_one_of_the_same_point(results: Results) -> None:
    point = result("sap", "photo", 4)
    measure(results, replace(point, metrics={**point.metrics, "accuracy": 0.875}))
    assert len(results.rows) == 6
    assert [row.metrics["accuracy"] for row in results.of("sap") if row.unseen == "photo"] == [0.875]


def test_points_of_other_settings_are_kept_and_those_asked_for_are_given_in_their_order(results: Results) -> None:
    points = {
        scale: [result("ties", unseen, right, settings={"scale": scale}) for unseen in UNSEEN]
        for scale, right in ((1.0, 3), (2.0, 4))
    }
    for measured in points.values():
        measure(results, *measured)
    assert len(results.of("ties")) == 4
    for scale in points:
        assert results.only(points[scale]).rows == points[scale]
        assert results.only(points[scale][::-1]).rows == points[scale][::-1]
    assert len(results.rows) == 10, "the whole stays as it is"


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


def test_the_kind_of_a_model_and_not_its_name_gives_its_place(results: Results) -> None:
    measure(results, result("client of all", "photo", 4), result("bare", "photo", 2, kind="zero-shot"))
    assert results.labels == ["zero-shot", "bare", "client photo", "client sketch", "sap", "client of all"]


def test_every_result_is_on_disk_as_soon_as_it_is_added(results: Results, tmp_path: Path) -> None:
    row = result("own", "photo", 1, variant={"model.rank": 2}, rejected=["cartoon"], provenance={"commit": "abc"})
    measure(results, row)
    again = Results(tmp_path)
    assert again.rows == results.rows and row in again.rows


def test_every_result_that_is_added_is_a_line_and_what_stands_is_never_rewritten(tmp_path: Path) -> None:
    results, before = Results(tmp_path), ""
    rows = [result("sap", "photo", 4), client("photo", "sketch", 3), result("sap", "photo", 4)]
    for number, row in enumerate(rows, start=1):
        measure(results, row)
        written = results.file.read_text(encoding="utf-8")
        assert written.startswith(before) and written.count("\n") == number
        assert Result(**unsealed(json.loads(written.removeprefix(before)))) == row
        before = written


def test_of_a_point_that_was_measured_anew_the_last_line_counts(results: Results, tmp_path: Path) -> None:
    anew = replace(result("sap", "sketch", 6), metrics={"accuracy": 0.25, "macro_accuracy": 0.5, "ece": 0.75})
    measure(results, anew)
    lines = lines_of(results)
    assert [(line["model"], line["unseen"]) for line in lines].count(("sap", "sketch")) == 2 and len(lines) == 7
    again = Results(tmp_path)
    assert again.rows == results.rows == [*results.rows[:5], anew]
    measure(again, result("average", "photo", 4))
    assert len(lines_of(again)) == 8, "a file that is whole is only appended to"


def test_a_line_says_all_of_a_point(results: Results) -> None:
    lines = lines_of(results)
    assert [(line["kind"], line["model"], line["unseen"]) for line in lines] == [
        (row.kind, row.model, row.unseen) for row in results.rows
    ]
    assert lines[0]["kind"] == "merge"
    assert lines[0]["metrics"] == {"accuracy": 0.75, "macro_accuracy": 0.375, "ece": 0.06}


def cut(file: Path, bytes_of_last_line: int) -> None:
    """Leaves the beginning of the last line, as a command that is killed while it writes does."""
    whole = file.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1 if whole.count(b"\n") > 1 else 0
    file.write_bytes(whole[: start + bytes_of_last_line])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["first byte", "half", "all but its end"])
def test_a_file_cut_in_its_last_line_is_read_without_it_and_repaired_by_the_next(
    results: Results, tmp_path: Path, share: float
) -> None:
    last = results.file.read_bytes().split(b"\n")[-2]
    cut(results.file, max(1, round(share * len(last))))
    broken = results.file.read_bytes()
    again = Results(tmp_path)
    assert again.rows == results.rows[:-1]
    assert not again.has(results.rows[-1])
    assert results.file.read_bytes() == broken, "who only reads writes nothing"
    for row in (result("average", "photo", 4), result("average", "sketch", 5)):
        measure(again, row)
        assert Results(tmp_path).rows == again.rows
        assert len(lines_of(again)) == len(again.rows)
    assert [row.label for row in again.rows] == [*(row.label for row in results.rows[:-1]), "average", "average"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_file_that_ends_in_its_first_line_is_read_as_empty(tmp_path: Path) -> None:
    results = Results(tmp_path)
    measure(results, result("sap", "photo", 4))
    cut(results.file, 20)
    again = Results(tmp_path)
    assert again.rows == []
    measure(again, result("sap", "photo", 4))
    assert Results(tmp_path).rows == results.rows and len(lines_of(again)) == 1


def test_a_file_cut_within_a_letter_of_several_bytes_is_read_too(tmp_path: Path) -> None:
    results = Results(tmp_path)
    measure(results, result("sap", "photo", 4), result("sap", "sketch", 4, settings={"prompt": "ein Gemälde"}))
    last = results.file.read_bytes().split(b"\n")[-2]
    cut(results.file, last.index("ä".encode()) + 1)
    again = Results(tmp_path)
    assert again.rows == results.rows[:1]
    measure(again, results.rows[1])
    assert Results(tmp_path).rows == results.rows


@pytest.mark.parametrize(
    "line",
    [
        '{"model": "sap", "unseen": "photo", "measurement": "m"}',
        '{"kind": "merge", "model": "sap", "unseen": "photo", "sources": [], "metrics": {}, "settings": {}}',
        '{"kind": "merge", "model": "sap", "unseen": "photo", "measurement": "m", "of_later": 1}',
    ],
    ids=["before 0.2", "no measurement", "later"],
)
@pytest.mark.parametrize("number", [1, 3, 7])
def test_a_line_that_is_no_result_is_refused_with_its_file_and_number(
    results: Results, tmp_path: Path, line: str, number: int
) -> None:
    lines = results.file.read_text(encoding="utf-8").split("\n")
    lines.insert(number - 1, line)
    results.file.write_text("\n".join(lines), encoding="utf-8")
    refusal = rf"results\.jsonl: line {number} is no result of this version \(.+\); .*--federation\.run_dir"
    with pytest.raises(InputError, match=refusal) as refused:
        Results(tmp_path)
    assert str(results.file) in str(refused.value) and "\n" not in str(refused.value)


DAMAGE = {"list": '["sap", 0.5]', "null": "null", "cut": "[1", "empty": ""}


@pytest.mark.parametrize("damage", [*DAMAGE, "flipped"])
@pytest.mark.parametrize("number", [1, 4, 6])
def test_a_damaged_line_is_named_and_measured_anew(
    results: Results, tmp_path: Path, caplog, monkeypatch, damage: str, number: int
) -> None:
    monkeypatch.setattr(logging.getLogger("sap_lightning"), "propagate", True)
    lines = results.file.read_text(encoding="utf-8").split("\n")
    whole, lost = lines[number - 1], results.rows[number - 1]
    lines[number - 1] = DAMAGE.get(damage, whole.replace('"ece": 0.', '"ece": 1.'))
    assert lines[number - 1] != whole
    results.file.write_text("\n".join(lines), encoding="utf-8")
    again = Results(tmp_path)
    assert f"results.jsonl: line {number} is damaged" in caplog.text
    assert again.rows == [row for row in results.rows if row != lost] and not again.has(lost)
    measure(again, lost)
    assert Results(tmp_path).rows == again.rows and len(lines_of(again)) == 6


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_damaged_predictions_are_named_and_measured_anew(
    results: Results, tmp_path: Path, caplog, monkeypatch, damage: str
) -> None:
    monkeypatch.setattr(logging.getLogger("sap_lightning"), "propagate", True)
    row, other = results.rows[:2]
    file = tmp_path / "predictions" / f"{row.measurement}.safetensors"
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(whole[:-1] if damage == "cut" else whole[:-1] + bytes([whole[-1] ^ 1]))
    again = Results(tmp_path)
    assert not again.has(row) and again.measured(row.measurement) is None and again.has(other)
    assert (damage == "gone") or f"{file} is damaged" in caplog.text
    with pytest.raises(InputError, match=f"{file}: is missing or damaged; the command that measured it"):
        again.predictions(row)
    measure(again, row)
    assert again.has(row) and file.read_bytes() == whole


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r", "\n", "\r\n"], ids=ascii)
def test_what_ends_a_line_elsewhere_does_not_end_one_here(tmp_path: Path, end: str) -> None:
    results = Results(tmp_path)
    rows = [
        result("sap", "photo", 4, variant={"model.templates": [f"a {{}}{end}drawn"]}),
        result("sap", "photo", 4, settings={"prompt": end}, rejected=[f"{end}photo"]),
    ]
    measure(results, *rows)
    assert Results(tmp_path).rows == rows
    assert len(lines_of(results)) == 2


@pytest.mark.parametrize("content", ["[]", "[1", ""])
def test_a_folder_of_a_version_before_0_2_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError, match=r"version before 0\.2.* use another --federation\.run_dir") as refused:
        Results(tmp_path)
    assert "\n" not in str(refused.value) and str(refused.value).startswith(f"{tmp_path}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_the_csv_is_written_when_asked_and_the_same_of_what_is_read_back(results: Results, tmp_path: Path) -> None:
    assert not results.csv.exists()
    results.write_csv()
    written = results.csv.read_bytes(), results.file.read_bytes()
    Results(tmp_path).write_csv()
    assert (results.csv.read_bytes(), results.file.read_bytes()) == written


def test_the_csv_has_a_line_for_each_point_with_all_that_it_was_made_with(tmp_path: Path) -> None:
    results = Results(tmp_path)
    measure(
        results,
        zero_shot("photo", 2),
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
    results.write_csv()
    with results.csv.open() as lines:
        bare, sap = csv.DictReader(lines)
    assert sap == {
        "row": results.rows[1].label,
        "model": "sap",
        "sparsity": "0.5",
        "unseen": "photo",
        "seed": "3",
        "rounds": "1",
        "bytes": "",
        "condition": "",
        "variant": '{"anchors.num_pairs": 4, "model.rank": 2}',
        "accuracy": "0.500000",
        "macro_accuracy": "0.250000",
        "ece": "0.040000",
        "personal_accuracy": "",
        "rejected": "cartoon;sketch",
        "settings": '{"space": "delta", "sparsity": 0.5}',
        "sources": "a;b",
        "measurement": "m",
        "config": "c0ffee",
        "commit": "abc-dirty",
        "versions": "torch 2, peft 1",
    }
    assert {bare[name] for name in ("sparsity", "variant", "rejected", "settings", "sources", "commit")} == {""}
    assert (bare["model"], bare["accuracy"]) == ("zero-shot", "0.250000")


def test_predictions_come_back_as_they_were_and_say_what_is_correct(results: Results, tmp_path: Path) -> None:
    row = result("sap", "photo", 4)
    again = Results(tmp_path)
    kept = again.predictions(row)
    for stored, given in zip(kept, answers(4), strict=True):
        assert torch.equal(stored, given) and stored.dtype == given.dtype
    assert kept.correct.tolist() == again.correct(row).tolist() == [True] * 4 + [False] * 4
    assert [path.suffix for path in (tmp_path / "predictions").iterdir()] == [".safetensors"] * 6
