"""What clients' numbers say of how far to go."""

from __future__ import annotations

import pytest

from sap_lightning.functional.reach import KEPT, LENGTHS, MEASURED, WORTH, carried_over, transfers

RISING = [0.2, 0.3, 0.4, 0.6, 0.5]
FALLING = [0.8, 0.7, 0.6, 0.5, 0.4]


def reach(**changed: list[float]) -> dict[str, list[float]]:
    return {style: changed.get(style, RISING) for style in MEASURED}


def test_nothing_is_won_at_length_0():
    assert LENGTHS[0] == 0
    assert not carried_over([reach(), reach(grey=FALLING)])[:, 0].any()


def test_one_style_that_loses_is_enough():
    assert transfers([reach()])
    assert not transfers([reach(edges=FALLING)])


def test_what_images_win_as_they_are_is_what_the_styles_are_compared_with():
    assert carried_over([reach()]).shape == (len(MEASURED) - 1, len(LENGTHS))
    home = [0.1, 0.2, 0.3, 0.4, 0.9]  # 0.8 won
    for won, expected in ((KEPT * 0.8 + 0.001, True), (KEPT * 0.8 - 0.001, False)):
        assert transfers([reach(plain=home, edges=[0.3, 0.3, 0.3, 0.3, 0.3 + won])]) == expected


@pytest.mark.parametrize(
    ("won", "expected"), [(WORTH + 0.001, True), (WORTH - 0.001, False), (0, False), (-0.4, False)], ids=str
)
def test_of_next_to_nothing_won_at_home_the_styles_say_nothing(won, expected):
    assert transfers([reach(plain=[0.4, 0.4, 0.4, 0.4, 0.4 + won])]) == expected


def test_what_must_be_won_at_home_is_won_by_the_mean_of_the_clients():
    little, much = ([0.4, 0.4, 0.4, 0.4, 0.4 + won] for won in (0, 2 * WORTH + 0.002))
    assert transfers([reach(plain=little), reach(plain=much)])


def test_clients_count_alike_and_what_one_loses_another_may_win():
    loses = [0.5, 0.45, 0.4, 0.15, 0.1]
    expected = [(a - 0.2 + b - 0.5) / 2 for a, b in zip(RISING, loses, strict=True)]
    assert carried_over([reach(), reach(grey=loses)])[0].tolist() == pytest.approx(expected)
    assert not transfers([reach(), reach(grey=loses)])
    assert transfers([reach(), reach(grey=[*loses[:4], 0.4])])


@pytest.mark.parametrize(
    ("edges", "expected"),
    [([0.5, 0.6, 0.7, 0.6, 0.5], False), ([0.5, 0.4, 0.3, 0.4, 0.6], True)],
    ids=["wins on the way", "loses on the way"],
)
def test_whole_adapters_are_judged(edges, expected):
    assert transfers([reach(edges=edges)]) == expected


def test_the_order_of_clients_and_styles_does_not_matter():
    one, other = reach(grey=FALLING), reach(edges=FALLING)
    backwards = {style: other[style] for style in reversed(MEASURED)}
    won, turned = carried_over([one, other]), carried_over([backwards, {s: one[s] for s in reversed(MEASURED)}])
    assert won.flatten().tolist() == pytest.approx(turned.flip(0).flatten().tolist())
    assert transfers([one, other]) == transfers([backwards, one])
