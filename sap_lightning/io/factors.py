"""The LoRA factors of an adapter: their keys in a weights file, and every check on what stands there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.peft_config import Scaling, in_text_tower
from sap_lightning.io.rules import MAX_FLOAT32, errors_in, short

Shapes = Mapping[str, tuple[int, ...]]
"""Weight shape (d_out, d_in) of every linear layer of a base, by name."""
_DTYPE_NAMES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FACTOR_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight")
_NAMED_FACTOR_KEY = re.compile(r".+\.lora_[AB]\.(?P<name>\w+)\.weight")


class Stated(NamedTuple):
    """What a weights file says of a tensor before it is read."""

    dtype: torch.dtype | str
    shape: tuple[int, ...]


class OpenWeights(Protocol):
    """Tensors by key, each read when it is looked at."""

    def keys(self) -> Iterable[str]:
        """The keys of all tensors."""

    def stated(self, key: str) -> Stated:
        """Dtype and shape of a tensor."""

    def tensor(self, key: str) -> Tensor:
        """The tensor."""


class Weights(Protocol):
    """Where tensors come from, to be opened for every look at them."""

    def opened(self) -> AbstractContextManager[OpenWeights]:
        """The tensors; what is wrong with them is said to be wrong here."""


class WeightsFile:
    """A safetensors file, open only while it is looked at."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def opened(self) -> Iterator[OpenWeights]:
        try:
            with errors_in(self.path), safe_open(self.path, framework="pt") as file:
                yield _OpenFile(file)
        except SafetensorError as error:
            raise InputError(f"{self.path}: not safetensors, {short(str(error))}; save the adapter again") from None
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror or error}); check the file") from None


class _OpenFile:
    def __init__(self, file: Any) -> None:
        self.file = file

    def keys(self) -> Iterable[str]:
        return list(self.file.keys())

    def stated(self, key: str) -> Stated:
        header = self.file.get_slice(key)
        return Stated(_DTYPE_NAMES.get(header.get_dtype(), header.get_dtype()), tuple(header.get_shape()))

    def tensor(self, key: str) -> Tensor:
        read: Tensor = self.file.get_tensor(key)
        return read


class WeightsInMemory:
    """Tensors that are in memory already.

    Args:
        tensors: by key.
        place: how messages call where they came from.
    """

    def __init__(self, tensors: Mapping[str, Tensor], place: str) -> None:
        self.tensors = tensors
        self.place = place

    @contextmanager
    def opened(self) -> Iterator[OpenWeights]:
        with errors_in(self.place):
            yield self

    def keys(self) -> Iterable[str]:
        return self.tensors.keys()

    def stated(self, key: str) -> Stated:
        return Stated(self.tensors[key].dtype, tuple(self.tensors[key].shape))

    def tensor(self, key: str) -> Tensor:
        return self.tensors[key]


class StoredLayers(Mapping[str, LoRALayer]):
    """The layers of an adapter's weights by name, each read and checked when it is looked at.

    Args:
        weights: where its tensors are.
        scaling: rank and scale of each layer.
        shapes: the base's; if not given, the layers may be of any model.

    Raises:
        InputError: naming a tensor that is unknown, missing or doubled.
    """

    def __init__(self, weights: Weights, scaling: Scaling, shapes: Shapes | None) -> None:
        self._weights = weights
        self._scaling = scaling
        self._shapes = shapes
        with weights.opened() as tensors:
            keys = factor_keys(tensors.keys(), shapes)
        self._keys = dict(sorted(keys.items()))

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    def __getitem__(self, name: str) -> LoRALayer:
        keys = self._keys[name]
        shape = None if self._shapes is None else self._shapes[name]
        with self._weights.opened() as tensors:
            return _read_layer(tensors, name, keys, self._scaling, shape)


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


def _read_layer(
    tensors: OpenWeights, name: str, keys: dict[str, str], scaling: Scaling, weight_shape: tuple[int, ...] | None
) -> LoRALayer:
    d_out, d_in = weight_shape or _stated_shape(tensors, keys)
    peft_name = keys["A"].removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    rank = scaling.rank_of(peft_name)
    layer = LoRALayer(
        A=_read_factor(tensors, keys["A"], (rank, d_in)),
        B=_read_factor(tensors, keys["B"], (d_out, rank)),
        scale=scaling.scale_of(peft_name),
    )
    require_finite(name, layer)
    return layer


def _stated_shape(tensors: OpenWeights, keys: dict[str, str]) -> tuple[int, int]:
    A, B = (tensors.stated(keys[factor]).shape for factor in "AB")
    if len(A) != 2 or len(B) != 2:
        raise InputError(f"{keys['A']} has shape {A}, expected (r, d_in); only linear layers can be merged")
    return B[0], A[1]


def _read_factor(tensors: OpenWeights, key: str, shape: tuple[int, int]) -> Tensor:
    stated = tensors.stated(key)
    if stated.dtype not in _DTYPE_NAMES.values():
        raise InputError(f"{key} has dtype {stated.dtype}, expected one of {', '.join(_DTYPE_NAMES)}")
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


def weights_bytes(layers: Mapping[str, LoRALayer]) -> bytes:
    """The layers as a weights file of PEFT's."""
    tensors = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = _own_copy(layer.A)
        tensors[f"base_model.model.{name}.lora_B.weight"] = _own_copy(layer.B)
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


def _own_copy(tensor: Tensor) -> Tensor:
    # safetensors refuses tensors that share memory, as slices of one stack do.
    return tensor.detach().cpu().float().clone(memory_format=torch.contiguous_format)
