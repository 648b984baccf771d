"""The three spaces in which an adapter is scored and pruned.

A space names the parameters θ of one adapted layer, gives ∂L/∂θ for one anchor from what backpropagation
leaves at the layer, and builds the layer's update back from (masked) parameters. With x (T, d_in) the inputs of
the layer over T tokens and g (T, d_out) the gradients of its outputs, G = ∂L/∂W = gᵀx, and every gradient below
follows from G.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor

from sap_lightning.functional.lora import LoRALayer, Update, singular_triplets

Parameters = tuple[Tensor, ...]
SpaceName = Literal["factor", "delta", "singular"]


class Space(ABC):
    """One adapted layer seen as parameters that can be scored and masked."""

    parameters: Parameters

    @abstractmethod
    def gradients(self, x: Tensor, g: Tensor) -> Parameters:
        """∂L/∂θ, each of its parameter's shape, from inputs x (T, d_in) and output gradients g (T, d_out)."""

    @abstractmethod
    def update(self, parameters: Parameters) -> Update:
        """The layer's update with these values for its parameters."""


class FactorSpace(Space):
    """θ: the elements of A and B. ∂L/∂A = s·BᵀG and ∂L/∂B = s·GAᵀ."""

    def __init__(self, layer: LoRALayer) -> None:
        self.layer = layer
        self.parameters = (layer.A, layer.B)

    def gradients(self, x: Tensor, g: Tensor) -> Parameters:
        A, B, scale = self.layer
        return scale * (g @ B).T @ x, scale * g.T @ (x @ A.T)

    def update(self, parameters: Parameters) -> LoRALayer:
        A, B = parameters
        return LoRALayer(A, B, self.layer.scale)


class DeltaSpace(Space):
    """θ: the elements of ΔW. ∂L/∂ΔW = G."""

    def __init__(self, layer: LoRALayer) -> None:
        self.parameters = (layer.delta(),)

    def gradients(self, x: Tensor, g: Tensor) -> Parameters:
        return (g.T @ x,)

    def update(self, parameters: Parameters) -> Tensor:
        return parameters[0]


class SingularSpace(Space):
    """θ: the singular values σ_k of ΔW, whole triplets kept or dropped. ∂L/∂σ_k = u_kᵀ G v_k."""

    def __init__(self, layer: LoRALayer) -> None:
        self.U, sigma, self.V = singular_triplets(layer)
        self.parameters = (sigma,)

    def gradients(self, x: Tensor, g: Tensor) -> Parameters:
        return (((g @ self.U) * (x @ self.V.T)).sum(0),)

    def update(self, parameters: Parameters) -> LoRALayer:
        return LoRALayer(self.V, self.U * parameters[0])


SPACES: dict[SpaceName, Callable[[LoRALayer], Space]] = {
    "factor": FactorSpace,
    "delta": DeltaSpace,
    "singular": SingularSpace,
}


def magnitudes(spaces: Mapping[str, Space]) -> dict[str, Parameters]:
    """|θ| of every parameter by layer."""
    return {name: tuple(theta.abs() for theta in space.parameters) for name, space in spaces.items()}
