"""Flower's grid without its network: real messages, and nodes that answer by functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

Answer = Callable[[Message], Message | None]
"""A node's reply to a question; None as long as it has none."""


def node(name: str, number: int, since: str = "monday") -> NodeInfo:
    """A node that is online, with a key of its own."""
    key = ec.derive_private_key(number, ec.SECP384R1()).public_key()
    public_key = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return NodeInfo(node_id=number, name=name, public_key=public_key, last_activated_at=since)


def says(content: RecordDict | Error) -> Answer:
    """Answers every question alike."""
    return lambda question: Message(content, reply_to=question)


def lost(question: Message, code: int) -> Message:
    """What Flower itself says in place of a reply."""
    reply = Message(Error(code, "lost"), reply_to=question)
    reply.metadata.__dict__["_src_node_id"] = 1
    return reply


class FakeGrid(Grid):
    """Nodes that are online, and what each answers.

    Attributes:
        asked: nodes by name in the order of the questions.
    """

    def __init__(self, *nodes: NodeInfo) -> None:
        self.nodes = list(nodes)
        self.answers: dict[str, Answer] = {}
        self.asked: list[str] = []
        self.questions: dict[str, Message] = {}
        self._names: dict[int, str] = {}

    def get_nodes(self) -> list[NodeInfo]:
        self._names |= {node.node_id: node.name for node in self.nodes}
        return self.nodes

    def get_node_ids(self) -> list[int]:
        return [node.node_id for node in self.nodes]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        numbers = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"question {len(self.questions)}"
            numbers.append(message.metadata.message_id)
            self.questions[numbers[-1]] = message
            self.asked.append(self._names[message.metadata.dst_node_id])
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        questions = [self.questions[number] for number in message_ids]
        answers = [self.answers[self._names[question.metadata.dst_node_id]](question) for question in questions]
        return [answer for answer in answers if answer is not None]

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        raise NotImplementedError
