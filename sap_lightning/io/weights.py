"""Where an upload's tensors come from: a safetensors file, on disk or in memory, read one tensor at a time.

The format is Hugging Face's (github.com/huggingface/safetensors). Its library parses the header anew at every opening,
in a time that the sender decides; here a header is bounded, and parsed once.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import torch
from torch import Tensor

from sap_lightning.errors import InputError
from sap_lightning.io.rules import errors_in, is_integer, object_from, short

MAX_HEADER_BYTES = 2**23
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Of an upload's tensors."""
_READ = DTYPES | {"F64": torch.float64}
_NAMES = {dtype: name for name, dtype in _READ.items()}
_BYTES = {name: dtype.itemsize for name, dtype in _READ.items()} | {
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_METADATA = "__metadata__"
_CHUNK_BYTES = 2**24
_LENGTH_BYTES = 8


class Stated(NamedTuple):
    """What a weights file says of a tensor before it is read."""

    dtype: torch.dtype | str
    shape: tuple[int, ...]


class OpenWeights(Protocol):
    """Tensors by key, each read when it is looked at."""

    def keys(self) -> Set[str]:
        """The keys of all tensors."""

    def stated(self, key: str) -> Stated:
        """Dtype and shape of a tensor."""

    def tensor(self, key: str) -> Tensor:
        """The tensor."""


class Weights(Protocol):
    """Where tensors come from, to be opened for every look at them."""

    def opened(self) -> AbstractContextManager[OpenWeights]:
        """The tensors; what is wrong with them is said to be wrong here."""


class _Place(NamedTuple):
    """A tensor in a file: what is stated of it, and the bytes from start up to end."""

    stated: Stated
    start: int
    end: int


class SafetensorsFile:
    """A safetensors file, open only while it is looked at, so that a thousand adapters need no thousand open files.

    Args:
        open_file: opens its bytes.
        place: how messages call it.
    """

    def __init__(self, open_file: Callable[[], BinaryIO], place: str) -> None:
        self._open = open_file
        self._place = place
        self._version: tuple[int, ...] | None = None
        self._index: dict[str, _Place] = {}

    @classmethod
    def at(cls, path: Path) -> SafetensorsFile:
        """The file at a path."""
        return cls(lambda: path.open("rb"), str(path))

    @classmethod
    def of(cls, content: bytes, place: str) -> SafetensorsFile:
        """The file whose bytes these are."""
        return cls(lambda: io.BytesIO(content), place)

    @contextmanager
    def opened(self) -> Iterator[OpenFile]:
        try:
            with errors_in(self._place), self._open() as file:
                version = _version_of(file)
                if version != self._version:
                    self._index = index_of(file)
                    self._version = version
                yield OpenFile(file, self._index)
        except OSError as error:
            raise InputError(f"{self._place}: cannot be read ({error.strerror or error}); check the file") from None


class OpenFile:
    """A safetensors file that is open: its tensors, whole or in part, and its bytes.

    Args:
        file: its bytes.
        index: where each tensor is.
    """

    def __init__(self, file: BinaryIO, index: Mapping[str, _Place]) -> None:
        self.file = file
        self.index = index

    def keys(self) -> Set[str]:
        return self.index.keys()

    def stated(self, key: str) -> Stated:
        return self._place_of(key).stated

    def tensor(self, key: str) -> Tensor:
        (dtype, shape), start, end = self._place_of(key)
        return self._read(dtype, start, end).view(shape)

    def rows(self, key: str, first: int, last: int) -> Tensor:
        """Rows of a tensor as a matrix (see `matrix_shape`), from first up to last."""
        (dtype, shape), start, _ = self._place_of(key)
        assert isinstance(dtype, torch.dtype)
        columns = matrix_shape(shape)[1]
        row = columns * dtype.itemsize
        return self._read(dtype, start + first * row, start + last * row).view(last - first, columns)

    def _read(self, dtype: torch.dtype | str, start: int, end: int) -> Tensor:
        assert isinstance(dtype, torch.dtype)
        content = bytearray(end - start)
        self.file.seek(start)
        if self.file.readinto(content) != len(content):  # type: ignore[attr-defined]  # of files and of bytes in memory
            raise InputError("is shorter than it was; the file has changed since it was first read")
        return torch.frombuffer(content, dtype=dtype) if content else torch.zeros(0, dtype=dtype)

    def in_order(self) -> list[str]:
        """The keys in the order of their tensors in the file."""
        return sorted(self.index, key=lambda key: (self.index[key].start, self.index[key].end))

    def head(self) -> bytes:
        """All that stands before the tensors."""
        self.file.seek(0)
        return self.file.read(min((place.start for place in self.index.values()), default=-1))

    def chunks(self, key: str) -> Iterator[bytes]:
        """The bytes of a tensor, of whatever dtype, in pieces of bounded size."""
        _, start, end = self._place_of(key)
        for at in range(start, end, _CHUNK_BYTES):
            self.file.seek(at)
            yield self.file.read(min(_CHUNK_BYTES, end - at))

    def _place_of(self, key: str) -> _Place:
        if key not in self.index:
            raise InputError(f"{short(key)} is gone; the file has changed since it was first read")
        return self.index[key]


class WeightsInMemory:
    """Tensors that are in memory already.

    Args:
        tensors: by key.
        place: how messages call where they came from.
    """

    def __init__(self, tensors: Mapping[str, Tensor], place: str) -> None:
        self.tensors = tensors
        self.place = place

    @contextmanager
    def opened(self) -> Iterator[OpenWeights]:
        with errors_in(self.place):
            yield self

    def keys(self) -> Set[str]:
        return self.tensors.keys()

    def stated(self, key: str) -> Stated:
        return Stated(self.tensors[key].dtype, tuple(self.tensors[key].shape))

    def tensor(self, key: str) -> Tensor:
        return self.tensors[key]


class CompletedWeights:
    """Tensors of which a part was sent, with those that both sides have.

    Args:
        sent: where the others are.
        known: by key; none of them may be sent.
    """

    def __init__(self, sent: Weights, known: Mapping[str, Tensor]) -> None:
        self.sent = sent
        self.known = known

    @contextmanager
    def opened(self) -> Iterator[OpenWeights]:
        with self.sent.opened() as tensors:
            if twice := sorted(tensors.keys() & self.known.keys()):
                raise InputError(
                    f"{short(twice[0])} is not to be sent, as both sides have it; upload the adapter again"
                )
            yield _Both(tensors, WeightsInMemory(self.known, ""))


class _Both:
    def __init__(self, one: OpenWeights, other: OpenWeights) -> None:
        self.one = one
        self.other = other

    def keys(self) -> Set[str]:
        return self.one.keys() | self.other.keys()

    def stated(self, key: str) -> Stated:
        return self._of(key).stated(key)

    def tensor(self, key: str) -> Tensor:
        return self._of(key).tensor(key)

    def _of(self, key: str) -> OpenWeights:
        return self.one if key in self.one.keys() else self.other  # noqa: SIM118  # it is no mapping


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor's shape as that of a matrix: its first dimension and all others; a vector is one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def is_finite(tensor: Tensor) -> bool:
    """Whether all of a tensor's numbers are; its extremes tell, NaN among them, in a tenth of the time of a mask."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def head_of(stated: Mapping[str, Stated]) -> bytes:
    """What stands in a safetensors file before tensors of these dtypes and shapes, which follow in this order.

    Its length is a multiple of eight bytes, as that library has it, and it says what transformers looks for.

    Raises:
        InputError: for a dtype of unknown size.
    """
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    at = 0
    for key, one in stated.items():
        end = at + bytes_in(one)
        header[key] = {"dtype": dtype_name(one.dtype), "shape": list(one.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def dtype_name(dtype: torch.dtype | str) -> str:
    """What the format calls a dtype, or torch where it is not read from it."""
    return _NAMES.get(dtype, str(dtype)) if isinstance(dtype, torch.dtype) else dtype


def readable(tensors: OpenWeights, key: str) -> Stated:
    """What is stated of a tensor of an upload.

    Raises:
        InputError: when it is of none of the dtypes that uploads have.
    """
    stated = tensors.stated(key)
    if stated.dtype not in DTYPES.values():
        raise InputError(f"{key} has dtype {dtype_name(stated.dtype)}, expected one of {', '.join(DTYPES)}")
    return stated


def bytes_in(stated: Stated) -> int:
    """How many bytes a tensor takes.

    Raises:
        InputError: for a dtype of unknown size.
    """
    name = dtype_name(stated.dtype)
    if name not in _BYTES:
        raise InputError(f"numbers are stored as {short(name)}; save the model in floating point")
    return math.prod(stated.shape) * _BYTES[name]


def index_of(file: BinaryIO) -> dict[str, _Place]:
    """Where each tensor of a safetensors file is, from its header.

    Raises:
        InputError: it is no such file, or its header is too large or says what cannot be.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if not 2 <= length <= min(size - _LENGTH_BYTES, MAX_HEADER_BYTES):
        _refuse(f"a header of {length} bytes in a file of {size}")
    header = object_from(file.read(length))
    if not isinstance(header.pop(_METADATA, {}), dict):
        _refuse(f"{_METADATA} is no object")
    first = _LENGTH_BYTES + length
    index = {key: _place_of(key, entry, first) for key, entry in header.items()}
    at = first
    for place in sorted(index.values(), key=lambda place: (place.start, place.end)):
        if place.start != at:
            _refuse("its tensors overlap or leave gaps")
        at = place.end
    if at != size:
        _refuse(f"its header is for {at} bytes, the file has {size}")
    return index


def _place_of(key: str, entry: Any, first: int) -> _Place:
    if not (isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}):
        _refuse(f"{short(key)} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        _refuse(f"{short(key)} is {short(entry)}")
    known = _READ.get(dtype, dtype)
    start, end = offsets
    if end < start or (isinstance(known, torch.dtype) and end - start != math.prod(shape) * known.itemsize):
        _refuse(f"{short(key)} of shape {short(shape)} has {end - start} bytes")
    return _Place(Stated(known, tuple(shape)), first + start, first + end)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and len(values) <= 8 and all(is_integer(value, 0) for value in values)


def _refuse(what: str) -> None:
    raise InputError(f"not safetensors, {what}; save it again")


def _version_of(file: BinaryIO) -> tuple[int, ...]:
    """Changes whenever the file does."""
    try:
        stat = os.fstat(file.fileno())
    except OSError:  # bytes in memory, which stay as they are
        return ()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
