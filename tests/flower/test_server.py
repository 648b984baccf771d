"""The server's run from the first question to the table, with real sites on a grid without a network."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from flower.grid import FakeGrid, node
from flwr.app import Context, RecordDict
from places import SHAPES_CLIP
from references import contents

from sap_lightning.errors import InputError
from sap_lightning.flower import collection, server
from sap_lightning.flower.client import answer
from sap_lightning.flower.server import main, run_config_from

CLIENTS = ["cartoon", "painting", "photo"]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch) -> None:
    monkeypatch.setattr(collection, "SECONDS_BETWEEN_LOOKS", 0.001)


@pytest.fixture
def settings(world, tmp_path) -> dict[str, Any]:
    """The server's, which has images of sketch alone."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "sketch").symlink_to(world / "domains" / "sketch")
    return {
        "model": {"base": SHAPES_CLIP},
        "data": {"root": str(tmp_path / "images"), "batch_size": 16},
        "anchors": {"root": str(world / "anchors"), "num_pairs": 8},
        "prune": {"sparsity": 0.9, "space": "factor"},
        "trainer": {"accelerator": "cpu"},
        "federation": {"run_dir": str(tmp_path / "server"), "report": False},
    }


@pytest.fixture
def grid(world, finished, tmp_path) -> FakeGrid:
    """Sites that trained as the clients of the finished run did."""
    grid = FakeGrid(*(node(name, number) for number, name in enumerate(CLIENTS, start=1)))
    for name in CLIENTS:
        shutil.copytree(finished / "uploads" / name, tmp_path / name / "uploads" / name)
        grid.answers[name] = site(world, tmp_path, name)
    return grid


def site(world: Path, tmp_path: Path, domain: str) -> Any:
    file = tmp_path / domain / "site.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "model": {"base": SHAPES_CLIP, "learning_rate": 2.0e-3},
                "data": {"root": str(world / "domains"), "domain": domain},
                "federation": {"run_dir": str(tmp_path / domain)},
            }
        )
    )
    context = Context(1, 2, {"config": str(file)}, RecordDict(), {}, 3)
    return lambda question: answer(question, context)


def start(grid: FakeGrid, settings: dict[str, Any], tmp_path: Path, quorum: int = 3, timeout: float = 60.0) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(yaml.safe_dump(settings))
    run_config = {"config": str(file), "quorum": quorum, "timeout": timeout}
    main(grid, Context(1, 0, {}, RecordDict(), run_config, 3))


def test_a_round_over_flower_merges_what_fit_merges_bit_for_bit(grid, settings, finished, tmp_path, capsys):
    start(grid, settings, tmp_path)
    for name in CLIENTS:
        assert contents(tmp_path / "server" / "uploads" / name) == contents(finished / "uploads" / name)
    merged = contents(tmp_path / "server" / "merged" / "sketch")
    assert merged and merged == contents(finished / "merged" / "sketch")
    assert "top-1 accuracy on unseen domains" in capsys.readouterr().out


def test_below_the_quorum_nothing_is_merged_and_a_second_run_completes_it(grid, settings, finished, tmp_path):
    photo = grid.nodes.pop()
    with pytest.raises(InputError, match=r"2 uploads \(cartoon, painting\) are fewer than the quorum of 3"):
        start(grid, settings, tmp_path, timeout=0.1)
    assert not (tmp_path / "server" / "merged").exists()
    assert sorted(path.name for path in (tmp_path / "server" / "uploads").iterdir()) == CLIENTS[:2]
    grid.nodes, grid.asked = [*grid.nodes, photo], []
    start(grid, settings, tmp_path)
    assert grid.asked == ["photo"]
    assert contents(tmp_path / "server" / "merged" / "sketch") == contents(finished / "merged" / "sketch")


def test_what_is_wrong_at_the_server_is_found_before_a_site_trains(grid, settings, tmp_path):
    settings["federation"]["unseen"] = "photo"
    with pytest.raises(InputError, match=r"federation\.unseen photo: no such domain; there are sketch"):
        start(grid, settings, tmp_path)
    settings["federation"] |= {"unseen": None, "poison": {"domain": "photo"}}
    with pytest.raises(InputError, match=r"federation\.poison\.domain: a poisoned client is one that is trained here"):
        start(grid, settings, tmp_path)
    assert grid.asked == []


def test_only_clients_that_the_server_names_are_asked(grid, settings, tmp_path):
    settings["federation"]["clients"] = ["cartoon", "photo"]
    with pytest.raises(InputError, match=r"2 uploads \(cartoon, photo\) are fewer than the quorum of 3"):
        start(grid, settings, tmp_path, timeout=0.1)
    assert grid.asked == ["cartoon", "photo"]


RUN = {"config": "server.yaml", "quorum": 2, "timeout": 60}


@pytest.mark.parametrize(
    ("name", "value"), [("config", ""), ("quorum", 0), ("quorum", 2.5), ("timeout", 0), ("timeout", "an hour")]
)
def test_a_faulty_run_config_is_named(name, value):
    assert run_config_from(RUN) == tuple(RUN.values())
    with pytest.raises(InputError, match=f"^run-config {name} is {value!r}, expected "):
        run_config_from(RUN | {name: value})


def test_flower_s_log_has_an_error_that_is_for_a_person_in_one_line(caplog):
    with server.app._lifespan(Context(1, 0, {}, RecordDict(), {}, 3)), caplog.at_level(logging.ERROR, "flwr"):
        for error in (InputError("wrong"), RuntimeError("a bug")):
            logging.getLogger("flwr").error("%s raised an exception", "ServerApp", exc_info=error)
    assert [(record.getMessage(), bool(record.exc_info)) for record in caplog.records] == [
        ("error: wrong", False),
        ("ServerApp raised an exception", True),
    ]
