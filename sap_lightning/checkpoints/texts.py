"""Texts that causal language models are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sap_lightning.checkpoints.examples import Examples
from sap_lightning.console import track
from sap_lightning.errors import InputError, first_line

MOST_TEXTS = 32
MOST_TOKENS = 64
"""How many texts are looked at, and how many tokens of each."""


def read_texts(file: str) -> list[str]:
    """The first lines of a text file that are not empty.

    Raises:
        InputError: when it cannot be read, or there is no such line.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"fuse.texts {file}: cannot be read as UTF-8 text ({first_line(error)})") from error
    if not (texts := [line for line in lines if line.strip()][:MOST_TEXTS]):
        raise InputError(f"fuse.texts {file}: has no text; give one a line")
    return texts


def language_model(folder: Path) -> PreTrainedModel:
    """The causal language model of a folder, in float32.

    Raises:
        InputError: when it is none.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:  # transformers raises whatever a faulty file leads it to
        raise InputError(
            f"{folder}: is no causal language model that fuse.texts could be shown to ({first_line(error)})"
        ) from error
    return model.eval()


def tokens_of(texts: Sequence[str], folder: Path) -> list[Tensor]:
    """The first tokens of each text by a model's tokenizer, shape (1, n).

    Raises:
        InputError: when the folder has no tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{folder}: has no tokenizer for fuse.texts ({first_line(error)})") from error
    tokens = [tokenizer(text, return_tensors="pt").input_ids[:, :MOST_TOKENS] for text in texts]
    return [one for one in tokens if one.numel()]


@dataclass(frozen=True)
class Texts(Examples):
    """Texts as models of one vocabulary read them.

    Attributes:
        tokens: of each text, shape (1, n).
    """

    tokens: Sequence[Tensor]

    @classmethod
    def of(cls, texts: Sequence[str], folder: Path) -> Texts:
        """Texts by the tokenizer of a model's folder.

        Raises:
            InputError: when it has none.
        """
        return cls(tokens_of(texts, folder))

    def load(self, folder: Path) -> PreTrainedModel:
        return language_model(folder)

    @torch.inference_mode()
    def show(self, model: PreTrainedModel) -> None:
        vocabulary, largest = model.config.get_text_config().vocab_size, max(int(one.max()) for one in self.tokens)
        if largest >= vocabulary:
            raise InputError(
                f"fuse.texts: token {largest} of the first model is none of another, which has {vocabulary};"
                " give models of one vocabulary"
            )
        for one in track(self.tokens, "texts"):
            model(input_ids=one)
