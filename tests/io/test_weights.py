"""Tensors read from safetensors files by our own index, against the library that defines the format."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from sap_lightning.errors import InputError
from sap_lightning.io.weights import MAX_HEADER_BYTES, SafetensorsFile, Stated, head_of, is_finite

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.arange(4).to(torch.bfloat16),
    "c": torch.ones(3, 1, dtype=torch.float16),
    "other": torch.ones(2, dtype=torch.int64),
}


def header_and_data(content: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def file_of(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_a_head_for_tensors_to_come_is_one_that_the_library_reads() -> None:
    tensors = {"b": torch.rand(2, 3), "a": torch.rand(()), "c": torch.rand(0, 4), "d": torch.rand(5).half()}
    head = head_of({key: Stated(tensor.dtype, tensor.shape) for key, tensor in tensors.items()})
    content = head + b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    assert len(head) % 8 == 0
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in load(content).items())
    with SafetensorsFile.of(content, "here").opened() as opened:
        assert opened.head() == head and opened.in_order()[0] == "b"


def keys_of(content: bytes) -> set[str]:
    with SafetensorsFile.of(content, "here").opened() as tensors:
        return set(tensors.keys())


def test_every_tensor_is_what_the_library_reads(tmp_path: Path) -> None:
    content = save(TENSORS, {"format": "pt"})
    (tmp_path / "file").write_bytes(content)
    for weights in (SafetensorsFile.of(content, "here"), SafetensorsFile.at(tmp_path / "file")):
        with weights.opened() as tensors:
            assert tensors.keys() == TENSORS.keys()
            for key in ("a", "b", "c"):
                assert tensors.stated(key) == (TENSORS[key].dtype, tuple(TENSORS[key].shape))
                assert torch.equal(tensors.tensor(key), TENSORS[key])
            assert tensors.stated("other").dtype == "I64"


def test_a_file_that_changes_is_indexed_anew(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(save({"a": torch.zeros(2)}))
    weights = SafetensorsFile.at(path)
    with weights.opened() as tensors:
        assert not tensors.tensor("a").any()
    path.write_bytes(save({"before": torch.ones(5), "a": torch.ones(3)}))
    with weights.opened() as tensors:
        assert tensors.tensor("a").tolist() == [1, 1, 1]
    path.write_bytes(save({"b": torch.ones(3)}))
    with pytest.raises(InputError, match="'a' is gone"), weights.opened() as tensors:
        tensors.tensor("a")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h, d: (h, d + b"\0"), "its header is for"),
        (lambda h, d: (h, d[:-1]), "its header is for"),
        (lambda h, d: (h | {"a": h["b"]}, d), "overlap or leave gaps"),
        (lambda h, d: (h | {"a": h["a"] | {"shape": [3, 3]}}, d), "'a' of shape .* has 24 bytes"),
        (lambda h, d: (h | {"a": h["a"] | {"shape": [-2, -3]}}, d), "'a' is"),
        (lambda h, d: (h | {"a": h["a"] | {"shape": "no"}}, d), "'a' is"),
        (lambda h, d: (h | {"a": h["a"] | {"data_offsets": [8, 0]}}, d), "'a' of shape"),
        (lambda h, d: (h | {"a": h["a"] | {"dtype": 7}}, d), "'a' is"),
        (lambda h, d: (h | {"a": {}}, d), "no dtype, shape and data_offsets"),
        (lambda h, d: (h | {"__metadata__": []}, d), "__metadata__ is no object"),
        (lambda h, d: ([], d), "the file is"),
        (lambda h, d: (b"[" * 100_000, d), "not valid JSON"),
        (lambda h, d: (b'{"a": 1, "a": 2}', d), "'a' stands there twice"),
        (lambda h, d: (b"{" + b" " * MAX_HEADER_BYTES + b"}", d), "a header of"),
    ],
)
def test_what_is_no_such_file_is_refused(change, reason: str) -> None:
    header, data = header_and_data(save(TENSORS))
    with pytest.raises(InputError, match=reason):
        keys_of(file_of(*change(header, data)))


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\0" * 8, b"\xff" * 100])
def test_scraps_are_refused(content: bytes) -> None:
    with pytest.raises(InputError, match="not safetensors, a header of"):
        keys_of(content)


def test_what_is_accepted_the_library_accepts_too() -> None:
    whole, dice = save(TENSORS, {"format": "pt"}), random.Random(0)
    accepted = 0
    for _ in range(2000):
        content = bytearray(whole)
        for _ in range(dice.randint(1, 3)):
            place = dice.randrange(len(content))
            content[place : place + dice.choice([1, 1, 1, 0, 2])] = bytes([dice.randrange(256)])
        try:
            keys_of(bytes(content))
        except InputError as error:
            assert str(error).isprintable()
            continue
        accepted += 1
        try:
            load(bytes(content))
        except (SafetensorError, KeyError) as error:
            # A dtype that nobody knows, which is refused when the tensor is asked for.
            assert "dtype" in str(error) or "variant" in str(error) or isinstance(error, KeyError)
    assert 50 < accepted < 1900


def test_many_tensors_and_much_metadata_cost_one_look() -> None:
    """Counted in CPU seconds with a margin of ten: parsing at every look would take minutes."""
    tensors = {f"t{number}": torch.zeros(1) for number in range(5000)}
    weights = SafetensorsFile.of(save(tensors, {f"key{number}": "" for number in range(100_000)}), "here")
    started = time.process_time()
    for key in tensors:
        with weights.opened() as opened:
            opened.tensor(key)
    assert time.process_time() - started < 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(number: float, dtype: torch.dtype) -> None:
    tensor = torch.randn(5, 7).to(dtype)
    tensor[0, 0], tensor[0, 1] = torch.finfo(dtype).max, torch.finfo(dtype).min
    assert is_finite(tensor) and is_finite(tensor[:0])
    for place in (2, 17, 34):
        broken = tensor.clone()
        broken.view(-1)[place] = number
        assert not is_finite(broken)
