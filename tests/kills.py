"""A process that is killed while it writes; for tests, and for benchmarks/crash.py."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
FORK = get_context("fork")


def played(folder: Path, play: Callable[[], None], at: int | None = None) -> tuple[int, int | None]:
    """Plays in a process of its own, which gets SIGKILL just before one of its changes of a folder, if one is given.

    Returns:
        How many changes there were, up to that, and the exit code.
    """
    changes = FORK.Value("i", 0)
    process = FORK.Process(target=_watched, args=(folder, play, changes, at))
    process.start()
    process.join()
    return changes.value, process.exitcode


def killed(folder: Path, play: Callable[[], None], at: int | None = None) -> int:
    """`played`, which must end as it is to; how many changes there were."""
    changes, exitcode = played(folder, play, at)
    assert exitcode == (0 if at is None else -signal.SIGKILL)
    return changes


def _watched(folder: Path, play: Callable[[], None], changes: Any, at: int | None) -> None:
    def on_event(event: str, args: tuple[Any, ...]) -> None:
        if event in CHANGES and _is_change(folder, event, args):
            changes.value += 1
            if changes.value == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)
    play()


def _is_change(folder: Path, event: str, args: tuple[Any, ...]) -> bool:
    if not isinstance(args[0], str | os.PathLike) or (event == "open" and args[2] & os.O_ACCMODE == os.O_RDONLY):
        return False
    relative_to = args[-1] if event in ("os.remove", "os.rmdir") else -1
    parent = "" if relative_to == -1 else os.readlink(f"/proc/self/fd/{relative_to}")
    return os.path.abspath(os.path.join(parent, args[0])).startswith(str(folder))
