"""One training step of ours, data and logging included, against a bare PyTorch loop on the same model and tensors.

python benchmarks/train_step.py --base ../shared/models/lit-dinov2-vits14-112
"""

from __future__ import annotations

import statistics
import time
from itertools import pairwise

import lightning as L
import torch
from jsonargparse import auto_cli
from torch.nn.functional import cross_entropy, normalize
from transformers import get_cosine_schedule_with_warmup
from worlds import SHAPES_CLIP, images_in

from sap_lightning.console import quieten
from sap_lightning.data.domains import DomainDataModule
from sap_lightning.modules.clip_lora import CLIPLoRAModule


class StepTimes(L.Callback):
    """Seconds from the end of one training step to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [after - before for before, after in pairwise(self.ends)]


def ours(module: CLIPLoRAModule, data: DomainDataModule, steps: int) -> list[float]:
    times = StepTimes()
    L.Trainer(
        max_steps=steps,
        callbacks=[times],
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir="runs/benchmarks",
    ).fit(module, datamodule=data)
    return times.seconds


def bare(module: CLIPLoRAModule, data: DomainDataModule, steps: int) -> list[float]:
    """Forward, loss, backward, AdamW and schedule on batches that are ready on the device."""
    tower, classes = module.tower, module.class_features
    batches = [data._preprocess.normalise(batch.images) for batch in data.train_dataloader()]
    labels = [batch.labels for batch in data.train_dataloader()]
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, 1, steps)
    ends = []
    for step in range(steps):
        images, targets = batches[step % len(batches)], labels[step % len(batches)]
        logits = module.logit_scale * normalize(tower(images).image_embeds, dim=-1) @ classes.T
        optimizer.zero_grad()
        cross_entropy(logits, targets).backward()
        optimizer.step()
        schedule.step()
        ends.append(time.perf_counter())
    return [after - before for before, after in pairwise(ends)]


def main(base: str = SHAPES_CLIP, steps: int = 8, rounds: int = 5, batch_size: int = 32) -> None:
    """Times both in turns.

    Args:
        base: CLIP checkpoint.
        steps: training steps in a round.
        rounds: how often each side takes its turn.
        batch_size: images in a step.
    """
    quieten()
    data = DomainDataModule(str(images_in("domains")), domain="photo", base=base, batch_size=batch_size)
    module = CLIPLoRAModule(base=base)
    ours(module, data, 2)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        times[0].extend(ours(module, data, steps))
        times[1].extend(bare(module, data, steps))
    a, b = map(statistics.median, times)
    print(f"ours {1000 * a:.1f} ms, bare loop {1000 * b:.1f} ms a step of {batch_size} images: ratio {a / b:.3f}")


if __name__ == "__main__":
    auto_cli(main)
