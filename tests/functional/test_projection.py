"""Parts along a direction against numpy's outer product."""

from __future__ import annotations

import numpy as np
import torch
from torch.testing import assert_close

from sap_lightning.functional.projection import split_along


def test_parts_are_those_of_the_projection_matrix() -> None:
    vectors, direction = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.arange(7.0) - 2
    along, across = split_along(vectors, direction)
    d = direction.double().numpy()
    expected = vectors.double().numpy() @ np.outer(d, d) / (d @ d)
    assert_close(along.double(), torch.from_numpy(expected), atol=1e-6, rtol=0)
    assert_close(along + across, vectors)
    assert_close(across @ direction, torch.zeros(5), atol=1e-5, rtol=0)


def test_along_nothing_there_is_nothing() -> None:
    vectors = torch.ones(2, 3)
    along, across = split_along(vectors, torch.zeros(3))
    assert torch.equal(along, torch.zeros(2, 3)) and torch.equal(across, vectors)
