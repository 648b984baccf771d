"""Unlabelled examples that whole models are shown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any


class Examples(ABC):
    """Examples of one kind, for models of one kind."""

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
            InputError: when the model cannot take them.
        """
