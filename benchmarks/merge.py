"""Ours against PEFT and mergekit on the same adapters: time and peak memory of each merge, one Markdown table.

python benchmarks/merge.py

Random LoRA of rank 16 on all linear layers of CLIP's ViT-B/16 vision tower. Each merge runs in a process of its own;
memory is what it takes beyond the loaded libraries, adapters included. No time includes reading them: here too they are
in memory, where PEFT has them; mergekit gets the full models it merges ready-made.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from jsonargparse import auto_cli
from peft import PeftModel
from random_adapters import vision_tower, write_random_adapters

from sap_lightning.console import quieten
from sap_lightning.functional.recompression import recompress
from sap_lightning.io.uploads import read_uploads
from sap_lightning.merging import DARE, TIES, Average, FedAvg, Magnitude, MergeMethod

RANK = 16
OURS: dict[str, MergeMethod] = {
    "average": Average(),
    "fedavg": FedAvg(),
    "magnitude": Magnitude(),
    "dare": DARE(sparsity=0.8),
    "ties peft": TIES(variant="peft"),
    "ties mergekit": TIES(variant="mergekit"),
}


class Cost(NamedTuple):
    """Seconds of a merge, and MiB that its process took beyond the loaded libraries."""

    seconds: float
    mib: float


PAIRS: dict[str, tuple[str, str, str]] = {
    "average, exact (rank K·16)": ("average", "", "cat"),
    "average, recompressed to rank 16": ("average", "rank", "svd"),
    "fedavg": ("fedavg", "", "linear"),
    "magnitude ρ 0.8, to rank 16": ("magnitude", "rank", "magnitude_prune_svd"),
    "dare ρ 0.8, to rank 16": ("dare", "rank", "dare_linear_svd"),
    "ties ρ 0.8, to rank 16": ("ties peft", "rank", "ties_svd"),
}
"""Row of the table: our method, whether its result is recompressed, and PEFT's combination_type."""


def main(clients: Sequence[int] = (3, 16), rounds: int = 1) -> None:
    """Times every pair for each number of clients.

    Args:
        clients: numbers of adapters to merge.
        rounds: how often each merge runs; the fastest counts.
    """
    print("| merge | K | ours s | peer s | peer / ours | ours MiB | peer MiB | peer |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        adapters = write_random_adapters(Path(folder), max(clients), RANK)
        for number in clients:
            for row, (method, rank, combination) in PAIRS.items():
                ours = best(rounds, run_ours, method, adapters[:number], RANK if rank else None)
                show(row, number, ours, best(rounds, run_peft, combination, adapters[:number]), f"PEFT {combination}")
            ours = best(rounds, run_ours, "ties mergekit", adapters[:number], None)
            show("ties ρ 0.8, dense", number, ours, best(rounds, run_mergekit, adapters[:number]), "mergekit ties")


def show(row: str, number: int, ours: Cost, peer: Cost, name: str) -> None:
    ratio = peer.seconds / ours.seconds
    costs = f"{ours.seconds:.2f} | {peer.seconds:.2f} | {ratio:.1f} | {ours.mib:.0f} | {peer.mib:.0f}"
    print(f"| {row} | {number} | {costs} | {name} |", flush=True)


def best(rounds: int, job: Callable[..., Cost], *args: object) -> Cost:
    return min(alone(job, *args) for _ in range(rounds))


def alone(job: Callable[..., Cost], *args: object) -> Cost:
    """Runs a job in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(job, *args).result()


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_ours(method: str, folders: list[Path], rank: int | None) -> Cost:
    warm_up()
    read_uploads(folders[:1])  # loads what reading needs
    memory = peak_mib()
    adapters = [replace(adapter, layers=dict(adapter.layers)) for adapter in read_uploads(folders)]
    started = time.perf_counter()
    update = OURS[method].merge(adapters)
    if rank:
        update = {name: recompress(layer, rank) for name, layer in update.items()}
    return Cost(time.perf_counter() - started, peak_mib() - memory)


def run_peft(combination: str, folders: list[Path]) -> Cost:
    quieten()
    tower = vision_tower()
    memory = peak_mib()
    model = PeftModel.from_pretrained(tower, folders[0], adapter_name="0")
    for index, folder in enumerate(folders[1:], start=1):
        model.load_adapter(folder, adapter_name=str(index))
    names = [str(index) for index in range(len(folders))]
    weights = [1 / len(names)] * len(names)
    options = {} if combination in ("cat", "linear") else {"svd_rank": RANK}
    if combination not in ("cat", "linear", "svd"):
        options["density"] = 0.2
    warm_up()
    started = time.perf_counter()
    model.add_weighted_adapter(names, weights, "merged", combination, **options)
    return Cost(time.perf_counter() - started, peak_mib() - memory)


def run_mergekit(folders: list[Path]) -> Cost:
    from mergekit.merge_methods.base import TensorGroup
    from mergekit.merge_methods.registry import get

    adapters = read_uploads(folders)
    clients = range(len(adapters))
    shared = {"int8_mask": False, "normalize": True, "rescale": False, "lambda": 1.0}
    each = {"weight": dict.fromkeys(clients, 1 / len(adapters)), "density": dict.fromkeys(clients, 0.2)}
    memory, seconds = peak_mib(), 0.0
    merged = []
    for name in adapters[0].layers:
        deltas = [adapter.layers[name].delta() for adapter in adapters]
        ids = [*clients, "base"]
        group = TensorGroup.from_tensors([*deltas, torch.zeros_like(deltas[0])], ids=ids, base_index=len(clients))
        started = time.perf_counter()
        merged.append(get("ties").merge_group(group, **shared, **each))
        seconds += time.perf_counter() - started
    return Cost(seconds, peak_mib() - memory)


def warm_up() -> None:
    """The first decomposition of a process loads LAPACK."""
    torch.linalg.svd(torch.randn(64, 64))


if __name__ == "__main__":
    auto_cli(main)
