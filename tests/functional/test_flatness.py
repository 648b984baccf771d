"""Scores of weights and neurons against loops in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from sap_lightning.functional.flatness import (
    as_flat,
    flatness_aware_importance,
    mutual_information,
    sharpness_aware_saliency,
    sharpness_of,
)


def test_saliency_is_less_where_the_direction_is_large() -> None:
    weight, direction = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for sharpness, floor, slope in (("code", 1, 0.3), ("paper", 1e-6, 1)):
        score = sharpness_aware_saliency(weight, direction, sharpness, 0.3)
        for w, g, s in zip(weight.flatten(), direction.flatten(), score.flatten(), strict=True):
            assert_close(s, abs(w * g) / (floor + slope * g * g))


def responses(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    signal = torch.rand(300, generator=generator)
    noise = torch.randn(300, 3, generator=generator)
    return signal, torch.stack([signal**2, signal + noise[:, 0] / 5, noise[:, 1], torch.ones(300)], 1)


def test_mutual_information_is_that_of_numpy_s_histogram() -> None:
    signal, outputs = responses()
    found = mutual_information(signal, outputs, bins=8)
    for output, value in zip(outputs.T, found.tolist(), strict=True):
        p = np.histogram2d(signal.numpy(), output.numpy(), bins=8)[0] / 300
        expected = sum(
            p[i, j] * np.log(p[i, j] / (p[i].sum() * p[:, j].sum())) for i in range(8) for j in range(8) if p[i, j]
        )
        assert value == pytest.approx(expected, abs=1e-5)
    assert found[0] > found[1] > found[2] > found[3] == 0


def test_importance_and_sharpness_are_loops_over_neurons() -> None:
    signal, outputs = responses()
    information = mutual_information(signal, outputs)
    variances = [float(np.var(output.double().numpy())) for output in outputs.T]
    for i, output in enumerate(outputs.T):
        expected = float(output.abs().mean()) * float(information[i]) / (variances[i] + 1e-6)
        assert float(flatness_aware_importance(signal, outputs)[i]) == pytest.approx(expected, rel=1e-4)
        sharp = variances[i] / (variances[i] + sorted(variances)[1])
        assert float(sharpness_of(outputs)[i]) == pytest.approx(sharp, abs=1e-5)


def test_neurons_as_flat_are_alike_whatever_the_scale_of_the_layer() -> None:
    _, outputs = responses()
    assert_close(as_flat(sharpness_of(outputs), sharpness_of(50 * outputs), 0.1).diagonal(), torch.ones(4))
    far = as_flat(torch.tensor([0.1]), torch.tensor([0.4]), 0.1)
    assert float(far) == pytest.approx(np.exp(-3), abs=1e-6)
