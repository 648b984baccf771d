"""How sure a table of accuracies is: spread over seeds, and intervals over test images."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Interval(NamedTuple):
    """A difference of accuracies with its 95 % confidence interval, all as shares in [-1, 1].

    Example:
        >>> from sap_lightning.functional.statistics import Interval
        >>> interval = Interval(difference=0.02, low=-0.01, high=0.05)
        >>> interval.low > 0  # other test images might turn this gain into a loss
        False
    """

    difference: float
    low: float
    high: float


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds, and their number.

    Example:
        >>> from sap_lightning.functional.statistics import Spread
        >>> print(Spread(mean=0.75, std=0.125, seeds=3))
        0.750 ± 0.125
        >>> print(Spread(mean=0.75, std=0.0, seeds=1))
        0.750
    """

    mean: float
    std: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" ± {self.std:.3f}" if self.seeds > 1 else "")


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n − 1 in the denominator); of a single value the latter is 0.

    Raises:
        ValueError: there are no values.

    Example:
        >>> from sap_lightning.functional.statistics import mean_and_std
        >>> mean_and_std([2.0, 4.0, 6.0])  # √((4 + 0 + 4) / 2)
        (4.0, 2.0)
        >>> mean_and_std([2.0])
        (2.0, 0.0)
    """
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def bootstrap_difference(
    correct: Sequence[Tensor], reference: Sequence[Tensor], samples: int = 2000, seed: int = 0
) -> Interval:
    """How much more accurate a model is than a reference, with a paired percentile bootstrap interval of 95 %.

    The statistic is the mean over domains of the mean over seeds and images. Test images are the sampling unit: they
    are drawn with replacement within each domain, the same ones for both models and all seeds. So the interval says
    what other images would change, not what other seeds would. Efron & Tibshirani 1993, An Introduction to the
    Bootstrap, section 13.3.

    Args:
        correct: for each domain whether the model of each seed got each image right, bool (seeds, n_d).
        reference: the same of the reference: the same images, and the same seeds in the same order.
        samples: how many times images are drawn.
        seed: of the drawing.

    Raises:
        ValueError: no domains, not the same number of them, or tensors that are not bool, not of the same two
            dimensions or empty.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.statistics import bootstrap_difference
        >>> correct = torch.tensor([[True, True, True, False]])  # one seed, four images
        >>> reference = torch.tensor([[True, True, False, False]])
        >>> bootstrap_difference([correct], [reference])  # the third is drawn 0 to 3 times in most drawings
        Interval(difference=0.25, low=0.0, high=0.75)
    """
    if not correct or len(correct) != len(reference):
        raise ValueError(f"need the same domains of both, at least one, got {len(correct)} and {len(reference)}")
    generator = np.random.default_rng(seed)
    observed, drawn = 0.0, np.zeros(samples)
    for one, other in zip(correct, reference, strict=True):
        wins = _wins(one, other)
        scale = one.numel() * len(correct)
        observed += float(wins.sum()) / scale
        drawn += _resampled_sums(wins, samples, generator) / scale
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(observed, float(low), float(high))


def bootstrap_mean(
    values: Sequence[Sequence[float]], weights: Sequence[float], samples: int = 2000, seed: int = 0
) -> Interval:
    """A weighted mean of groups' means, with a percentile bootstrap interval of 95 %, drawn within each group.

    Of two models' scores on the same questions, one less the other, it is what ``bootstrap_difference`` is of right and
    wrong; its source is there.

    Args:
        values: of each group, at least one.
        weights: of each group.
        samples: how many times values are drawn.
        seed: of the drawing.

    Raises:
        ValueError: no groups, one without values, or not as many weights.

    Example:
        >>> from sap_lightning.functional.statistics import bootstrap_mean
        >>> bootstrap_mean([[0.5, 0.5], [0.0, 0.0]], [0.5, 0.5])  # all of a group are alike: nothing else can be drawn
        Interval(difference=0.25, low=0.25, high=0.25)
    """
    if not values or len(values) != len(weights) or not all(values):
        raise ValueError("need groups of at least one value each, and a weight for each group")
    generator = np.random.default_rng(seed)
    observed, drawn = 0.0, np.zeros(samples)
    for group, weight in zip(values, weights, strict=True):
        observed += weight * statistics.fmean(group)
        drawn += weight * _resampled_sums(np.asarray(group, dtype=float), samples, generator) / len(group)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(observed, float(low), float(high))


def _wins(correct: Tensor, reference: Tensor) -> np.ndarray:
    """For each image in how many seeds more the model is right than the reference, int (n,)."""
    for tensor in (correct, reference):
        if tensor.dtype != torch.bool or tensor.dim() != 2 or not tensor.numel():
            raise ValueError(f"expected bool (seeds, images), got {tensor.dtype} of shape {tuple(tensor.shape)}")
    if correct.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(correct.shape)} and {tuple(reference.shape)}")
    return (correct.sum(0) - reference.sum(0)).cpu().numpy()


def _resampled_sums(values: np.ndarray, samples: int, generator: np.random.Generator) -> np.ndarray:
    """Sums (samples,) of n values drawn with replacement from n.

    How often each distinct value is drawn is multinomial. They are few however many images there are, so neither time
    nor memory grows with n.
    """
    distinct, counts = np.unique(values, return_counts=True)
    return generator.multinomial(len(values), counts / len(values), size=samples) @ distinct
