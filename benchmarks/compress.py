"""A model compressed by GRASP and its controls, and by leaving blocks out, at as many parameters: loss, size, speed.

python benchmarks/compress.py FOLDER --texts FILE.txt      # a causal language model
python benchmarks/compress.py FOLDER --anchors FOLDER      # the vision tower of a CLIPModel

A language model is shown rows of the first nine tenths of the text and measured on the last; CLIP is shown the first
half of the pairs of images and captions and measured on the others. Of blocks as many are dropped as leave a few more
parameters than GRASP, as leave a few less, and as GRASP compressed, each wherever they are and in a row (``angular``).
Speed is of the forward pass, by seconds of the processor, of which the shortest of three is taken.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import auto_cli
from torch import nn
from transformers import AutoTokenizer

from sap_lightning.checkpoints.checkpoint import Checkpoint
from sap_lightning.compression.calibration import Batch, Calibration, caption_losses, next_token_losses
from sap_lightning.compression.compression import Compression
from sap_lightning.compression.loading import IMAGES, ROWS, reopened
from sap_lightning.console import quieten
from sap_lightning.data.anchors import AnchorDataModule
from sap_lightning.data.texts import TokenRows
from sap_lightning.models.clip import load_base

Losses = Callable[[nn.Module, Batch], torch.Tensor]


class Held(NamedTuple):
    """What was held out: batches, the loss on one, and how many tokens or images they are."""

    batches: Sequence[Batch]
    losses: Losses
    size: int


def main(
    model: Path,
    texts: Path | None = None,
    anchors: Path | None = None,
    layers: float = 0.25,
    retain: float = 0.1,
    rows: int = 16,
    tokens: int = 64,
    pairs: int = 64,
    steps: int = 16,
    recovery: int = 0,
    energy: float = 0.0,
    work: Path = Path("runs/compress"),
) -> None:
    """Prints the table.

    Args:
        model: folder of the model.
        texts: for a language model.
        anchors: for CLIP.
        layers: share of the blocks.
        retain: share of the triplets.
        rows: of tokens, shown and held out.
        tokens: of a row.
        pairs: of images and captions, in all.
        steps: of GradPruner.
        recovery: epochs of a row of its own; 0 leaves it out.
        energy: share of each layer's scores that a row of its own keeps, in place of a share of its triplets.
        work: where compressed models stay; one that stands is not made again.
    """
    quieten()
    work.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {}
    if texts:
        shown, held = split_text(model, texts, rows, tokens, work)
        data, seen = {"texts": str(shown), "rows": rows, "tokens": tokens}, None
    else:
        seen, held = split_pairs(model, str(anchors), pairs)
    compress = partial(compressed, model, seen, data, work)
    unit = "tokens" if texts else "images"
    print(f"| | loss, shown | loss, held out | parameters | MB | {unit} a CPU second |\n|---|---:|---:|---:|---:|---:|")
    grasped: dict[str, tuple[str, dict[str, Any]]] = {
        "GRASP, paper": ("paper", {"score": "paper"}),
        "GRASP, code": ("code", {"score": "code"}),
        "largest σ": ("sigma", {"score": "sigma"}),
        "random groups": ("random", {"score": "random"}),
        "GRASP, paper, blocks in a row": ("run", {"angular": True}),
    }
    if recovery:
        grasped[f"GRASP, paper, {recovery} epochs of recovery"] = ("recovered", {"recovery_epochs": recovery})
    if energy:
        grasped[f"GRASP, paper, {energy:.0%} of the scores"] = (f"energy-{energy}", {"retain": None, "energy": energy})
    for label, (kind, options) in grasped.items():
        name = f"{kind}-{layers}-{retain}"
        record = compress(name, **{"layers": layers, "retain": retain, **options})
        if kind == "paper":
            show("as it is", record, 0, model, held)
        show(label, record, 1, work / name, held)
    before, after = record["parameters"]
    blocks, chosen = len(record["findings"]["redundancy"]), len(record["findings"]["blocks"])
    fewer = (before - after) // block_size(model)
    for count in sorted({fewer, fewer + 1, chosen} - {0}):
        for name, angular in {f"drop-{count}": False, f"drop-run-{count}": True}.items():
            record = compress(name, method="drop", layers=count / blocks, angular=angular)
            show(f"{count} blocks dropped{', in a row' * angular}", record, 1, work / name, held)
    record = compress(f"gradpruner-{fewer + 1}", method="gradpruner", layers=(fewer + 1) / blocks, steps=steps)
    show(f"GradPruner, {fewer + 1} blocks", record, 1, work / f"gradpruner-{fewer + 1}", held)


# Compressing


def compressed(
    model: Path, seen: AnchorDataModule | None, data: Mapping[str, Any], work: Path, name: str, **options: Any
) -> dict[str, Any]:
    """Compresses into a folder of that name, unless it stands, and returns the record."""
    folder = work / name
    if not folder.exists():
        Compression(str(model), str(folder), **data, **options).run(seen)
    return dict(json.loads((folder / "compress.json").read_text()))


def block_size(model: Path) -> int:
    """Parameters of one block."""
    shapes = Checkpoint(str(model)).shapes
    inside = [key for key in shapes if ".layers.0." in key and "text_model" not in key]
    return sum(math.prod(shapes[key]) for key in inside)


# Measuring


def split_text(model: Path, texts: Path, rows: int, tokens: int, work: Path) -> tuple[Path, Held]:
    """A file of the first nine tenths, and rows of the last."""
    text = texts.read_text(encoding="utf-8")
    shown = work / "shown.txt"
    shown.write_text(text[: len(text) * 9 // 10], encoding="utf-8")
    ids = TokenRows(text[len(text) * 9 // 10 :], rows, tokens, str(texts)).ids(AutoTokenizer.from_pretrained(model))
    return shown, Held([(some,) for some in ids.split(ROWS)], next_token_losses, ids.numel())


def split_pairs(model: Path, anchors: str, pairs: int) -> tuple[AnchorDataModule, Held]:
    """The first half of the pairs, and the others."""
    every = AnchorDataModule(anchors, pairs, str(model))
    images, captions = every.images()[pairs // 2 :], load_base(str(model)).texts(every.captions[pairs // 2 :])
    batches = list(zip(images.split(IMAGES), captions.split(IMAGES), strict=True))
    return AnchorDataModule(anchors, pairs // 2, str(model)), Held(batches, caption_losses, len(images))


def show(name: str, record: dict[str, Any], when: int, folder: Path, held: Held) -> None:
    """A row of a model as the record has it before (0) or after (1)."""
    calibration = Calibration(reopened(folder), held.batches, held.losses)
    loss, speed = calibration.loss(), held.size / min(timed(calibration) for _ in range(3))
    size = f"{record['parameters'][when] / 1e6:.1f} M | {record['bytes'][when] / 1e6:.1f}"
    print(f"| {name} | {record['findings']['loss'][when]:.3f} | {loss:.3f} | {size} | {speed:.0f} |", flush=True)


def timed(calibration: Calibration) -> float:
    """Seconds of the processor for a forward pass over all."""
    started = time.process_time()
    calibration.loss()
    return time.process_time() - started


if __name__ == "__main__":
    auto_cli(main)
