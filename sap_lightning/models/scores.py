"""What anchors said of the parameters of many clients, on disk until a layer of it is looked at."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sap_lightning.files import writing
from sap_lightning.functional.spaces import Parameters


class ScoreFile:
    """A temporary file for the scores of many adapters, which is gone as soon as nobody has any of them."""

    @cached_property
    def _file(self) -> IO[bytes]:
        return tempfile.TemporaryFile()

    def keep(self, scores: Mapping[str, Parameters]) -> Mapping[str, Parameters]:
        """The same scores, but on disk.

        Args:
            scores: of an adapter's parameters by layer, on the CPU.

        Raises:
            InputError: the folder of temporary files has no room for them.
        """
        with writing(tempfile.gettempdir()):
            places = {name: tuple(map(self._append, layer)) for name, layer in scores.items()}
        return _KeptScores(self._file, places)

    def _append(self, tensor: Tensor) -> _Place:
        values = tensor.numpy()
        place = _Place(self._file.seek(0, 2), values.dtype, values.shape)
        values.tofile(self._file)
        return place


class _Place(NamedTuple):
    """Where in the file a tensor begins, and what it is."""

    start: int
    dtype: np.dtype
    shape: tuple[int, ...]


class _KeptScores(Mapping[str, Parameters]):
    def __init__(self, file: IO[bytes], places: Mapping[str, tuple[_Place, ...]]) -> None:
        self._file = file
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __getitem__(self, name: str) -> Parameters:
        return tuple(map(self._read, self._places[name]))

    def _read(self, place: _Place) -> Tensor:
        self._file.seek(place.start)
        values = np.fromfile(self._file, place.dtype, int(np.prod(place.shape)))
        return torch.from_numpy(values.reshape(place.shape))
