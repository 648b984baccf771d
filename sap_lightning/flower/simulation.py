"""A round on Flower's simulation engine: one machine, one settings file, and a virtual node for each client of `fit`.

Such nodes have neither a name nor a key nor settings: Flower numbers them, and the number says which client they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.common.constant import NUM_PARTITIONS_KEY, PARTITION_ID_KEY
from flwr.proto.node_pb2 import NodeInfo

from sap_lightning.cli import SapCLI
from sap_lightning.errors import InputError
from sap_lightning.flower.sites import Site

SITES = "sites"


def is_virtual(node_config: Mapping[str, Any]) -> bool:
    """Whether a node is one of a simulation, which has a number and nothing else."""
    return node_config.keys() == {PARTITION_ID_KEY, NUM_PARTITIONS_KEY}


def client_options(config: str, node_config: Mapping[str, Any]) -> list[str]:
    """What the command `client` takes at a virtual node: a domain of its own, and a run folder in that of the run.

    Raises:
        InputError: for less nodes than clients, or settings that are wrong.
    """
    cli = SapCLI("fit", ["--config", config])
    domains = cli.federation().domains
    if node_config[NUM_PARTITIONS_KEY] < len(domains):
        raise InputError(
            f"there are {node_config[NUM_PARTITIONS_KEY]} virtual nodes for {len(domains)} clients; run with"
            f" --federation-config num-supernodes={len(domains)}"
        )
    domain = domains[node_config[PARTITION_ID_KEY]]
    folder = cli.run_folder.path / SITES / domain
    return ["--config", config, f"--data.domain={domain}", f"--federation.run_dir={folder}"]


class Partitions:
    """Gives each domain to the virtual node of its number, as a `Register` does to the node of its key.

    Args:
        domains: in the order of the nodes' numbers.
    """

    def __init__(self, domains: Sequence[str]) -> None:
        self.domains = domains
        self.keys: Mapping[str, str] = {}

    def sites(self, nodes: Iterable[NodeInfo]) -> list[Site]:
        """Nodes of a simulation, which were numbered as they were made; one without a client is none."""
        in_order = sorted(nodes, key=lambda node: node.registered_at)
        return [Site(domain, "", node.node_id, "") for domain, node in zip(self.domains, in_order, strict=False)]

    def refusal(self, site: Site, others: Sequence[Site]) -> str:
        """Each may speak for the domain of its number."""
        return ""

    def bind(self, site: Site) -> None:
        """A number needs no binding."""
