"""Results and evidence as a small run leaves them, made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sap_lightning.reporting.evidence import Client, Evidence, GalleryPicture, Projection
from sap_lightning.results import Predictions, Result, Results

UNSEEN = ["photo", "sketch"]
IMAGES = 8
PROVENANCE = {"config": "c0ffee", "commit": "badcafe", "versions": "torch 2.13"}


def answers(right: int, of: int = IMAGES) -> Predictions:
    """Of images of two classes in turn, the first so many are classified right."""
    labels = torch.arange(of) % 2
    predicted = torch.where(torch.arange(of) < right, labels, 1 - labels)
    return Predictions(torch.eye(2)[predicted] * 0.8 + 0.1, labels, torch.arange(of))


def result(model: str, unseen: str, right: int, of: int = IMAGES, **changed: Any) -> Result:
    """A merge that has classified so many images right; its measurement depends on model, domain and seed."""
    accuracy = float(torch.tensor(right / of))  # float32, as metrics are
    known = {
        "kind": "merge",
        "metrics": {"accuracy": accuracy, "macro_accuracy": accuracy / 2, "ece": right / 100},
        "measurement": f"{model}-{unseen}-{changed.get('seed', 0)}-{right}",
    }
    return Result(model=model, unseen=unseen, **(known | changed))


def client(domain: str, unseen: str, right: int, **changed: Any) -> Result:
    """One client alone."""
    return result(f"client {domain}", unseen, right, kind="client", **changed)


def zero_shot(unseen: str, right: int, **changed: Any) -> Result:
    """The base as it is."""
    return result("zero-shot", unseen, right, kind="zero-shot", **changed)


def measure(results: Results, *rows: Result, of: int = IMAGES) -> None:
    """Adds results with the predictions they were measured by."""
    for row in rows:
        results.keep_predictions(row.measurement, answers(round(row.metrics["accuracy"] * of), of))
        results.add(row)


def two_clients(folder: Path) -> Results:
    """Both clients, of which only the one that has not seen the domain is measured on it; zero-shot and sap."""
    results = Results(folder)
    measure(
        results,
        result("sap", "sketch", 6),
        result("sap", "photo", 4),
        client("sketch", "photo", 5),
        client("photo", "sketch", 3),
        zero_shot("photo", 2),
        zero_shot("sketch", 4),
    )
    return results


def add(results: Results, model: str, rights: dict[str, int], kind: str = "merge", **changed: Any) -> None:
    """Adds a model that has so many of 20 images right on each domain."""
    known = {"kind": kind, "provenance": PROVENANCE, **changed}
    measure(results, *(result(model, unseen, right, 20, **known) for unseen, right in rights.items()), of=20)


def swept(folder: Path, seeds: int = 1) -> Results:
    """Zero-shot at 0.5, the average at 0.85, sap at 0.85 and 0.95, and a client that has seen photo."""
    results = Results(folder)
    for seed in range(seeds):
        add(results, "zero-shot", {"photo": 10, "sketch": 10}, "zero-shot", seed=seed)
        add(results, "client photo", {"sketch": 12}, "client", seed=seed)
        add(results, "average", {"photo": 15, "sketch": 19}, seed=seed)
        add(results, "sap", {"photo": 18, "sketch": 16 + seed}, seed=seed, sparsity=0.5, swept=True)
        add(results, "sap", {"photo": 19, "sketch": 19 - seed}, seed=seed, sparsity=0.8, swept=True)
    return results


def evidence(client: str = "sketch") -> Evidence:
    """All that a report can show beside its table, of two clients."""
    layers = {f"vision_model.encoder.layers.{i}.self_attn.{m}": 0.1 * i for i in range(3) for m in ("q", "v")}
    pixels = torch.full((3, 8, 8), 200, dtype=torch.uint8)
    return Evidence(
        merged="sap ρ=0.8",
        clients=[
            Client("photo", 1000, 400, 0.7, 0.1, False, ""),
            Client(client, 1000, 400, 0.9, 0.5, True, "labels flipped"),
        ],
        share_kept={"photo": layers, client: layers},
        overlap=torch.tensor([[1.0, 0.3], [0.3, 1.0]]),
        conflict=dict.fromkeys(layers, (0.4, 0.2)),
        projection=Projection(torch.rand(4, 2), torch.rand(4, 2), ["photo", client] * 2, ["dog", "cat"] * 2),
        unseen_in_projection="photo",
        confusion={"photo": (torch.eye(2), 2 * torch.eye(2))},
        class_names=["dog", "cat"],
        fixed=[GalleryPicture(pixels, "photo", "dog", "cat", "dog")],
        broken=[GalleryPicture(pixels, "photo", "cat", "cat", client)],
    )
