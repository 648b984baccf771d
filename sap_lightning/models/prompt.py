"""Class prompts with vectors in place of words: the learnable context of CoOp (Zhou et al. 2022, arXiv:2109.01134).

Reference code: KaiyangZhou/CoOp, trainers/coop.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import Update, dense
from sap_lightning.io.context import ClassPosition, class_position_of
from sap_lightning.io.prompt import Room
from sap_lightning.models.clip import TextEncoder, require_told_apart


def room_in(texts: TextEncoder) -> Room:
    """What a text tower has room for: a context beside a name of one token, a full stop, start and end."""
    return Room(texts.token_embedding.embedding_dim, texts.max_length - 4)


def prompted_features(texts: TextEncoder, class_names: Sequence[str], update: Mapping[str, Update]) -> Tensor | None:
    """Normalised features of classes, shape (classes, d), by the context in an update; None where it has none."""
    for name, layer in update.items():
        if (position := class_position_of(name)) is not None:
            context = dense(layer)
            with torch.inference_mode(False), torch.no_grad():
                return ClassPrompts(texts, class_names, len(context), position).features(context)
    return None


class ClassPrompts:
    """The prompts [SOS] v₁ … v_M name . [EOS] of classes, whose context v is shared by all and comes with each use.

    Args:
        texts: text tower and tokenizer.
        class_names: in label order.
        length: M, the number of vectors.
        class_position: where the name stands; at the front it is name v . and in the middle v₁ … v_M/2 name … v_M . of
            which an odd M has the longer half after the name.

    Raises:
        InputError: when a prompt is longer than the tower can read, or that of two classes is one.
    """

    def __init__(
        self, texts: TextEncoder, class_names: Sequence[str], length: int, class_position: ClassPosition
    ) -> None:
        self.texts = texts
        before = {"front": 0, "middle": length // 2, "end": length}[class_position]
        start, end = texts.tokenizer.bos_token_id, texts.tokenizer.eos_token_id
        room = [start] * length  # of ids, as no text is sure to be one token a word; what they stand for is replaced
        prompts, places = [], []
        for name in class_names:
            size, ids = len(texts.tokens(name)), texts.tokens(f"{name}.")
            prompt = [start, *room[:before], *ids[:size], *room[before:], *ids[size:], end]
            if len(prompt) > texts.max_length:
                raise InputError(
                    f"class {name!r}: its prompt is {len(prompt)} tokens long with a context of {length}, the text"
                    f" tower reads {texts.max_length}; shorten the name in data.class_names, or the context"
                )
            prompts.append(torch.tensor(prompt))
            places.append([1 + place + (size if place >= before else 0) for place in range(length)])
        require_told_apart(class_names, [prompt.tolist() for prompt in prompts])
        self.ids = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=end)
        self.places = torch.tensor(places, dtype=torch.int64)

    def features(self, context: Tensor) -> Tensor:
        """Normalised features of the classes, shape (classes, d), by a context (M, width), with gradients to it."""
        ids, places = self.ids.to(context.device), self.places.to(context.device)
        rows = torch.arange(len(ids), device=context.device)[:, None]

        def insert(module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
            return embedded.index_put((rows, places), context.expand(len(ids), -1, -1))

        with self.texts.token_embedding.register_forward_hook(insert):
            return self.texts.features_of(ids)
