"""A process that is killed while it writes."""

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


def killed(folder: Path, play: Callable[[], None], at: int | None = None) -> int:
    """Plays in a process of its own, which gets SIGKILL just before one of its changes of a folder.

    Returns:
        How many changes there were, up to the last.
    """
    changes = FORK.Value("i", 0)
    process = FORK.Process(target=_watched, args=(folder, play, changes, at))
    process.start()
    process.join()
    assert process.exitcode == (0 if at is None else -signal.SIGKILL)
    return changes.value


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
    return os.path.abspath(args[0]).startswith(str(folder))
