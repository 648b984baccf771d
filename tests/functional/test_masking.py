from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import reproducibly
from torch import Tensor

from sap_lightning.functional import masking
from sap_lightning.functional.masking import (
    RunningThreshold,
    Scope,
    keep_in_rows,
    keep_mask,
    keep_masks,
    keep_middle,
    row_ranks,
)

sparsities = st.floats(0, 1) | st.sampled_from([0.0, 0.5, 0.8, 0.95, 1.0])
distinct = st.floats(0, 1e6, width=32)
tied = st.integers(0, 3).map(float)
score_lists = st.lists(distinct, min_size=1, max_size=200) | st.lists(tied, min_size=1, max_size=200)
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=2)


@st.composite
def adapters(draw: st.DrawFn) -> dict[str, tuple[Tensor, ...]]:
    """Scores with many ties for one to four layers of one or two parameters each."""
    layer_shapes = draw(st.lists(st.lists(shapes, min_size=1, max_size=2), min_size=1, max_size=4))
    scores: dict[str, tuple[Tensor, ...]] = {}
    for index, layer in enumerate(layer_shapes):
        sizes = [math.prod(shape) for shape in layer]
        values = [draw(st.lists(tied, min_size=size, max_size=size)) for size in sizes]
        scores[f"layer{index}"] = tuple(torch.tensor(v).view(shape) for v, shape in zip(values, layer, strict=True))
    return scores


def reference(scores: np.ndarray, sparsity: float) -> np.ndarray:
    keep = np.ones(len(scores), dtype=bool)
    keep[np.argsort(scores, kind="stable")[: round(sparsity * len(scores))]] = False
    return keep


def flat(parameters: tuple[Tensor, ...]) -> np.ndarray:
    return np.concatenate([tensor.flatten().numpy() for tensor in parameters])


@reproducibly
@given(score_lists, sparsities)
def test_the_lowest_go_and_of_equal_scores_the_first(scores: list[float], sparsity: float) -> None:
    keep = keep_mask(torch.tensor(scores), sparsity)
    assert keep.dtype == torch.bool
    np.testing.assert_array_equal(keep.numpy(), reference(np.array(scores), sparsity))


@reproducibly
@given(score_lists, sparsities)
def test_exactly_the_rounded_share_goes(scores: list[float], sparsity: float) -> None:
    assert int((~keep_mask(torch.tensor(scores), sparsity)).sum()) == round(sparsity * len(scores))


@reproducibly
@given(score_lists, sparsities, sparsities)
def test_what_a_higher_sparsity_keeps_a_lower_one_keeps_too(scores: list[float], one: float, other: float) -> None:
    low, high = sorted([one, other])
    assert not (keep_mask(torch.tensor(scores), high) & ~keep_mask(torch.tensor(scores), low)).any()


@st.composite
def matrices(draw: st.DrawFn) -> list[list[float]]:
    """Scores with many ties or none, in one to five rows of the same length."""
    width, scores = draw(st.integers(1, 20)), draw(st.sampled_from([distinct, tied]))
    return draw(st.lists(st.lists(scores, min_size=width, max_size=width), min_size=1, max_size=5))


@reproducibly
@given(matrices(), sparsities)
def test_every_row_loses_its_own_lowest_and_of_equal_scores_the_first(rows: list[list[float]], sparsity: float) -> None:
    keep = keep_in_rows(torch.tensor(rows), sparsity)
    assert keep.dtype == torch.bool
    np.testing.assert_array_equal(keep.numpy(), [reference(np.array(row), sparsity) for row in rows])


def test_rows_of_equal_scores_lose_their_first_columns_whatever_other_rows_hold() -> None:
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.0], [9.0, 9.0, 9.0, 9.0], [4.0, 1.0, 3.0, 1.0]])
    kept = [[False, False, True, True], [False, False, True, True], [True, False, True, False]]
    assert keep_in_rows(scores, 0.5).tolist() == kept


@reproducibly
@given(adapters(), sparsities)
def test_global_scope_ranks_the_whole_adapter_as_one_list(
    scores: dict[str, tuple[Tensor, ...]], sparsity: float
) -> None:
    masks = keep_masks(scores, sparsity, "global")
    kept = np.concatenate([flat(masks[name]) for name in scores])
    np.testing.assert_array_equal(kept, reference(np.concatenate([flat(layer) for layer in scores.values()]), sparsity))


@reproducibly
@given(adapters(), sparsities)
def test_layer_scope_ranks_each_layer_by_itself(scores: dict[str, tuple[Tensor, ...]], sparsity: float) -> None:
    masks = keep_masks(scores, sparsity, "layer")
    for name, layer in scores.items():
        np.testing.assert_array_equal(flat(masks[name]), reference(flat(layer), sparsity))


@reproducibly
@given(adapters(), sparsities)
def test_tensor_scope_ranks_each_tensor_by_itself(scores: dict[str, tuple[Tensor, ...]], sparsity: float) -> None:
    masks = keep_masks(scores, sparsity, "tensor")
    assert masks.keys() == scores.keys()
    for name, layer in scores.items():
        for mask, tensor in zip(masks[name], layer, strict=True):
            np.testing.assert_array_equal(flat((mask,)), reference(flat((tensor,)), sparsity))


@pytest.mark.parametrize("scope", ["global", "layer", "tensor"])
def test_masks_have_the_names_and_shapes_of_the_scores(scope: Scope) -> None:
    scores = {"q": (torch.rand(2, 5), torch.rand(3, 2)), "fc1": (torch.rand(4),)}
    masks = keep_masks(scores, 0.5, scope)
    shapes = {name: [mask.shape for mask in layer] for name, layer in masks.items()}
    assert shapes == {name: [score.shape for score in layer] for name, layer in scores.items()}


def test_global_scope_may_empty_a_layer_where_layer_scope_never_does() -> None:
    scores = {"weak": (torch.full((4,), 0.1),), "strong": (torch.full((4,), 0.9),)}
    assert not keep_masks(scores, 0.5, "global")["weak"][0].any()
    assert keep_masks(scores, 0.5, "layer")["weak"][0].sum() == 2


@pytest.mark.parametrize(("sparsity", "kept"), [(0, 6), (1, 0)])
def test_the_extremes_keep_all_or_nothing(sparsity: float, kept: int) -> None:
    assert keep_mask(torch.rand(2, 3), sparsity).sum() == kept


def test_many_equal_scores_in_a_matrix_go_row_by_row() -> None:
    assert keep_mask(torch.zeros(2, 3), 0.5).tolist() == [[False, False, False], [True, True, True]]


def test_an_infinite_score_is_the_last_to_go() -> None:
    assert keep_mask(torch.tensor([math.inf, 1.0, 2.0, 0.0]), 0.75).tolist() == [True, False, False, False]


def test_a_million_scores_match_a_stable_sort() -> None:
    scores = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)).mul(1000).round()
    np.testing.assert_array_equal(keep_mask(scores, 0.95).numpy(), reference(scores.numpy(), 0.95))


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, math.nan, 95])
def test_a_sparsity_outside_zero_to_one_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match="sparsity must lie in"):
        keep_mask(torch.rand(4), sparsity)


@pytest.mark.parametrize("sparsity", [0, 0.5])
def test_a_score_that_is_not_a_number_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match="NaN"):
        keep_mask(torch.tensor([1.0, math.nan, 3.0]), sparsity)


@reproducibly
@given(matrices(), sparsities, sparsities, st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_the_middle_is_what_neither_end_takes(
    rows: list[list[float]], sparsity: float, largest: float, by_rows: bool, dtype: torch.dtype
) -> None:
    scores = torch.tensor(rows, dtype=dtype)
    keep = keep_middle(scores, sparsity, largest, by_rows)
    assert keep.dtype == torch.bool
    for values, stays in zip(scores, keep, strict=True) if by_rows else [(scores.flatten(), keep.flatten())]:
        size = len(values)
        top = min(round(largest * size), round(sparsity * size))
        order = np.argsort(values.numpy(), kind="stable")
        expected = np.zeros(size, dtype=bool)
        expected[order[round(sparsity * size) - top : size - top]] = True
        np.testing.assert_array_equal(stays.numpy(), expected)


@reproducibly
@given(matrices(), st.sampled_from([torch.float32, torch.float64]))
def test_ranks_run_from_zero_to_one_and_of_equal_scores_the_first_is_lower(
    rows: list[list[float]], dtype: torch.dtype
) -> None:
    ranks = row_ranks(torch.tensor(rows, dtype=dtype))
    for values, of_row in zip(rows, ranks.tolist(), strict=True):
        assert list(np.argsort(of_row)) == list(np.argsort(values, kind="stable"))
        assert sorted(of_row) == pytest.approx([i / max(len(values) - 1, 1) for i in range(len(values))])


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("values", ["magnitudes", "signed", "ties", "equal"])
def test_a_running_threshold_keeps_what_one_look_at_all_would(values: str, sparsity: float, monkeypatch) -> None:
    monkeypatch.setattr(masking, "_PIECE", 150)
    drawn = torch.randn(997, generator=torch.Generator().manual_seed(0))
    every = {"magnitudes": drawn.abs(), "signed": drawn, "ties": (4 * drawn).round().abs(), "equal": 0 * drawn}[values]
    parts = every.split([100, 0, 500, 397])
    threshold = RunningThreshold(sparsity)
    for look in (threshold.count, threshold.refine):
        for part in parts:
            look(part)
    kept = torch.cat([threshold.keep(part.view(1, -1)).flatten() for part in parts])
    assert torch.equal(kept, keep_mask(every, sparsity))
