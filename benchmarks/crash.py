"""Kills a small fit at seeded events of its file system, continues it, and compares every byte with a run let through.

python benchmarks/crash.py        # make crash

The run folder is in memory (/dev/shm), another file system than that of temporary files. An event is a file opened to
be written, renamed, cut or removed, or a folder made or removed; the process gets SIGKILL just before it. TensorBoard's
events, which hold the time, and locks are not compared; checkpoints are by the values they hold.
"""

from __future__ import annotations

import io
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from lightning_utilities.core.apply_func import apply_to_collection
from worlds import SHAPES_CLIP

from sap_lightning.__main__ import main as sap_lightning
from sap_lightning.commands import COMMANDS  # noqa: F401  # imported here, and not by every run
from sap_lightning.data.shapes.world import draw_world

CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
FORK = get_context("fork")


def main(kills: int = 20, seed: int = 0, disk: Path = Path("/dev/shm"), rounds: int = 1) -> None:
    """Ends with exit code 1 where a killed run does not continue to the same bytes.

    Args:
        kills: how many runs are killed, each at one event.
        seed: chooses the events.
        disk: a folder of the file system that the run folder is on.
        rounds: how often the clients train and upload.
    """
    with tempfile.TemporaryDirectory() as world, tempfile.TemporaryDirectory(dir=disk) as place:
        draw_world(Path(world, "shapes"), images_per_class=4)
        line, run = command(Path(world, "shapes"), Path(place, "run"), rounds), Path(place, "run")
        events, _ = fit(line, run)
        whole = contents(run)
        print(f"{len(whole)} files, {events} events\n\n| killed at | seconds | differs |\n|---|---|---|")
        faults = 0
        for event in sorted(random.Random(seed).sample(range(1, events + 1), kills)):
            shutil.rmtree(run)
            started = time.perf_counter()
            _, killed = fit(line, run, event)
            _, ended = fit(line, run)
            found = contents(run)
            differs = [str(name) for name in sorted(whole.keys() | found.keys()) if whole.get(name) != found.get(name)]
            faults += bool(differs) or (killed, ended) != (-signal.SIGKILL, 0)
            said = ", ".join(differs) or "nothing"
            print(f"| {event} | {time.perf_counter() - started:.0f} | {said} |", flush=True)
    print(f"\n{kills - faults} of {kills} killed runs continued to the same bytes")
    sys.exit(faults > 0)


def command(world: Path, run: Path, rounds: int) -> list[str]:
    return [
        "fit",
        f"--model.base={SHAPES_CLIP}",
        f"--data.root={world / 'domains'}",
        f"--anchors.root={world / 'anchors'}",
        "--anchors.num_pairs=4",
        "--federation.unseen=[photo,sketch]",
        f"--federation.rounds={rounds}",
        "--trainer.max_epochs=2",
        "--trainer.accelerator=cpu",
        f"--federation.run_dir={run}",
    ]


def fit(line: list[str], run: Path, kill_at: int | None = None) -> tuple[int, int | None]:
    """Runs the command, up to an event if one is given; how many events there were, and its exit code."""
    events = FORK.Value("i", 0)
    process = FORK.Process(target=watched, args=(line, run, events, kill_at))
    process.start()
    process.join()
    return events.value, process.exitcode


def watched(line: list[str], run: Path, events: Any, kill_at: int | None) -> None:
    def on_event(event: str, args: tuple[Any, ...]) -> None:
        if event in CHANGES and changes(run, event, args):
            events.value += 1
            if events.value == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)
    sys.argv = ["sap_lightning", *line]
    logging.disable(logging.WARNING)
    with redirect_stdout(io.StringIO()):
        sap_lightning()


def changes(run: Path, event: str, args: tuple[Any, ...]) -> bool:
    """Whether an event changes something in the run folder."""
    if not isinstance(args[0], str | os.PathLike) or (event == "open" and args[2] & os.O_ACCMODE == os.O_RDONLY):
        return False
    folder = os.readlink(f"/proc/self/fd/{args[-1]}") if event in ("os.remove", "os.rmdir") and args[-1] != -1 else ""
    return os.path.join(folder, args[0]).startswith(str(run))


def contents(run: Path) -> dict[Path, bytes]:
    files = [path for path in run.rglob("*") if path.is_file()]
    return {
        path.relative_to(run): values(path) if path.suffix == ".ckpt" else path.read_bytes()
        for path in files
        if "tfevents" not in path.name and path.name != ".lock"
    }


def values(checkpoint: Path) -> bytes:
    """What a checkpoint holds; its bytes also tell which equal strings were one object when it was written."""
    return repr(apply_to_collection(torch.load(checkpoint), torch.Tensor, torch.Tensor.tolist)).encode()


if __name__ == "__main__":
    auto_cli(main)
