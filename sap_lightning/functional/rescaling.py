"""Making up for what pruning took away."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from sap_lightning.functional.lora import LoRALayer, Update, dense, in_factors, inner, scaled
from sap_lightning.functional.masking import Scope

Rescale = Literal["none", "l1", "l2", "inverse_keep", "robust"]


def rescaled(
    before: Mapping[str, Update],
    after: Mapping[str, Update],
    rescale: Rescale,
    scope: Scope,
    sparsity: float,
    cap: float = math.inf,
) -> dict[str, Update]:
    """Makes up for pruning in one of the ways of this file.

    Args:
        before: the whole adapter by layer.
        after: the same pruned; ``robust`` and the scope ``tensor`` need it in factor form.
        rescale: the way.
        scope: whether l1 and l2 restore the norm of each layer, of its A and its B, or of the whole adapter.
        sparsity: ρ, for ``inverse_keep``.
        cap: the largest factor of l1 and l2.

    Returns:
        The pruned updates made up for, by layer; ``none`` leaves them as they are.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import LoRALayer, dense
        >>> from sap_lightning.functional.rescaling import rescaled
        >>> whole = LoRALayer(A=torch.tensor([[3.0, 4.0]]), B=torch.tensor([[1.0]]))
        >>> pruned = whole._replace(A=torch.tensor([[0.0, 4.0]]))
        >>> for way in ("none", "l1", "l2", "inverse_keep", "robust"):
        ...     update = rescaled({"q_proj": whole}, {"q_proj": pruned}, way, scope="layer", sparsity=0.5)
        ...     print(way, [round(x, 3) for x in dense(update["q_proj"])[0].tolist()])
        none [0.0, 4.0]
        l1 [0.0, 7.0]
        l2 [0.0, 5.0]
        inverse_keep [0.0, 8.0]
        robust [0.0, 7.0]
    """
    match rescale:
        case "l1" | "l2":
            return restore_norm(before, after, 1 if rescale == "l1" else 2, scope, cap)
        case "inverse_keep":
            return inverse_keep(after, sparsity)
        case "robust":
            return {name: robust(in_factors(before[name]), in_factors(layer)) for name, layer in after.items()}
    return dict(after)


def norm(update: Update, p: int) -> float:
    """Entrywise l1 norm Σ|ΔW_ij| (p = 1) or Frobenius norm √Σ ΔW_ij² (p = 2).

    Args:
        update: ΔW in factor form, or dense of shape (d_out, d_in).
        p: 1 or 2.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.rescaling import norm
        >>> norm(torch.tensor([[3.0, -4.0]]), p=1), norm(torch.tensor([[3.0, -4.0]]), p=2)
        (7.0, 5.0)
    """
    if isinstance(update, Tensor):
        return float(torch.linalg.vector_norm(update, p, dtype=torch.float64))
    if p == 2:
        return math.sqrt(max(inner(update, update), 0.0))
    return norm(update.delta(), p)


def length_of(update: Mapping[str, Update]) -> float:
    """Frobenius norm over all layers, (Σ ‖ΔW_l‖²)^½; layers are looked at one at a time.

    Args:
        update: each layer in factor form, or dense of shape (d_out, d_in).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.rescaling import length_of
        >>> length_of({"q": torch.tensor([[3.0]]), "v": torch.tensor([[0.0, 4.0]])})
        5.0
    """
    return math.hypot(*(norm(layer, 2) for layer in update.values()))


def relative_error(of: Mapping[str, Update], to: Mapping[str, Update]) -> float:
    """‖to − of‖ / ‖of‖ in Frobenius norm over all layers; 0 when both are the same or there is nothing.

    Args:
        of: for each layer ΔW in factor form, or dense of shape (d_out, d_in).
        to: the same layers, what stands in for them.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.rescaling import relative_error
        >>> of, to = {"q_proj": torch.tensor([[3.0, 4.0]])}, {"q_proj": torch.tensor([[3.0, 2.0]])}
        >>> round(relative_error(of, to), 3)  # 2 / 5
        0.4
    """
    size = sum(norm(update, 2) ** 2 for update in of.values())
    gap = sum(norm(dense(to[name]) - dense(of[name]), 2) ** 2 for name in of if to[name] is not of[name])
    return math.sqrt(gap / size) if size else 0.0


def restore_norm(
    before: Mapping[str, Update], after: Mapping[str, Update], p: int, scope: Scope, cap: float = math.inf
) -> dict[str, Update]:
    """Scales pruned updates back to their lp norm before pruning: ΔW'·min(‖ΔW‖_p / ‖ΔW'‖_p, cap).

    What pruning emptied stays empty.

    Args:
        before: the whole adapter by layer.
        after: ΔW' of the same layers, in factor form or dense of shape (d_out, d_in).
        p: 1 or 2.
        scope: whether each layer gets a factor of its own, its A and its B each get one (which needs factor form), or
            all get one from the norm of the whole adapter.
        cap: the largest factor.

    Returns:
        The scaled updates, each in the form it came in.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import LoRALayer
        >>> from sap_lightning.functional.rescaling import restore_norm
        >>> q, v = (LoRALayer(A=torch.tensor([[a, 4.0]]), B=torch.ones(1, 1)) for a in (3.0, 5.0))  # l1 norms 7 and 9
        >>> pruned = torch.tensor([[0.0, 4.0]])
        >>> for scope in ("layer", "global"):
        ...     restored = restore_norm({"q": q, "v": v}, {"q": pruned, "v": pruned}, p=1, scope=scope)
        ...     print(scope, restored["q"].tolist(), restored["v"].tolist())
        layer [[0.0, 7.0]] [[0.0, 9.0]]
        global [[0.0, 8.0]] [[0.0, 8.0]]
        >>> halved = q._replace(A=torch.tensor([[3.0, 0.0]]))
        >>> restore_norm({"q": q}, {"q": halved}, p=1, scope="tensor", cap=2.0)["q"].A.tolist()  # 7/3 is above 2
        [[6.0, 0.0]]
    """
    if scope == "tensor":
        return {
            name: _restore_factors(in_factors(before[name]), in_factors(layer), p, cap) for name, layer in after.items()
        }
    was = {name: norm(before[name], p) ** p for name in after}
    now = {name: norm(update, p) ** p for name, update in after.items()}
    if scope == "global":
        was, now = dict.fromkeys(after, sum(was.values())), dict.fromkeys(after, sum(now.values()))
    return {
        name: scaled(update, min((was[name] / now[name]) ** (1 / p), cap)) if now[name] else update
        for name, update in after.items()
    }


def _restore_factors(before: LoRALayer, after: LoRALayer, p: int, cap: float) -> LoRALayer:
    A, B = (
        min(norm(whole, p) / left, cap) * pruned if (left := norm(pruned, p)) else pruned
        for whole, pruned in ((before.A, after.A), (before.B, after.B))
    )
    return after._replace(A=A, B=B)


def inverse_keep(after: Mapping[str, Update], sparsity: float) -> dict[str, Update]:
    """ΔW / (1 − ρ): keeps the expectation under random drops (DARE, Yu et al. 2024, arXiv:2311.03099).

    At ρ = 1 nothing is left to scale.

    Args:
        after: for each layer ΔW in factor form, or dense of shape (d_out, d_in).
        sparsity: ρ in [0, 1], the share that was dropped.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.rescaling import inverse_keep
        >>> inverse_keep({"q_proj": torch.tensor([[0.0, 2.0, 0.0, 0.0]])}, sparsity=0.75)["q_proj"].tolist()
        [[0.0, 8.0, 0.0, 0.0]]
    """
    factor = 1 / (1 - sparsity) if sparsity < 1 else 1.0
    return {name: scaled(update, factor) for name, update in after.items()}


def robust(before: LoRALayer, after: LoRALayer) -> LoRALayer:
    """RobustMerge's complementary scaling B·diag(s) of the ranks of B (Zeng et al. 2025, arXiv:2502.17159).

    What else the authors' code does to B (dividing it by the sum of the clients' scales and doubling it) is part of
    its merge, not of this.

    Args:
        before: the whole layer.
        after: the same pruned.

    Returns:
        The pruned layer with its B scaled by `complementary_scales`.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import LoRALayer
        >>> from sap_lightning.functional.rescaling import robust
        >>> before = LoRALayer(A=torch.tensor([[1.0, 3.0]]), B=torch.tensor([[5.0]]))
        >>> after = before._replace(A=torch.tensor([[1.0, 0.0]]))  # a quarter of Σ|A| is left
        >>> robust(before, after).B.tolist()
        [[20.0]]
    """
    return after._replace(B=after.B * complementary_scales(before.A, after.A))


def complementary_scales(A: Tensor, pruned: Tensor) -> Tensor:
    """s_j = Σ|A_j| / Σ|M⊙A_j| of each of the r ranks, raised to the int(0.8·r)-th of the sorted s, as the code does.

    The sorted s count from 0. Ranks that pruning emptied have s = 0.

    Args:
        A: before pruning, shape (r, d_in).
        pruned: M⊙A, of the same shape.

    Returns:
        s, shape (r,).

    Example:
        >>> import torch
        >>> from sap_lightning.functional.rescaling import complementary_scales
        >>> A = torch.ones(6, 4)
        >>> pruned = A.clone()
        >>> pruned[0] = 0  # emptied
        >>> pruned[4, :2] = 0  # s = 4 / 2
        >>> pruned[5, :3] = 0  # s = 4 / 1
        >>> complementary_scales(A, pruned).tolist()  # 1, the s of the other ranks, is raised to int(0.8·6) = 4th, 2
        [0.0, 2.0, 2.0, 2.0, 2.0, 4.0]
    """
    left = pruned.abs().sum(1)
    s = torch.where(left > 0, A.abs().sum(1) / left, 0)
    return s.clamp(min=s.sort().values[int(0.8 * len(s))]) * (left > 0)
