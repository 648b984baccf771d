from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator

import pytest
import rich
import transformers
from rich.logging import RichHandler

from sap_lightning.console import on_terminal, quieten, track

PACKAGE = "sap_lightning"
LIBRARIES = ("lightning.pytorch", "lightning.fabric", "datasets", "httpx")


def test_somebody_watches_a_terminal_only_where_there_is_one(terminal):
    assert on_terminal()
    rich.reconfigure(force_terminal=False)
    assert not on_terminal()


def test_items_are_tracked_silently_without_a_terminal(capsys):
    items = ["a", "b"]
    assert list(track(items, "scoring")) == items
    assert capsys.readouterr().out == ""


def test_items_are_tracked_with_a_bar_on_a_terminal(terminal, capsys):
    assert list(track(["a", "b"], "scoring")) == ["a", "b"]
    assert "scoring" in capsys.readouterr().out


@pytest.fixture
def package(monkeypatch) -> Iterator[logging.Logger]:
    """The package's logger without handlers; all loggers and warnings are as they were afterwards."""
    loggers = [logging.getLogger(name) for name in (PACKAGE, *LIBRARIES)]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    verbosity = transformers.logging.get_verbosity()
    loggers[0].handlers[:] = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    with warnings.catch_warnings():
        yield loggers[0]
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()
    for logger, handlers, level, propagate in before:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_the_package_s_lines_have_the_time_without_a_terminal_and_libraries_only_errors(package, capsys):
    quieten()
    package.getChild("sweep").info("measured")
    logging.getLogger("lightning.pytorch").warning("chatter")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(" measured") and line[:4].isdigit()


def test_the_package_s_lines_go_above_the_bars_of_a_terminal(package, terminal):
    before = package.handlers[:]  # pytest's own, where an earlier command left the logger to itself
    quieten()
    (handler,) = (one for one in package.handlers if one not in before)
    assert isinstance(handler, RichHandler) and handler.console is rich.get_console()


def test_a_process_beside_others_gives_its_lines_to_its_handler(package, capsys):
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    quieten(handler)
    package.info("%s measured", "photo")
    assert said == ["photo measured"] and capsys.readouterr().err == ""


def test_a_name_in_a_line_neither_ends_it_nor_steers_the_terminal(package, capsys):
    quieten()
    package.warning("%s skipped", "a\nb\x1b[2J.png")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(r" a\nb\x1b[2J.png skipped")


@pytest.mark.parametrize(("rank", "level"), [("0", logging.INFO), ("1", logging.WARNING)])
def test_of_several_processes_the_first_one_speaks(package, monkeypatch, rank, level):
    monkeypatch.setenv("LOCAL_RANK", rank)
    quieten()
    assert package.level == level and not package.propagate


def test_only_the_known_noise_of_libraries_is_hidden(package):
    quieten()
    with pytest.warns(UserWarning, match="the disk is nearly full"):
        warnings.warn("the disk is nearly full", stacklevel=1)
    with warnings.catch_warnings(record=True) as shown:
        warnings.warn("The 'val_dataloader' does not have many workers which may be a bottleneck", stacklevel=1)
    assert shown == []


def test_what_a_thread_could_not_write_is_said_in_one_line(package, capsys):
    def fail() -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", threading.excepthook)
        quieten()
        thread = threading.Thread(target=fail, name="writer")
        thread.start()
        thread.join()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("writer: [Errno 28] No space left on device")
