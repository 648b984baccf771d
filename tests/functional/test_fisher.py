"""Squares of single samples' gradients, against torch.func and closed forms."""

from __future__ import annotations

import torch
from references import randn64
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from sap_lightning.functional.fisher import fisher_trace, moving_average, rows_kept, sample_squares

W, X, Y = randn64(0, 3, 4), randn64(1, 5, 4), torch.tensor([0, 2, 1, 1, 0])


def squares() -> list[torch.Tensor]:
    weight, unused = W.clone().requires_grad_(), torch.zeros(2, requires_grad=True)
    losses = (cross_entropy(x[None] @ weight.T, y[None]) for x, y in zip(X, Y, strict=True))
    found = list(sample_squares(losses, [weight, unused]))
    assert not any(of_unused.any() for _, of_unused in found)
    return [of_weight for of_weight, _ in found]


def test_they_are_those_of_the_samples_one_by_one():
    gradient = torch.func.grad(lambda weight, x, y: cross_entropy(x @ weight.T, y))
    expected = torch.func.vmap(gradient, (None, 0, 0))(W, X, Y).square()
    assert_close(torch.stack(squares()), expected.float())


def test_they_are_not_the_square_of_the_batch_s_gradient():
    weight = W.clone().requires_grad_()
    (of_batch,) = torch.autograd.grad(cross_entropy(X @ weight.T, Y), weight)
    assert (torch.stack(squares()).mean(0) > 1.5 * of_batch.square()).any()


def test_the_difficulty_of_a_sample_is_in_closed_form_that_of_its_mistake_and_its_length():
    mistakes = (X @ W.T).softmax(1) - torch.eye(3)[Y]
    expected = mistakes.square().sum(1) * X.square().sum(1)
    assert_close(torch.stack([fisher_trace([one]) for one in squares()]), expected.float())


def test_a_moving_average_forgets():
    gathered = None
    for latest in X:
        gathered = moving_average(gathered, latest, momentum=0.9)
    shares = 0.1 * 0.9 ** torch.arange(len(X) - 1, -1, -1, dtype=torch.float64)
    assert_close(gathered, shares @ X)


def test_whole_rows_are_kept_and_one_at_least():
    information = torch.tensor([[9.0, 0.0], [4.0, 4.0], [0.0, 0.0], [5.0, 5.0]])
    for share, rows in ((1.0, [0, 1, 2, 3]), (0.75, [0, 1, 3]), (0.5, [0, 3]), (0.01, [3])):
        assert rows_kept(information, share).flatten().nonzero().flatten().tolist() == rows
