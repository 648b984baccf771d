from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from references import randn64
from torch import Tensor
from torch.testing import assert_close

from sap_lightning.functional.lora import LoRALayer, Update, dense, scaled
from sap_lightning.functional.masking import Scope
from sap_lightning.functional.rescaling import (
    Rescale,
    inverse_keep,
    norm,
    relative_error,
    rescaled,
    restore_norm,
    robust,
)

EACH_P = pytest.mark.parametrize("p", [1, 2])
EACH_SCOPE = pytest.mark.parametrize("scope", ["layer", "global"])


BEFORE = {
    "q": LoRALayer(randn64(0, 5, 6), randn64(1, 8, 5), 0.3),
    "fc1": LoRALayer(randn64(2, 5, 7), randn64(3, 4, 5), -2.0),
}


def keep_some(tensor: Tensor, seed: int) -> Tensor:
    return tensor * (randn64(seed, *tensor.shape) > 0.5)


def pruned_factors() -> dict[str, Update]:
    return {name: layer._replace(A=keep_some(layer.A, 4), B=keep_some(layer.B, 5)) for name, layer in BEFORE.items()}


def pruned_deltas() -> dict[str, Update]:
    return {name: keep_some(layer.delta(), 6) for name, layer in BEFORE.items()}


EACH_FORM = pytest.mark.parametrize("prune", [pruned_factors, pruned_deltas])
Prune = Callable[[], dict[str, Update]]


def lp(updates: Mapping[str, Update], p: int) -> Tensor:
    """Norm of all elements of these updates together."""
    return torch.cat([dense(update).flatten() for update in updates.values()]).abs().pow(p).sum() ** (1 / p)


@EACH_P
@EACH_FORM
def test_norm_is_that_of_all_elements_in_either_form(p: int, prune: Prune) -> None:
    for name, update in prune().items():
        assert norm(update, p) == pytest.approx(float(lp({name: update}, p)))


@EACH_P
@pytest.mark.parametrize("cap", [1.2, 1e9])
def test_restoring_by_tensor_gives_a_and_b_their_norms_back_up_to_a_cap(p: int, cap: float) -> None:
    after = pruned_factors()
    for name, restored in restore_norm(BEFORE, after, p, "tensor", cap).items():
        whole, pruned = BEFORE[name], after[name]
        assert isinstance(restored, LoRALayer) and isinstance(pruned, LoRALayer)
        for factor in ("A", "B"):
            of, left = getattr(whole, factor), getattr(pruned, factor)
            longer = min(float(lp({"": of}, p) / lp({"": left}, p)), cap)
            assert_close(getattr(restored, factor), longer * left)
    nothing = BEFORE["q"]._replace(A=0 * BEFORE["q"].A)
    assert not dense(restore_norm(BEFORE, {"q": nothing}, p, "tensor")["q"]).any()
    with pytest.raises(ValueError, match="need updates in factor form"):
        restore_norm(BEFORE, pruned_deltas(), p, "tensor")


@EACH_P
@EACH_FORM
@EACH_SCOPE
def test_no_factor_is_above_the_cap(p: int, prune: Prune, scope: Scope) -> None:
    after = prune()
    free, capped = restore_norm(BEFORE, after, p, scope), restore_norm(BEFORE, after, p, scope, cap=1.1)
    for name, update in after.items():
        factor = min(float(dense(free[name]).norm() / dense(update).norm()), 1.1)
        assert_close(dense(capped[name]), factor * dense(update))


def test_norm_of_nothing_is_zero_and_of_float32_factors_exact() -> None:
    empty = LoRALayer(torch.randn(5, 6), torch.zeros(8, 5))
    assert norm(empty, 1) == norm(empty, 2) == 0
    single = LoRALayer(BEFORE["q"].A.float(), BEFORE["q"].B.float(), 0.3)
    assert norm(single, 2) == pytest.approx(norm(BEFORE["q"], 2), rel=1e-6)


@EACH_P
@EACH_FORM
def test_restoring_by_layer_gives_each_layer_its_norm_back(p: int, prune: Prune) -> None:
    after = prune()
    restored = restore_norm(BEFORE, after, p, "layer")
    for name, update in after.items():
        factor = lp({name: BEFORE[name]}, p) / lp({name: update}, p)
        assert_close(dense(restored[name]), factor * dense(update))


@EACH_P
@EACH_FORM
def test_restoring_globally_scales_the_whole_adapter_by_one_factor(p: int, prune: Prune) -> None:
    after = prune()
    restored = restore_norm(BEFORE, after, p, "global")
    factor = lp(BEFORE, p) / lp(after, p)
    for name, update in after.items():
        assert_close(dense(restored[name]), factor * dense(update))


@EACH_P
@EACH_FORM
@EACH_SCOPE
def test_a_layer_that_pruning_emptied_stays_empty(p: int, prune: Prune, scope: Scope) -> None:
    after = prune()
    after["q"] = scaled(after["q"], 0)
    restored = restore_norm(BEFORE, after, p, scope)
    assert not dense(restored["q"]).any()
    kept = BEFORE if scope == "global" else {"fc1": BEFORE["fc1"]}
    assert_close(lp(restored, p), lp(kept, p))


@EACH_P
@EACH_FORM
@EACH_SCOPE
def test_an_adapter_that_pruning_emptied_stays_empty(p: int, prune: Prune, scope: Scope) -> None:
    after = {name: scaled(update, 0) for name, update in prune().items()}
    assert not any(dense(update).any() for update in restore_norm(BEFORE, after, p, scope).values())


def test_a_layer_whose_factors_no_longer_share_a_rank_stays_empty() -> None:
    first, last = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    first[0] = last[-1] = 1
    A, B, _ = BEFORE["q"]
    after = {"q": BEFORE["q"]._replace(A=A * first[:, None], B=B * last)}
    assert not dense(restore_norm(BEFORE, after, 2, "layer")["q"]).any()


@EACH_P
@EACH_SCOPE
def test_an_adapter_that_was_not_pruned_stays_as_it_is(p: int, scope: Scope) -> None:
    for name, update in restore_norm(BEFORE, BEFORE, p, scope).items():
        assert_close(dense(update), BEFORE[name].delta())


@EACH_FORM
@pytest.mark.parametrize(("sparsity", "factor"), [(0, 1), (0.75, 4), (0.9, 10), (1, 1)])
def test_inverse_keep_divides_by_the_share_kept(prune: Prune, sparsity: float, factor: float) -> None:
    after = prune()
    for name, update in inverse_keep(after, sparsity).items():
        assert_close(dense(update), factor * dense(after[name]))


def robust_reference(before: LoRALayer, after: LoRALayer) -> Tensor:
    """ΔW as RobustMerge's published code scales it, without its closing factor 2; rank by rank."""
    ratios = []
    for whole, kept in zip(before.A.tolist(), after.A.tolist(), strict=True):
        remains = sum(abs(value) for value in kept)
        ratios.append(sum(abs(value) for value in whole) / remains if remains else 0.0)
    floor = sorted(ratios)[int(0.8 * len(ratios))]
    ranks = zip(after.A, after.B.T, ratios, strict=True)
    return after.scale * sum(torch.outer(max(ratio, floor) * up, down) for down, up, ratio in ranks)


@pytest.mark.parametrize("rank", [1, 2, 5, 8])
@pytest.mark.parametrize("emptied", [0, 1, 7])
def test_robust_scales_the_ranks_of_B_as_the_published_code_does(rank: int, emptied: int) -> None:
    before = LoRALayer(randn64(7, rank, 30), randn64(8, 9, rank), 0.3)
    A = keep_some(before.A, 9)
    A[:emptied] = 0
    after = before._replace(A=A, B=keep_some(before.B, 10))
    result = robust(before, after)
    assert result.A.equal(after.A) and result.scale == after.scale
    assert result.B.isfinite().all()
    assert_close(result.delta(), robust_reference(before, after))


def test_robust_leaves_emptied_ranks_empty() -> None:
    before = BEFORE["q"]
    after = before._replace(A=before.A.clone())
    after.A[2] = 0
    result = robust(before, after)
    assert not torch.outer(result.B[:, 2], result.A[2]).any()
    nothing = robust(before, before._replace(A=torch.zeros_like(before.A)))
    assert nothing.B.isfinite().all() and not nothing.delta().any()


def assert_same(actual: Mapping[str, Update], expected: Mapping[str, Update]) -> None:
    assert actual.keys() == expected.keys()
    for name, update in expected.items():
        assert_close(dense(actual[name]), dense(update), atol=0, rtol=0)


@EACH_FORM
@EACH_SCOPE
def test_every_way_of_rescaling_is_called_by_its_name(prune: Prune, scope: Scope) -> None:
    after = prune()
    ways: dict[Rescale, dict[str, Update]] = {
        "none": after,
        "l1": restore_norm(BEFORE, after, 1, scope),
        "l2": restore_norm(BEFORE, after, 2, scope),
        "inverse_keep": {name: scaled(update, 4) for name, update in after.items()},
    }
    for rescale, expected in ways.items():
        assert_same(rescaled(BEFORE, after, rescale, scope, 0.75), expected)


@EACH_SCOPE
def test_robust_rescales_every_layer_by_its_own_factors(scope: Scope) -> None:
    after = {name: layer for name, layer in pruned_factors().items() if isinstance(layer, LoRALayer)}
    for name, update in rescaled(BEFORE, after, "robust", scope, 0.75).items():
        assert_close(dense(update), robust_reference(BEFORE[name], after[name]))


@pytest.mark.parametrize("rescale", ["none", "l1", "l2", "inverse_keep", "robust"])
def test_rescaling_leaves_the_pruned_adapter_alone(rescale: Rescale) -> None:
    after = pruned_factors()
    assert rescaled(BEFORE, after, rescale, "layer", 0.5).keys() == BEFORE.keys()
    assert_same(after, pruned_factors())


def test_robust_leaves_an_unpruned_layer_as_it_is() -> None:
    assert_close(robust(BEFORE["q"], BEFORE["q"]).delta(), BEFORE["q"].delta())


@EACH_FORM
def test_relative_error_is_the_distance_over_the_size(prune: Prune) -> None:
    after = prune()
    gap = {name: dense(after[name]) - BEFORE[name].delta() for name in BEFORE}
    assert relative_error(BEFORE, after) == pytest.approx(float(lp(gap, 2) / lp(BEFORE, 2)))


def test_relative_error_is_zero_for_the_same_and_one_for_nothing_left() -> None:
    nothing = {name: scaled(layer, 0) for name, layer in BEFORE.items()}
    assert relative_error(BEFORE, BEFORE) == 0
    assert relative_error(BEFORE, nothing) == pytest.approx(1)
    assert relative_error(nothing, nothing) == relative_error({}, {}) == 0


def test_relative_error_counts_only_the_layers_that_differ() -> None:
    after: dict[str, Update] = {**BEFORE, "q": scaled(BEFORE["q"], 0)}
    assert relative_error(BEFORE, after) == pytest.approx(float(lp({"q": BEFORE["q"]}, 2) / lp(BEFORE, 2)))
