from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import reproducibly

from sap_lightning.functional.agreement import overlap, principal_components, share_kept, sign_conflict

layers = st.dictionaries(st.sampled_from("abc"), st.lists(st.booleans(), min_size=4, max_size=4))


def masks(kept: dict[str, list[bool]]) -> dict[str, tuple[torch.Tensor, ...]]:
    """Two tensors a layer, of shapes (1, 2) and (2,)."""
    return {name: (torch.tensor([flags[:2]]), torch.tensor(flags[2:])) for name, flags in kept.items()}


@reproducibly
@given(layers, layers)
def test_overlap_is_the_jaccard_index_of_the_sets_of_what_is_kept(one, other) -> None:
    first, second = ({(name, i) for name in kept for i in range(4) if kept[name][i]} for kept in (one, other))
    expected = len(first & second) / len(first | second) if first | second else 0.0
    assert overlap(masks(one), masks(other)) == overlap(masks(other), masks(one)) == expected


@reproducibly
@given(layers)
def test_the_share_kept_is_counted_over_all_tensors_of_a_layer(kept) -> None:
    assert share_kept(masks(kept)) == {name: sum(flags) / 4 for name, flags in kept.items()}


def test_the_share_kept_is_over_all_parameters_of_a_layer() -> None:
    A, B = torch.tensor([[True, False], [False, False]]), torch.tensor([[True, True]])
    assert share_kept({"factors": (A, B), "delta": (A,)}) == {"factors": 3 / 6, "delta": 1 / 4}


def test_what_only_the_larger_rank_has_is_kept_by_one() -> None:
    small, large = {"q": (torch.ones(2, 3).bool(),)}, {"q": (torch.ones(4, 3).bool(),)}
    assert overlap(small, large) == 6 / 12


@reproducibly
@given(st.lists(st.lists(st.integers(-1, 1), min_size=5, max_size=5), max_size=4))
def test_conflict_is_counted_where_two_clients_or_more_change_an_element(updates) -> None:
    columns = [[value for value in column if value] for column in zip(*updates, strict=True)]
    shared = [column for column in columns if len(column) > 1]
    expected = sum(len(set(column)) > 1 for column in shared) / len(shared) if shared else 0.0
    assert sign_conflict([torch.tensor(update, dtype=torch.float32) for update in updates]) == expected


def test_components_are_those_of_the_covariance() -> None:
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 5, 0.1, 2, 1, 1]) + 7
    plane = principal_components(features)
    values, vectors = np.linalg.eigh(np.cov(features.double().numpy().T))
    expected = (features.double().numpy() - features.double().numpy().mean(0)) @ vectors[:, [-1, -2]]
    np.testing.assert_allclose(np.abs(plane.numpy()), np.abs(expected), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(plane.var(0).numpy(), values[[-1, -2]], rtol=1e-10)


def test_a_component_points_where_its_largest_loading_is_positive() -> None:
    along = torch.tensor([-2.0, -1.0, 0.0, 3.0])
    for sign in (1, -1):
        features = torch.stack([0.1 * along, sign * along], dim=1)
        assert (principal_components(features)[:, 0] * sign * along >= 0).all()


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1)])
def test_components_that_there_are_not_are_zero(shape) -> None:
    plane = principal_components(torch.arange(shape[0] * shape[1]).view(shape))
    assert plane.shape == (shape[0], 2)
    assert not plane[:, 1].any()
