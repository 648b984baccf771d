"""Several clients at once on one machine: a process each, with a GPU or a share of the cores of its own."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from logging.handlers import QueueHandler
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from sap_lightning.callbacks.progress import EpochLog, Row, RowBar, Rows, training_progress
from sap_lightning.console import on_terminal, quieten
from sap_lightning.data.domains import DomainDataModule
from sap_lightning.errors import InputError, in_one_line, is_said
from sap_lightning.federation.client import ShowProgress, TrainerFactory, train_client
from sap_lightning.federation.run_folder import RunFolder
from sap_lightning.modules.client import ClientModule

log = logging.getLogger(__name__)
SPAWN = get_context("spawn")
PATIENCE = 30.0
"""Seconds that a process has to clear away what it was writing."""


@dataclass(frozen=True, eq=False)
class Training:
    """What a client is trained with; see `train_client`."""

    module: ClientModule
    data: DomainDataModule
    folder: RunFolder
    make_trainer: TrainerFactory
    title: str
    config: Mapping[str, Any]

    @property
    def upload(self) -> Path:
        """What the client sends."""
        return self.folder.upload(self.data.require_domain())

    def run(self, progress: ShowProgress = training_progress, **overrides: Any) -> Path:
        """Trains a copy of the module, so that neither model nor images stay in memory."""
        module, data = copy.deepcopy(self.module), copy.copy(self.data)
        make_trainer = partial(self.make_trainer, **overrides)
        return train_client(module, data, self.folder, make_trainer, self.title, self.config, progress)


class Free(NamedTuple):
    """A process says that it waits for a client."""


class Failed(NamedTuple):
    """A process says why its client cannot be trained."""

    reason: str


Message = logging.LogRecord | Row | Free | Failed


def require_parallel(number: int, trainer: L.Trainer, *parts: Any) -> None:
    """Raises InputError when that many clients cannot be trained at once.

    Args:
        number: of clients.
        trainer: as each of them would have it.
        parts: what other processes get.
    """
    setting = f"federation.parallel {number}"
    if not isinstance(trainer.strategy, SingleDeviceStrategy) or trainer.device_ids != [0]:
        raise InputError(
            f"{setting}: each client is trained on one device, which this chooses; leave out trainer.strategy and"
            " trainer.devices, or federation.parallel"
        )
    try:
        pickle.dumps(parts)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(
            f"{setting}: {error}, as other processes need to; name classes and functions that stand in a module,"
            " functools.partial of them, or leave out federation.parallel"
        ) from error


def train_all(trainings: Sequence[Training], at_once: int, trainer: L.Trainer) -> None:
    """Trains every client that has not uploaded yet, one after another, or so many at once to the same bits.

    Args:
        trainings: the clients.
        at_once: how many.
        trainer: as each of them has it.

    Raises:
        InputError: when a client cannot be trained. Of several at once the others are trained to their end; no other
            is begun.
    """
    missing = [training for training in trainings if not training.upload.exists()]
    together = missing if min(at_once, len(missing)) > 1 else []
    for training in trainings:
        if training not in together:
            training.run()
    if together:
        _train_together(together, min(at_once, len(together)), trainer)


def _train_together(trainings: Sequence[Training], at_once: int, trainer: L.Trainer) -> None:
    waiting, failures = deque(trainings), []
    with Rows() as rows, _workers(at_once, trainer) as workers:
        while heard := _heard(workers):
            for worker in heard:
                match worker.hear():
                    case logging.LogRecord() as record:
                        _log(record)
                    case Row() as row:
                        rows.show(row)
                    case Failed(reason):
                        failures.append(f"{worker.title}: {reason}")
                        log.warning("%s", failures[-1])  # at once, as the others may go on for hours
                        waiting.clear()
                    case Free():
                        rows.remove(worker.title)
                        if waiting:
                            worker.train(waiting.popleft())
                        else:
                            worker.release()
    if failures:
        raise InputError("; ".join(dict.fromkeys(failures)))


def _heard(workers: Sequence[Worker]) -> list[Worker]:
    """Those that have something to say, or died; waits for the first. None where all have ended."""
    open_ones = [worker for worker in workers if not worker.connection.closed]
    ready = wait([worker.connection for worker in open_ones]) if open_ones else []
    return [worker for worker in open_ones if worker.connection in ready]


def _log(record: logging.LogRecord) -> None:
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)


class Worker:
    """A process that trains one client after another, as its parent sees it.

    It has as many threads as its parent, since torch's sums follow their number, and so do the last bits of what is
    trained; its share of the cores is what they run on.

    Args:
        number: of this process, from 0.
        at_once: number of processes.
        trainer: as each client has it.
    """

    def __init__(self, number: int, at_once: int, trainer: L.Trainer) -> None:
        self.training: Training | None = None
        self.connection, connection = SPAWN.Pipe()
        overrides, cores = place(number, at_once, trainer)
        arguments = (connection, overrides, torch.get_num_threads(), on_terminal())
        self.process = SPAWN.Process(target=work, args=arguments, daemon=True)
        with _inherited(cores):
            self.process.start()
        connection.close()

    @property
    def title(self) -> str:
        """What the log calls the client, or the process where it has none yet."""
        return self.training.title if self.training else "a process for clients"

    def hear(self) -> Message:
        """What it says next, or at last how it died."""
        try:
            said: Message = self.connection.recv()
        except (EOFError, OSError):  # an OSError where it died in the midst of a word
            self.connection.close()
            return Failed(self._how_it_died())
        return said

    def _how_it_died(self) -> str:
        self.process.join()
        code = self.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if self.training is None:
            return f"it {how} before it began; a script that starts processes does so below if __name__ == '__main__'"
        return f"its process {how}; where memory ran out, lower federation.parallel, and run the same command again"

    def train(self, training: Training) -> None:
        """Gives it a client."""
        self.training = training
        with suppress(ConnectionError):  # it has died, which is heard next
            self.connection.send(training)

    def release(self) -> None:
        """Lets it end, as there are no more clients."""
        with suppress(ConnectionError):
            self.connection.send(None)
        self.connection.close()

    def stop(self) -> None:
        """Ends it in the midst of its training, if it was not released."""
        if not self.connection.closed:
            self.process.terminate()
            self.connection.close()

    def wait(self) -> None:
        """Waits until it has ended."""
        self.process.join(PATIENCE)
        self.process.kill()
        self.process.join()


@contextmanager
def _workers(at_once: int, trainer: L.Trainer) -> Iterator[list[Worker]]:
    """So many processes, of which none is left in the end, however that comes."""
    workers: list[Worker] = []
    try:
        for number in range(at_once):
            workers.append(Worker(number, at_once, trainer))
        yield workers
    finally:
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.wait()


def place(number: int, at_once: int, trainer: L.Trainer) -> tuple[dict[str, Any], set[int]]:
    """Trainer arguments and cores of one of several processes: a GPU in turn, or a share of the cores."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []  # Linux alone has it
    if trainer.strategy.root_device.type != "cpu":
        return {"devices": [number % trainer.accelerator.auto_device_count()]}, set(cores)
    return {}, share(cores, number, at_once)


def share(cores: Sequence[int], number: int, of: int) -> set[int]:
    """One of several shares of the cores: every second of them for the first of two, and so on.

    The two halves of a core, which Linux numbers far apart, are mostly in one share.
    """
    return set(cores[number % len(cores) :: of]) if cores else set()


@contextmanager
def _inherited(cores: set[int]) -> Iterator[None]:
    """What a process that is started meanwhile has from its first moment: these cores, and no ear for Ctrl-C.

    OpenMP looks once, when it is loaded, at how many cores there are: bound later, two threads on one core took seven
    times as long. Ctrl-C reaches all processes on a terminal, and the parent answers it for them.
    """
    if os.name == "nt":  # which knows neither
        yield
        return
    resource_tracker.ensure_running()  # which would open the ears again, as the first process starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    all_cores = os.sched_getaffinity(0) if cores else set()
    try:
        if cores:
            os.sched_setaffinity(0, cores)
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, all_cores)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Parent(QueueHandler):
    """The process that started this one: it hears log lines and what else there is to say, and names clients."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)  # type: ignore[arg-type]  # of which `enqueue` alone makes use
        self.connection = connection
        self.one_at_a_time = threading.Lock()

    def enqueue(self, record: logging.LogRecord) -> None:
        self.say(record)

    def say(self, message: Message) -> None:
        with self.one_at_a_time, suppress(ConnectionError):  # of a parent that is gone `_end_with_parent` hears
            self.connection.send(message)

    def next_client(self) -> Training | None:
        """The next client to train; None where there are no more."""
        self.say(Free())
        try:
            training: Training | None = self.connection.recv()
        except (EOFError, ConnectionError):  # nor a parent
            return None
        return training


def work(connection: Connection, overrides: Mapping[str, Any], threads: int, drawn: bool) -> None:
    """What the process does: trains what clients it is given, until there are no more or its parent has ended.

    Args:
        connection: to its parent.
        overrides: Trainer arguments.
        threads: of torch.
        drawn: whether the parent shows bars.
    """
    signal.signal(signal.SIGTERM, _end)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    parent = Parent(connection)
    quieten(parent)
    progress: ShowProgress = partial(RowBar, show=parent.say) if drawn else EpochLog
    while training := parent.next_client():
        try:
            training.run(progress, **overrides)
        except Exception as error:
            if not is_said(error):
                raise
            parent.say(Failed(in_one_line(error)))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends anyway


def _end(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # what is half-written is cleared away now
    sys.exit(128 + number)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
