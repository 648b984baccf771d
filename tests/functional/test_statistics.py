from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sap_lightning.functional.statistics import Spread, bootstrap_difference, bootstrap_mean, mean_and_std


def answers(seed: int, accuracy: float, *shapes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator) < accuracy for shape in shapes]


def brute_force(correct: list[Tensor], reference: list[Tensor], samples: int) -> tuple[float, list[float]]:
    """Draws images one sample at a time and takes both models' accuracies of them."""
    rng = np.random.default_rng(7)

    def accuracy(domains: list[np.ndarray]) -> float:
        return float(np.mean([domain.mean() for domain in domains]))

    ours, theirs = [x.numpy() for x in correct], [x.numpy() for x in reference]
    differences = []
    for _ in range(samples):
        draws = [rng.integers(0, x.shape[1], x.shape[1]) for x in ours]
        drawn = [[x[:, draw] for x, draw in zip(domains, draws, strict=True)] for domains in (ours, theirs)]
        differences.append(accuracy(drawn[0]) - accuracy(drawn[1]))
    return accuracy(ours) - accuracy(theirs), np.percentile(differences, [2.5, 97.5]).tolist()


def test_the_standard_deviation_is_the_sample_s() -> None:
    values = [0.1, 0.7, 0.4, 0.45]
    assert mean_and_std(values) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert mean_and_std([0.3]) == (0.3, 0.0)
    with pytest.raises(ValueError):
        mean_and_std([])


def test_a_spread_says_its_deviation_only_where_there_are_several_seeds() -> None:
    assert str(Spread(*mean_and_std([0.5, 0.6]), seeds=2)) == "0.550 ± 0.071"
    assert str(Spread(*mean_and_std([0.5]), seeds=1)) == "0.500"


@pytest.mark.parametrize("shapes", [[(1, 60)], [(3, 40), (3, 90)]])
def test_the_interval_is_that_of_drawing_images_one_sample_at_a_time(shapes: list[tuple[int, int]]) -> None:
    correct, reference = answers(0, 0.8, *shapes), answers(1, 0.6, *shapes)
    # A paired difference: of half the images both models say the same.
    for one, other in zip(correct, reference, strict=True):
        other[:, ::2] = one[:, ::2]
    difference, bounds = brute_force(correct, reference, samples=10000)
    found = bootstrap_difference(correct, reference, samples=10000)
    assert found.difference == pytest.approx(difference)
    # The difference comes in steps of 1 / (seeds · images), and no sample of 10000 hits a quantile exactly.
    assert [found.low, found.high] == pytest.approx(bounds, abs=0.006 if len(shapes) > 1 else 0.017)
    assert found.low < found.difference < found.high


def test_models_that_answer_alike_differ_by_exactly_nothing() -> None:
    correct = answers(0, 0.7, (3, 50), (3, 20))
    assert bootstrap_difference(correct, correct) == (0.0, 0.0, 0.0)


def test_the_images_drawn_are_the_same_for_all_seeds() -> None:
    # Seeds that agree tell no more than one; images drawn for each seed apart would give a narrower interval.
    correct, reference = answers(0, 0.8, (1, 50)), answers(1, 0.6, (1, 50))
    repeated = bootstrap_difference([x.repeat(8, 1) for x in correct], [x.repeat(8, 1) for x in reference])
    assert repeated == pytest.approx(bootstrap_difference(correct, reference))


def test_the_seed_alone_decides_the_draw() -> None:
    correct, reference = answers(0, 0.8, (2, 500)), answers(1, 0.6, (2, 500))
    one = bootstrap_difference(correct, reference, seed=3)
    torch.rand(1)
    assert bootstrap_difference(correct, reference, seed=3) == one
    assert bootstrap_difference(correct, reference, seed=4) != one


def test_the_interval_covers_the_true_difference_about_95_times_in_100() -> None:
    covered = 0
    for trial in range(400):
        (common,) = answers(trial, 0.5, (1, 200))
        (ours,), (theirs,) = answers(1000 + trial, 0.6, (1, 200)), answers(2000 + trial, 0.4, (1, 200))
        # Both answer alike half the time, else right with 0.6 and 0.4: a true difference of 0.1.
        interval = bootstrap_difference([common | ours], [common | theirs], samples=400)
        covered += interval.low <= 0.1 <= interval.high
    assert 0.92 <= covered / 400 <= 0.98


@pytest.mark.parametrize(
    ("correct", "reference", "message"),
    [
        ([], [], "at least one"),
        ([(2, 5)], [(2, 5), (2, 5)], "got 1 and 2"),
        ([(2, 5)], [(2, 6)], "shapes differ"),
        ([(2, 5)], [(1, 5)], "shapes differ"),
        ([(2, 0)], [(2, 0)], r"bool \(seeds, images\)"),
        ([(5,)], [(5,)], r"bool \(seeds, images\)"),
    ],
)
def test_answers_that_cannot_be_paired_are_refused(
    correct: list[tuple[int, ...]], reference: list[tuple[int, ...]], message: str
) -> None:
    made = [[torch.ones(shape, dtype=torch.bool) for shape in shapes] for shapes in (correct, reference)]
    with pytest.raises(ValueError, match=message):
        bootstrap_difference(*made)


def test_probabilities_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        bootstrap_difference([torch.rand(2, 5)], [torch.rand(2, 5)])


def test_a_weighted_mean_of_scores_has_the_interval_of_right_and_wrong() -> None:
    correct, reference = answers(0, 0.7, (1, 50), (1, 20)), answers(1, 0.6, (1, 50), (1, 20))
    both = zip(correct, reference, strict=True)
    values = [(one.double() - other.double())[0].tolist() for one, other in both]
    assert bootstrap_mean(values, [0.5, 0.5]) == pytest.approx(bootstrap_difference(correct, reference))


def test_weights_and_values_that_are_no_counts_are_taken_as_they_are() -> None:
    rng = np.random.default_rng(0)
    values, weights = [rng.normal(1, 1, 400).tolist(), rng.normal(5, 2, 100).tolist()], [0.75, 0.25]
    interval = bootstrap_mean(values, weights)
    assert interval.difference == pytest.approx(0.75 * np.mean(values[0]) + 0.25 * np.mean(values[1]))
    # The standard error of a sum of independent means, and a normal distribution.
    error = math.sqrt(0.75**2 * np.var(values[0]) / 400 + 0.25**2 * np.var(values[1]) / 100)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.1)


@pytest.mark.parametrize(("values", "weights"), [([], []), ([[1.0]], [0.5, 0.5]), ([[1.0], []], [0.5, 0.5])])
def test_groups_without_values_or_weights_are_refused(values: list[list[float]], weights: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one value each"):
        bootstrap_mean(values, weights)
