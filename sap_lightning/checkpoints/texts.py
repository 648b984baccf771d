"""Texts that language models are shown."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import GenerationConfig, PreTrainedModel

from sap_lightning.checkpoints.examples import Examples
from sap_lightning.console import track
from sap_lightning.data.texts import check_tokens, read_text
from sap_lightning.errors import InputError
from sap_lightning.fingerprints import digest
from sap_lightning.models.language import language_config, load_language_model, tokenizer_of

MOST_TEXTS = 32
MOST_TOKENS = 64
"""How many texts are looked at, and how many tokens of each."""
ANSWER_TOKENS = 16
"""Of what a model says to a text."""
SHORTER = "give texts of shorter lines"


class Texts(Examples):
    """The first lines of a text file that are not empty, for causal language models.

    Args:
        file: of texts, one a line.
        tokenizer: folder of the model whose tokenizer all models go by.

    Raises:
        InputError: when it cannot be read, or there is no such line.
    """

    def __init__(self, file: str, tokenizer: Path) -> None:
        self.texts = read_texts(file)
        self.place = f"fuse.texts {file}"
        self.tokenizer = tokenizer
        self.fingerprint = digest(self.texts)

    def check(self, folder: Path) -> None:
        config = language_config(folder)
        check_tokens(self._tokens, config, folder, self.place, SHORTER)

    def load(self, folder: Path) -> PreTrainedModel:
        self.check(folder)
        return load_language_model(folder)

    @torch.inference_mode()
    def show(self, model: PreTrainedModel) -> None:
        for one in track(self._tokens, "texts"):
            model(one)

    def losses(self, model: PreTrainedModel) -> Iterator[Tensor]:
        """Mean loss of the next token, text after text; a text of one token has no next one."""
        for one in self._tokens:
            if one.shape[1] > 1:
                yield cross_entropy(model(one).logits[0, :-1], one[0, 1:])

    @torch.inference_mode()
    def predictions(self, model: PreTrainedModel) -> list[Tensor]:
        """The probability of every next token at every position."""
        return [model(one).logits[0].softmax(-1) for one in self._tokens]

    def __len__(self) -> int:
        return len(self._tokens)

    def logits(self, model: PreTrainedModel, number: int) -> Tensor:
        """Of every next token."""
        logits: Tensor = model(self._tokens[number]).logits
        return logits[0]

    def answers(self, model: PreTrainedModel) -> list[Hashable]:
        """The tokens with which it goes on, greedily."""
        with_answers = [pad(one, (0, ANSWER_TOKENS)) for one in self._tokens]
        check_tokens(with_answers, model.config, str(model.name_or_path), f"{self.place}, with an answer", SHORTER)
        continued = (
            model.generate(  # type: ignore[operator]  # of whichever causal language model
                one,
                attention_mask=torch.ones_like(one),
                generation_config=GenerationConfig(max_new_tokens=ANSWER_TOKENS, pad_token_id=0),
            )
            for one in track(self._tokens, "texts")
        )
        return [tuple(whole[0, one.shape[1] :].tolist()) for one, whole in zip(self._tokens, continued, strict=True)]

    @cached_property
    def _tokens(self) -> list[Tensor]:
        tokenizer = tokenizer_of(self.tokenizer, "fuse.texts")
        tokens = [tokenizer(text, return_tensors="pt").input_ids[:, :MOST_TOKENS] for text in self.texts]
        return [one for one in tokens if one.numel()]


def read_texts(file: str) -> list[str]:
    """The first lines of a text file that are not empty.

    Raises:
        InputError: when it cannot be read, or there is no such line.
    """
    lines = read_text(file, "fuse.texts").splitlines()
    if not (texts := [line for line in lines if line.strip()][:MOST_TEXTS]):
        raise InputError(f"fuse.texts {file}: has no text; give one a line")
    return texts
