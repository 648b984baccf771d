"""A tiny language model with a tokenizer on disk, and a text that it is shown."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from llamas import llama, saved, trained
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

WORDS = ["[UNK]", *["the", "cat", "dog", "sat", "ran", "on", "under", "a", "mat", "bed"]]


def with_tokenizer(folder: Path) -> Path:
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of four blocks in shards, whose weights are as large as training would make them."""
    model = trained(llama(num_hidden_layers=4), 1, size=0.1)
    return str(with_tokenizer(saved(model, tmp_path_factory.mktemp("models") / "speaker")))


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text(" ".join(random.Random(0).choices(WORDS[1:], k=400)))
    return str(file)
