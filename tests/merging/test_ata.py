from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from adapters import adapter_of
from probes import FC2, PROJECTION, Q, deltas, is_finite, negative, random_adapter, relative_gap, zero
from torch import Tensor
from torch.testing import assert_close

from sap_lightning.errors import InputError
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.ata import ATA, aggregation_weights
from sap_lightning.merging.average import Average

SAMPLES = (30, 10, 20, 5)
ADAPTERS = [random_adapter(seed, samples=n) for seed, n in enumerate(SAMPLES, start=1)]
NAMES = sorted([Q, FC2, PROJECTION])


def whole(one: Adapter) -> Tensor:
    """ΔW of all layers as one float64 vector."""
    return torch.cat([deltas([one], name)[0].flatten() for name in NAMES])


def reference(adapters: Sequence[Adapter], k: int, neighbours: int) -> Tensor:
    """Θ̄_k as one vector, by the paper's formula."""
    others = sorted(
        (float((whole(adapters[k]) - whole(other)).norm()), i) for i, other in enumerate(adapters) if i != k
    )
    samples = adapters[k].num_samples
    assert samples is not None
    above, below = samples * whole(adapters[k]), float(samples)
    for distance, i in others[:neighbours]:
        above = above + whole(adapters[i]) / distance
        below += 1 / distance
    return above / below


def as_layers(vector: Tensor) -> dict[str, Tensor]:
    shapes = [ADAPTERS[0].layers[name].shape for name in NAMES]
    pieces = vector.split([a * b for a, b in shapes])
    return {name: piece.view(shape) for name, piece, shape in zip(NAMES, pieces, shapes, strict=True)}


@pytest.mark.parametrize("neighbours", [1, 2, 3, 9])
@pytest.mark.parametrize("k", [0, 3])
def test_a_clients_model_is_the_papers_formula(neighbours: int, k: int) -> None:
    merged = ATA(neighbours, client=ADAPTERS[k].name).merge(ADAPTERS)
    assert relative_gap(merged, as_layers(reference(ADAPTERS, k, neighbours))) < 1e-6


def test_the_global_model_is_the_weighted_average_of_the_clients_models() -> None:
    weights = [0.4, 0.3, 0.2, 0.1]
    models = [w * reference(ADAPTERS, k, 2) for k, w in enumerate(weights)]
    assert relative_gap(ATA(neighbours=2).merge(ADAPTERS, weights), as_layers(torch.stack(models).sum(0))) < 1e-6


def test_rows_sum_to_one_and_neighbours_are_the_nearest() -> None:
    distances = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 4.0], [2.0, 4.0, 0.0]])
    weights = aggregation_weights(distances, torch.tensor([1, 2, 3]), neighbours=1)
    expected = [[0.5, 0.5, 0], [1 / 3, 2 / 3, 0], [1 / 7, 0, 6 / 7]]
    assert_close(weights, torch.tensor(expected, dtype=torch.float64))


def test_of_equally_near_clients_the_first_counts() -> None:
    weights = aggregation_weights(torch.ones(4, 4), torch.ones(4), neighbours=1)
    assert (weights > 0).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]


def test_a_client_without_a_layer_counts_there_with_no_update() -> None:
    adapters = [*ADAPTERS[:2], random_adapter(9, names=[Q, FC2], samples=7)]
    merged = ATA(neighbours=2, client="client 9").merge(adapters)
    assert relative_gap(merged, as_layers(reference(adapters, 2, 2))) < 1e-6


def test_a_client_alone_and_equal_clients_are_fixed_points() -> None:
    one = ADAPTERS[0]
    for adapters in ([one], [one, one, one]):
        assert relative_gap(ATA().merge(adapters), one.layers) < 1e-6


def test_the_order_of_clients_does_not_matter() -> None:
    weights = [0.4, 0.3, 0.2, 0.1]
    assert relative_gap(ATA(2).merge(ADAPTERS, weights), ATA(2).merge(ADAPTERS[::-1], weights[::-1])) < 1e-6


def test_zero_and_opposite_adapters_give_no_nan() -> None:
    one = ADAPTERS[0]
    for pair in ([zero(one), zero(one)], [one, negative(one)], [one, zero(one)]):
        assert is_finite(ATA().merge([adapter_of(each.layers, each.name, samples=5) for each in pair]))


def test_an_unknown_client_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(InputError, match=r"merge\.method\.client 'nobody'.*client 1, client 2"):
        ATA(client="nobody").merge(ADAPTERS)


def test_an_upload_without_a_number_of_samples_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="'client 7' has no manifest"):
        ATA().merge([ADAPTERS[0], random_adapter(7)])


def test_bad_neighbours_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"merge\.method\.neighbours"):
        ATA(neighbours=0)


def test_what_the_global_model_takes_of_every_client_stands_in_the_findings() -> None:
    prepared = ATA(neighbours=1).prepare(ADAPTERS, [0.25] * 4)
    weights = prepared.findings["weights"]
    assert list(weights) == [one.name for one in ADAPTERS]
    assert sum(weights.values()) == pytest.approx(1)
    assert relative_gap(prepared.apply(), Average().merge(ADAPTERS, list(weights.values()))) < 1e-6
