"""Which figures a report has, and what they are drawn from."""

from __future__ import annotations

from pathlib import Path

import pytest
from reporting.samples import UNSEEN, add, evidence, swept
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from sap_lightning.callbacks.tensorboard import log_figures
from sap_lightning.reporting.draw import accuracy_curves, draw, rounds_curves
from sap_lightning.reporting.table import tabulate
from sap_lightning.results import Results

OF_EVIDENCE = [
    "caption_margin",
    "share_kept/photo",
    "share_kept/sketch",
    "mask_overlap",
    "sign_conflict",
    "projection/before",
    "projection/after",
    "confusion/photo/before",
    "confusion/photo/after",
    "gallery/fixed",
    "gallery/broken",
]


def test_every_figure_that_there_is_data_for_is_drawn(tmp_path: Path) -> None:
    results = swept(tmp_path)
    rows = tabulate(results, UNSEEN)
    assert list(draw(results, rows, evidence())) == ["accuracy_by_sparsity", *OF_EVIDENCE]
    assert list(draw(results, rows, None)) == ["accuracy_by_sparsity"]
    one_sparsity = results.only(row for row in results.rows if row.sparsity != 0.5)
    assert list(draw(one_sparsity, tabulate(one_sparsity, UNSEEN), evidence())) == OF_EVIDENCE, "a point is no curve"


def test_curves_have_what_is_pruned_and_references_what_is_not(tmp_path: Path) -> None:
    results = swept(tmp_path)
    for unseen, sparsity in (("photo", 0.5), ("sketch", 0.9)):  # chosen anew for every domain
        add(results, "sap_auto", {unseen: 20}, sparsity=sparsity)
    curves, references = accuracy_curves(results, tabulate(results, UNSEEN))
    assert {name: [(rho, spread.mean) for rho, spread in curve] for name, curve in curves.items()} == {
        "sap": [(0.5, pytest.approx(0.85)), (0.8, pytest.approx(0.95))]
    }
    assert {name: spread.mean for name, spread in references.items()} == {
        "zero-shot": 0.5,
        "average": pytest.approx(0.85),
    }


def test_a_model_that_was_not_measured_everywhere_is_no_reference(tmp_path: Path) -> None:
    results = Results(tmp_path)
    add(results, "bare", {"photo": 10, "sketch": 10}, "zero-shot")
    add(results, "average", {"sketch": 19})
    _, references = accuracy_curves(results, tabulate(results, UNSEEN))
    assert list(references) == ["bare"], "it is the kind that makes a reference"


def test_tensorboard_has_the_same_figures(tmp_path: Path) -> None:
    results = swept(tmp_path)
    figures = draw(results, tabulate(results, UNSEEN), evidence())
    board = SummaryWriter(str(tmp_path / "board"))
    log_figures([board], figures)
    board.close()
    tags = EventAccumulator(str(tmp_path / "board")).Reload().Tags()["images"]
    assert len(tags) == len(figures) == 12
    assert set(tags) == set(figures)


def test_rows_that_differ_in_rounds_alone_are_a_curve(tmp_path: Path) -> None:
    results = swept(tmp_path)
    assert not any("rounds" in name for name in draw(results, tabulate(results, UNSEEN), None))
    for rounds in (5, 1):
        for rank in (2, 4):
            variant = {"federation.rounds": rounds, "model.rank": rank}
            add(
                results, "ties", {"photo": 9 + rounds, "sketch": 9}, variant=variant, rounds=rounds, bytes=1000 * rounds
            )
    rows = tabulate(results, UNSEEN)
    curves = rounds_curves(results, rows)
    assert {name: [row.rounds for row in of] for name, of in curves.items() if "ties" in name} == {
        "ties, rank=2": [5, 1],
        "ties, rank=4": [5, 1],
    }
    only = results.only(row for row in results.rows if row.model in ("ties", "zero-shot"))
    assert list(draw(only, tabulate(only, UNSEEN), None)) == ["accuracy_by_rounds", "accuracy_by_bytes"]
    assert "accuracy_by_bytes" not in draw(results, rows, None), "of some merges no bytes were counted"
