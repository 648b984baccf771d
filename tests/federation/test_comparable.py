"""What stands beside a run's own points, by the real commands."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator

import pytest
from federation.runs import lines_of, shown_rows


def test_the_table_is_of_the_clients_that_take_part(copy, run):
    here = [f"--federation.run_dir={copy}", "--federation.report=false"]
    run("fit", "--merge.method=ties", *here)
    before = shown_rows(copy)
    run("fit", "--federation.clients=[cartoon,photo]", "--federation.unseen=sketch", *here)
    after = shown_rows(copy)
    assert list(after) == ["zero-shot", "client cartoon", "client photo", "best client", "average", "sap"]
    assert len(before) == 9 and len(lines_of(copy)) == 4 * 7 + 2, "what was measured of all clients is kept"
    sources = json.loads((copy / "merged" / "sketch" / "sap" / "merge.json").read_text())["sources"]
    assert {source["name"] for source in sources} == {"cartoon", "photo"} and len(sources) == 2
    assert sources == sorted(sources, key=lambda source: source["sha256"]), "in the order of their content"
    run("fit", *here)
    assert {**shown_rows(copy), "ties": before["ties"]} == before, "earlier merges of the same clients stand beside"
    record = json.loads((copy / "merged" / "sketch" / "sap" / "merge.json").read_text())
    assert len(record["sources"]) == 3


@pytest.fixture
def one_more(world) -> Iterator[Callable[[], None]]:
    """Adds an image to the photos of all tests' world, for the time of a test."""
    image = min((world / "domains" / "photo").rglob("*.png"))
    yield lambda: shutil.copy(image, image.with_stem("zz"))
    image.with_stem("zz").unlink()


def test_a_row_measured_before_an_image_was_added_is_not_in_the_table(copy, run, one_more, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sap_lightning"), "propagate", True)
    here = [f"--federation.run_dir={copy}", "--federation.report=false", "--federation.unseen=photo"]
    run("fit", "--merge.method=ties", *here)
    assert "ties" in shown_rows(copy)
    one_more()
    run("fit", *here)
    assert "ties" not in shown_rows(copy) and ": ties; measure it again" in caplog.text
    run("fit", "--merge.method=ties", *here)
    assert {"ties", "average", "sap"} < shown_rows(copy).keys()
