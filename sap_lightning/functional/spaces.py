"""The three spaces in which an adapter is scored and pruned.

A space names the parameters θ of one adapted layer, gives ∂L/∂θ for one anchor from what backpropagation
leaves at the layer, and builds the layer's update back from (masked) parameters. With x (T, d_in) the inputs of
the layer over T tokens and g (T, d_out) the gradients of its outputs, G = ∂L/∂W = gᵀx, and every gradient below
follows from G.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Literal

from torch import Tensor

from sap_lightning.functional.lora import LoRALayer, Update, dense, in_factors, singular_triplets

Parameters = tuple[Tensor, ...]
SpaceName = Literal["factor", "delta", "singular"]


class Space(ABC):
    """One adapted layer seen as parameters that can be scored and masked.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import LoRALayer
        >>> from sap_lightning.functional.spaces import SPACES
        >>> layer = LoRALayer(A=torch.ones(2, 3), B=torch.ones(4, 2))
        >>> for name, space in SPACES.items():
        ...     print(name, [tuple(parameter.shape) for parameter in space(layer).parameters])
        factor [(2, 3), (4, 2)]
        delta [(4, 3)]
        singular [(2,)]
    """

    parameters: Parameters

    @abstractmethod
    def gradients(self, x: Tensor, g: Tensor) -> Parameters:
        """∂L/∂θ, each of its parameter's shape, from inputs x (T, d_in) and output gradients g (T, d_out)."""

    @abstractmethod
    def update(self, parameters: Parameters) -> Update:
        """The layer's update with these values for its parameters."""


class FactorSpace(Space):
    """θ: the elements of A (r, d_in) and B (d_out, r). ∂L/∂A = s·BᵀG and ∂L/∂B = s·GAᵀ.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import LoRALayer
        >>> from sap_lightning.functional.spaces import FactorSpace
        >>> space = FactorSpace(LoRALayer(A=torch.tensor([[3.0, 4.0]]), B=torch.tensor([[5.0]]), scale=2.0))
        >>> x, g = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0]])  # one token, so G = [[1, 2]]
        >>> [gradient.tolist() for gradient in space.gradients(x, g)]
        [[[10.0, 20.0]], [[22.0]]]
        >>> A, B = space.parameters
        >>> space.update((A * torch.tensor([[0.0, 1.0]]), B)).delta().tolist()
        [[0.0, 40.0]]
    """

    def __init__(self, layer: Update) -> None:
        self.layer = in_factors(layer)
        self.parameters = (self.layer.A, self.layer.B)

    def gradients(self, x: Tensor, g: Tensor) -> Parameters:
        A, B, scale = self.layer
        return scale * (g @ B).T @ x, scale * g.T @ (x @ A.T)

    def update(self, parameters: Parameters) -> LoRALayer:
        A, B = parameters
        return LoRALayer(A, B, self.layer.scale)


class DeltaSpace(Space):
    """θ: the elements of ΔW (d_out, d_in). ∂L/∂ΔW = G.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import LoRALayer
        >>> from sap_lightning.functional.spaces import DeltaSpace
        >>> space = DeltaSpace(LoRALayer(A=torch.tensor([[3.0, 4.0]]), B=torch.tensor([[5.0]]), scale=2.0))
        >>> (delta,) = space.parameters
        >>> delta.tolist()
        [[30.0, 40.0]]
        >>> x, g = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0], [10.0]])  # two tokens
        >>> space.gradients(x, g)[0].tolist()
        [[31.0, 42.0]]
    """

    def __init__(self, layer: Update) -> None:
        self.layer = layer

    @cached_property
    def parameters(self) -> Parameters:  # type: ignore[override]  # set once, as an attribute is
        """ΔW, made when it is first asked for: scores that come from the anchors need none."""
        return (dense(self.layer),)

    def gradients(self, x: Tensor, g: Tensor) -> Parameters:
        return (g.T @ x,)

    def update(self, parameters: Parameters) -> Tensor:
        return parameters[0]


class SingularSpace(Space):
    """θ: the singular values σ_k of ΔW, whole triplets kept or dropped. ∂L/∂σ_k = u_kᵀ G v_k.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import LoRALayer
        >>> from sap_lightning.functional.spaces import SingularSpace
        >>> space = SingularSpace(LoRALayer(A=torch.tensor([[2.0, 1.0], [1.0, 2.0]]), B=torch.eye(2)))
        >>> (sigma,) = space.parameters
        >>> sigma.round(decimals=3).tolist()
        [3.0, 1.0]
        >>> first_only = sigma * torch.tensor([1.0, 0.0])
        >>> space.update((first_only,)).delta().round(decimals=3).tolist()
        [[1.5, 1.5], [1.5, 1.5]]
    """

    def __init__(self, layer: Update) -> None:
        self.U, sigma, self.V = singular_triplets(layer)
        self.parameters = (sigma,)

    def gradients(self, x: Tensor, g: Tensor) -> Parameters:
        return (((g @ self.U) * (x @ self.V.T)).sum(0),)

    def update(self, parameters: Parameters) -> LoRALayer:
        return LoRALayer(self.V, self.U * parameters[0])


SPACES: dict[SpaceName, Callable[[Update], Space]] = {
    "factor": FactorSpace,
    "delta": DeltaSpace,
    "singular": SingularSpace,
}


def magnitudes(spaces: Mapping[str, Space]) -> dict[str, Parameters]:
    """|θ| of every parameter by layer, each of its parameter's shape.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.lora import LoRALayer
        >>> from sap_lightning.functional.spaces import FactorSpace, magnitudes
        >>> space = FactorSpace(LoRALayer(A=torch.tensor([[3.0, -4.0]]), B=torch.tensor([[-5.0]])))
        >>> [theta.tolist() for theta in magnitudes({"q_proj": space})["q_proj"]]
        [[[3.0, 4.0]], [[5.0]]]
    """
    return {name: tuple(theta.abs() for theta in space.parameters) for name, space in spaces.items()}
