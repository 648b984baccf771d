"""Time and peak memory of merging ever more clients, streamed from disk; one Markdown table.

python benchmarks/scale.py

Random LoRA of rank 16 on all linear layers of CLIP's ViT-B/16 vision tower, 10.6 MB each. Each merge runs in a process
of its own; seconds include reading and checking the adapters, memory is the process's peak beyond the loaded
libraries.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from costs import Cost, alone, peak_mib
from jsonargparse import auto_cli
from random_adapters import write_random_adapters

from sap_lightning.io.uploads import read_uploads
from sap_lightning.merging import METHODS

RANK = 16


def main(methods: Sequence[str] = ("average", "fedavg"), clients: Sequence[int] = (10, 100, 1000)) -> None:
    """Merges the first K adapters by every method.

    Args:
        methods: names of merge methods.
        clients: values of K.
    """
    print("| method | K | seconds | MiB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        adapters = write_random_adapters(Path(folder), max(clients), RANK)
        for method in methods:
            for number in clients:
                cost = alone(run_streamed, method, adapters[:number])
                print(f"| {method} | {number} | {cost.seconds:.1f} | {cost.mib:.0f} |", flush=True)


def run_streamed(method: str, folders: list[Path]) -> Cost:
    memory, started = peak_mib(), time.perf_counter()
    METHODS[method]().merge(read_uploads(folders))
    return Cost(time.perf_counter() - started, peak_mib() - memory)


if __name__ == "__main__":
    auto_cli(main)
