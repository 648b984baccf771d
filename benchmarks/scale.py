"""Time and peak memory of merging ever more clients, streamed from disk; one Markdown table.

OMP_NUM_THREADS=1 python benchmarks/scale.py

Random LoRA of rank 16 on all linear layers of CLIP's ViT-B/16 vision tower, 10.6 MB each, or (``--small``) of rank 4 on
a tower an eighth as wide, 0.3 MB. Each merge runs in a process of its own; seconds are the processor's and include
reading and checking the adapters, memory is the process's peak beyond the loaded libraries.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from costs import Cost, alone, peak_mib
from jsonargparse import auto_cli
from random_adapters import SMALL, VIT_B_16, write_random_adapters

from sap_lightning.io.uploads import read_uploads
from sap_lightning.merging import METHODS


def main(
    methods: Sequence[str] = ("average", "fedavg"), clients: Sequence[int] = (10, 100, 1000), small: bool = False
) -> None:
    """Merges the first K adapters by every method.

    Args:
        methods: names of merge methods.
        clients: values of K.
        small: adapters of the small tower.
    """
    print("| method | K | seconds | MiB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        adapters = write_random_adapters(Path(folder), max(clients), *((4, SMALL) if small else (16, VIT_B_16)))
        for method in methods:
            for number in clients:
                cost = alone(run_streamed, method, adapters[:number])
                print(f"| {method} | {number} | {cost.seconds:.1f} | {cost.mib:.0f} |", flush=True)


def run_streamed(method: str, folders: list[Path]) -> Cost:
    memory, started = peak_mib(), time.process_time()
    METHODS[method]().merge(read_uploads(folders))
    return Cost(time.process_time() - started, peak_mib() - memory)


if __name__ == "__main__":
    auto_cli(main)
