"""What is shown of clients that were tuned on instructions: tables, sentences, and a report that needs only itself."""

from __future__ import annotations

import base64
import json
import logging
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from llava import CLIENTS, conversations, tiny_llava
from reporting.pages import HOSTILE, Page, assert_every_link_leads_somewhere, assert_it_needs_nothing

from sap_lightning.data.instructions import InstructionDataModule
from sap_lightning.federation.instruction import BASE, InstructionFederation
from sap_lightning.instruction_results import InstructionResult
from sap_lightning.modules.vlm_lora import VLMLoRAModule
from sap_lightning.reporting.instruction import show_instruction
from sap_lightning.reporting.instruction_page import ANSWERS, LONGEST, MOST_DRAWN, asked_of, figures_of, marked
from sap_lightning.reporting.instruction_table import rows_of
from sap_lightning.reporting.sentences import image_sentence, tuning_summary

COUNT = 6
RIGHT = {BASE: 1, "local": 2, "fedit": 3, "pilot": 5}
"""How many of a client's answers each system has right after its last turn."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llava(tmp_path_factory.mktemp("llava") / "base"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations, of which some have questions that are no words."""
    root = conversations(tmp_path_factory.mktemp("clients"), CLIENTS, count=COUNT)
    lines = [json.loads(line) for line in (root / "vqa_b" / "test.jsonl").read_text().splitlines()]
    for line in lines:
        line["conversations"][0]["value"] = f"<image>\n{HOSTILE} question"
    (root / "vqa_b" / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture(scope="module")
def federation(base: str, root: Path, tmp_path_factory: pytest.TempPathFactory) -> InstructionFederation:
    """Three clients, measured before and after each of two turns, by numbers that were made up."""
    return measured(base, root, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def written(federation: InstructionFederation) -> Path:
    return shown(federation)


@pytest.fixture
def another(base: str, root: Path, tmp_path: Path) -> InstructionFederation:
    """The same, to be changed."""
    return measured(base, root, tmp_path / "run")


def measured(base: str, root: Path, folder: Path, images: bool = True, **settings: Any) -> InstructionFederation:
    settings = {"systems": ["local", "fedit", "pilot"], "methods": ["average"], **settings}
    federation = InstructionFederation(
        VLMLoRAModule(base), InstructionDataModule(str(root)), run_dir=str(folder), rounds=1, **settings
    )
    for system in (BASE, *settings["systems"], *settings["methods"]):
        turns = {BASE: (0,), "average": (1,)}.get(system, (1, 2))
        for turn in turns:
            for place, client in enumerate(federation.data.clients):
                federation.results.add(result(federation, system, turn, client, place, images))
    return federation


def result(
    federation: InstructionFederation, system: str, turn: int, client: str, place: int, images: bool
) -> InstructionResult:
    task = federation.data.tasks[client]
    right = RIGHT.get(system, 1) - (turn == 1)
    answers = [sample.answer for sample in federation.data.samples(client, "test.jsonl")]
    said = [{"said": a if at < right else HOSTILE, "answer": a} for at, a in enumerate(answers)]
    perplexity = 3.0 - right / 4 + place
    return InstructionResult(
        system, turn, client, task, fmean(federation.judged(task, said)), perplexity,
        perplexity + (0.5 if place else -0.5) if images else None, 1000 * turn, "", said, {"commit": "badcafe"},
    )  # fmt: skip


def shown(federation: InstructionFederation) -> Path:
    show_instruction(federation)
    return federation.folder / "report.html"


def test_the_page_needs_nothing_but_itself(written):
    assert_it_needs_nothing(written)
    assert_every_link_leads_somewhere(written)
    sections = [section["id"] for section in Page(written).all("section")]
    assert sections == ["results", "once", "turns", "clients", "images", "sent", "answers", "settings"]


def test_it_says_what_was_run_and_with_what(federation, written):
    text = " ".join(Page(written).text.split())
    assert "3 clients of 2 tasks (caption, vqa) tune" in text and "in R = 1 round, that is 2 turns of training" in text
    assert federation.client.base in text and "badcafe" in text
    assert "test conversations of the clients, and their images" in text
    row = '<th scope="row">vqa_a</th><td>vqa</td><td>6</td><td>6</td><td>0.167</td>'
    assert row in written.read_text(), "a client's task, how many conversations it has, and the base's score"


def test_what_clients_wrote_and_models_said_is_text(written):
    text = Page(written).text
    assert f"{HOSTILE} question" in text and f"{HOSTILE} 0.00" in text


def test_the_tables_have_differences_and_the_best_of_each_column(federation, written):
    rows = {row.system: row for row in rows_of(federation)}
    assert rows[BASE].over_base is None and rows["fedit"].over_fedit is None
    # Of every client's six answers two more are right than by fedit, and four more than by the base.
    assert rows["pilot"].over_fedit.difference == pytest.approx(2 / 6)
    assert rows["pilot"].over_base.difference == pytest.approx(4 / 6)
    assert rows["pilot"].over_base.low > 0 > rows[BASE].over_fedit.high
    assert rows["pilot"].sent == [1000, 2000] and rows["local"].sent == rows[BASE].sent == []
    source = written.read_text()
    assert source.count('<td class="best">0.833</td>') == 3, "both tasks and their mean, by pilot"
    assert "<td>+33.3 [" in source and "3 kB" in source


def test_columns_are_marked_as_they_are_printed():
    table = marked(["a", "b", "c"], [["x", "0.50", "2"], ["y", "0.50", "1"], ["z", "0.49", "3"]], most=[1], least=[2])
    assert [[best for _, best in row] for row in table.rows] == [
        [False, True, False], [False, True, True], [False, False, False],
    ]  # fmt: skip


def test_the_words_are_computed(federation):
    first, second, third, last = tuning_summary(rows_of(federation))
    assert first == "pilot has the highest mean score over the 2 tasks: 0.833."
    assert second.startswith("It is 66.7 points ahead of the base (95 % interval +")
    assert "33.3 points ahead of fedit" in second
    assert "picked from 3 ways" in third
    assert last == "The perplexity of the right answers is lowest by pilot: 2.75."
    found = {system: federation.results.of(system, 2) for system in ("fedit", "pilot")}
    assert image_sentence(found).endswith(
        "Of 3 clients, perplexity is lower with the right image than with another one for so many: fedit 2, pilot 2."
    )


def test_a_base_that_is_best_and_a_pilot_that_is_not_are_said(another):
    for one in another.results.of("pilot", 2):
        another.results.add(replace(one, said=[{**of, "said": HOSTILE} for of in one.said], score=0.0))
    rows = {row.system: row for row in rows_of(another)}
    *_, fourth, _ = tuning_summary(list(rows.values()))
    assert fourth.startswith("pilot is level with the base as far as these conversations can tell, −16.7 points")
    assert "50.0 points behind fedit (95 % interval −" in fourth
    first, second, third, _ = tuning_summary([rows[BASE], rows["pilot"]])
    assert first.startswith("base has the highest mean score")
    assert second == "No way of tuning does better; of them pilot comes nearest with 0.000."
    assert third.startswith("pilot is level with the base")


def test_some_conversations_of_every_client_are_shown_with_what_was_said(federation, written):
    found = {system: federation.results.of(system, 0 if system == BASE else 2) for system in (BASE, "fedit", "pilot")}
    asked = list(asked_of(federation, "vqa", found))
    assert [one.client for one in asked] == ["vqa_a", "vqa_a", "vqa_b", "vqa_b"] and len(asked) == ANSWERS
    second = asked[1]  # at 1/4 and 3/4 of six: the second and the fifth
    assert second.question == "what colour is it ?" and second.picture.size == (16, 16)
    assert [(of.systems, of.said, of.score) for of in second.answers] == [
        ([BASE, "fedit"], HOSTILE, 0.0), (["pilot"], second.right, 1.0),
    ]  # fmt: skip
    pictures = [str(image["src"]) for image in Page(written).all("img") if "jpeg" in str(image["src"])]
    assert len(pictures) == 2 * ANSWERS
    assert base64.b64decode(pictures[0].split(",", 1)[1]).startswith(b"\xff\xd8")


def test_a_long_answer_is_cut_and_a_picture_that_has_gone_is_left_out(base, tmp_path):
    federation = measured(base, conversations(tmp_path / "clients", CLIENTS, count=COUNT), tmp_path / "run")
    for file in federation.data.root.glob("vqa_*/images/*"):
        file.unlink()
    *others, last = federation.results.of("pilot", 2)
    long = [{**of, "said": "x" * 5000} for of in last.said]
    asked = list(asked_of(federation, "vqa", {"pilot": [*others, replace(last, said=long)]}))
    assert [one.picture for one in asked] == [None] * ANSWERS
    assert len(asked[-1].answers[0].said) == LONGEST


def test_conversations_that_were_changed_since_are_not_compared(another):
    for one in another.results.of("pilot", 2):
        another.results.add(replace(one, said=[{**of, "answer": "another"} for of in one.said]))
    rows = rows_of(another)
    (pilot,) = [row for row in rows if row.system == "pilot"]
    assert pilot.over_base is None and pilot.over_fedit is None
    assert not any(sentence.startswith(("It is", "pilot is")) for sentence in tuning_summary(rows))
    found = {system: another.results.of(system, 2) for system in ("fedit", "pilot")}
    assert list(asked_of(another, "vqa", found)) == []


def test_a_model_of_text_alone_has_no_images_and_one_that_sends_nothing_no_bytes(base, tmp_path):
    root = conversations(tmp_path / "clients", CLIENTS, count=COUNT, images=False)
    page = Page(shown(measured(base, root, tmp_path / "run", images=False, systems=["local"], methods=[])))
    sections = [section["id"] for section in page.all("section")]
    assert sections == ["results", "turns", "clients", "answers", "settings"]
    assert "over base" in page.text and "over fedit" not in page.text


def test_figures_have_every_turn_and_a_panel_for_each_of_few_clients(federation, monkeypatch):
    figures = figures_of(federation)
    assert list(figures) == ["score", "perplexity"]
    titles = [[axes.get_title() for axes in figure.axes if axes.get_visible()] for figure in figures.values()]
    assert titles == [["mean over tasks", "caption", "vqa"], ["mean over clients", "caption_a", "vqa_a", "vqa_b"]]
    pilot = figures["score"].axes[0].lines[2]
    assert list(pilot.get_ydata()) == pytest.approx([1 / 6, 4 / 6, 5 / 6])
    assert "pilot 0.833" in figures["score"].get_label()
    assert len(CLIENTS) < MOST_DRAWN
    monkeypatch.setattr("sap_lightning.reporting.instruction_page.MOST_DRAWN", 2)
    assert [axes.get_title() for axes in figures_of(federation)["perplexity"].axes] == ["mean over clients"]


def test_a_report_that_cannot_be_made_does_not_fail_the_run(another, capsys, caplog, monkeypatch):
    (another.folder / "report.html").mkdir()
    monkeypatch.setattr(logging.getLogger("sap_lightning"), "propagate", True)
    with caplog.at_level(logging.WARNING, "sap_lightning"):
        show_instruction(another)
    assert f"{another.folder}: has no report" in caplog.text
    assert "Report:" not in (out := capsys.readouterr().out) and "Tuned together" in out
    assert (another.folder / "table.md").is_file()


def test_the_same_results_give_the_same_page(federation, written):
    before = written.read_bytes()
    assert shown(federation).read_bytes() == before
