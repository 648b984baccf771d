"""Ours against PEFT, mergekit, merge-and-rebase and fusion_bench on the same adapters; one Markdown table.

OMP_NUM_THREADS=1 python benchmarks/merge.py --merge_and_rebase FOLDER

Random LoRA of rank 16 on all linear layers of CLIP's ViT-B/16 vision tower. Each merge runs in a process of its own.
Seconds are the processor's; memory is what a merge takes beyond the loaded libraries, adapters included. No time
includes reading them: here too they are in memory, where PEFT has them; the other peers get the full models they merge
ready-made (peers.py). Rows of a peer that is not there are left out; what asks for more than 12 GiB is inf.
"""

from __future__ import annotations

import math
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from costs import Cost, best, peak_mib, warm_up
from jsonargparse import auto_cli
from peers import run_fusion_bench, run_merge_and_rebase, run_mergekit, run_peft
from random_adapters import write_random_adapters

from sap_lightning.functional.recompression import recompress
from sap_lightning.io.uploads import read_uploads
from sap_lightning.merging import (
    CART,
    DARE,
    PCB,
    TIES,
    TSVM,
    WUDI,
    Average,
    DCMerge,
    FedAvg,
    IsoC,
    IsoCTS,
    Magnitude,
    MergeMethod,
)

RANK = 16
MOST_GIB = 12


class Row(NamedTuple):
    """What is merged how.

    Attributes:
        name: of the row.
        ours: our method.
        rank: that our result is recompressed to.
        peer: the other library.
        method: its name of the method.
    """

    name: str
    ours: MergeMethod
    rank: int | None
    peer: str
    method: str


ROWS = (
    Row("average, exact (rank K·16)", Average(), None, "PEFT", "cat"),
    Row("average, recompressed to rank 16", Average(), RANK, "PEFT", "svd"),
    Row("fedavg", FedAvg(), None, "PEFT", "linear"),
    Row("magnitude ρ 0.8, to rank 16", Magnitude(), RANK, "PEFT", "magnitude_prune_svd"),
    Row("dare ρ 0.8, to rank 16", DARE(sparsity=0.8), RANK, "PEFT", "dare_linear_svd"),
    Row("ties ρ 0.8, to rank 16", TIES(variant="peft"), RANK, "PEFT", "ties_svd"),
    Row("ties ρ 0.8, dense", TIES(variant="mergekit"), None, "mergekit", "ties"),
    Row("average, exact", Average(), None, "merge-and-rebase", "weighted_average"),
    Row("ties ρ 0.8, dense", TIES(variant="mergekit"), None, "merge-and-rebase", "ties_merge"),
    Row("dare ρ 0.8, dense", DARE(sparsity=0.8), None, "merge-and-rebase", "dare_merge"),
    Row("pcb", PCB(), None, "merge-and-rebase", "pcb"),
    Row("wudi", WUDI(), None, "merge-and-rebase", "wudi"),
    Row("iso_c", IsoC(), None, "merge-and-rebase", "isoc_merge"),
    Row("iso_cts", IsoCTS(), None, "merge-and-rebase", "isocts_merge"),
    Row("tsv_m", TSVM(), None, "merge-and-rebase", "tsv_merge"),
    Row("cart", CART(), None, "merge-and-rebase", "cart_merge"),
    Row("dc_merge", DCMerge(), None, "merge-and-rebase", "dc_merge"),
    Row("average, exact", Average(), None, "fusion_bench", "simple_average"),
    Row("ties ρ 0.8 over all layers, dense", TIES(), None, "fusion_bench", "ties_merging"),
    Row("dare ρ 0.8, dense", DARE(sparsity=0.8), None, "fusion_bench", "dare"),
    Row("iso_c", IsoC(), None, "fusion_bench", "iso_c"),
    Row("tsv_m", TSVM(), None, "fusion_bench", "TSVM"),
)


def main(
    clients: Sequence[int] = (3, 16),
    rounds: int = 1,
    rows: Sequence[str] | None = None,
    merge_and_rebase: Path | None = None,
) -> None:
    """Times every row for each number of clients.

    Args:
        clients: numbers of adapters to merge.
        rounds: how often each merge runs; the fastest counts.
        rows: those whose peer, or method of it, has one of these names; all if left out.
        merge_and_rebase: a clone of github.com/apanariello4/merge-and-rebase.
    """
    absent = set() if find_spec("fusion_bench") else {"fusion_bench"}
    if not merge_and_rebase:
        absent.add("merge-and-rebase")
    chosen = [row for row in ROWS if row.peer not in absent and (rows is None or {row.peer, row.method} & set(rows))]
    print("| merge | K | ours s | peer s | peer / ours | ours MiB | peer MiB | peer |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        adapters = write_random_adapters(Path(folder), max(clients), RANK)
        for number in clients:
            for row in chosen:
                ours = best(rounds, bounded, run_ours, row, adapters[:number])
                show(row, number, ours, best(rounds, bounded, run_peer, row, adapters[:number], merge_and_rebase))


def show(row: Row, number: int, ours: Cost, peer: Cost) -> None:
    ratio = peer.seconds / ours.seconds
    costs = f"{ours.seconds:.2f} | {peer.seconds:.2f} | {ratio:.1f} | {ours.mib:.0f} | {peer.mib:.0f}"
    print(f"| {row.name} | {number} | {costs} | {row.peer} {row.method} |", flush=True)


def bounded(job: Callable[..., Cost], *args: object) -> Cost:
    """A job's cost, infinite where it asks for more memory than there may be."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_GIB * 2**30, MOST_GIB * 2**30))
    try:
        return job(*args)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return Cost(math.inf, math.inf)
        raise


def run_ours(row: Row, folders: list[Path]) -> Cost:
    warm_up()
    read_uploads(folders[:1])  # loads what reading needs
    memory = peak_mib()
    adapters = [replace(adapter, layers=dict(adapter.layers)) for adapter in read_uploads(folders)]
    started = time.process_time()
    update = row.ours.merge(adapters)
    if row.rank:
        update = {name: recompress(layer, row.rank) for name, layer in update.items()}
    return Cost(time.process_time() - started, peak_mib() - memory)


def run_peer(row: Row, folders: list[Path], clone: Path | None) -> Cost:
    if row.peer == "PEFT":
        return run_peft(folders, row.method, RANK)
    if row.peer == "mergekit":
        return run_mergekit(folders, row.method)
    if row.peer == "fusion_bench":
        return run_fusion_bench(folders, row.method)
    assert clone is not None  # without one its rows are left out
    return run_merge_and_rebase(folders, row.method, clone)


if __name__ == "__main__":
    auto_cli(main)
