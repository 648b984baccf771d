"""SAP and SAPAuto against dense float64 arithmetic on gradients by autograd."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import product

import pytest
import torch
from probes import (
    FC2,
    LOGIT_SCALE,
    PROJECTION,
    Q,
    anchor_gradients,
    captions,
    images,
    model_of,
    probe,
    random_adapter,
    relative_gap,
    tower,
)
from references import REDUCTIONS
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy, normalize

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer, Update, dense
from sap_lightning.io.adapter import Adapter, sha256_of
from sap_lightning.merging.distances import mean_cosine
from sap_lightning.merging.sap import SAP, SAPAuto
from sap_lightning.models.probe import AnchorProbe

WEIGHTS = [0.5, 0.3, 0.2]
Thetas = list[Tensor]


def clients() -> list[Adapter]:
    return [random_adapter(1), random_adapter(2, rank=2), random_adapter(3, (Q, PROJECTION))]


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
    as_it_is = SAP(0.7, space).merge(clients(), WEIGHTS, probe())
    longer = SAP(0.7, space, scale=1.4).merge(clients(), WEIGHTS, probe())
    assert relative_gap(longer, {name: 1.4 * dense(update) for name, update in as_it_is.items()}) < 1e-6
    with pytest.raises(InputError, match=r"merge\.scale must be above 0, got 0"):
        SAP(scale=0)


@pytest.mark.parametrize(("reduction", "space"), product(REDUCTIONS, ["factor", "delta", "singular"]))
def test_sap_equals_its_formula_in_every_space_and_reduction(space, reduction):
    for scope in ("global", "layer"):
        method = SAP(0.7, space, scope, reduction)
        merged = method.merge(clients(), WEIGHTS, probe())
        assert relative_gap(merged, reference(clients(), WEIGHTS, method)) < 1e-4


@pytest.mark.parametrize("rescale_scope", ["layer", "global"])
@pytest.mark.parametrize("rescale", ["none", "l1", "l2", "inverse_keep"])
def test_every_way_of_rescaling_equals_its_formula(rescale, rescale_scope):
    for space in ("factor", "delta"):
        method = SAP(0.6, space, rescale=rescale, rescale_scope=rescale_scope)
        merged = method.merge(clients(), WEIGHTS, probe())
        assert relative_gap(merged, reference(clients(), WEIGHTS, method)) < 1e-4


def test_robust_rescaling_scales_the_ranks_of_b_by_what_pruning_took_from_a():
    one = random_adapter(1, (Q,), rank=8)
    method = SAP(0.5, "factor", rescale="robust")
    merged = method.merge([one], anchors=probe())
    (A, B, scale), (keep_a, keep_b) = one.layers[Q], method.kept(one, 0.5)[Q]
    ratios = A.abs().sum(1) / (A * keep_a).abs().sum(1)
    ratios = ratios.clamp(min=float(ratios.sort().values[int(0.8 * 8)]))
    expected = scale * (B * keep_b * ratios).double() @ (A * keep_a).double()
    assert relative_gap(merged, {Q: expected}) < 1e-6


def test_the_contrastive_loss_scores_against_all_captions():
    method = SAP(0.7, loss="contrastive", scope="layer")
    merged = method.merge(clients(), WEIGHTS, probe())
    assert relative_gap(merged, reference(clients(), WEIGHTS, method, contrastive_gradients)) < 1e-4
    assert relative_gap(merged, reference(clients(), WEIGHTS, method)) > 0.1, "another loss, another merge"


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


@pytest.mark.parametrize("space", ["factor", "delta", "singular"])
def test_sign_aware_keeps_exactly_what_lowers_the_loss_most(space):
    method = SAP(0.8, space, reduction="mean_then_abs", sign_aware=True)
    merged = method.merge(clients(), WEIGHTS, probe())
    assert relative_gap(merged, reference(clients(), WEIGHTS, method)) < 1e-4


def test_combinations_that_are_not_defined_are_refused():
    with pytest.raises(InputError, match=r"sign_aware needs prune\.reduction mean_then_abs, got square"):
        SAP(reduction="square", sign_aware=True)
    with pytest.raises(InputError, match=r"needs prune\.space factor, got singular"):
        SAP(space="singular", rescale="robust")
    with pytest.raises(InputError, match=r"prune\.sparsity must lie in"):
        SAP(sparsity=1.5)


def test_a_sweep_over_sparsities_looks_at_the_anchors_once_for_every_client(monkeypatch):
    anchors, looks = probe(), []
    gradients = anchors.gradients
    monkeypatch.setattr(anchors, "gradients", lambda *given: looks.append(1) or gradients(*given))
    method = SAP()
    method.prepare(clients(), WEIGHTS, anchors)
    assert len(looks) == 3
    for sparsity in (0.0, 0.3, 0.9, 1.0):
        fresh = SAP(sparsity).merge(clients(), WEIGHTS, probe())
        assert relative_gap(method.apply(sparsity), fresh) == 0
    method.prepare(clients()[:2], WEIGHTS[:2], anchors)
    assert len(looks) == 3, "a client is scored once for as long as the method lives"
    other = SAP(0.5)
    other.answers = method.answers
    other.prepare(clients(), WEIGHTS, anchors)
    assert len(looks) == 3, "methods can share what the anchors said"


def test_other_anchors_are_asked_anew():
    method, (half, other_half) = SAP(0.9), probe().halves()
    method.merge(clients(), WEIGHTS, half)
    again = method.merge(clients(), WEIGHTS, other_half)
    assert relative_gap(again, SAP(0.9).merge(clients(), WEIGHTS, other_half)) == 0
    assert relative_gap(again, SAP(0.9).merge(clients(), WEIGHTS, half)) > 0


def test_the_order_of_clients_matters_to_the_last_bits_only():
    merged = SAP().merge(clients(), WEIGHTS, probe())
    turned = SAP().merge(clients()[::-1], WEIGHTS[::-1], probe())
    assert relative_gap(turned, merged) < 1e-6


@pytest.mark.parametrize("space", ["factor", "delta", "singular"])
def test_a_merge_leaves_the_adapters_as_they_were(space):
    ours = clients()
    before = [one.sha256 for one in ours]
    SAP(0.9, space).merge(ours, WEIGHTS, probe())
    assert [sha256_of(one.layers) for one in ours] == before


def test_an_upload_whose_saliency_overflows_is_refused_by_name():
    layers = random_adapter(1, (FC2,)).layers
    huge = Adapter("huge", {FC2: layers[FC2]._replace(scale=1e38)}, "0" * 64)
    with pytest.raises(InputError, match="upload 'huge': its saliency on the anchors is not finite"):
        SAP().merge([huge], anchors=probe())


# SAPAuto


def auto() -> SAPAuto:
    return SAPAuto(sparsities=[0.0, 0.5, 0.9], spaces=["delta", "factor"], scales=[0.5, 1.0, 1.5])


def disagreeing() -> list[Adapter]:
    """Clients of which the second wants the opposite of the first, but half as much."""
    first, _, third = clients()
    layers = {name: layer._replace(B=-layer.B / 2) for name, layer in first.layers.items()}
    return [first, Adapter("contrary", layers, sha256_of(layers), None), third]


@pytest.fixture(scope="module")
def prepared() -> SAPAuto:
    method = auto()
    method.prepare(disagreeing(), WEIGHTS, probe())
    return method


def test_auto_tries_every_space_with_every_sparsity_and_then_the_scales_of_the_best(prepared):
    tried = [(trial.space, trial.sparsity, trial.scale) for trial in prepared.tried]
    grid = [(space, sparsity, 1.0) for space in ("delta", "factor") for sparsity in (0.0, 0.5, 0.9)]
    best = min(prepared.tried[:6], key=lambda trial: trial.loss)
    assert tried == [*grid, *((best.space, best.sparsity, scale) for scale in (0.5, 1.5))]


def test_auto_scores_on_one_half_of_the_anchors_and_judges_on_the_other(prepared):
    for trial in prepared.tried:
        scored = SAP(trial.sparsity, trial.space).merge(disagreeing(), WEIGHTS, scoring_half())
        update = {name: trial.scale * dense(layer) for name, layer in scored.items()}
        assert trial.loss == pytest.approx(held_out_loss(update), abs=1e-5)
    assert prepared.chosen.loss == min(trial.loss for trial in prepared.tried)


def scoring_half() -> AnchorProbe:
    """A probe to which every other anchor does not exist."""
    whole = probe()
    whole.batches = lambda: [(images(8)[::2], torch.arange(4))]
    return AnchorProbe(
        whole.tower, whole.wear, whole.image_features, whole.batches, captions(8)[::2], whole.logit_scale
    )


@torch.no_grad()
def held_out_loss(update: Mapping[str, Update]) -> float:
    precise, _ = model_of({})
    weights = {
        f"{name}.weight": tower().get_submodule(name).weight.double() + dense(layer).double()
        for name, layer in update.items()
    }
    features = functional_call(precise, weights, (images(8).double()[1::2],)).image_embeds
    return float((1 - torch.cosine_similarity(features, captions(8).double()[1::2])).mean())


def test_the_halves_of_the_anchors_have_no_pair_in_common():
    for anchors in (2, 7, 8):
        one, other = probe(anchors).halves()
        assert sorted([*one.chosen, *other.chosen]) == list(range(anchors))


def test_auto_keeps_half_and_lengthens_the_mean_where_the_clients_agree():
    agreeing = clients()[:1]
    layers = {name: layer._replace(B=layer.B * 1.5) for name, layer in agreeing[0].layers.items()}
    agreeing.append(Adapter("more of it", layers, sha256_of(layers), None))
    method = auto()
    method.prepare(agreeing, WEIGHTS[:2], probe())
    assert method.findings["agreement"] == pytest.approx(1)
    expected = SAP(sparsity=0.5, scale=1.2).merge(agreeing, WEIGHTS[:2], probe())
    assert relative_gap(method.apply(), {name: dense(update) for name, update in expected.items()}) == 0


def test_the_mean_cosine_is_that_of_the_dense_updates():
    adapters = disagreeing()
    names = sorted({name for adapter in adapters for name in adapter.layers})
    deltas = [
        torch.cat(
            [(a.layers[n].delta() if n in a.layers else torch.zeros(_shape(n))).double().flatten() for n in names]
        )
        for a in adapters
    ]
    pairs = [torch.cosine_similarity(deltas[i], deltas[j], dim=0) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert mean_cosine(adapters) == pytest.approx(float(sum(pairs)) / 3, abs=1e-7)
    assert mean_cosine(adapters) < 0
    assert mean_cosine(adapters[:1]) == 0


def _shape(name: str) -> tuple[int, ...]:
    return tuple(tower().get_submodule(name).weight.shape)


def test_auto_applies_what_it_chose(prepared):
    chosen = prepared.chosen
    scored = SAP(chosen.sparsity, chosen.space).merge(disagreeing(), WEIGHTS, scoring_half())
    expected = {name: chosen.scale * dense(layer) for name, layer in scored.items()}
    assert relative_gap(prepared.apply(), expected) < 1e-5


def test_auto_s_findings_are_json_and_name_every_trial(prepared):
    findings = json.loads(json.dumps(prepared.findings))
    assert findings["chosen"] in findings["tried"]
    assert len(findings["tried"]) == len(prepared.tried)
    assert findings["tried"][0].keys() == {"space", "sparsity", "scale", "loss"}


def test_the_command_leaves_auto_s_findings_in_the_record(run, finished, tmp_path):
    run(
        "merge",
        "--merge.method=sap_auto",
        "--merge.method.sparsities=[0.5,0.9]",
        "--merge.method.spaces=[delta]",
        "--merge.method.scales=[1.0,2.0]",
        f"--merge.output={tmp_path / 'out'}",
        "--uploads",
        *(str(finished / "uploads" / domain) for domain in ("cartoon", "photo")),
    )
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert len(record["findings"]["tried"]) == 3
    assert record["findings"]["chosen"]["loss"] == min(trial["loss"] for trial in record["findings"]["tried"])
    assert record["settings"]["sparsities"] == [0.5, 0.9]


def test_auto_needs_two_anchors_and_something_to_try():
    with pytest.raises(InputError, match="holds out half of the anchors"):
        auto().prepare(disagreeing(), WEIGHTS, probe(1))
    auto().prepare(disagreeing(), WEIGHTS, probe(2))
    with pytest.raises(InputError, match=r"sap_auto looks at anchors; give --anchors\.root"):
        auto().prepare(disagreeing(), WEIGHTS)
    for empty in ("sparsities", "spaces", "scales"):
        with pytest.raises(InputError, match="something to try"):
            SAPAuto(**{empty: []})
    with pytest.raises(InputError, match=r"sparsities must lie in \[0, 1\]"):
        SAPAuto(sparsities=[0.5, 2])
