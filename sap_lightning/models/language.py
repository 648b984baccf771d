"""Causal language models and their tokenizers, from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sap_lightning.data.instructions import IGNORED
from sap_lightning.errors import InputError, first_line
from sap_lightning.models.base import load_whole


def load_language_model(folder: Path) -> PreTrainedModel:
    """A causal language model in float32, in evaluation mode.

    Raises:
        InputError: when it is none.
    """
    return load_whole(AutoModelForCausalLM, folder, str(folder), "causal language model", use_safetensors=True)


def language_config(folder: Path) -> Any:
    """What the config of a causal language model says, before a weight of it is read.

    Raises:
        InputError: when transformers knows no such model.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever a faulty file leads it to
        raise InputError(f"{folder}: no causal language model could be loaded: {first_line(error)}") from error


def tokenizer_of(folder: Path, option: str) -> Any:
    """The tokenizer of a language model.

    Args:
        folder: the model's.
        option: that names the texts.

    Raises:
        InputError: when there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise InputError(
            f"{folder}: has no tokenizer for {option} ({first_line(error)}); save it beside the model"
        ) from error


def answer_losses(language: nn.Module, inputs: Tensor, attention: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """−log p of every token of the answers.

    Args:
        language: a causal language model.
        inputs: embeddings of what it reads, shape (n, length, C).
        attention: shape (n, length).
        labels: shape (n, length); IGNORED of what is no answer.

    Returns:
        The losses, shape (n, m), of the m positions at which any conversation has an answer, 0 where one has none, and
        whether it has, shape (n, m).
    """
    labels = labels[:, 1:]
    # Logits of a large vocabulary are as much work as a third of a small model's layers, and no other is looked at.
    positions = (labels != IGNORED).any(0).nonzero().flatten()
    logits = cast(Any, language)(inputs_embeds=inputs, attention_mask=attention, logits_to_keep=positions).logits
    labels = labels[:, positions]
    losses = cross_entropy(logits.mT.float(), labels, reduction="none", ignore_index=IGNORED)
    return losses, labels != IGNORED
