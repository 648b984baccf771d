"""What a finished run's report is made of, against the run's own results and uploads."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import tensor

from sap_lightning.functional.lora import LoRALayer
from sap_lightning.functional.traffic import sparse_upload
from sap_lightning.io.adapter import Adapter, sha256_of
from sap_lightning.merging.magnitude import Magnitude
from sap_lightning.reporting.evidence import confusion, evidence_of_masks, gain, gallery
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


def test_the_gallery_holds_what_changed_surest_first_whatever_the_order():
    labels = torch.tensor([0, 0, 1, 1, 0])
    before = Predictions(torch.tensor([[0, 1], [0, 1], [0, 1], [0, 1], [1, 0]]).float(), labels, torch.arange(5) * 2)
    sure = torch.tensor([0.6, 0.9, 0.3, 0.8, 0.2])  # of class 0, after
    after = Predictions(torch.stack([sure, 1 - sure], 1), labels, before.images)
    shuffled = Predictions(*(tensor[[3, 0, 4, 2, 1]] for tensor in after))
    images = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 2, 2), dtype=np.uint8)
    fixed, broken = gallery(before, shuffled, images, ["dog", "cat"], "photo", 9)
    assert [int(picture.pixels[0, 0, 0]) for picture in fixed] == [2, 0]
    assert [int(picture.pixels[0, 0, 0]) for picture in broken] == [6, 8]
    assert fixed[0][1:] == ("photo", "dog", "cat", "dog")
    assert broken[0][1:] == ("photo", "cat", "cat", "dog")
    assert [len(of) for of in gallery(before, after, images, ["dog", "cat"], "photo", 1)] == [1, 1]
    with pytest.raises(ValueError, match="different images of photo: 5 and 4"):
        gallery(before, Predictions(*(tensor[:4] for tensor in after)), images, ["dog", "cat"], "photo", 9)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("space", ["delta", "factor"])
def test_evidence_of_masks_is_that_of_the_dense_updates(scope, space):
    generator = torch.Generator().manual_seed(0)

    def client(name: str, layers: list[str]) -> Adapter:
        of = {n: LoRALayer(*(torch.randn(s, generator=generator) for s in ((2, 6), (5, 2))), 0.5) for n in layers}
        return Adapter(name, of, sha256_of(of))

    adapters = [client("a", ["q", "v"]), client("b", ["q", "v"]), client("c", ["v"])]
    pruning = Magnitude(0.5, scope, space).prepare(adapters, [1 / 3] * 3)
    shares, matrix, conflict, sizes = evidence_of_masks(pruning, 0.5)
    assert {name: list(layers) for name, layers in shares.items()} == {"a": ["q", "v"], "b": ["q", "v"], "c": ["v"]}
    if scope == "layer":
        assert shares["a"] == pytest.approx({"q": 0.5, "v": 0.5})
    kept = [
        {
            (n, t, *map(int, i))
            for n, layer in pruning.kept(one, 0.5).items()
            for t, m in enumerate(layer)
            for i in m.nonzero()
        }
        for one in adapters
    ]
    assert sizes == {one.sha256: sparse_upload(pruning.kept(one, 0.5)) for one in adapters}
    np.testing.assert_allclose(matrix, [[len(p & q) / len(p | q) for q in kept] for p in kept])
    for name, (before, after) in conflict.items():
        own = [one for one in adapters if name in one.layers]
        whole = torch.stack([one.layers[name].delta().sign() for one in own])
        pruned = [pruning.pruned(one, 0.5)[name] for one in own]
        signs = torch.stack([(p.delta() if isinstance(p, LoRALayer) else p).sign() for p in pruned])
        for found, of in ((before, whole), (after, signs)):
            shared = of.abs().sum(0) > 1
            assert found == pytest.approx(float((of.sum(0).abs() < of.abs().sum(0))[shared].float().mean()))


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


def test_clients_csv_has_each_upload_s_size_and_how_it_stands(finished):
    with (finished / "clients.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["name"] for row in rows] == DOMAINS
    for row in rows:
        folder: Path = finished / "uploads" / row["name"]
        assert int(row["upload_bytes"]) == sum(len(file.read_bytes()) for file in folder.iterdir())
        assert int(row["sparse_bytes"]) > 0
        assert row["poison"] == ""
        assert float(row["anchor_loss"]) > 0 and 0 < float(row["margin"]) < 1
        assert row["stands_out"] == "False"


def test_the_report_of_a_run_has_every_figure(finished):
    figures = {path.stem for path in (finished / "figures").glob("*.svg")}
    assert figures == {path.stem for path in (finished / "figures").glob("*.png")}
    assert {"caption_margin", "mask_overlap", "sign_conflict", "projection_before", "projection_after"} <= figures
    assert {f"share_kept_{domain}" for domain in DOMAINS} <= figures
    assert {f"confusion_{domain}_{when}" for domain in DOMAINS for when in ("before", "after")} <= figures
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "95 %" in page and "python -m sap_lightning fit" in page
    table = (finished / "table.md").read_text(encoding="utf-8")
    assert all(f"| {label} |" in table for label in ("zero-shot", "best client", "average", "sap"))
