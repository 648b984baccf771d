"""A linear layer of low rank, in the place of a whole one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.weights import is_finite


class LowRank(nn.Module):
    """x ↦ up·(down·x) + bias.

    Args:
        factors: down as A, shape (K, d_in), and up as B, shape (d_out, K).
        bias: shape (d_out,), or none.
        transposed: whether it stands for a layer that has its weight as (d_in, d_out).
    """

    def __init__(self, factors: LoRALayer, bias: Tensor | None, transposed: bool = False) -> None:
        super().__init__()
        self.down = nn.Parameter(factors.A, requires_grad=False)
        self.up = nn.Parameter(factors.B, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.transposed = transposed

    @classmethod
    def in_place_of(cls, layer: nn.Module, factors: LoRALayer) -> LowRank:
        """With the layer's own bias."""
        bias = layer.bias
        assert bias is None or isinstance(bias, Tensor)
        return cls(factors, None if bias is None else bias.detach(), isinstance(layer, Conv1D))

    def forward(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.down), self.up, self.bias)

    @property
    def rank(self) -> int:
        """K."""
        return len(self.down)

    def dense(self) -> nn.Module:
        """The product as a layer of the kind that it stands for."""
        d_out, d_in = len(self.up), self.down.shape[1]
        with torch.device("meta"):  # which draws nothing
            layer = Conv1D(d_out, d_in) if self.transposed else nn.Linear(d_in, d_out)
        weight = (self.up @ self.down).detach()
        layer.weight = nn.Parameter(weight.T.contiguous() if self.transposed else weight, requires_grad=False)
        layer.bias = self.bias
        return layer


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as (d_out, d_in), whichever way it has it."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.data.T if isinstance(layer, Conv1D) else weight.data


def empty_in_place_of(layer: nn.Module, rank: int) -> LowRank:
    """One of this rank, to be loaded."""
    d_out, d_in = weight_of(layer).shape
    return LowRank.in_place_of(layer, LoRALayer(torch.zeros(rank, d_in), torch.zeros(d_out, rank)))


def rounded(tensor: Tensor, dtype: torch.dtype, place: str) -> Tensor:
    """A tensor in the dtype in which it is stored.

    Raises:
        InputError: when there is no room for its numbers, naming the place.
    """
    result = tensor.to(dtype)
    if not is_finite(result):
        raise InputError(
            f"{place} has numbers that {str(dtype).removeprefix('torch.')} cannot hold once it is compressed; save the"
            " model in bfloat16 or float32"
        )
    return result
