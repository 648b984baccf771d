"""A model whose neurons, heads and dimensions of the stream stand in another order, which computes the same."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def reordered(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def permuted(model: Any, seed: int = 0) -> tuple[Any, dict[str, Tensor]]:
    """A copy in another order, and for each layer of its blocks which row of the copy each row of the model became."""
    own = copy.deepcopy(model)
    config = getattr(own.config, "vision_config", own.config)
    heads, width = config.num_attention_heads, config.hidden_size
    kv = getattr(config, "num_key_value_heads", None) or heads
    stream = reordered(width, seed)
    weights = {name: weight for name, weight in own.state_dict().items() if not name.startswith("text_")}
    rows: dict[str, Tensor] = {}
    for block in range(config.num_hidden_layers):
        of_kv, inner = reordered(kv, seed + 10 + block), reordered(width // heads, seed + 20 + block)
        served = reordered(heads // kv, seed + 30 + block)
        # Position turns pairs of dimensions of queries and keys; without it they may change places too.
        asked = torch.arange(width // heads) if kv < heads else reordered(width // heads, seed + 40 + block)
        of_q = (of_kv[:, None] * (heads // kv) + served).flatten()
        dims = width // heads
        queries, keys = _in_heads(of_q, asked, dims), _in_heads(of_kv, asked, dims)
        values, outputs = _in_heads(of_kv, inner, dims), _in_heads(of_q, inner, dims)
        hidden = reordered(config.intermediate_size, seed + 50 + block)
        for name, weight in weights.items():
            if f".layers.{block}." not in name:
                continue
            layer = name.rpartition(".")[0].rpartition(".")[2]
            of_rows = {"q_proj": queries, "k_proj": keys, "v_proj": values, "fc1": hidden, "gate_proj": hidden,
                       "up_proj": hidden}.get(layer, stream)  # fmt: skip
            of_columns = {"o_proj": outputs, "out_proj": outputs, "fc2": hidden, "down_proj": hidden}.get(layer, stream)
            weight.copy_(weight[of_rows][:, of_columns] if weight.ndim == 2 else weight[of_rows])
            rows[name.rpartition(".")[0]] = of_rows.argsort()
    turned = set()
    for name, weight in weights.items():
        if ".layers." not in name and weight.data_ptr() not in turned:  # a head may be the embedding
            turned.add(weight.data_ptr())
            _turn_outer(name, weight, stream)
    return own, rows


def _in_heads(heads: Tensor, inner: Tensor, dims: int) -> Tensor:
    return (heads[:, None] * dims + inner).flatten()


def _turn_outer(name: str, weight: Tensor, stream: Tensor) -> None:
    """What is in no block: embeddings, norms and heads."""
    if name.endswith("patch_embedding.weight") or (weight.ndim == 1 and len(weight) == len(stream)):
        weight.copy_(weight[stream])
    elif weight.ndim == 2:
        weight.copy_(weight[:, stream])


def moved(model: nn.Module, seed: int) -> None:
    """Gives norms and biases numbers of their own, which begin as ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
