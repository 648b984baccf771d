"""One training step of ours, data and logging included, against a bare PyTorch loop on the same model and tensors.

python benchmarks/train_step.py --base ../shared/models/lit-dinov2-vits14-112
python benchmarks/train_step.py --precision bf16-mixed

On a GPU where there is one; then it also prints the peak of the memory that each side took.
"""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse import auto_cli
from torch.nn.functional import cross_entropy, normalize
from transformers import get_cosine_schedule_with_warmup
from worlds import SHAPES_CLIP, images_in

from sap_lightning.console import quieten
from sap_lightning.data.domains import DomainDataModule
from sap_lightning.modules.clip_lora import CLIPLoRAModule

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class StepTimes(L.Callback):
    """Seconds from the end of one training step to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [after - before for before, after in pairwise(self.ends)]


def ours(module: CLIPLoRAModule, data: DomainDataModule, steps: int, precision: Precision) -> list[float]:
    times = StepTimes()
    L.Trainer(
        max_steps=steps,
        precision=precision,
        callbacks=[times],
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir="runs/benchmarks",
    ).fit(module, datamodule=data)
    return times.seconds


def bare(module: CLIPLoRAModule, data: DomainDataModule, steps: int, precision: Precision) -> list[float]:
    """Forward, loss, backward, AdamW and schedule on batches that are ready on the device."""
    module.to(DEVICE)
    tower: Any = module.tower
    classes = module.class_features
    batches = [data._preprocess.normalise(batch.images.to(DEVICE)) for batch in data.train_dataloader()]
    labels = [batch.labels.to(DEVICE) for batch in data.train_dataloader()]
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, 1, steps)
    scaler = torch.GradScaler(DEVICE, enabled=precision == "16-mixed")
    ends = []
    for step in range(steps):
        images, targets = batches[step % len(batches)], labels[step % len(batches)]
        with torch.autocast(DEVICE, AUTOCAST.get(precision), enabled=precision in AUTOCAST):
            features = tower(images).image_embeds
        loss = cross_entropy(module.logit_scale * normalize(features.float(), dim=-1) @ classes.T, targets)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        loss.item()  # as ours, which logs it: waits for the device
        ends.append(time.perf_counter())
    return [after - before for before, after in pairwise(ends)]


def main(
    base: str = SHAPES_CLIP, steps: int = 8, rounds: int = 5, batch_size: int = 32, precision: Precision = "32-true"
) -> None:
    """Times both in turns.

    Args:
        base: CLIP checkpoint.
        steps: training steps in a round.
        rounds: how often each side takes its turn.
        batch_size: images in a step.
        precision: of the forward pass.
    """
    quieten()
    data = DomainDataModule(str(images_in("domains")), domain="photo", base=base, batch_size=batch_size)
    module = CLIPLoRAModule(base=base)
    ours(module, data, 2, precision)
    times: dict[str, list[float]] = {"ours": [], "bare loop": []}
    memory = dict.fromkeys(times, 0.0)
    for _ in range(rounds):
        for name, run in (("ours", ours), ("bare loop", bare)):
            times[name].extend(run(module, data, steps, precision))
            memory[name] = max(memory[name], peak_memory())
    a, b = (statistics.median(seconds) for seconds in times.values())
    print(f"ours {1000 * a:.1f} ms, bare loop {1000 * b:.1f} ms a step of {batch_size} images: ratio {a / b:.3f}")
    if DEVICE == "cuda":
        print(
            f"{torch.cuda.get_device_name()}, {precision}: {batch_size / a:.0f} against {batch_size / b:.0f} images/s,"
        )
        print(f"peak memory {memory['ours']:.2f} against {memory['bare loop']:.2f} GiB")


def peak_memory() -> float:
    """GiB at the most since it was asked last; 0 without a GPU."""
    if DEVICE == "cpu":
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


if __name__ == "__main__":
    auto_cli(main)
