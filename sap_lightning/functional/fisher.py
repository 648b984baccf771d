"""The diagonal of the empirical Fisher information: squares of the gradients of single samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from sap_lightning.functional.masking import keep_highest


def sample_squares(losses: Iterable[Tensor], parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """(∂L_i/∂θ)² of one sample after another, each of its parameter's shape.

    The gradient of a batch is the mean of its samples' gradients, whose square is another thing. Empirical: with
    L_i = −log p(y_i|x_i), y_i is the sample's own label and not one that the model draws.

    Args:
        losses: L_i of every sample, a scalar with a graph, which is not looked at before its turn.
        parameters: θ; one that the loss does not depend on has gradient 0.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.fisher import sample_squares
        >>> theta = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> losses = (theta @ x for x in (torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 1.0])))
        >>> [squares.tolist() for (squares,) in sample_squares(losses, [theta])]
        [[1.0, 9.0], [1.0, 1.0]]
    """
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        yield [gradient.detach().float().square() for gradient in gradients]


def fisher_trace(squares: Sequence[Tensor]) -> Tensor:
    """s(x) = Σ_j (∂L/∂θ_j)², a scalar: the trace of one sample's Fisher information.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.fisher import fisher_trace
        >>> float(fisher_trace([torch.tensor([1.0, 9.0]), torch.tensor([[4.0]])]))
        14.0
    """
    return torch.stack([square.sum() for square in squares]).sum()


def moving_average(gathered: Tensor | None, latest: Tensor, momentum: float) -> Tensor:
    """F ← γ·F + (1 − γ)·f, from F = 0.

    Args:
        gathered: F, any shape; nothing before the first.
        latest: f, of the same shape.
        momentum: γ.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.fisher import moving_average
        >>> first = moving_average(None, torch.tensor([12.0]), momentum=0.75)
        >>> moving_average(first, torch.tensor([20.0]), momentum=0.75).tolist()
        [7.25]
    """
    before = torch.zeros_like(latest) if gathered is None else gathered
    return momentum * before + (1 - momentum) * latest


def rows_kept(information: Tensor, share: float) -> Tensor:
    """True at the rows of the largest Fisher information, at least one; the rest stay as they are.

    A row of B (d_out, r) is an output of the layer, a row of A (r, d_in) one of its r directions.

    Args:
        information: F, shape (rows, columns); a row counts by its sum.
        share: of the rows.

    Returns:
        Shape (rows, 1).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.fisher import rows_kept
        >>> rows_kept(torch.tensor([[1.0, 1.0], [5.0, 0.0], [0.0, 1.0], [2.0, 2.0]]), share=0.5).flatten().tolist()
        [False, True, False, True]
    """
    return keep_highest(information.sum(1).cpu(), share)[:, None].to(information.device)
