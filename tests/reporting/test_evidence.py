"""What a finished run's report is made of, against the run's own results and uploads."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import tensor

from sap_lightning.reporting.evidence import confusion, gain, size_of
from sap_lightning.results import Predictions, Results

DOMAINS = ["cartoon", "painting", "photo", "sketch"]


def test_confusions_count_true_classes_in_rows_and_predicted_ones_in_columns():
    probabilities = torch.eye(3)[[0, 1, 1, 2, 0]]
    predictions = Predictions(probabilities, tensor([0, 0, 1, 2, 2]), torch.arange(5))
    assert confusion(predictions).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]


def test_the_gain_is_the_difference_of_accuracies():
    labels, images = tensor([0, 1, 2, 0]), torch.arange(4)
    before = Predictions(torch.eye(3)[[0, 0, 0, 0]], labels, images)
    after = Predictions(torch.eye(3)[[0, 1, 2, 1]], labels, images)
    assert gain(before, after) == pytest.approx(0.25)


def test_stored_predictions_give_the_accuracy_that_the_results_state(finished):
    results = Results(finished)
    for row in results.rows:
        predictions = results.predictions(row)
        counts = confusion(predictions)
        assert counts.sum() == len(predictions.labels)
        assert float(counts.diagonal().sum() / counts.sum()) == pytest.approx(row.metrics["accuracy"], abs=1e-6)
        per_class = counts.diagonal() / counts.sum(1)
        stated = [value for name, value in row.metrics.items() if name.startswith("accuracy/")]
        assert per_class.tolist() == pytest.approx(stated, abs=1e-6)


def test_clients_csv_has_each_upload_s_size_and_robust_z_score(finished):
    with (finished / "clients.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["name"] for row in rows] == DOMAINS
    for row in rows:
        folder: Path = finished / "uploads" / row["name"]
        assert int(row["upload_bytes"]) == size_of(folder) == sum(len(file.read_bytes()) for file in folder.iterdir())
        assert int(row["sparse_bytes"]) > 0
        assert row["poison"] == ""
    losses = tensor([float(row["anchor_loss"]) for row in rows], dtype=torch.float64)
    away = losses - losses.quantile(0.5)
    expected = 0.6745 * away / away.abs().quantile(0.5)
    assert [float(row["z_score"]) for row in rows] == pytest.approx(expected.tolist(), rel=1e-4)


def test_the_report_of_a_run_has_every_figure(finished):
    figures = {path.stem for path in (finished / "figures").glob("*.svg")}
    assert figures == {path.stem for path in (finished / "figures").glob("*.png")}
    assert {"anchor_loss", "mask_overlap", "sign_conflict", "projection_before", "projection_after"} <= figures
    assert {f"share_kept_{domain}" for domain in DOMAINS} <= figures
    assert {f"confusion_{domain}_{when}" for domain in DOMAINS for when in ("before", "after")} <= figures
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "95 %" in page and "python -m sap_lightning fit" in page
    table = (finished / "table.md").read_text(encoding="utf-8")
    assert all(f"| {label} |" in table for label in ("zero-shot", "best client", "average", "sap"))
