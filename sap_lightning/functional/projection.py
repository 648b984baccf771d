"""A vector's part along a direction and the part at right angles to it."""

from __future__ import annotations

from torch import Tensor


def split_along(vectors: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Each vector's part along a direction, ⟨v, d⟩/‖d‖²·d, and the rest; along a direction of 0 there is nothing.

    Args:
        vectors: shape (..., n).
        direction: d, shape (n,).

    Returns:
        The parts along it and across it, both of the vectors' shape, whose sum the vectors are.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.projection import split_along
        >>> along, across = split_along(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([2.0, 0.0]))
        >>> along.tolist(), across.tolist()
        ([[3.0, 0.0], [0.0, 0.0]], [[0.0, 4.0], [0.0, 2.0]])
    """
    size = direction.square().sum()
    if size == 0:
        return vectors.new_zeros(vectors.shape), vectors
    along = (vectors @ direction / size)[..., None] * direction
    return along, vectors - along
