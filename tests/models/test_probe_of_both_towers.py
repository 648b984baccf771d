"""What anchors say of updates of both towers: captions follow the text tower, in float64 by autograd."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import pytest
import torch
from places import SHAPES_CLIP
from references import REDUCTIONS, randn
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import normalize
from torch.testing import assert_close

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.functional.spaces import FactorSpace
from sap_lightning.models.clip import Base, load_base
from sap_lightning.models.patched import Patched
from sap_lightning.models.probe import AnchorProbe

ANCHORS = 5
CAPTIONS = ["a dog.", "a photo of a red circle.", "a cat", "two drawn things on a table", "a house"]
IMAGES = randn(0, ANCHORS, 3, 64, 64)
TEXT = ("text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.1.mlp.fc2", "text_projection")
VISION = ("vision_model.encoder.layers.0.self_attn.v_proj", "visual_projection")
Layers = dict[str, LoRALayer]


@cache
def loaded() -> Base:
    """The built-in base; not to be changed."""
    return load_base(SHAPES_CLIP)


@pytest.fixture(scope="module")
def layers() -> Layers:
    weights = {name: loaded().clip.get_submodule(name).weight for name in (*TEXT, *VISION)}
    return {
        name: LoRALayer(0.1 * randn(2 * i, 3, w.shape[1]), 0.1 * randn(2 * i + 1, w.shape[0], 3), 1.5)
        for i, (name, w) in enumerate(weights.items())
    }


@pytest.fixture
def probe() -> AnchorProbe:
    """Anchors in batches of three on a copy of the base."""
    tower, texts, logit_scale, _ = deepcopy(loaded())
    batches = list(zip(IMAGES.split(3), torch.arange(ANCHORS).split(3), strict=True))
    return AnchorProbe(
        Patched(tower, texts.tower),
        lambda: batches,
        texts(CAPTIONS),
        logit_scale,
        encode=lambda pairs: texts.features([CAPTIONS[pair] for pair in pairs]),
    )


def exact(layers: Layers) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A and B of every layer in float64, and features of images and captions through base + update."""
    model = deepcopy(loaded().clip).double()
    factors = {name: (x.A.double().requires_grad_(), x.B.double().requires_grad_()) for name, x in layers.items()}
    weights = {
        f"{name}.weight": model.get_submodule(name).weight + layers[name].scale * B @ A
        for name, (A, B) in factors.items()
    }
    tokens = loaded().texts.tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    out = functional_call(model, weights, (), {**tokens, "pixel_values": IMAGES.double()})
    flat = {f"{name} {part}": of for name, pair in factors.items() for part, of in zip("AB", pair, strict=True)}
    return flat, normalize(out.image_embeds, dim=-1), normalize(out.text_embeds, dim=-1)


def exact_losses(layers: Layers, loss: str) -> tuple[dict[str, Tensor], Tensor]:
    factors, images, texts = exact(layers)
    if loss == "cosine":
        return factors, 1 - (images * texts).sum(1)
    logits = loaded().logit_scale * images @ texts.T
    if loss == "entropy":
        return factors, -(logits.softmax(1) * logits.log_softmax(1)).sum(1)
    return factors, logits.logsumexp(1) - logits.diagonal()


@pytest.mark.parametrize(
    ("loss", "reduction"),
    [
        *(("cosine", reduction) for reduction in REDUCTIONS),
        ("contrastive", "mean_then_abs"),
        ("entropy", "mean_then_abs"),
    ],
)
def test_gradients_of_both_towers_are_autograds_of_every_anchor(layers, probe, loss, reduction) -> None:
    factors, losses = exact_losses(layers, loss)
    each = [torch.autograd.grad(one, list(factors.values()), retain_graph=True) for one in losses]
    reduce = {"mean_then_abs": lambda g: g.mean(0)}.get(reduction, REDUCTIONS[reduction])
    expected = {name: reduce(torch.stack(of)) for name, *of in zip(factors, *each, strict=True)}
    spaces = {name: FactorSpace(layer) for name, layer in layers.items()}
    found = probe.gradients(layers, spaces, reduction, loss)
    for name, pair in found.of.items():
        for part, gradient in zip("AB", pair, strict=True):
            wanted = expected[f"{name} {part}"]
            assert (gradient - wanted).norm() <= 1e-4 * wanted.norm(), name
    assert found.loss == pytest.approx(float(losses.detach().mean()), rel=1e-5)
    assert not any(module._forward_hooks for module in probe.patched.text.modules())


@pytest.mark.parametrize("loss", ["contrastive", "entropy"])
def test_a_single_anchor_has_no_gradient_of_its_own_where_its_loss_looks_at_all_captions(layers, probe, loss) -> None:
    spaces = {name: FactorSpace(layer) for name, layer in layers.items()}
    with pytest.raises(InputError, match=r"text tower needs prune\.reduction mean_then_abs, got square"):
        probe.gradients(layers, spaces, "square", loss)
    vision = {name: spaces[name] for name in VISION}
    probe.gradients({name: layers[name] for name in VISION}, vision, "square", loss)


def test_gradients_at_the_base_reach_the_text_tower_too(layers, probe) -> None:
    nothing = {name: layer._replace(scale=0.0) for name, layer in layers.items()}
    spaces = {name: FactorSpace(layer) for name, layer in layers.items()}
    at_base = probe.gradients({}, spaces, "abs_then_mean")
    worn = probe.gradients(nothing, spaces, "abs_then_mean")
    for name in TEXT:
        assert all(gradient.any() for gradient in at_base.of[name])
        assert_close(at_base.of[name], worn.of[name])


@pytest.mark.parametrize("loss", ["cosine", "contrastive", "entropy"])
def test_losses_and_logits_are_those_of_captions_through_the_changed_tower(layers, probe, loss) -> None:
    _, losses = exact_losses(layers, loss)
    assert probe.loss(layers, loss) == pytest.approx(float(losses.detach().mean()), rel=1e-5)
    _, images, texts = exact(layers)
    assert_close(probe.logits(layers).double(), loaded().logit_scale * images @ texts.T, atol=1e-4, rtol=1e-4)
    assert_close(probe.logits({}), loaded().logit_scale * probe.features({}) @ probe.captions.T)
    half = probe.halves()[1]
    assert half.loss(layers, loss) == pytest.approx(float(losses[1::2].detach().mean()), rel=1e-5)


@torch.no_grad()
def test_grams_of_the_text_tower_are_of_every_caption_without_what_fills_it_up(layers, probe) -> None:
    found = probe.grams(layers)
    name = TEXT[1]
    patched = Patched(*(tower for tower in (deepcopy(loaded().tower), deepcopy(loaded().texts.tower))))
    patched.set_update(layers)
    seen: list[Tensor] = []
    patched.layer(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    for caption in CAPTIONS:
        patched.text["text_model"](**loaded().texts.tokenizer([caption], return_tensors="pt"))
    rows = torch.cat(seen)
    assert_close(found[name], rows.T @ rows / len(rows), atol=1e-5, rtol=1e-4)


def test_captions_are_encoded_anew_only_where_the_text_tower_is_changed(layers, probe) -> None:
    def refuse(pairs):
        raise AssertionError("captions of the base are known")

    strict = AnchorProbe(probe.patched, probe.batches, probe.captions, probe.logit_scale, encode=refuse)
    vision = {name: layers[name] for name in VISION}
    spaces = {name: FactorSpace(layer) for name, layer in vision.items()}
    strict.gradients(vision, spaces, "square")
    strict.grams(vision)
    strict.logits(vision)
    for loss in ("cosine", "contrastive", "contrastive_symmetric"):
        strict.loss(vision, loss)
    with pytest.raises(AssertionError, match="are known"):
        strict.loss(layers)
