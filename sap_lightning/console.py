"""What a person sees while a command runs: log lines, bars, and not the noise of the libraries below."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from rich import get_console
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import track as progress_track

from sap_lightning.errors import InputError, printable

Item = TypeVar("Item")
LOG_WIDTH = 160
"""Columns of tables where no terminal sets them."""

NOISE = (
    r".*LightningCLI's args parameter.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*is_gradient_checkpointing.*",
    r".*module\(s\) in eval mode at the start of training.*",
    r".*smaller than the logging interval.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*GPU available but not used.*",
    r".*Total length of `DataLoader` across ranks is zero.*",
    r".*The given buffer is not writable.*",
    r".*does not have many workers.*",
)


def quieten(handler: logging.Handler | None = None) -> None:
    """Shows this package's log lines, or gives them to a handler, and hides the noise of its libraries."""
    threading.excepthook = _say_in_one_line
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    for name in ("lightning.pytorch", "lightning.fabric", "datasets", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    _quieten_transformers()
    package = logging.getLogger("sap_lightning")
    handler = handler or _handler()
    handler.addFilter(_on_one_line)
    package.addHandler(handler)
    package.setLevel(logging.INFO if os.environ.get("LOCAL_RANK", "0") == "0" else logging.WARNING)
    package.propagate = False


def _quieten_transformers() -> None:
    # By its variables where it is not imported yet: it takes a second that not every command needs.
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if (imported := sys.modules.get("transformers")) is not None:
        imported.logging.set_verbosity_error()
        imported.logging.disable_progress_bar()


def _say_in_one_line(error: threading.ExceptHookArgs) -> None:
    """What TensorBoard's thread cannot write is lost; the main thread hears of it when it writes next."""
    logging.getLogger("sap_lightning").warning("%s: %s", error.thread and error.thread.name, error.exc_value)


def _handler() -> logging.Handler:
    if on_terminal():
        # The console of the progress bars, so that lines go above them.
        return RichHandler(console=get_console(), show_time=False, show_level=False, show_path=False)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    return handler


def _on_one_line(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), ()
    return True


def table_console() -> Console:
    """What tables are printed to: as wide as the terminal, or where there is none wide enough for any."""
    return Console(width=None if on_terminal() else LOG_WIDTH)


def on_terminal() -> bool:
    """Whether somebody watches a terminal."""
    return get_console().is_terminal


def track(items: Sequence[Item], description: str) -> Iterable[Item]:
    """The items, with a bar that goes away when they are through."""
    return progress_track(items, description, transient=True) if on_terminal() else items


def run_as_command(function: Callable[..., object], as_positional: bool = True) -> None:
    """Runs a function with arguments from the command line; bad input ends in one line and exit code 1.

    Args:
        function: whose docstring is the help.
        as_positional: whether arguments without a default are given by their place, or by name.
    """
    from jsonargparse import auto_cli  # which few that write to a console need

    try:
        auto_cli(function, as_positional=as_positional)
    except InputError as error:
        sys.exit(f"error: {error}")
