"""Which neuron of one model is which of another: spaces of their blocks matched by what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sap_lightning.checkpoints.activations import Activity
from sap_lightning.checkpoints.behaviour import Heads, read_by, responses_of
from sap_lightning.functional.flatness import as_flat, sharpness_of
from sap_lightning.functional.matching import UNMATCHED, assigned, cka, cosines, in_order

Block = Mapping[str, Activity]
"""What a block's layers did, by what they are called in it."""
Maps = dict[str, Tensor]
"""By space, for each dimension of the first model's the other's, or `UNMATCHED`."""


class Attention(NamedTuple):
    """What a block's attention said, head by head, each of shape (n, d)."""

    queries: Sequence[Tensor]
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    heads: Sequence[Tensor]

    @classmethod
    def of(cls, block: Block, heads: Heads) -> Attention:
        """That of a block, whose attention is divided so."""
        numbers = (heads.queries, heads.values, heads.values, heads.queries)
        return cls(*(_by_head(responses_of(space, block), n) for space, n in zip(cls._fields, numbers, strict=True)))

    def served_by(self, head: int) -> range:
        """The heads of queries that one of keys and values serves."""
        served = len(self.queries) // len(self.values)
        return range(head * served, (head + 1) * served)


@dataclass(frozen=True)
class Matcher:
    """Assigns neurons one to one by how alike they are, and drops pairs that are not alike enough.

    Attributes:
        sigma: σ, by which neurons of other flatness are less alike.
        threshold: of likeness.
    """

    sigma: float
    threshold: float

    def neurons(self, a: Tensor, b: Tensor) -> Tensor:
        """For each neuron of the first the other's, or `UNMATCHED`, by their outputs (n, d) and (n, d')."""
        likeness = cosines(a, b) * as_flat(sharpness_of(a), sharpness_of(b), self.sigma)
        found = assigned(likeness)
        alike = likeness.gather(1, found.clamp(min=0)[:, None]).squeeze(1) >= self.threshold
        return torch.where(alike, found, UNMATCHED)

    def stream(self, a: Sequence[Block], b: Sequence[Block]) -> Tensor:
        """The same for dimensions of the stream, by what paired blocks read of it."""
        return self.neurons(_stream(a), _stream(b))

    def block(self, a: Block, b: Block, of_a: Heads, of_b: Heads) -> Maps:
        """The spaces of a pair of blocks alone."""
        hidden = self.neurons(responses_of("hidden", a), responses_of("hidden", b))
        attention = self.attention(Attention.of(a, of_a), Attention.of(b, of_b), of_a.turned or of_b.turned)
        return {"hidden": hidden, **attention}

    def attention(self, a: Attention, b: Attention, turned: bool) -> Maps:
        """Queries, keys, values and what heads say: head by head, then their dimensions."""
        found = {space: [_unmatched(head) for head in heads] for space, heads in a._asdict().items()}
        for i, j in _pairs(assigned(cka(a.values, b.values))):
            mine, theirs = a.served_by(i), b.served_by(j)
            served = assigned(cka([a.heads[q] for q in mine], [b.heads[r] for r in theirs]))
            queries = [(mine[q], theirs[r]) for q, r in _pairs(served)]
            value = self.neurons(a.values[i], b.values[j])
            key = _in_place(a.keys[i], b.keys[j]) if turned else self._asked(a, b, i, j, queries)
            found["values"][i], found["keys"][i] = _of_head(value, j, b.values), _of_head(key, j, b.keys)
            for q, r in queries:
                found["queries"][q], found["heads"][q] = _of_head(key, r, b.queries), _of_head(value, r, b.heads)
        return {space: torch.cat(parts) for space, parts in found.items()}

    def _asked(self, a: Attention, b: Attention, i: int, j: int, queries: Sequence[tuple[int, int]]) -> Tensor:
        """Dimensions of a head's keys, which are those of the queries that it serves."""
        mine = torch.cat([a.keys[i], *(a.queries[q] for q, _ in queries)])
        return self.neurons(mine, torch.cat([b.keys[j], *(b.queries[r] for _, r in queries)]))


def paired_blocks(a: Sequence[Block], b: Sequence[Block]) -> Tensor:
    """For each block of the first the other's, or `UNMATCHED`, in order, by what they read."""
    if len(a) == len(b):
        return torch.arange(len(a))
    return in_order(cka([read_by(block)[0] for block in a], [read_by(block)[0] for block in b]))


def _stream(blocks: Sequence[Block]) -> Tensor:
    """What blocks read, one below the other, each on its own scale."""
    return torch.cat([read / read.std() for block in blocks for read in read_by(block)])


def _by_head(responses: Tensor, heads: int) -> Sequence[Tensor]:
    return responses.view(len(responses), heads, -1).unbind(1)


def _pairs(found: Tensor) -> list[tuple[int, int]]:
    return [(i, j) for i, j in enumerate(found.tolist()) if j != UNMATCHED]


def _unmatched(head: Tensor) -> Tensor:
    return torch.full((head.shape[1],), UNMATCHED)


def _in_place(head: Tensor, other: Tensor) -> Tensor:
    """Dimensions that stay where they are, if there are as many."""
    return torch.arange(head.shape[1]) if head.shape == other.shape else _unmatched(head)


def _of_head(found: Tensor, head: int, heads: Sequence[Tensor]) -> Tensor:
    """Dimensions of one head of the other model as those of all of them."""
    return torch.where(found >= 0, head * heads[head].shape[1] + found, UNMATCHED)
