"""Tiny language models on disk: a base and models that were trained from it, as if."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "vocab_size": 40,
}

WORDS = ["[UNK]", *["the", "cat", "dog", "sat", "ran", "on", "under", "a", "mat", "bed"]]
TEXTS = ["the cat sat on the mat", "a dog ran under the bed", "the dog sat"]
"""Texts, and all tokens that a tokenizer knows."""


def llama(seed: int = 0, **options: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES | options))


def trained(model: PreTrainedModel, seed: int, size: float = 0.01) -> PreTrainedModel:
    """A model of the same weights but for what training, as if, has changed of them."""
    own = type(model)(model.config)
    generator = torch.Generator().manual_seed(seed)
    own.load_state_dict(
        {
            name: weight + size * torch.randn(weight.shape, generator=generator)
            for name, weight in model.state_dict().items()
        }
    )
    return own


def saved(model: torch.nn.Module, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "20KB") -> Path:
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


def ids_of(text: str) -> Tensor:
    """A text's tokens, shape (1, length)."""
    return torch.tensor([[WORDS.index(word) for word in text.split()]])


def weights_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model's files."""
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def changes(folders: Mapping[str, Path] | list[Path], base: Path) -> list[dict[str, Tensor]]:
    """What each model has changed of the base, float64."""
    own = weights_in(base)
    return [
        {key: weight.double() - own[key].double() for key, weight in weights_in(Path(folder)).items()}
        for folder in folders
    ]
