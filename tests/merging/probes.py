"""Anchors on a tiny tower, random adapters for it, and what float64 says of the tower with an update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache

import torch
from references import TINY_VISION
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import normalize
from transformers import CLIPVisionModelWithProjection

from sap_lightning.functional.lora import LoRALayer, Update, dense
from sap_lightning.io.adapter import Adapter, sha256_of
from sap_lightning.io.manifest import Manifest
from sap_lightning.models.layers import layer_shapes
from sap_lightning.models.probe import AnchorProbe

Layers = Mapping[str, LoRALayer]
LOGIT_SCALE = 10.0
Q, FC2, PROJECTION = (
    "vision_model.encoder.layers.0.self_attn.q_proj",
    "vision_model.encoder.layers.0.mlp.fc2",
    "visual_projection",
)
"""One layer of each shape: (32, 32), (32, 64) and (16, 32)."""


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_layer(seed: int, shape: tuple[int, int], rank: int = 3, scale: float = 2.0) -> LoRALayer:
    d_out, d_in = shape
    return LoRALayer(0.2 * randn(seed, rank, d_in), 0.2 * randn(seed + 1, d_out, rank), scale)


def adapter(name: str, layers: Layers, samples: int | None = None) -> Adapter:
    """An upload of these layers, with a manifest if it has samples."""
    sha256 = sha256_of(layers)
    manifest = (
        None
        if samples is None
        else Manifest("tiny", "0" * 64, name, ("cat", "dog"), samples, 3, 6, tuple(layers), 0, {}, sha256)
    )
    return Adapter(name, dict(sorted(layers.items())), sha256, manifest)


def random_adapter(
    seed: int, names: Sequence[str] = (Q, FC2, PROJECTION), rank: int = 3, samples: int | None = None
) -> Adapter:
    shapes = layer_shapes(tower())
    layers = {name: random_layer(1000 * seed + 2 * i, tuple(shapes[name]), rank) for i, name in enumerate(names)}
    return adapter(f"client {seed}", layers, samples)


def negative(one: Adapter) -> Adapter:
    """The adapter whose updates are the opposite."""
    return adapter(f"not {one.name}", {n: layer._replace(scale=-layer.scale) for n, layer in one.layers.items()})


def zero(one: Adapter) -> Adapter:
    """An adapter that changes nothing, as LoRA starts."""
    return adapter(f"no {one.name}", {n: layer._replace(B=0 * layer.B) for n, layer in one.layers.items()})


@cache
def tower() -> CLIPVisionModelWithProjection:
    """The base; not to be changed."""
    base = CLIPVisionModelWithProjection(TINY_VISION).eval().requires_grad_(False)
    for index, weight in enumerate(base.parameters()):
        # Large enough for attention to look somewhere, which CLIP's own initialisation is not.
        weight.copy_(0.2 * randn(100 + index, *weight.shape) + (1 if weight.ndim == 1 else 0))
    return base


def images(anchors: int) -> Tensor:
    return randn(10, anchors, 3, 16, 16)


def captions(anchors: int) -> Tensor:
    return normalize(randn(11, anchors, 16), dim=-1)


def probe(anchors: int = 8) -> AnchorProbe:
    """Anchors in two batches on a copy of the tower."""
    worn = deepcopy(tower())
    base = deepcopy(worn.state_dict())

    def wear(update: Mapping[str, Update]) -> None:
        worn.load_state_dict(base)
        for name, layer in update.items():
            worn.get_submodule(name).weight.add_(dense(layer))

    def batches() -> list[tuple[Tensor, Tensor]]:
        return list(zip(images(anchors).split(5), torch.arange(anchors).split(5), strict=True))

    return AnchorProbe(
        worn,
        wear,
        lambda pixels: normalize(worn(pixels).image_embeds, dim=-1),
        batches,
        captions(anchors),
        LOGIT_SCALE,
    )


def exact_delta(layer: LoRALayer) -> Tensor:
    return layer.scale * layer.B.double() @ layer.A.double()


def deltas(adapters: Sequence[Adapter], name: str) -> list[Tensor]:
    """Every client's dense float64 ΔW of a layer, 0 where it lacks the layer."""
    return [
        exact_delta(one.layers[name]) if name in one.layers else torch.zeros(layer_shapes(tower())[name]).double()
        for one in adapters
    ]


def model_of(layers: Layers) -> tuple[CLIPVisionModelWithProjection, dict[str, Tensor]]:
    """The float64 tower, and those of its weights that the layers change, changed."""
    precise = deepcopy(tower()).double()
    weights = {
        f"{name}.weight": precise.get_submodule(name).weight + exact_delta(layer) for name, layer in layers.items()
    }
    return precise, weights


def exact_features(layers: Layers, pixels: Tensor) -> Tensor:
    """Normalised float64 features of images through base + adapter."""
    precise, weights = model_of(layers)
    return normalize(functional_call(precise, weights, (pixels.double(),)).image_embeds, dim=-1)


def anchor_gradients(layers: Layers, names: Sequence[str], anchors: int = 8) -> list[dict[str, Tensor]]:
    """∂(1 − cos_i)/∂W at base + adapter for one anchor after another, by autograd in float64."""
    precise, changed = model_of(layers)
    weights = {f"{name}.weight": precise.get_submodule(name).weight for name in names} | changed
    weights = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    gradients = []
    for pixels, caption in zip(images(anchors).double(), captions(anchors).double(), strict=True):
        features = functional_call(precise, weights, (pixels[None],)).image_embeds
        loss = 1 - torch.cosine_similarity(features, caption[None]).sum()
        of = torch.autograd.grad(loss, list(weights.values()))
        gradients.append(dict(zip((name.removesuffix(".weight") for name in weights), of, strict=True)))
    return gradients


def layer_inputs(layers: Layers, name: str, anchors: int = 8) -> Tensor:
    """Float64 inputs of a layer over all tokens of all anchors through base + adapter, shape (tokens, d_in)."""
    precise, weights = model_of(layers)
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.append(inputs[0])

    precise.get_submodule(name).register_forward_pre_hook(keep)
    functional_call(precise, weights, (images(anchors).double(),))
    return seen[0].flatten(0, -2)


def relative_gap(actual: Mapping[str, Update], expected: Mapping[str, Update]) -> float:
    """The largest ‖actual − expected‖ / ‖expected‖ of a layer."""
    assert actual.keys() == expected.keys()
    return max(
        float((dense(actual[name]).double() - dense(expected[name]).double()).norm())
        / max(float(dense(expected[name]).double().norm()), 1e-12)
        for name in expected
    )


def is_finite(update: Mapping[str, Update]) -> bool:
    return all(bool(dense(layer).isfinite().all()) for layer in update.values())
