"""A finished federation on a small built-in world and a terminal, shared by the tests that look at them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# Sums of torch follow the number of threads, and a process that is forked from one with several may wait for ever.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import rich
from places import REPOSITORY, SHAPES_CLIP

from sap_lightning.__main__ import main
from sap_lightning.commands import COMMANDS
from sap_lightning.data.shapes.world import draw_world
from sap_lightning.options import is_taken


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "shapes"
    draw_world(folder, images_per_class=6)
    return folder


@pytest.fixture(scope="session")
def options(world) -> list[str]:
    """One short epoch on the small world; the run folder is for the test to name."""
    return [
        f"--config={REPOSITORY / 'configs' / 'shapes.yaml'}",
        f"--model.base={SHAPES_CLIP}",
        f"--data.root={world / 'domains'}",
        f"--anchors.root={world / 'anchors'}",
        "--anchors.num_pairs=8",
        "--data.batch_size=16",
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
    ]


def taken(options: list[str], command: str) -> list[str]:
    """Those of the options that a command takes."""
    return [option for option in options if is_taken(option.partition("=")[0].removeprefix("--"), command)]


@pytest.fixture(scope="session")
def run(options):
    """Runs a command in this process."""

    def run_command(command: str, *more: str) -> None:
        COMMANDS[command]([*taken(options, command), *more])

    return run_command


@pytest.fixture(scope="session")
def run_in_shell(options):
    """Runs a command as a person does, and returns what became of it."""

    def run_command(command: str, *more: str, **kwargs) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "sap_lightning", command, *taken(options, command), *more]
        return subprocess.run(
            line, capture_output=True, text=True, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, **kwargs
        )

    return run_command


@pytest.fixture
def refusal(options, monkeypatch):
    """Runs the program in this process with a fault, and returns what it ends with: one line, beside exit code 1."""

    def run_program(command: str, *more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["sap_lightning", command, *taken(options, command), *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, str), "a text is printed to standard error, and the exit code is 1"
        (line,) = ended.value.code.splitlines()
        return line

    return run_program


@pytest.fixture(scope="session")
def finished(run, tmp_path_factory) -> Path:
    """The run folder of a federation that ran through."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run("fit", f"--federation.run_dir={folder}")
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """The finished run in another place, to be continued."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own, with room for 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def terminal(monkeypatch) -> Iterator[None]:
    """Rich takes what it writes to for a terminal of 100 columns."""
    with monkeypatch.context() as terminal:
        terminal.setenv("FORCE_COLOR", "1")
        terminal.setenv("COLUMNS", "100")
        rich.reconfigure()
        yield
    rich.reconfigure()
