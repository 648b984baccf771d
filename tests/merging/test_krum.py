from __future__ import annotations

from dataclasses import replace

import pytest
from adapters import SHAPES, assert_same, deltas, random_adapter, unlike_adapters

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.merging.average import Average
from sap_lightning.merging.distances import squared_distances
from sap_lightning.merging.krum import Krum


def dense_distance(one, other) -> float:
    return sum(float((deltas([one], name) - deltas([other], name)).square().sum()) for name in SHAPES)


def ranking(adapters, byzantine: int):
    """The adapters from the lowest Krum score to the highest, from dense distances."""

    def score(one) -> float:
        distances = sorted(dense_distance(one, other) for other in adapters if other is not one)
        return sum(distances[: len(adapters) - byzantine - 2])

    return sorted(adapters, key=score)


@pytest.mark.parametrize(("clients", "byzantine"), [(4, 0), (5, 1), (7, 1), (9, 3)])
@pytest.mark.parametrize("multi", [1, 2, 3])
def test_it_averages_the_clients_of_the_lowest_scores(clients: int, byzantine: int, multi: int) -> None:
    # Scales that differ keep the scores apart.
    adapters = [random_adapter(seed, scale=0.5 + 0.01 * seed) for seed in range(clients)]
    expected = Average().merge(ranking(adapters, byzantine)[:multi])
    assert_same(Krum(byzantine, multi).merge(adapters), expected)


@pytest.mark.parametrize(("byzantine", "chosen"), [(1, 1), (0, 2)])
def test_a_score_counts_all_but_f_and_two_of_the_clients(byzantine: int, chosen: int) -> None:
    # On a line at 0, 1, 2, 4 and 9 the two nearest, the three nearest and all others choose three different clients.
    adapters = [random_adapter(0, scale=place) for place in (0.0, 1.0, 2.0, 4.0, 9.0)]
    assert_same(Krum(byzantine).merge(adapters), adapters[chosen].layers)


def test_hostile_clients_are_left_out() -> None:
    honest = [random_adapter(0, scale=1 + 0.001 * k) for k in range(5)]
    hostile = [random_adapter(seed, scale=100.0) for seed in (1, 2)]
    named = [replace(one, name=str(number)) for number, one in enumerate(honest + hostile)]
    prepared = Krum(byzantine=2, multi=5).prepare(named, [1 / 7] * 7)
    assert sorted(prepared.findings["chosen"]) == ["0", "1", "2", "3", "4"]
    assert_same(prepared.apply(), Average().merge(honest))


def test_of_three_clients_the_lower_hash_of_the_nearest_two_wins() -> None:
    near = [random_adapter(0, scale=1.0), random_adapter(0, scale=1.01)]
    first = min(near, key=lambda adapter: adapter.sha256)
    for adapters in ([*near, random_adapter(1)], [random_adapter(1), *near[::-1]]):
        assert_same(Krum().merge(adapters), first.layers, 0)


def test_chosen_clients_keep_their_share_among_themselves() -> None:
    near = [random_adapter(0, scale=1.0), random_adapter(0, scale=1.01)]
    merged = Krum(multi=2).merge([*near, random_adapter(1)], [0.1, 0.3, 0.6])
    assert_same(merged, Average().merge(near, [0.25, 0.75]))


def test_a_layer_that_a_client_lacks_counts_as_zero() -> None:
    adapters = unlike_adapters()
    expected = sum(dense_distance(adapters[k], adapters[2]) for k in (0, 1))
    assert float(squared_distances(adapters)[2].sum()) == pytest.approx(expected, rel=1e-12)
    assert isinstance(Krum().merge(adapters)["q"], LoRALayer)


@pytest.mark.parametrize(("clients", "byzantine"), [(1, 0), (2, 0), (4, 1), (6, 2)])
def test_too_few_clients_are_refused(clients: int, byzantine: int) -> None:
    with pytest.raises(InputError, match=rf"at least 2·{byzantine} \+ 3 clients, got {clients}"):
        Krum(byzantine).merge([random_adapter(seed) for seed in range(clients)])


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"merge\.method\.byzantine must be at least 0, got -1"):
        Krum(byzantine=-1)
    with pytest.raises(InputError, match=r"merge\.method\.multi must be at least 1, got 0"):
        Krum(multi=0)
    with pytest.raises(InputError, match=r"merge\.method\.multi 4 is more than the 3 clients"):
        Krum(multi=4).merge([random_adapter(seed) for seed in range(3)])


def test_the_chosen_clients_stand_in_the_findings() -> None:
    near, far = unlike_adapters()[:2], random_adapter(9, scale=50.0)
    named = [replace(one, name=name) for name, one in (("near", near[0]), ("nearer", near[1]), ("far", far))]
    prepared = Krum(multi=2).prepare(named, [1 / 3] * 3)
    assert set(prepared.findings["chosen"]) == {"near", "nearer"}
