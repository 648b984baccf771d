"""Clients of one round against seconds and peak memory: trained one after another or side by side, then merged.

python benchmarks/many_clients.py
python benchmarks/many_clients.py --clients '[4]' --parallel '[1,2]' --images_per_class 60 --epochs 5

A client has images of its own, in one of the four styles of the built-in world. As the defaults are, it trains for one
step and does not measure its reach, so that what is measured is what a client costs beside its training. Each
measurement is in a process of its own. Seconds are those of all processes on their cores, so that other jobs count
little and two cores take half as long; memory is the peak of the largest process, libraries included. A merge begins
with reading and checking the uploads.
"""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import lightning as L
from costs import Cost, alone, peak_mib
from jsonargparse import auto_cli
from worlds import SHAPES_CLIP, images_in

from sap_lightning.console import quieten
from sap_lightning.data.anchors import AnchorDataModule
from sap_lightning.data.domains import DomainDataModule
from sap_lightning.data.shapes.world import DOMAINS, draw_domain
from sap_lightning.federation.one_shot import OneShotFederation
from sap_lightning.merging import SAP, Average, MergeMethod
from sap_lightning.modules.clip_lora import CLIPLoRAModule
from sap_lightning.modules.merge import MergeModule

SIZE = 64
METHODS: Sequence[MergeMethod] = (Average(), SAP(sparsity=0.9, space="factor"))


class Job(NamedTuple):
    """A federation of small clients.

    Attributes:
        world: a folder for each client's images and one for the unseen domain.
        run: the run folder.
        parallel: clients that are trained at once.
        epochs: of a client's training.
    """

    world: Path
    run: Path
    parallel: int
    epochs: int

    def federation(self) -> OneShotFederation:
        quieten()
        trainer = partial(
            L.Trainer, max_epochs=self.epochs, accelerator="cpu", enable_model_summary=False, log_every_n_steps=1
        )
        federation = OneShotFederation(
            CLIPLoRAModule(SHAPES_CLIP, reach=False),
            DomainDataModule(str(self.world), base=SHAPES_CLIP, batch_size=16, cache=False),
            AnchorDataModule(str(images_in("anchors")), base=SHAPES_CLIP),
            MergeModule(SHAPES_CLIP),
            trainer,
            str(self.run),
            unseen="unseen",
            parallel=self.parallel,
        )
        federation.check()
        return federation


def main(
    clients: Sequence[int] = (10, 100, 1000), parallel: Sequence[int] = (2,), images_per_class: int = 1, epochs: int = 1
) -> None:
    """One Markdown table.

    Args:
        clients: numbers of clients K.
        parallel: how many of them are trained at once.
        images_per_class: a client's images of each of eight classes.
        epochs: of a client's training.
    """
    columns = ["K", "at once", *(f"{what} CPU s | MiB" for what in ("training", *(method.name for method in METHODS)))]
    print(f"| {' | '.join(columns)} |\n|{'---|' * 8}")
    for number in clients:
        with tempfile.TemporaryDirectory() as folder:
            world = draw_clients(Path(folder, "world"), number, images_per_class)
            for at_once in parallel:
                job = Job(world, Path(folder, f"run{at_once}"), at_once, epochs)
                costs = [alone(train, job), *(alone(merge, job, method) for method in METHODS)]
                measured = " | ".join(f"{cost.seconds:.1f} | {cost.mib:.0f}" for cost in costs)
                print(f"| {number} | {at_once} | {measured} |", flush=True)


def draw_clients(world: Path, number: int, images_per_class: int) -> Path:
    """Images of that many clients and of an unseen domain, each drawn from a seed of its own."""
    names = [*(f"client{seed:04}" for seed in range(number)), "unseen"]
    for seed, name in enumerate(names):
        draw_domain(world / name, DOMAINS[seed % len(DOMAINS)], images_per_class, SIZE, seed)
    return world


def train(job: Job) -> Cost:
    federation = job.federation()
    started = cpu_seconds()
    federation.train()
    of_clients = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return Cost(cpu_seconds() - started, max(peak_mib(), of_clients))


def merge(job: Job, method: MergeMethod) -> Cost:
    federation = job.federation()
    started = cpu_seconds()
    federation.evaluation.merge_of(federation.collect(federation.folder.uploads), method)
    return Cost(cpu_seconds() - started, peak_mib())


def cpu_seconds() -> float:
    """Of this process and of those that it has started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    auto_cli(main)
