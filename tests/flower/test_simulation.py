"""Virtual nodes on Flower's simulation engine: who is which client, and a whole round where Ray is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from federation.runs import DOMAINS
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.server.superlink.fleet.vce.vce_api import _register_nodes
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager
from places import SHAPES_CLIP
from references import contents

from sap_lightning import __version__
from sap_lightning.data.domains import DomainDataModule
from sap_lightning.errors import InputError
from sap_lightning.flower import client, server
from sap_lightning.flower.client import answer
from sap_lightning.flower.simulation import Partitions, client_options, is_virtual
from sap_lightning.flower.wire import MESSAGE_TYPE, Question, files_in, question_record
from sap_lightning.modules.merge import MergeModule


@pytest.fixture
def config(world, tmp_path) -> Path:
    """The settings of the finished run, in a file for `fit`."""
    settings = {
        "model": {"base": SHAPES_CLIP, "learning_rate": 2.0e-3},
        "data": {"root": str(world / "domains"), "batch_size": 16},
        "anchors": {"root": str(world / "anchors"), "num_pairs": 8},
        "prune": {"sparsity": 0.9, "space": "factor"},
        "trainer": {"max_epochs": 1, "accelerator": "cpu"},
        "federation": {"run_dir": str(tmp_path / "run"), "report": False},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def numbered(number: int, of: int = 4) -> dict[str, Any]:
    """What Flower says to a virtual node."""
    return {"partition-id": number, "num-partitions": of}


def test_a_node_with_settings_of_its_own_is_a_site():
    assert is_virtual(numbered(0))
    for other in ({}, {"partition-id": 0}, numbered(0) | {"config": "site.yaml"}, {"config": "site.yaml"}):
        assert not is_virtual(other)


@pytest.mark.parametrize(("unseen", "domains"), [(None, DOMAINS), ("sketch", ["cartoon", "painting", "photo"])])
def test_a_node_is_the_client_of_its_number_among_those_that_fit_trains(config, tmp_path, unseen, domains):
    settings = yaml.safe_load(config.read_text())
    settings["federation"]["unseen"] = unseen
    config.write_text(yaml.safe_dump(settings))
    for number, domain in enumerate(domains):
        folder = tmp_path / "run" / "sites" / domain
        expected = ["--config", str(config), f"--data.domain={domain}", f"--federation.run_dir={folder}"]
        assert client_options(str(config), numbered(number)) == expected


def test_fewer_nodes_than_clients_are_refused(config):
    with pytest.raises(InputError, match=r"there are 2 virtual nodes for 4 clients; run with .*num-supernodes=4"):
        client_options(str(config), numbered(0, of=2))


def test_the_server_counts_nodes_as_flower_numbers_them():
    factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
    numbers = _register_nodes(num_nodes=5, state_factory=factory)
    nodes = sorted(factory.state().get_node_info(), key=lambda node: node.node_id)
    sites = Partitions(DOMAINS).sites(nodes)
    assert {site.domain: numbers[site.node] for site in sites} == {domain: i for i, domain in enumerate(DOMAINS)}


def test_a_virtual_node_sends_what_its_client_sends_in_fit(config, world, finished, tmp_path):
    base = MergeModule(SHAPES_CLIP)
    base.configure_model()
    question = Question(base.base_fingerprint, DomainDataModule(str(world / "domains")).class_names, __version__)
    context = Context(1, 2, numbered(2), RecordDict(), {"config": str(config)}, 3)
    reply = answer(Message(question_record(question), 2, MESSAGE_TYPE), context)
    assert files_in(reply.content) == contents(finished / "uploads" / "photo")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["sites"]


def test_a_round_of_virtual_nodes_is_fit_bit_for_bit(config, finished, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="the extra simulation is not installed")
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    monkeypatch.setenv("PYTHONPATH", "")  # to which Flower adds
    run = {"config": str(config), "quorum": 4, "timeout": 600}
    server_app, client_app = ServerApp(), ClientApp()

    # What `flwr run` gives to both apps, which the Python API does not.
    @server_app.main()
    def start(grid: Grid, context: Context) -> None:
        server.main(grid, Context(context.run_id, context.node_id, {}, RecordDict(), run, 3))

    @client_app.train("upload")
    def reply(message: Message, context: Context) -> Message:
        own = Context(context.run_id, context.node_id, context.node_config, RecordDict(), run, 3)
        return client.answer(message, own)

    one_core = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 1}}
    run_simulation(server_app, client_app, len(DOMAINS), backend_config=one_core)
    for part in ("uploads", "merged"):
        assert contents(tmp_path / "run" / part) == contents(finished / part)
