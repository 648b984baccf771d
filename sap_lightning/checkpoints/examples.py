"""Unlabelled examples that whole models are shown, and what models say of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor


class Anchors(Protocol):
    """Image–caption pairs, as an `AnchorDataModule` has them."""

    @property
    def captions(self) -> Sequence[str]:
        """One caption per pair."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever an image or a caption does."""

    @property
    def preprocessing(self) -> Mapping[str, Any]:
        """What becomes of an image before it is looked at."""

    def images(self, base: str | None = None) -> Tensor:
        """Normalised images, shape (pairs, 3, h, w), or what another checkpoint's preprocessing makes of them."""


class Examples(ABC):
    """Examples of one kind, for models of one kind.

    Attributes:
        fingerprint: tells them from others.
    """

    fingerprint: str

    def check(self, folder: Path) -> None:  # noqa: B027  # most can be shown to any model that loads
        """Looks at a model before a weight of it is read.

        Raises:
            InputError: it cannot be shown these examples.
        """

    @abstractmethod
    def load(self, folder: Path) -> Any:
        """A model in float32, in evaluation mode.

        Raises:
            InputError: it is not of the kind that these examples are for.
        """

    @abstractmethod
    def show(self, model: Any) -> None:
        """Passes one example after another through a model, for what watches it.

        Raises:
            InputError: the model cannot take them.
        """

    @abstractmethod
    def losses(self, model: Any) -> Iterator[Tensor]:
        """The loss of one example after another: a number, with gradients of all parameters that it depends on."""

    @abstractmethod
    def predictions(self, model: Any) -> list[Tensor]:
        """What a model expects: of each example probabilities, shape (positions, what there is to choose from)."""

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def logits(self, model: Any, number: int) -> Tensor:
        """Logits of what a model expects of one example, with gradients, shape (positions, what there is to choose)."""

    @abstractmethod
    def answers(self, model: Any) -> list[Hashable]:
        """What a model says to each example, which equals what another says or does not."""
