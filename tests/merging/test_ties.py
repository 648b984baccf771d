from __future__ import annotations

import numpy as np
import pytest
import torch
from adapters import FULL_RANK, SHAPES, assert_same, deltas, mergekit_group, peft_merge, random_adapter, unlike_adapters

from sap_lightning.errors import InputError
from sap_lightning.merging.ties import TIES

WEIGHTS = [0.5, 0.3, 0.2]


def trimmed(vector: np.ndarray, sparsity: float) -> np.ndarray:
    """Zero at the round(ρN) smallest magnitudes."""
    result = vector.copy()
    result[np.argsort(np.abs(vector), kind="stable")[: round(sparsity * len(vector))]] = 0
    return result


def disjoint_mean(vectors: np.ndarray) -> np.ndarray:
    """The paper's elect and merge of vectors (K, N), element by element."""
    merged = np.zeros(vectors.shape[1])
    for i, values in enumerate(vectors.T):
        sign = 1 if values.sum() >= 0 else -1
        agreeing = [value for value in values if value * sign > 0]
        merged[i] = np.mean(agreeing) if agreeing else 0
    return merged


@pytest.mark.parametrize("sparsity", [0.8, 0.5])
def test_the_authors_variant_trims_the_whole_update_and_takes_the_disjoint_mean(sparsity: float) -> None:
    adapters = [*unlike_adapters()[:2], random_adapter(2, 6, 1.0)]
    flat = torch.cat([deltas(adapters, name).flatten(1) for name in SHAPES], dim=1).numpy()
    merged = disjoint_mean(np.stack([trimmed(vector, sparsity) for vector in flat]))
    pieces = torch.from_numpy(0.7 * merged).split([d_out * d_in for d_out, d_in in SHAPES.values()])
    expected = {name: piece.view(SHAPES[name]) for name, piece in zip(SHAPES, pieces, strict=True)}
    assert_same(TIES(sparsity, scale=0.7).merge(adapters), expected)


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.25, 0.5])
@pytest.mark.parametrize("weights", [[1 / 3] * 3, WEIGHTS])
def test_the_peft_variant_equals_ties_svd(weights, density: float, majority) -> None:
    adapters = [random_adapter(0, 4), random_adapter(1, 2, 2.0), random_adapter(2, 3, 1.0)]
    expected = peft_merge(
        adapters,
        [3 * weight for weight in weights],
        "ties_svd",
        svd_rank=FULL_RANK,
        density=density,
        majority_sign_method=majority,
    )
    assert_same(TIES(1 - density, variant="peft", majority=majority).merge(adapters, weights), expected, 1e-5)


@pytest.mark.parametrize(("majority", "consensus"), [("total", "sum"), ("frequency", "count")])
@pytest.mark.parametrize("density", [0.25, 0.5])
@pytest.mark.parametrize("weights", [[1 / 3] * 3, WEIGHTS])
def test_the_mergekit_variant_equals_mergekit(weights, density: float, majority, consensus: str) -> None:
    task_arithmetic = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic")
    method = task_arithmetic.GeneralizedTaskArithmeticMerge(
        consensus_method=task_arithmetic.ConsensusMethod(consensus),
        sparsification_method=task_arithmetic.SparsificationMethod.magnitude,
        default_normalize=True,
        default_rescale=False,
        method_name="ties",
        method_pretty_name=None,
        method_reference_url=None,
    )
    adapters = [random_adapter(0, 4), random_adapter(1, 2, 2.0), random_adapter(2, 3, 1.0)]
    expected = {}
    for name in SHAPES:
        group = mergekit_group(adapters, name)
        expected[name] = method.merge_group(
            group,
            weight=dict(enumerate(weights, 1)),
            density=dict.fromkeys((1, 2, 3), density),
            normalize=True,
            rescale=False,
            int8_mask=False,
            **{"lambda": 0.7},
        )
    merged = TIES(1 - density, scale=0.7, variant="mergekit", majority=majority).merge(adapters, weights)
    assert_same(merged, expected)


def test_a_sparsity_out_of_range_is_refused() -> None:
    with pytest.raises(InputError, match=r"merge\.method\.sparsity must lie in \[0, 1\], got 1\.5"):
        TIES(sparsity=1.5)
