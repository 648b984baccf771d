"""Random adapters for two layers, their dense updates, and PEFT's merge of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from sap_lightning.functional.lora import LoRALayer, Update, dense
from sap_lightning.functional.reach import MEASURED
from sap_lightning.io.adapter import Adapter, sha256_of
from sap_lightning.io.manifest import Manifest

SHAPES = {"fc1": (32, 24), "q": (24, 24)}
FULL_RANK = 24


def adapter_of(layers: Mapping[str, LoRALayer], name: str = "client", samples: int | None = None) -> Adapter:
    """An upload of these layers, with a manifest if it has samples."""
    sha256 = sha256_of(layers)
    manifest = (
        None
        if samples is None
        else Manifest("tiny", "0" * 64, name, ("cat", "dog"), samples, 3, 6, tuple(layers), 0, {}, sha256)
    )
    return Adapter(name, dict(sorted(layers.items())), sha256, manifest)


def reaching(
    adapter: Adapter, said: Sequence[float] | Mapping[str, Sequence[float]] = (0.2, 0.3, 0.4, 0.1, 0.1)
) -> Adapter:
    """The adapter of a client that says this of every style or of each; that nothing holds if not told what."""
    curves = said if isinstance(said, Mapping) else dict.fromkeys(MEASURED, tuple(said))
    manifest = Manifest("tiny", "0" * 64, "home", ("cat", "dog"), 10, 3, 6, ("q",), 0, {}, adapter.sha256,
                        curves)  # fmt: skip
    return replace(adapter, manifest=manifest)


def random_adapter(seed: int, rank: int = 4, scale: float = 0.5, names: Sequence[str] = tuple(SHAPES)) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: LoRALayer(
            torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator), scale
        )
        for name, (d_out, d_in) in SHAPES.items()
    }
    return adapter_of({name: layers[name] for name in names})


def unlike_adapters() -> list[Adapter]:
    """Three clients of other ranks and scales, the last without a layer."""
    return [random_adapter(0, 4, 0.5), random_adapter(1, 2, 2.0), random_adapter(2, 6, 1.0, ["q"])]


def exact_delta(layer: LoRALayer) -> Tensor:
    """ΔW in float64."""
    return layer.scale * layer.B.double() @ layer.A.double()


def delta_of(adapter: Adapter, name: str) -> Tensor:
    """ΔW in float64; zero where the client lacks the layer."""
    if name not in adapter.layers:
        return torch.zeros(SHAPES[name], dtype=torch.float64)
    return exact_delta(adapter.layers[name])


def deltas(adapters: Sequence[Adapter], name: str) -> Tensor:
    """The ΔW of one layer, stacked, in float64."""
    return torch.stack([delta_of(adapter, name) for adapter in adapters])


def assert_same(merged: Mapping[str, Update], expected: Mapping[str, Update], tolerance: float = 1e-6) -> None:
    """The same layers, and in each a gap of at most this share of its Frobenius norm."""
    assert merged.keys() == expected.keys()
    for name in expected:
        wanted = dense(expected[name]).double()
        gap = torch.linalg.matrix_norm(dense(merged[name]).double() - wanted)
        assert gap <= tolerance * torch.linalg.matrix_norm(wanted), f"{name}: {gap}"


def mergekit_group(adapters: Sequence[Adapter], name: str) -> Any:
    """What mergekit merges of a layer: the base, which is zero, and the ΔW, numbered from 1; skips without mergekit."""
    base = pytest.importorskip("mergekit.merge_methods.base")
    stacked = deltas(adapters, name)
    return base.TensorGroup.from_tensors([torch.zeros_like(stacked[0]), *stacked], base_index=0)


def peft_merge(adapters: Sequence[Adapter], weights: Sequence[float], combination: str, **options: Any):
    """ΔW by layer of PEFT's ``add_weighted_adapter``."""
    model = nn.ModuleDict({name: nn.Linear(d_in, d_out, bias=False) for name, (d_out, d_in) in SHAPES.items()})
    names = [str(k) for k in range(len(adapters))]
    configs = [_config(adapter) for adapter in adapters]
    peft_model = get_peft_model(model, configs[0], names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        peft_model.add_adapter(name, config)
    modules = dict(model.items())
    for name, adapter in zip(names, adapters, strict=True):
        for layer_name, layer in adapter.layers.items():
            modules[layer_name].lora_A[name].weight.data = layer.A.clone()
            modules[layer_name].lora_B[name].weight.data = layer.B.clone()
    peft_model.add_weighted_adapter(names, list(weights), "merged", combination, **options)
    return {name: module.get_delta_weight("merged").detach() for name, module in modules.items()}


def _config(adapter: Adapter) -> LoraConfig:
    layer = next(iter(adapter.layers.values()))
    return LoraConfig(r=layer.rank, lora_alpha=layer.rank * layer.scale, target_modules=list(adapter.layers))
