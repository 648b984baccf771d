"""Clients side by side: the same bytes, and what becomes of processes that fail, are killed, or lose their parent."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import threading
import time
from functools import partial
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from federation.runs import DOMAINS, outcome
from places import SHAPES_CLIP
from references import contents, quiet_trainer

from sap_lightning.data.domains import DomainDataModule
from sap_lightning.errors import InputError
from sap_lightning.federation import parallel
from sap_lightning.federation.parallel import Training, place, require_parallel, share, train_all
from sap_lightning.federation.run_folder import RunFolder
from sap_lightning.files import locked
from sap_lightning.modules.clip_lora import CLIPLoRAModule

FORK = get_context("fork")
CALLBACK = '''
import json, os, signal, time
from pathlib import Path
import lightning as L
import torch

class KilledOnce(L.Callback):
    """Kills the painting's process when it is trained and before it has uploaded, the first time."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def on_train_start(self, trainer, module):
        """The first two wait for each other, or one process might train both while the other is still starting."""
        (self.folder / f"{trainer.datamodule.domain}.begun").touch()
        patience = time.monotonic() + 300
        while len(list(self.folder.glob("*.begun"))) < 2 and time.monotonic() < patience:
            time.sleep(0.05)

    def on_train_end(self, trainer, module):
        name = trainer.datamodule.domain
        blocked = sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))
        said = [os.getpid(), torch.get_num_threads(), sorted(os.sched_getaffinity(0)), blocked]
        with (self.folder / name).open("a") as file:
            print(json.dumps(said), file=file)
        if name == "painting" and len((self.folder / name).read_text().splitlines()) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
'''


@pytest.fixture
def killed_once(tmp_path, monkeypatch) -> list[str]:
    """Options of such a callback."""
    (tmp_path / "killed_once.py").write_text(CALLBACK)
    (tmp_path / "said").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    options = {"class_path": "killed_once.KilledOnce", "init_args": {"folder": str(tmp_path / "said")}}
    return [f"--trainer.callbacks={json.dumps(options)}"]


def test_side_by_side_and_with_one_killed_they_come_to_the_bytes_of_one_after_another(
    finished, run, killed_once, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("sap_lightning"), "propagate", True)
    caplog.set_level(logging.INFO, logger="sap_lightning")
    few = ["--federation.unseen=sketch", "--federation.report=false"]
    line = ["fit", *killed_once, *few, f"--federation.run_dir={tmp_path / 'run'}"]
    died = r"^client 2 of 3 \(painting\): its process was killed by SIGKILL; .* run the same command again"
    with pytest.raises(InputError, match=died):
        run(*line, "--federation.parallel=2")
    assert active_children() == []
    trained = {path.name for path in (tmp_path / "run" / "uploads").iterdir()}
    assert "cartoon" in trained and "painting" not in trained, "the other was trained to its end"
    assert "client 1 of 3 (cartoon): epoch 1 of 1, loss" in caplog.text
    run(*line)
    for folder in ("uploads/cartoon", "uploads/painting", "uploads/photo", "merged/sketch"):
        assert contents(tmp_path / "run" / folder) == contents(finished / folder)

    said = {name: json.loads((tmp_path / "said" / name).read_text().splitlines()[0]) for name in DOMAINS[:2]}
    assert len({os.getpid(), *(pid for pid, *_ in said.values())}) == 3
    for _, threads, _, blocked in said.values():
        assert threads == torch.get_num_threads()
        assert signal.SIGINT in blocked, "Ctrl-C is for the parent"
    shares = [sorted(share(sorted(os.sched_getaffinity(0)), number, 2)) for number in range(2)]
    assert sorted(own for _, _, own, _ in said.values()) == shares, "whichever began first"


def test_a_federation_that_has_run_continues_with_another_number_and_begins_no_process(copy, run, monkeypatch):
    monkeypatch.setattr(parallel, "Worker", lambda *_: pytest.fail("nothing is left to train"))
    before = contents(copy)
    run("fit", "--federation.parallel=3", "--federation.report=false", f"--federation.run_dir={copy}")
    after = contents(copy)
    for name in outcome(copy):
        assert after[name] == before[name], name


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--federation.parallel=0"], r"federation\.parallel must be at least 1, got 0"),
        (
            ["--federation.parallel=2", "--trainer.devices=2", "--trainer.strategy=ddp"],
            r"federation\.parallel 2: each client is trained on one device, .* leave out trainer\.strategy and",
        ),
    ],
)
def test_what_contradicts_it_is_refused(run, tmp_path, line, said):
    with pytest.raises(InputError, match=said):
        run("fit", *line, f"--federation.run_dir={tmp_path}")
    assert not (tmp_path / "uploads").exists()


def test_what_no_other_process_can_have_is_refused():
    with pytest.raises(InputError, match=r"^federation\.parallel 2: .*lambda.* functions that stand in a module"):
        require_parallel(2, quiet_trainer(), lambda **overrides: quiet_trainer(**overrides))
    require_parallel(2, quiet_trainer(), partial(L.Trainer, accelerator="cpu"))


@pytest.mark.parametrize(
    ("cores", "of", "shares"),
    [
        (range(8), 2, [{0, 2, 4, 6}, {1, 3, 5, 7}]),
        ([1, 4, 6], 2, [{1, 6}, {4}]),
        ([0, 1], 3, [{0}, {1}, {0}]),
        ([], 2, [set(), set()]),
    ],
)
def test_every_process_has_a_share_of_the_cores(cores, of, shares):
    assert [share(cores, number, of) for number in range(of)] == shares


def test_on_the_cpu_the_trainer_stays_as_it_is():
    overrides, cores = place(0, 1, quiet_trainer())
    assert overrides == {} and cores == os.sched_getaffinity(0)


# Processes that need not import anything, and train nothing


def asleep(default_root_dir: Path, **overrides: Any) -> None:
    """In place of a trainer: says which process it is in, and stays."""
    (default_root_dir / "asleep").write_text(str(os.getpid()))
    time.sleep(600)


def refuses(**overrides: Any) -> None:
    raise InputError("trainer: there is no such accelerator")


@pytest.fixture
def training(world, tmp_path, monkeypatch):
    """What a domain's client is trained with, in a process that is forked."""
    monkeypatch.setattr(parallel, "SPAWN", FORK)
    data = DomainDataModule(str(world / "domains"), base=SHAPES_CLIP)

    def training_of(domain: str, make_trainer: Any) -> Training:
        module, folder = CLIPLoRAModule(SHAPES_CLIP), RunFolder(tmp_path)
        return Training(module, data.for_domain(domain), folder, make_trainer, f"client {domain}", {})

    return training_of


def test_of_one_that_fails_the_reason_is_said_and_no_other_is_begun(training, tmp_path):
    with pytest.raises(InputError) as failed:
        train_all([training(domain, refuses) for domain in ("photo", "sketch", "cartoon")], 2, quiet_trainer())
    reason = r"client (photo|sketch): trainer: there is no such accelerator"
    assert all(re.fullmatch(reason, said) for said in str(failed.value).split("; "))
    assert not (tmp_path / "clients" / "cartoon").exists() and active_children() == []


def wait_until_asleep(folder: Path, number: int) -> None:
    while len(list(folder.glob("clients/*/asleep"))) < number:
        time.sleep(0.02)


class Told(Exception):
    """To end."""


def test_a_parent_that_is_told_to_end_leaves_no_process_behind(training, tmp_path):
    def tell(number: int, frame: object) -> None:
        raise Told

    processes: list[Any] = []

    def when_they_train() -> None:
        wait_until_asleep(tmp_path, 2)
        processes.extend(active_children())
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, tell)
    try:
        threading.Thread(target=when_they_train).start()
        with pytest.raises(Told):
            train_all([training(domain, asleep) for domain in ("photo", "sketch")], 2, quiet_trainer())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [process.exitcode for process in processes] == [143, 143], "they had time to clear away"
    with locked(tmp_path):
        assert not list(tmp_path.glob("uploads/*"))


def test_processes_whose_parent_is_killed_end_too(training, tmp_path):
    both = [training(domain, asleep) for domain in ("photo", "sketch")]
    parent = FORK.Process(target=train_all, args=(both, 2, quiet_trainer()))
    parent.start()
    wait_until_asleep(tmp_path, 2)
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 60
    while True:
        try:
            with locked(tmp_path):  # which nobody has who trains below it
                return
        except InputError:
            assert time.monotonic() < deadline, "a process has outlived its parent"
            time.sleep(0.05)
