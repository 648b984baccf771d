"""What clients' numbers say of how far to go."""

from __future__ import annotations

import pytest

from sap_lightning.functional.reach import LENGTHS, MEASURED, best_length, carried_over

RISING = [0.2, 0.3, 0.4, 0.6, 0.5]
FALLING = [0.8, 0.7, 0.6, 0.5, 0.4]


def reach(**changed: list[float]) -> dict[str, list[float]]:
    return {style: changed.get(style, RISING) for style in MEASURED}


def best(*reaches: dict[str, list[float]]) -> float:
    return best_length(carried_over(reaches))


def test_nothing_is_won_at_length_0():
    assert LENGTHS[0] == 0
    assert not carried_over([reach(), reach(grey=FALLING)])[:, 0].any()


def test_one_style_that_loses_is_enough_to_stay_at_the_base():
    assert best(reach()) == 0.75
    assert best(reach(edges=FALLING)) == 0.0


def test_what_images_win_as_they_are_does_not_count():
    assert best(reach(plain=FALLING)) == 0.75
    assert carried_over([reach()]).shape == (len(MEASURED) - 1, len(LENGTHS))


def test_clients_count_alike_and_what_one_loses_another_may_win():
    loses = [0.5, 0.45, 0.4, 0.35, 0.3]
    expected = [(a - 0.2 + b - 0.5) / 2 for a, b in zip(RISING, loses, strict=True)]
    assert carried_over([reach(), reach(grey=loses)])[0].tolist() == pytest.approx(expected)
    assert best(reach(), reach(grey=loses)) == 0.75


def test_of_lengths_that_are_alike_the_shortest_is_taken():
    assert best({style: [0.2, 0.6, 0.6, 0.6, 0.6] for style in MEASURED}) == 0.25
    assert best({style: [0.5] * 5 for style in MEASURED}) == 0.0


def test_the_order_of_clients_and_styles_does_not_matter():
    one, other = reach(grey=FALLING), reach(edges=FALLING)
    backwards = {style: other[style] for style in reversed(MEASURED)}
    won, turned = carried_over([one, other]), carried_over([backwards, {s: one[s] for s in reversed(MEASURED)}])
    assert won.flatten().tolist() == pytest.approx(turned.flip(0).flatten().tolist())
    assert best(one, other) == best(backwards, one)
