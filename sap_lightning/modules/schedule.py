"""How a client's learning rate goes."""

from __future__ import annotations

from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

Schedule = Literal["cosine", "constant"]


def rates(optimizer: Optimizer, schedule: Schedule, warmup: float, steps: int, done: int = 0) -> LambdaLR:
    """The rate rises over the first steps, then falls as a cosine to nothing, or stays.

    Args:
        optimizer: whose rate it is; with its initial rate, where steps are done.
        schedule: what the rate does once it has risen.
        warmup: share of the steps over which it rises.
        steps: in all.
        done: of them before.
    """
    rising = round(warmup * steps)
    if schedule == "constant":
        return get_constant_schedule_with_warmup(optimizer, rising, last_epoch=done - 1)
    return get_cosine_schedule_with_warmup(optimizer, rising, steps, last_epoch=done - 1)
