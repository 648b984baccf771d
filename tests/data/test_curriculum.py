"""Which share of the images an epoch shows, and which images."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sap_lightning.data.curriculum import Curriculum, easiest
from sap_lightning.errors import InputError

PACES = ["linear", "sqrt", "exp"]


@pytest.mark.parametrize("pace", PACES)
def test_it_begins_at_its_start_never_falls_and_is_whole_after_its_time(pace):
    curriculum = Curriculum(start=0.3, full_at=0.5, pace=pace)
    shares = [curriculum.share(epoch, epochs=20) for epoch in range(20)]
    assert shares[0] == pytest.approx(0.3)
    assert shares == sorted(shares) and shares[9] < 1
    assert shares[10:] == [1.0] * 10


@pytest.mark.parametrize(("pace", "half"), zip(PACES, [0.65, (0.09 + 0.91 / 2) ** 0.5, 0.3**0.5], strict=True))
def test_half_way_it_is_what_its_formula_says(pace, half):
    assert Curriculum(start=0.3, full_at=1, pace=pace).share(5, epochs=10) == pytest.approx(half)


@pytest.mark.parametrize("pace", PACES)
def test_from_a_start_of_one_it_is_whole(pace):
    curriculum = Curriculum(start=1, pace=pace)
    assert not curriculum.narrows
    assert {curriculum.images(37, 8, epoch, epochs=5) for epoch in range(5)} == {37}


def test_an_epoch_has_a_batch_at_least_as_far_as_there_are_images():
    tiny = Curriculum(start=0.01)
    assert [tiny.images(number, 32, 0, epochs=5) for number in (100, 20)] == [32, 20]


def test_the_easiest_come_first_and_are_never_left_out_again():
    difficulty = torch.rand(50, generator=torch.Generator().manual_seed(0))
    before: set[int] = set()
    for number in range(1, 51):
        chosen = easiest(difficulty, number).tolist()
        assert chosen == sorted(chosen) and len(chosen) == number
        assert before < set(chosen)
        before = set(chosen)
        left = [float(difficulty[place]) for place in range(50) if place not in before]
        assert max(difficulty[chosen]) < min(left, default=2)


def test_the_order_of_the_images_does_not_matter():
    difficulty = torch.rand(50, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert set(order[easiest(difficulty[order], 20)].tolist()) == set(easiest(difficulty, 20).tolist())


@pytest.mark.parametrize("settings", [{"start": 0}, {"start": 1.5}, {"full_at": 0}, {"full_at": -1}])
def test_a_share_that_cannot_be_is_refused_by_name(settings: dict[str, Any]):
    (name,) = settings
    with pytest.raises(InputError, match=rf"data\.curriculum\.{name} must lie in \(0, 1\]"):
        Curriculum(**settings)
