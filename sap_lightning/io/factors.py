"""The LoRA factors of an adapter: their keys in a weights file, and every check on what stands there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.peft_config import Scaling, in_text_tower
from sap_lightning.io.rules import MAX_FLOAT32, short
from sap_lightning.io.weights import OpenWeights, Weights, readable

Factors = Literal["AB", "A", "B"]
"""Both factors of an adapter, or one."""
Shapes = Mapping[str, tuple[int, ...]]
"""Weight shape (d_out, d_in) of every linear layer of a base, by name."""
_FACTOR_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight")
_NAMED_FACTOR_KEY = re.compile(r".+\.lora_[AB]\.(?P<name>\w+)\.weight")
_WHOLE_KEY = re.compile(r"base_model\.model\.(?P<layer>(?:(?!lora_)[\w-]+\.)*?)(?P<copy>base_layer\.)?(?:weight|bias)")


class Beside(NamedTuple):
    """What may stand in a weights file beside LoRA factors, and is left out.

    Attributes:
        heads: whether layers that were trained whole, such as a classifier's head, may be.
        base_weight: the base's weight by PEFT's name for the layer, with which a copy of it must agree; None where the
            base cannot tell.
    """

    heads: bool = False
    base_weight: Callable[[str], Tensor | None] = lambda layer: None


NOTHING_BESIDE = Beside()


class StoredLayers(Mapping[str, LoRALayer]):
    """The layers of an adapter's weights by name, each read and checked when it is looked at.

    Args:
        weights: where its tensors are.
        scaling: rank and scale of each layer.
        shapes: the base's; if not given, the layers may be of any model.
        beside: what else may stand there.

    Attributes:
        dropped: PEFT's names of the layers that were trained whole, and are left out.

    Raises:
        InputError: naming a tensor that is unknown, missing, doubled or of a wrong shape.
    """

    def __init__(
        self, weights: Weights, scaling: Scaling, shapes: Shapes | None, beside: Beside = NOTHING_BESIDE
    ) -> None:
        self._weights = weights
        with weights.opened() as tensors:
            whole = _whole(tensors.keys())
            self.dropped = _dropped(tensors, whole, beside)
            keys = dict(sorted(factor_keys(tensors.keys() - whole.keys(), shapes).items()))
            stated = {name: _stated(tensors, factors) for name, factors in keys.items()}
            names = {name: _peft_name(factors["A"]) for name, factors in keys.items()}
            of = scaling.ranks_and_scales({names[name]: stated[name].A[0] for name in keys})
        self._layers = {
            name: _StoredLayer(name, keys[name], shapes[name] if shapes else stated[name].delta, *of[names[name]])
            for name in keys
        }

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __contains__(self, name: object) -> bool:
        return name in self._layers

    def __getitem__(self, name: str) -> LoRALayer:
        with self._weights.opened() as tensors:
            return self._layers[name].read(tensors)


class _StatedShapes(NamedTuple):
    """Shapes of a layer's factors as its file states them, (r, d_in) and (d_out, r)."""

    A: tuple[int, ...]
    B: tuple[int, ...]

    @property
    def delta(self) -> tuple[int, ...]:
        return self.B[0], self.A[1]


class _StoredLayer(NamedTuple):
    """Where a layer's factors are, and what they must be."""

    name: str
    keys: dict[str, str]
    shape: tuple[int, ...]
    rank: int
    scale: float

    def read(self, tensors: OpenWeights) -> LoRALayer:
        d_out, d_in = self.shape
        layer = LoRALayer(
            A=_read_factor(tensors, self.keys["A"], (self.rank, d_in)),
            B=_read_factor(tensors, self.keys["B"], (d_out, self.rank)),
            scale=self.scale,
        )
        require_finite(self.name, layer)
        return layer


def _whole(keys: Iterable[str]) -> dict[str, re.Match[str]]:
    """Keys of tensors that are no factors, with the layers they are of."""
    return {key: found for key in keys if (found := _WHOLE_KEY.fullmatch(key))}


def _dropped(tensors: OpenWeights, whole: Mapping[str, re.Match[str]], beside: Beside) -> list[str]:
    """Names of layers that were trained whole, once copies of the base's weights are found to be that."""
    heads = set()
    for key, found in whole.items():
        layer = found["layer"].removesuffix(".")
        if not found["copy"]:
            heads.add(layer)
        elif not _is_copy(tensors, key, beside.base_weight(layer)):
            raise InputError(
                f"{short(key)} is not the base's own weight, as far as can be told; save the adapter with"
                " save_embedding_layers=False"
            )
    if heads and not beside.heads:
        raise InputError(
            f"{short(min(heads))} was trained whole and is no LoRA, such as a classifier's head;"
            " --merge.drop_heads true merges the rest without it"
        )
    return sorted(heads)


def _is_copy(tensors: OpenWeights, key: str, own: Tensor | None) -> bool:
    if own is None or readable(tensors, key).shape != own.shape:
        return False
    weight = tensors.tensor(key)
    return torch.equal(weight, own.to(weight.dtype))


def _peft_name(key: str) -> str:
    return key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")


def factor_keys(file_keys: Iterable[str], shapes: Shapes | None) -> dict[str, dict[str, str]]:
    """A file's keys by our name of the layer, then by factor, A and B.

    Raises:
        InputError: naming a key that is no factor of the base's, or one that is missing or doubled.
    """
    keys: dict[str, dict[str, str]] = {}
    for key in sorted(file_keys):
        name, factor = _parse_key(key, shapes)
        if factor in keys.setdefault(name, {}):
            raise InputError(f"{key} and {keys[name][factor]} are one and the same factor; keep one of them")
        keys[name][factor] = key
    if not keys:
        raise InputError("no tensors; train the adapter first")
    for name, factors in keys.items():
        if missing := {"A", "B"} - factors.keys():
            raise InputError(f"{name} has no lora_{missing.pop()}; save the adapter again")
    return keys


def _parse_key(key: str, shapes: Shapes | None) -> tuple[str, str]:
    """The layer, under our name for it, and the factor that a file's key stands for."""
    match = _FACTOR_KEY.fullmatch(key)
    if not match:
        if named := _NAMED_FACTOR_KEY.fullmatch(key):
            raise InputError(
                f"{short(key)} has the adapter's name {named['name']!r} in it; save the adapter with PEFT's"
                " save_pretrained"
            )
        raise InputError(f"{short(key)} is no LoRA factor; expected base_model.model.*.lora_A.weight or _B")
    if shapes is None:
        return match["layer"], match["factor"]
    for name in (match["layer"], f"vision_model.{match['layer']}"):
        if name in shapes:
            return name, match["factor"]
    if in_text_tower(key) and not any(map(in_text_tower, shapes)):
        raise InputError(f"{short(key)} changes the text tower, only the vision tower can be merged here")
    raise InputError(
        f"{short(key)}: the base has no such linear layer; merge adapters of this base, of its linear layers alone (no"
        " convolutions, no embeddings)"
    )


def _stated(tensors: OpenWeights, keys: dict[str, str]) -> _StatedShapes:
    shapes = _StatedShapes(*(tensors.stated(keys[factor]).shape for factor in "AB"))
    for factor, expected in (("A", "(r, d_in)"), ("B", "(d_out, r)")):
        shape = getattr(shapes, factor)
        if len(shape) != 2 or 0 in shape:
            raise InputError(f"{keys[factor]} has shape {shape}, expected {expected}; only linear layers can be merged")
    return shapes


def _read_factor(tensors: OpenWeights, key: str, shape: tuple[int, int]) -> Tensor:
    stated = readable(tensors, key)
    if stated.shape != shape:
        raise InputError(
            f"{key} has shape {stated.shape}, expected {shape} by the base and the adapter's rank; train the adapter on"
            " this base"
        )
    # A copy, since what is read keeps the whole file mapped for as long as it lives.
    return tensors.tensor(key).to(torch.float32, copy=True)


def require_finite(where: str, layer: LoRALayer) -> None:
    """Raises InputError when a factor is not finite, or ΔW may not be in float32."""
    for factor, tensor in (("A", layer.A), ("B", layer.B)):
        if not tensor.isfinite().all():
            raise InputError(f"{where}: lora_{factor} has NaN or Inf; train with a lower learning rate")
    largest = abs(layer.scale) * layer.A.double().norm() * layer.B.double().norm()
    if not largest < MAX_FLOAT32:
        raise InputError(f"{where}: ΔW overflows float32 (scale {layer.scale:g}); check lora_alpha")


def weights_bytes(layers: Mapping[str, LoRALayer], factors: Factors = "AB") -> bytes:
    """The layers, or one factor of each, as a weights file of PEFT's."""
    return safetensors.torch.save(factor_tensors(layers, factors), metadata={"format": "pt"})


def factor_tensors(layers: Mapping[str, LoRALayer], factors: Factors) -> dict[str, Tensor]:
    """These factors of each layer by PEFT's keys."""
    return {
        f"base_model.model.{name}.lora_{factor}.weight": _own_copy(getattr(layer, factor))
        for name, layer in layers.items()
        for factor in factors
    }


def _own_copy(tensor: Tensor) -> Tensor:
    # safetensors refuses tensors that share memory, as slices of one stack do.
    return tensor.detach().cpu().float().clone(memory_format=torch.contiguous_format)
