"""The program as the system sees it: what it ends with when it is told to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import taken
from places import REPOSITORY


@pytest.fixture
def client_in_training(options, tmp_path):
    """A client whose training would go on for minutes, past its first epoch."""
    line = [*taken(options, "client"), "--data.domain=photo", f"--federation.run_dir={tmp_path}"]
    command = [sys.executable, "-m", "sap_lightning", "client", *line, "--trainer.max_epochs=500"]
    process = subprocess.Popen(command, cwd=REPOSITORY, env=os.environ, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "clients" / "photo" / "last.ckpt").exists():
        time.sleep(0.05)
    yield process
    process.kill()


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_told_to_end_while_it_trains_it_says_how_to_go_on(client_in_training, tmp_path: Path, number, exit_code):
    client_in_training.send_signal(number)
    said = client_in_training.communicate(timeout=60)[1]
    assert client_in_training.returncode == exit_code
    assert said.splitlines()[-1] == "interrupted: run the same command again to continue" and "Traceback" not in said
    assert not (tmp_path / "uploads").exists()


def test_told_to_end_while_it_still_imports_it_says_the_same(tmp_path: Path):
    # The first import of a command, which takes the place of Lightning's seconds.
    (tmp_path / "lightning").mkdir()
    (tmp_path / "lightning" / "__init__.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    found = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    line = [sys.executable, "-m", "sap_lightning", "fit"]
    ended = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": found})
    assert (ended.returncode, ended.stderr) == (130, "interrupted: run the same command again to continue\n")


def test_whoever_runs_it_within_another_program_keeps_its_signals(refusal):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    refusal("fit", "--model.rank=0")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
