"""What the next round starts from: the updates of a round brought back to the rank of one adapter.

The mean of K updates of rank r has a rank of up to K·r, and training goes on in factors of rank r.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sap_lightning.functional.lora import LoRALayer, Update, inner, singular_triplets, stack
from sap_lightning.functional.recompression import recompress


def mean_factors(layers: Sequence[LoRALayer], weights: Sequence[float]) -> LoRALayer:
    """Ā = Σ w_k·A_k and B̄ = Σ w_k·B_k, averaged apart (FedIT, Zhang et al. 2023, arXiv:2305.05644).

    s·B̄·Ā is not the mean of the ΔW_k: it has cross terms B_j·A_k.

    Args:
        layers: the K updates, of one rank and scale.
        weights: the K weights w_k.

    Raises:
        ValueError: they differ in rank or scale.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import LoRALayer
        >>> from sap_lightning.functional.rounds import mean_factors
        >>> one = LoRALayer(A=torch.tensor([[2.0, 0.0]]), B=torch.tensor([[4.0]]))
        >>> other = LoRALayer(A=torch.tensor([[0.0, 6.0]]), B=torch.tensor([[2.0]]))
        >>> mean = mean_factors([one, other], [0.5, 0.5])
        >>> mean.A.tolist(), mean.B.tolist()
        ([[1.0, 3.0]], [[3.0]])
    """
    if len({(layer.rank, layer.scale) for layer in layers}) > 1:
        raise ValueError("A and B are averaged apart for adapters of one rank and scale alone")
    A, B = (
        torch.stack([weight * getattr(layer, name) for layer, weight in zip(layers, weights, strict=True)]).sum(0)
        for name in ("A", "B")
    )
    return LoRALayer(A, B, layers[0].scale)


def brought_down(update: Update, rank: int) -> LoRALayer:
    """The best approximation of ΔW of at most this rank, in the factors that training goes on from.

    With ΔW = U·diag(σ)·V cut to the largest σ, A = V and B = U·diag(σ), as in FlexLoRA (Bai et al. 2024,
    arXiv:2402.11505): rows of A of length 1, like those that LoRA is drawn with, train where σ is 0 too. A client of
    lower rank takes the first rows of A and columns of B, which are the best for its own rank.

    Args:
        update: ΔW in factor form, or dense of shape (d_out, d_in).
        rank: of the result, less where ΔW has fewer triplets.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.rounds import brought_down
        >>> down = brought_down(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), rank=1)  # singular values 3 and 1
        >>> round(float(down.A.norm()), 4), round(float(down.B.norm()), 4)
        (1.0, 3.0)
        >>> down.delta().round(decimals=3).tolist()
        [[1.5, 1.5], [1.5, 1.5]]
    """
    U, sigma, V = singular_triplets(update)
    return LoRALayer(V[:rank], U[:, :rank] * sigma[:rank])


def mean_residual(layers: Sequence[LoRALayer], weights: Sequence[float]) -> LoRALayer:
    """Σ w_k·ΔW_k − s·B̄·Ā, what averaging A and B apart is wrong by; of rank K·r.

    FedEx-LoRA (Singhal et al. 2024, arXiv:2410.09432; code RaghavSinghal10/fedex-lora, fed_agg.py) adds it to the base.
    Every column of B̄ is a sum of the clients' columns, so that the rank is no more than K·r.

    Args:
        layers: the K updates, of one rank and scale.
        weights: the K weights w_k.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import LoRALayer
        >>> from sap_lightning.functional.rounds import mean_residual
        >>> one = LoRALayer(A=torch.tensor([[2.0, 0.0]]), B=torch.tensor([[4.0]]))
        >>> other = LoRALayer(A=torch.tensor([[0.0, 6.0]]), B=torch.tensor([[2.0]]))
        >>> mean_residual([one, other], [0.5, 0.5]).delta().round(decimals=3).tolist()  # [4, 6] − 3·[1, 3]
        [[1.0, -3.0]]
    """
    exact = [LoRALayer(layer.A.double(), layer.B.double(), layer.scale) for layer in layers]
    both = stack([*exact, mean_factors(exact, weights)], [*weights, -1.0])
    residual = recompress(both, sum(layer.rank for layer in layers))
    return LoRALayer(residual.A.to(layers[0].A.dtype), residual.B.to(layers[0].B.dtype))


def corrected_mean(layers: Sequence[LoRALayer], weights: Sequence[float], strength: float = 0.01) -> LoRALayer:
    """Ā and B̄ + ΔB, where ΔB makes up for what averaging A and B apart is wrong by (LoRA-FAIR).

    ΔB minimises 1 − cos(ΔW, (B̄ + ΔB)·Ā) + λ·‖ΔB‖² with ΔW = Σ w_k·ΔW_k and the cosine of whole matrices (Bian et al.
    2024, arXiv:2411.14961, equation 8). That the norm is Frobenius' squared is our reading, and L-BFGS in float64 until
    nothing moves takes the place of the authors' SGD. Products of factors suffice: ⟨ΔW, BĀ⟩ = ⟨ΔW·Āᵀ, B⟩ and
    ‖BĀ‖² = ⟨B·ĀĀᵀ, B⟩.

    Args:
        layers: the K updates, of one rank and scale.
        weights: the K weights w_k.
        strength: λ, the authors' 0.01.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import LoRALayer
        >>> from sap_lightning.functional.rounds import corrected_mean
        >>> same = LoRALayer(A=torch.tensor([[2.0, 1.0]]), B=torch.tensor([[4.0], [3.0]]))
        >>> corrected_mean([same, same], [0.5, 0.5]).B.round(decimals=3).tolist()  # nothing to make up for
        [[4.0], [3.0]]
    """
    mean = mean_factors(layers, weights)
    A, start = mean.A.double(), mean.B.double()
    target = stack([layer._replace(scale=1.0) for layer in layers], weights)
    length = inner(target, target) ** 0.5
    gram = A @ A.T
    if not length or not float((start @ gram * start).sum()):
        return mean
    aligned = target.B.double() @ (target.A.double() @ A.T)
    B = _minimised(lambda B: _misfit(B, start, aligned, gram, length, strength), start)
    return mean._replace(B=B.to(mean.B.dtype))


def _misfit(B: Tensor, start: Tensor, aligned: Tensor, gram: Tensor, length: float, strength: float) -> Tensor:
    cosine = (aligned * B).sum() / (length * ((B @ gram) * B).sum().sqrt())
    return 1 - cosine + strength * (B - start).square().sum()


def _minimised(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Where a loss of one tensor has its least value, from a start that is near it."""
    point = start.clone().requires_grad_()
    descent = torch.optim.LBFGS(
        [point], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        descent.zero_grad()
        value = loss(point)
        value.backward()
        return value

    with torch.enable_grad():
        descent.step(closure)
    return point.detach()


def added(one: LoRALayer, other: LoRALayer) -> LoRALayer:
    """ΔW₁ + ΔW₂ exactly, of a rank that stays below the size of the weight however much is added.

    Args:
        one: ΔW₁ of shape (d_out, d_in).
        other: ΔW₂ of the same shape.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import LoRALayer
        >>> from sap_lightning.functional.rounds import added
        >>> total = LoRALayer(A=torch.tensor([[1.0, 2.0]]), B=torch.tensor([[1.0], [0.0]]))
        >>> for _ in range(3):
        ...     total = added(total, LoRALayer(A=torch.tensor([[0.0, 1.0]]), B=torch.tensor([[0.0], [1.0]])))
        ...     print(total.rank, total.delta().round(decimals=3).abs().tolist())
        2 [[1.0, 2.0], [0.0, 1.0]]
        2 [[1.0, 2.0], [0.0, 2.0]]
        2 [[1.0, 2.0], [0.0, 3.0]]
    """
    both = stack([one, other], [1.0, 1.0])
    return both if both.rank <= min(both.shape) else recompress(both, min(both.shape))
