"""SAP against dense float64 arithmetic on gradients by autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch
from probes import (
    FC2,
    LOGIT_SCALE,
    Q,
    anchor_gradients,
    captions,
    images,
    model_of,
    probe,
    random_adapter,
    relative_gap,
    unlike_clients,
)
from references import REDUCTIONS
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy, normalize

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer, dense
from sap_lightning.io.adapter import Adapter, sha256_of
from sap_lightning.merging.fedavg import FedAvg
from sap_lightning.merging.sap import SAP

WEIGHTS = [0.5, 0.3, 0.2]
Thetas = list[Tensor]


def parameters(layer: LoRALayer, space: str) -> tuple[Thetas, Callable[[Tensor], Thetas], Callable[[Thetas], Tensor]]:
    """θ, ∂L/∂θ from ∂L/∂W, and ΔW from θ, in float64."""
    A, B, s = layer.A.double(), layer.B.double(), layer.scale
    if space == "factor":
        return [A, B], lambda G: [s * B.T @ G, s * G @ A.T], lambda t: s * t[1] @ t[0]
    if space == "delta":
        return [s * B @ A], lambda G: [G], lambda t: t[0]
    U, sigma, V = (part for part in torch.linalg.svd(s * B @ A, full_matrices=False))
    U, sigma, V = U[:, : layer.rank], sigma[: layer.rank], V[: layer.rank]
    return [sigma], lambda G: [(U.T @ G @ V.T).diagonal()], lambda t: U * t[0] @ V


def kept(scores: Mapping[str, Thetas], sparsity: float, scope: str) -> dict[str, Thetas]:
    """1 for what stays, 0 for the round(ρN) lowest."""
    if scope == "tensor":
        return {
            name: [kept({"": [tensor]}, sparsity, "global")[""][0] for tensor in layer]
            for name, layer in scores.items()
        }
    if scope == "layer":
        return {name: kept({name: layer}, sparsity, "global")[name] for name, layer in scores.items()}
    flat = torch.cat([tensor.flatten() for layer in scores.values() for tensor in layer])
    keep = torch.ones_like(flat)
    keep[flat.sort(stable=True).indices[: round(sparsity * len(flat))]] = 0
    pieces = iter(keep.split([tensor.numel() for layer in scores.values() for tensor in layer]))
    return {name: [next(pieces).view_as(tensor) for tensor in layer] for name, layer in scores.items()}


def reference(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: SAP,
    gradients: Callable[..., list[dict[str, Tensor]]] = anchor_gradients,
) -> dict[str, Tensor]:
    """What SAP's docstring says, in dense float64."""
    merged: dict[str, Tensor] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        per_anchor = gradients(adapter.layers, list(adapter.layers))
        parts = {name: parameters(layer, method.space) for name, layer in adapter.layers.items()}
        scores = {}
        for name, (thetas, gradient_of, _) in parts.items():
            each = [gradient_of(G[name]) for G in per_anchor]
            taylor = [theta * torch.stack([one[i] for one in each]) for i, theta in enumerate(thetas)]
            scores[name] = [-t.mean(0) if method.sign_aware else REDUCTIONS[method.reduction](t) for t in taylor]
        masks = kept(scores, method.sparsity, method.scope)
        before = {name: build(thetas) for name, (thetas, _, build) in parts.items()}
        after = {
            name: build([theta * mask for theta, mask in zip(thetas, masks[name], strict=True)])
            for name, (thetas, _, build) in parts.items()
        }
        for name, delta in rescaled(before, after, method).items():
            merged[name] = merged.get(name, 0) + weight * delta
    return merged


def rescaled(before: dict[str, Tensor], after: dict[str, Tensor], method: SAP) -> dict[str, Tensor]:
    if method.rescale == "inverse_keep":
        return {name: delta / (1 - method.sparsity) for name, delta in after.items()}
    if method.rescale == "none":
        return after
    p = {"l1": 1, "l2": 2}[method.rescale]
    groups = [list(after)] if method.rescale_scope == "global" else [[name] for name in after]
    factors = {}
    for names in groups:
        was, now = (torch.cat([of[name].flatten() for name in names]).norm(p) for of in (before, after))
        factors |= dict.fromkeys(names, was / now if now else 1.0)
    return {name: factors[name] * delta for name, delta in after.items()}


@pytest.mark.parametrize("space", ["factor", "delta"])
def test_the_scale_is_a_factor_on_the_merged_update(space):
    as_it_is = SAP(0.7, space).merge(unlike_clients(), WEIGHTS, probe())
    longer = SAP(0.7, space, scale=1.4).merge(unlike_clients(), WEIGHTS, probe())
    assert relative_gap(longer, {name: 1.4 * dense(update) for name, update in as_it_is.items()}) < 1e-6
    with pytest.raises(InputError, match=r"prune\.scale must be above 0, got 0"):
        SAP(scale=0)


@pytest.mark.parametrize(("reduction", "space"), product(REDUCTIONS, ["factor", "delta", "singular"]))
def test_sap_equals_its_formula_in_every_space_and_reduction(space, reduction):
    for scope in ("global", "layer", "tensor"):
        method = SAP(0.7, space, scope, reduction)
        merged = method.merge(unlike_clients(), WEIGHTS, probe())
        assert relative_gap(merged, reference(unlike_clients(), WEIGHTS, method)) < 1e-4


@pytest.mark.parametrize("consensus", ["elected", "median"])
def test_another_consensus_is_of_the_pruned_updates(consensus):
    clients = unlike_clients()
    prepared = SAP(0.7, consensus=consensus).prepare(clients, WEIGHTS, probe())
    merged = prepared.apply()
    for name in merged:
        whole = [dense(one.layers[name]).double() if name in one.layers else None for one in clients]
        pruned = [dense(prepared.pruned(one)[name]).double() for one in clients if name in one.layers]
        own = [delta.norm() / part.norm() * part for delta, part in zip(filter_none(whole), pruned, strict=True)]
        weights = [w for w, delta in zip(WEIGHTS, whole, strict=True) if delta is not None]
        expected = torch.stack(own).quantile(0.5, dim=0) if consensus == "median" else elected(own, weights)
        assert (dense(merged[name]) - expected).norm() < 1e-5 * expected.norm()


def filter_none(values: Sequence[Tensor | None]) -> list[Tensor]:
    return [value for value in values if value is not None]


def elected(updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Element by element: the weighted mean over the updates that have the sign of the weighted sum."""
    stacked, shares = torch.stack(list(updates)), torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)
    agree = (stacked.sign() == (shares * stacked).sum(0).sign()) & (stacked != 0)
    support = (shares * agree).sum(0)
    return torch.where(support > 0, (shares * stacked * agree).sum(0) / support, 0)


@pytest.mark.parametrize("rescale_scope", ["layer", "global"])
@pytest.mark.parametrize("rescale", ["none", "l1", "l2", "inverse_keep"])
def test_every_way_of_rescaling_equals_its_formula(rescale, rescale_scope):
    for space in ("factor", "delta"):
        method = SAP(0.6, space, rescale=rescale, rescale_scope=rescale_scope)
        merged = method.merge(unlike_clients(), WEIGHTS, probe())
        assert relative_gap(merged, reference(unlike_clients(), WEIGHTS, method)) < 1e-4


def test_robust_rescaling_scales_the_ranks_of_b_by_what_pruning_took_from_a():
    one = random_adapter(1, (Q,), rank=8)
    prepared = SAP(0.5, "factor", rescale="robust").prepare([one], [1.0], probe())
    (A, B, scale), (keep_a, keep_b) = one.layers[Q], prepared.kept(one)[Q]
    ratios = A.abs().sum(1) / (A * keep_a).abs().sum(1)
    ratios = ratios.clamp(min=float(ratios.sort().values[int(0.8 * 8)]))
    expected = scale * (B * keep_b * ratios).double() @ (A * keep_a).double()
    assert relative_gap(prepared.apply(), {Q: expected}) < 1e-6


def test_the_contrastive_loss_scores_against_all_captions():
    method = SAP(0.7, loss="contrastive", scope="layer")
    merged = method.merge(unlike_clients(), WEIGHTS, probe())
    assert relative_gap(merged, reference(unlike_clients(), WEIGHTS, method, contrastive_gradients)) < 1e-4
    assert relative_gap(merged, reference(unlike_clients(), WEIGHTS, method)) > 0.1, "another loss, another merge"


def contrastive_gradients(layers: Mapping[str, LoRALayer], names: Sequence[str]) -> list[dict[str, Tensor]]:
    precise, weights = model_of(dict(layers))
    weights = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    gradients = []
    for index, pixels in enumerate(images(8).double()):
        feature = normalize(functional_call(precise, weights, (pixels[None],)).image_embeds, dim=-1)
        loss = cross_entropy(LOGIT_SCALE * feature @ captions(8).double().T, torch.tensor([index]))
        of = torch.autograd.grad(loss, [weights[f"{name}.weight"] for name in names])
        gradients.append(dict(zip(names, of, strict=True)))
    return gradients


def symmetric_gradients(layers: Mapping[str, LoRALayer], names: Sequence[str]) -> list[dict[str, Tensor]]:
    """∂L/∂W of CLIP's own loss, one batch of the probe's five anchors after another."""
    precise, weights = model_of(dict(layers))
    weights = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    gradients = []
    for pixels, texts in zip(images(8).double().split(5), captions(8).double().split(5), strict=True):
        logits = LOGIT_SCALE * normalize(functional_call(precise, weights, (pixels,)).image_embeds, dim=-1) @ texts.T
        own = torch.arange(len(texts))
        loss = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
        of = torch.autograd.grad(loss, [weights[f"{name}.weight"] for name in names])
        gradients.append(dict(zip(names, of, strict=True)))
    return gradients


def test_the_symmetric_loss_scores_by_batch():
    method = SAP(0.7, reduction="mean_then_abs", loss="contrastive_symmetric", scope="layer")
    merged = method.merge(unlike_clients(), WEIGHTS, probe())
    assert relative_gap(merged, reference(unlike_clients(), WEIGHTS, method, symmetric_gradients)) < 1e-4
    assert relative_gap(merged, replace(method, loss="contrastive").merge(unlike_clients(), WEIGHTS, probe())) > 0.1
    whole = {"batches": lambda: [(images(8), torch.arange(8))]}
    assert relative_gap(merged, method.merge(unlike_clients(), WEIGHTS, probe(**whole))) > 1e-3, "of other batches"
    assert method.asks_by_batch and not SAP().asks_by_batch


def test_factors_of_pruned_clients_may_be_averaged_apart():
    clients = [random_adapter(1), random_adapter(2), random_adapter(3, (Q, FC2))]
    method = SAP(0.7, "factor", "tensor", rescale="none", mean_of="factors")
    prepared = method.prepare(clients, WEIGHTS, probe())
    expected = {}
    for name in clients[0].layers:
        sums = []
        for part, empty in (("A", 0), ("B", 0)):
            pruned = [prepared.pruned(one).get(name) for one in clients]
            terms = [w * 2**0.5 * getattr(p, part).double() for w, p in zip(WEIGHTS, pruned, strict=True) if p]
            sums.append(sum(terms, start=empty))
        expected[name] = sums[1] @ sums[0]
    assert relative_gap(prepared.apply(), expected) < 1e-6
    assert relative_gap(prepared.apply(), replace(method, mean_of="delta").merge(clients, WEIGHTS, probe())) > 0.1
    unpruned = replace(method, sparsity=0).merge(clients, WEIGHTS, probe())
    assert relative_gap(unpruned, FedAvg().merge(clients, WEIGHTS)) < 1e-6


def test_a_and_b_get_their_norms_back_apart_up_to_a_cap():
    one = random_adapter(1)
    method = SAP(0.9, "factor", "tensor", rescale="l1", rescale_scope="tensor")
    for cap in (None, 1.5):
        prepared = replace(method, rescale_cap=cap).prepare([one], [1.0], probe())
        expected = {}
        for name, (A, B, scale) in prepared.pruned(one).items():
            longer = [
                of * min(float(whole.abs().sum() / of.abs().sum()), cap or 1e9)
                for of, whole in ((A, one.layers[name].A), (B, one.layers[name].B))
            ]
            expected[name] = scale * longer[1].double() @ longer[0].double()
        assert relative_gap(prepared.apply(), expected) < 1e-6


@pytest.mark.parametrize("space", ["factor", "delta", "singular"])
def test_sign_aware_keeps_exactly_what_lowers_the_loss_most(space):
    method = SAP(0.8, space, reduction="mean_then_abs", sign_aware=True)
    merged = method.merge(unlike_clients(), WEIGHTS, probe())
    assert relative_gap(merged, reference(unlike_clients(), WEIGHTS, method)) < 1e-4


def test_combinations_that_are_not_defined_are_refused():
    with pytest.raises(InputError, match=r"sign_aware needs prune\.reduction mean_then_abs, got square"):
        SAP(reduction="square", sign_aware=True)
    with pytest.raises(InputError, match=r"needs prune\.space factor, got singular"):
        SAP(space="singular", rescale="robust")
    with pytest.raises(InputError, match=r"prune\.consensus median is of ΔW, and prune\.mean_of factors"):
        SAP(space="factor", mean_of="factors", consensus="median")
    for settings in ({"mean_of": "factors"}, {"rescale_scope": "tensor"}):
        with pytest.raises(InputError, match=r"apart and needs prune\.space factor, got delta"):
            SAP(**settings)
    with pytest.raises(InputError, match=r"rescale_cap 10: must be at least 1, and is for .* l1 or l2, got none"):
        SAP(rescale="none", rescale_cap=10)
    with pytest.raises(InputError, match=r"rescale_cap 0\.5: must be at least 1"):
        SAP(rescale_cap=0.5)
    with pytest.raises(InputError, match=r"contrastive_symmetric is of a batch and needs .* mean_then_abs, got square"):
        SAP(reduction="square", loss="contrastive_symmetric")
    with pytest.raises(InputError, match=r"prune\.sparsity must lie in"):
        SAP(sparsity=1.5)


def test_a_sweep_over_sparsities_looks_at_the_anchors_once_for_every_client(asked):
    anchors = probe()
    prepared = SAP().prepare(unlike_clients(), WEIGHTS, anchors)
    assert len(asked) == 3
    for sparsity in (0.0, 0.3, 0.9, 1.0):
        fresh = SAP(sparsity).merge(unlike_clients(), WEIGHTS, probe())
        assert relative_gap(prepared.apply(sparsity), fresh) == 0
    asked.clear()
    SAP().prepare(unlike_clients()[:2], WEIGHTS[:2], anchors)
    assert not asked, "a client is scored once for as long as the anchors' probe lives"


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.5},
        {"scope": "layer"},
        {"rescale": "none"},
        {"rescale_scope": "global"},
        {"consensus": "elected"},
        {"rescale_cap": 1.0},
        {"scale": 1.4},
    ],
)
def test_what_does_not_concern_the_scores_asks_nothing_new(settings, asked):
    anchors, clients = probe(), unlike_clients()
    plain = SAP().prepare(clients, WEIGHTS, anchors)
    asked.clear()
    other = SAP(**settings).prepare(clients, WEIGHTS, anchors)
    assert not asked, "methods share what the anchors said"
    assert all(other.answer(one) is plain.answer(one) for one in clients)
    assert relative_gap(other.apply(), SAP(**settings).merge(clients, WEIGHTS, probe())) == 0
    assert relative_gap(other.apply(), plain.apply()) > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"space": "factor"},
        {"space": "singular"},
        {"reduction": "square"},
        {"loss": "contrastive"},
        {"sign_aware": True},
    ],
)
def test_what_concerns_the_scores_is_asked_for_itself(settings, asked):
    anchors, clients = probe(), unlike_clients()
    plain = SAP(reduction="mean_then_abs")
    plain.prepare(clients, WEIGHTS, anchors)
    other = replace(plain, **settings)
    merged = other.merge(clients, WEIGHTS, anchors)
    assert len(asked) == 2 * len(clients)
    assert relative_gap(merged, other.merge(clients, WEIGHTS, probe())) == 0
    assert relative_gap(merged, plain.merge(clients, WEIGHTS, anchors)) > 0
    assert len(asked) == 3 * len(clients), "both are remembered; only the fresh probe was asked"


def test_other_anchors_are_asked_anew(asked):
    anchors, clients = probe(), unlike_clients()
    half, other_half = anchors.halves()
    assert half.memory is other_half.memory is anchors.memory
    first = SAP(0.9).merge(clients, WEIGHTS, half)
    again = SAP(0.9).merge(clients, WEIGHTS, other_half)
    assert len(asked) == 2 * len(clients), "halves share their memory, but not their answers"
    fresh = [SAP(0.9).merge(clients, WEIGHTS, one) for one in probe().halves()]
    assert relative_gap(first, fresh[0]) == relative_gap(again, fresh[1]) == 0
    assert relative_gap(again, first) > 0


def test_the_answer_has_the_loss_with_the_whole_adapter():
    clients = unlike_clients()
    for loss in ("cosine", "contrastive", "contrastive_symmetric"):
        prepared = SAP(loss=loss, reduction="mean_then_abs").prepare(clients, WEIGHTS, probe())
        expected = [probe().loss(one.layers, loss) for one in clients]
        assert [prepared.answer(one).loss for one in clients] == pytest.approx(expected, rel=1e-5)


def test_the_order_of_clients_matters_to_the_last_bits_only():
    merged = SAP().merge(unlike_clients(), WEIGHTS, probe())
    turned = SAP().merge(unlike_clients()[::-1], WEIGHTS[::-1], probe())
    assert relative_gap(turned, merged) < 1e-6


@pytest.mark.parametrize("space", ["factor", "delta", "singular"])
def test_a_merge_leaves_the_adapters_as_they_were(space):
    ours = unlike_clients()
    before = [one.sha256 for one in ours]
    SAP(0.9, space).merge(ours, WEIGHTS, probe())
    assert [sha256_of(one.layers) for one in ours] == before


def test_an_upload_whose_saliency_overflows_is_refused_by_name():
    layers = random_adapter(1, (FC2,)).layers
    huge = Adapter("huge", {FC2: layers[FC2]._replace(scale=1e38)}, "0" * 64)
    with pytest.raises(InputError, match="upload 'huge': its saliency on the anchors is not finite"):
        SAP().merge([huge], anchors=probe())
