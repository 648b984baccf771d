"""Changes of style: what they change, and what they must leave."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sap_lightning.functional.styles import STYLES, edges, grey, posterised, retextured

each_style = pytest.mark.parametrize("style", list(STYLES))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 12, 10, generator=torch.Generator().manual_seed(0))


@each_style
def test_images_stay_images(images, style):
    changed = STYLES[style](images)
    assert changed.shape == images.shape and changed.dtype == images.dtype
    assert changed.min() >= 0 and changed.max() <= 1
    assert (changed - images).abs().max() > 0.05


@each_style
def test_an_image_is_changed_alike_in_every_company(images, style):
    assert torch.equal(STYLES[style](images)[1:2], STYLES[style](images[1:2]))


@each_style
def test_an_image_without_anything_on_it_stays_finite(style):
    for level in (0.0, 0.5, 1.0):
        assert STYLES[style](torch.full((1, 3, 8, 8), level)).isfinite().all()


def test_grey_tells_nothing_of_hue(images):
    assert torch.allclose(grey(images), grey(images[:, [2, 0, 1]]), atol=1e-6)
    red, green = torch.zeros(2, 1, 3, 4, 4).unbind()
    red[:, 0], green[:, 1] = 0.6, 0.6
    assert torch.equal(grey(red), grey(green))


def test_edges_tell_nothing_of_light(images):
    assert torch.allclose(edges(images), edges(0.5 * images + 0.2), atol=1e-4)


def test_edges_are_those_of_sobel(images):
    grey_image = np.pad(images[0].mean(0).numpy().astype(np.float64), 2, mode="edge")
    blurred = sum(grey_image[i : i + 14, j : j + 12] for i in range(3) for j in range(3)) / 9
    blurred = np.pad(blurred[1:-1, 1:-1], 1, mode="edge")
    right = sum(w * (blurred[i : i + 12, 2:] - blurred[i : i + 12, :-2]) for i, w in enumerate((1, 2, 1)))
    down = sum(w * (blurred[2:, j : j + 10] - blurred[:-2, j : j + 10]) for j, w in enumerate((1, 2, 1)))
    slope = np.hypot(right, down)
    expected = 1 - np.minimum(slope / np.quantile(slope, 0.98), 1)
    assert np.abs(edges(images)[0, 1].numpy() - expected).max() < 1e-5


def test_posterised_images_have_five_values_a_channel(images):
    assert set(posterised(images).unique().tolist()) <= {0.0, 0.25, 0.5, 0.75, 1.0}


def test_another_texture_has_the_same_mean_and_other_amplitudes(images):
    image = 0.4 + 0.2 * images  # far from black and white, which clip
    changed = retextured(image)
    assert torch.allclose(changed.mean((2, 3)), image.mean((2, 3)), atol=0.02)
    before, after = (torch.fft.fft2(x).abs()[..., 1:, 1:] for x in (image, changed))
    assert (after / before).log().abs().mean() > 0.2
