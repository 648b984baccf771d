"""Without the extra `flower` its tests have nothing to run on; the extra `dev` holds it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if find_spec("flwr") else ["*.py"]


@pytest.fixture(autouse=True, scope="session")
def in_a_run() -> None:
    """What Flower tells the process of an app, without which it makes no message."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
