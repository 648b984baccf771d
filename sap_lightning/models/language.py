"""Causal language models and their tokenizers, from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sap_lightning.errors import InputError, first_line


def load_language_model(folder: Path) -> PreTrainedModel:
    """A causal language model in float32, in evaluation mode.

    Raises:
        InputError: when it is none.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:  # transformers raises whatever a faulty file leads it to
        raise InputError(f"{folder}: is no causal language model ({first_line(error)})") from error
    return model.eval()


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
