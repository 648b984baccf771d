"""Which dimension of one model is which of another, by what they say at the same positions.

Assignment is the Hungarian method (Kuhn 1955) of scipy, of the extra ``fam``; CKA is that of Kornblith et al. 2019,
arXiv:1905.00414.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

FIELDS = 4
"""Of an image on either side."""
UNMATCHED = -1
"""Stands where a dimension has no counterpart."""


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Cosines of all pairs of columns, centred; one that never changes is at right angles to all.

    Args:
        x: shape (n, d_x), n positions.
        y: shape (n, d_y), at the same positions.

    Returns:
        Shape (d_x, d_y).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.matching import cosines
        >>> x = torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
        >>> cosines(x, x[:, [1, 0]] * 3 + 1).round(decimals=3).tolist()
        [[0.0, 1.0], [0.0, 0.0]]
    """
    return _standardised(x).T @ _standardised(y)


def _standardised(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return centred / centred.norm(dim=0).clamp(min=torch.finfo(x.dtype).eps * x.norm(dim=0).clamp(min=1))


def in_fields(responses: Tensor) -> Tensor:
    """Responses to an image at places that images of other patches have too: the class token and 4 × 4 fields.

    Args:
        responses: shape (1 + g², d), at the class token and the patches row by row, g at least 4; or any (n, d).

    Returns:
        Shape (17, d), each field the mean of the patches in it; or (1, d), the mean of all.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.matching import in_fields
        >>> in_fields(torch.arange(65.0)[:, None]).flatten()[:3].tolist()  # of 8 × 8 patches, so of two times two
        [0.0, 5.5, 7.5]
        >>> in_fields(torch.arange(5.0)[:, None]).tolist()
        [[2.0]]
    """
    side = math.isqrt(len(responses) - 1)
    if side < FIELDS or 1 + side**2 != len(responses):
        return responses.mean(0, keepdim=True)
    patches = responses[1:].T.reshape(1, -1, side, side)
    return torch.cat([responses[:1], adaptive_avg_pool2d(patches, FIELDS)[0].flatten(1).T])


def cka(some: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Linear CKA of sets of responses: 1 where one is another rotated, moved and scaled; 0 where one is constant.

    Args:
        some: each of shape (n, d), n positions, d its own.
        others: the same, at the same positions.

    Returns:
        Shape (some, others).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.matching import cka
        >>> x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 4.0]])
        >>> cka([x], [5 * x[:, [1, 0]] - 2, torch.ones(3, 1)]).round(decimals=3).tolist()
        [[1.0, 0.0]]
    """
    return _grams(some) @ _grams(others).T


def _grams(responses: Sequence[Tensor]) -> Tensor:
    """Of each the products of all pairs of positions, centred and of length 1, shape (sets, n²)."""
    centred = (one - one.mean(0) for one in responses)
    grams = torch.stack([(one @ one.T).flatten() for one in centred])
    return grams / grams.norm(dim=1, keepdim=True).clamp(min=torch.finfo(grams.dtype).tiny)


def assigned(similarity: Tensor) -> Tensor:
    """The column for every row, each at most once, by which the sum of similarities is greatest.

    Args:
        similarity: shape (rows, columns).

    Returns:
        int64 (rows,), with `UNMATCHED` for rows that are left over.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.matching import assigned
        >>> assigned(torch.tensor([[5.0, 4.0], [4.0, 0.0], [1.0, 1.0]])).tolist()  # 4 + 4, not 5 + 1
        [1, 0, -1]
    """
    from scipy.optimize import linear_sum_assignment  # of an extra

    rows, columns = linear_sum_assignment(similarity.double().numpy(), maximize=True)
    found = torch.full((len(similarity),), UNMATCHED)
    found[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return found


def in_order(similarity: Tensor) -> Tensor:
    """The column for every row, later rows having later columns, by which the sum of similarities is greatest.

    As many are matched as there are of the fewer of both.

    Args:
        similarity: shape (rows, columns).

    Returns:
        int64 (rows,), with `UNMATCHED` for rows that are left over.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.matching import in_order
        >>> in_order(torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.1, 0.7]])).tolist()
        [0, 2]
    """
    if len(similarity) > similarity.shape[1]:
        found = torch.full((len(similarity),), UNMATCHED)
        matched = in_order(similarity.T)
        found[matched] = torch.arange(len(matched))
        return found
    rows, columns = similarity.shape
    # best[i][j]: of the first i rows, all matched, with the first j columns
    best = torch.full((rows + 1, columns + 1), -torch.inf, dtype=torch.float64)
    best[0] = 0
    for i in range(rows):
        for j in range(i, columns):
            best[i + 1, j + 1] = torch.maximum(best[i + 1, j], best[i, j] + similarity[i, j])
    found, j = torch.full((rows,), UNMATCHED), columns
    for i in reversed(range(rows)):
        while best[i + 1, j] == best[i + 1, j - 1]:
            j -= 1
        j -= 1
        found[i] = j
    return found


def in_coordinates_of(first: Tensor, other: Tensor, rows: Tensor, columns: Tensor | None = None) -> Tensor:
    """Another model's weight under the first one's rows and columns; where there is no counterpart, the first one's.

    Args:
        first: shape (d_out, d_in), or (d_out,) of a bias.
        other: the same of the other model, of whatever sizes.
        rows: for each row of the first the other's, or `UNMATCHED`, shape (d_out,).
        columns: for each column the same, shape (d_in,); None of a bias.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.matching import in_coordinates_of
        >>> first, other = torch.zeros(2, 2), torch.tensor([[1.0, 2.0, 3.0]])
        >>> in_coordinates_of(first, other, torch.tensor([-1, 0]), torch.tensor([2, 0])).tolist()
        [[0.0, 0.0], [3.0, 1.0]]
    """
    if columns is None:
        return torch.where(rows >= 0, other[rows], first)
    known = (rows >= 0)[:, None] & (columns >= 0)
    return torch.where(known, other[rows][:, columns], first)


def row_scales(first: Tensor, other: Tensor, columns: Tensor) -> Tensor:
    """By what each row of another model's weight is as long as the first one's, over columns that both have.

    Args:
        first: shape (d_out, d_in).
        other: of the same shape, in the first one's coordinates.
        columns: for each column the other's, or `UNMATCHED`, shape (d_in,).

    Returns:
        Shape (d_out,), 1 for a row of zeros.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.matching import row_scales
        >>> first, other = torch.tensor([[3.0, 4.0, 9.0]]), torch.tensor([[0.0, 10.0, 1.0]])
        >>> row_scales(first, other, torch.tensor([0, 1, -1])).tolist()
        [0.5]
    """
    mine, theirs = (one[:, columns != UNMATCHED].norm(dim=1) for one in (first, other))
    return torch.where((mine > 0) & (theirs > 0), mine / theirs, 1.0)
