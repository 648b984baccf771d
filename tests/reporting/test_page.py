"""A report of a small run: what it says, what it leaves out, and that it needs nothing but itself."""

from __future__ import annotations

import base64
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from places import REPOSITORY
from reporting.pages import HOSTILE, Page, assert_every_link_leads_somewhere, assert_it_needs_nothing
from reporting.samples import UNSEEN, add, evidence, measure, swept

from sap_lightning.federation.run_folder import config_file
from sap_lightning.reporting.draw import draw
from sap_lightning.reporting.evidence import NO_MASKS, Client, Evidence
from sap_lightning.reporting.html import file_names
from sap_lightning.reporting.page import write_report
from sap_lightning.reporting.table import tabulate
from sap_lightning.results import Results

SETTINGS = {"prune": {"sparsity": 0.8}, "model": {"templates": ["a <b>photo</b>"]}}


def write(
    folder: Path, results: Results, unseen: Sequence[str], shown: Evidence | None, settings: Mapping[str, Any]
) -> Path:
    rows = tabulate(results, unseen)
    return write_report(folder, results, rows, unseen, draw(results, rows, shown), shown, settings)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return write(folder, swept(folder, seeds=2), UNSEEN, evidence(HOSTILE), SETTINGS)


def test_the_page_needs_nothing_but_itself(written: Path) -> None:
    assert_it_needs_nothing(written)


def test_the_pictures_in_the_page_need_nothing_either(written: Path) -> None:
    sources = [str(image["src"]) for image in Page(written).all("img")]
    decoded = [base64.b64decode(source.split(",", 1)[1]) for source in sources if "svg" in source]
    assert decoded
    for svg in decoded:
        assert not re.search(rb'(href|src)="(?!#|data:)', svg)
        assert b"<script" not in svg


def test_ids_are_unique_and_every_link_leads_somewhere(written: Path) -> None:
    assert_every_link_leads_somewhere(written)


def test_names_from_outside_are_text(written: Path) -> None:
    page = Page(written)
    assert HOSTILE in page.text
    assert any(HOSTILE in str(image["alt"]) for image in page.all("img"))
    assert "a <b>photo</b>" in page.text


def test_every_figure_has_an_alternative_and_most_a_caption(written: Path) -> None:
    page = Page(written)
    assert all(len(str(image["alt"])) > 10 for image in page.all("img"))
    assert len(page.all("figure")) == len(page.all("figcaption")) == 7


def test_the_figures_stand_in_the_folder_in_both_forms(written: Path) -> None:
    names = {file.stem for file in (written.parent / "figures").iterdir()}
    assert {"accuracy_by_sparsity", "caption_margin", "share_kept_photo", "mask_overlap", "sign_conflict"} < names
    assert {"projection_before", "projection_after", "confusion_photo_before", "gallery_broken"} < names
    assert len(list((written.parent / "figures").iterdir())) == 2 * len(names)
    for name in names:
        assert min(Image.open(written.parent / "figures" / f"{name}.png").size) > 100
        assert "</svg>" in (written.parent / "figures" / f"{name}.svg").read_text(encoding="utf-8")


def test_the_table_is_there_with_spread_and_the_best_in_bold(written: Path) -> None:
    source = written.read_text(encoding="utf-8")
    (bold,) = re.findall(r"<tr class=\"marked\">.*?</tr>", source, re.DOTALL)
    cells = re.findall(r"<td( class=\"best\")?>([\d.]+) <span class=\"pm\">± ([\d.]+)</span>", bold)
    assert cells == [(' class="best"', "0.950", "0.000"), ("", "0.925", "0.035"), (' class="best"', "0.937", "0.018")]


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    path = write(tmp_path, swept(tmp_path), UNSEEN, None, {})
    assert "±" not in path.read_text(encoding="utf-8")


def test_figures_of_an_earlier_report_go_and_what_is_not_a_figure_stays(tmp_path: Path) -> None:
    (tmp_path / "figures" / "mine").mkdir(parents=True)
    (tmp_path / "figures" / "projection_before.png").write_bytes(b"old")
    write(tmp_path, swept(tmp_path), UNSEEN, None, {})
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {
        "accuracy_by_sparsity.png",
        "accuracy_by_sparsity.svg",
        "mine",
    }


def test_without_evidence_there_are_the_tables_and_the_sparsities(tmp_path: Path) -> None:
    page = Page(write(tmp_path, swept(tmp_path), UNSEEN, None, SETTINGS))
    assert [section["id"] for section in page.all("section")] == ["results", "sparsity", "settings"]
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {
        "accuracy_by_sparsity.png",
        "accuracy_by_sparsity.svg",
    }
    assert "c0ffee" in page.text and "badcafe" in page.text and "torch 2.13" in page.text


def test_the_command_that_repeats_a_run_is_there_with_its_settings(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    assert "--federation.run_dir" not in Page(write(folder, swept(folder), UNSEEN, None, {})).text
    settings = folder / config_file({})
    settings.parent.mkdir()
    settings.write_text("{}")
    text = Page(write(folder, Results(folder), UNSEEN, None, {})).text
    assert f"fit --config '{settings}' --federation.run_dir '{folder}_again'" in text


def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    results = Results(tmp_path)
    add(results, "zero-shot", {"photo": 10}, "zero-shot")
    bare = Evidence("sap", [], *NO_MASKS[:3], None, "", {}, [], [], [])
    page = Page(write(tmp_path, results, ["photo"], bare, {}))
    assert [section["id"] for section in page.all("section")] == ["results", "settings"]
    assert page.all("img") == []


def test_a_merge_that_prunes_nothing_has_no_masks_and_no_pruned_bytes(tmp_path: Path) -> None:
    clients = [Client(name, 1000, None, 0.5, 0.1, False, "") for name in ("photo", "sketch", "cartoon")]
    bare = Evidence("krum", clients, *NO_MASKS[:3], None, "", {}, [], [], [])
    page = Page(write(tmp_path, swept(tmp_path), UNSEEN, bare, {}))
    assert [section["id"] for section in page.all("section")] == [
        "results",
        "sparsity",
        "clients",
        "poison",
        "settings",
    ]
    assert "pruned by the client" not in page.text and "could prune" not in page.text


def test_a_client_that_breaks_the_base_stands_out_in_the_report(tmp_path: Path) -> None:
    honest = [Client(name, 1000, 400, 0.5, 0.1, False, "") for name in ("photo", "sketch")]
    broken = Client("cartoon", 1000, None, math.nan, math.nan, True, "")
    page = Page(write(tmp_path, swept(tmp_path), UNSEEN, replace(evidence(), clients=[*honest, broken]), {}))
    assert "The anchors single out cartoon." in page.text
    (bars,) = [image["alt"] for image in page.all("img") if str(image["alt"]).startswith("Bar chart of caption")]
    assert "cartoon nan, outlier" in str(bars)


def test_clients_that_were_left_out_are_named(tmp_path: Path) -> None:
    results = swept(tmp_path)
    row = replace(results.rows[0], model="sap", condition="rejecting outliers", rejected=["cartoon"])
    measure(results, row, replace(row, model="average"), of=20)
    page = Page(write(tmp_path, results, UNSEEN, None, {}))
    assert page.text.count("Left out of the merges for unseen photo, seed 0 (rejecting outliers): cartoon.") == 1


def write_seeded(folder: Path) -> Path:
    torch.manual_seed(0)
    return write(folder, swept(folder), UNSEEN, evidence(), SETTINGS)


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_same_run_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    write_seeded(folder)
    here = contents(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    program = f"from test_page import *; write_seeded(Path({str(folder)!r}))"
    tests = REPOSITORY / "tests"
    environment = os.environ | {
        "PYTHONHASHSEED": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{tests}{os.pathsep}{REPOSITORY}",
    }
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tests / "reporting", env=environment)
    assert len(here) > 30
    assert contents(folder) == here


def test_file_names_are_plain_and_differ() -> None:
    names = ["share/a b", "share/a_b", "share/A_b", "../../x", "ρ=0.8", "<script>"]
    assert file_names(names) == ["share_a_b", "share_a_b_2", "share_a_b_3", "x", "ρ_0_8", "script"]


def test_a_report_of_several_rounds_says_what_each_merge_took(tmp_path: Path) -> None:
    results = swept(tmp_path)
    add(results, "ties", {"photo": 19, "sketch": 9}, variant={"federation.rounds": 1}, rounds=1, bytes=1000)
    add(results, "ties", {"photo": 19, "sketch": 15}, variant={"federation.rounds": 5}, rounds=5, bytes=9000)
    page = Page(write(tmp_path, results, UNSEEN, None, SETTINGS))
    assert "Accuracy against rounds and bytes on the wire" in page.text
    assert "sends its adapter, in one round or in several" in page.text
    assert re.search(r"ties, rounds=5\s*5\s*9 kB\s*9\s*0\.850", page.text)
    assert {"accuracy_by_rounds.svg", "accuracy_by_rounds.png"} <= {
        file.name for file in (tmp_path / "figures").iterdir()
    }
    before = Page(write(tmp_path, swept(tmp_path / "one"), UNSEEN, None, SETTINGS))
    assert "sends its adapter once" in before.text and "Accuracy against rounds" not in before.text
