"""Seconds and memory of a job in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch


class Cost(NamedTuple):
    """Seconds of a merge, and MiB that its process took beyond the loaded libraries."""

    seconds: float
    mib: float


def best(rounds: int, job: Callable[..., Cost], *args: object) -> Cost:
    return min(alone(job, *args) for _ in range(rounds))


def alone(job: Callable[..., Cost], *args: object) -> Cost:
    """Runs a job in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(job, *args).result()


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def warm_up() -> None:
    """The first decomposition of a process loads LAPACK."""
    torch.linalg.svd(torch.randn(64, 64))
