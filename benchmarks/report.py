"""What the report and its evidence cost beside the measurements that they are of; one Markdown table.

OMP_NUM_THREADS=1 python benchmarks/report.py CLIP IMAGES ANCHORS

A run on a subset of a labelled image dataset such as PACS, one epoch for each client: every domain in turn is unseen,
and zero-shot, each client alone, the plain average and SAP are measured on it. Seconds are the processor's.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import lightning as L
from jsonargparse import auto_cli

from sap_lightning.console import quieten
from sap_lightning.data.anchors import AnchorDataModule
from sap_lightning.data.domains import DomainDataModule
from sap_lightning.federation.comparable import comparable
from sap_lightning.federation.one_shot import OneShotFederation
from sap_lightning.modules.clip_lora import CLIPLoRAModule
from sap_lightning.modules.merge import MergeModule
from sap_lightning.reporting.show import show


def main(base: str, images: Path, anchors: Path, images_per_class: Sequence[int] = (5, 15, 20)) -> None:
    """A row for each size of the subset.

    Args:
        base: folder of a CLIP checkpoint.
        images: folder domain/class/image.
        anchors: folder of images with captions.jsonl.
        images_per_class: of every domain.
    """
    quieten()
    print("| images a class | training s | measurements s | report s | report / measurements |\n|---|---|---|---|---|")
    for number in images_per_class:
        with tempfile.TemporaryDirectory() as folder:
            some = subset(images, Path(folder, "images"), number)
            federation = a_federation(base, some, anchors, Path(folder, "run"))
            federation.check()
            training = seconds(federation.train)
            measuring = seconds(federation.run)
            reporting = seconds(partial(show, federation, comparable(federation)))
        costs = f"{training:.1f} | {measuring:.1f} | {reporting:.1f} | {reporting / measuring:.3f}"
        print(f"| {number} | {costs} |", flush=True)


def subset(images: Path, folder: Path, number: int) -> Path:
    """Links to the first images of every class."""
    for of_class in sorted(images.glob("*/*/")):
        (folder / of_class.relative_to(images)).mkdir(parents=True)
        for image in sorted(of_class.iterdir())[:number]:
            (folder / image.relative_to(images)).symlink_to(image.resolve())
    return folder


def a_federation(base: str, images: Path, anchors: Path, run: Path) -> OneShotFederation:
    trainer = partial(L.Trainer, max_epochs=1, accelerator="cpu", enable_model_summary=False, log_every_n_steps=1)
    return OneShotFederation(
        CLIPLoRAModule(base, reach=False),
        DomainDataModule(str(images), base=base, cache=False),
        AnchorDataModule(str(anchors), base=base),
        MergeModule(base),
        trainer,
        str(run),
    )


def seconds(job: Callable[[], object]) -> float:
    """Of this process and of those that it has started and that have ended."""
    started = os.times()
    job()
    return sum(os.times()[:4]) - sum(started[:4])


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
