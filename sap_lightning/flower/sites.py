"""Who may speak for which domain: a node, by the name and the key that it is registered under."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Collection, Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from flwr.proto.node_pb2 import NodeInfo

from sap_lightning.errors import InputError
from sap_lightning.files import write_json
from sap_lightning.io.manifest import check_domain
from sap_lightning.io.rules import TEXT_BY_NAME, errors_in, object_from, require


class Site(NamedTuple):
    """A node as Flower knows it.

    Attributes:
        domain: the name that it is registered under.
        key: fingerprint of its public key, as ``ssh-keygen -lf`` prints it.
        node: Flower's number of it.
        since: when it was started.
    """

    domain: str
    key: str
    node: int
    since: str


def site_of(node: NodeInfo) -> Site:
    """What matters of a node."""
    return Site(node.name, fingerprint_of(node.public_key), node.node_id, node.last_activated_at)


def fingerprint_of(public_key: bytes) -> str:
    """SHA-256 of a public key in PEM form, as ``ssh-keygen -lf`` prints it."""
    line = load_pem_public_key(public_key).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return "SHA256:" + b64encode(sha256(b64decode(line.split()[1])).digest()).decode().rstrip("=")


class Register:
    """Gives each domain to one key: the one that its file names, else the first that is bound.

    Args:
        file: JSON object from domain to the fingerprint of its key; need not be there.
        domains: that take part; every one that there is a node of if not given.

    Raises:
        InputError: the file is malformed.
    """

    def __init__(self, file: Path, domains: Collection[str] | None = None) -> None:
        self.file = file
        self.domains = domains
        with errors_in(file):
            self.keys = object_from(file.read_bytes()) if file.is_file() else {}
            require("the file", self.keys, TEXT_BY_NAME)

    def sites(self, nodes: Iterable[NodeInfo]) -> list[Site]:
        """Nodes as those who would speak for the domain of their name."""
        return [site_of(node) for node in nodes]

    def refusal(self, site: Site, others: Sequence[Site]) -> str:
        """Why a site may not speak for the domain of its name, beside the others; empty where it may."""
        try:
            check_domain(site.domain)
        except InputError as error:
            return f"{error}, and register it anew"
        if self.domains is not None and site.domain not in self.domains:
            return "it is not in federation.clients"
        bound = self.keys.get(site.domain)
        if bound not in (None, site.key):
            return f"the domain is bound to another key, {bound}; if it has a new one, change {self.file}"
        twin = next((other for other in others if other.domain == site.domain and other.node != site.node), None)
        if bound is None and twin:
            return (
                f"the key {twin.key} is registered under this name too; unregister one, or write one into {self.file}"
            )
        return ""

    def bind(self, site: Site) -> None:
        """From now on no other key speaks for the site's domain."""
        if site.domain not in self.keys:
            self.keys[site.domain] = site.key
            write_json(self.file, self.keys)
