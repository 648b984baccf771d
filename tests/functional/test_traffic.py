from __future__ import annotations

import numpy as np
import pytest
import torch

from sap_lightning.functional.traffic import fedavg_bytes, one_shot_bytes, sparse_bytes, sparse_upload, triplets_upload


def layouts(tensor: np.ndarray) -> list[int]:
    """The bytes that the three layouts really take."""
    (where,) = tensor.nonzero()
    values = tensor[where].tobytes()
    bitmap = np.packbits(tensor != 0).tobytes()
    return [len(values + bitmap), len(values + where.astype(np.uint32).tobytes()), len(tensor.tobytes())]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("kept", [0, 1, 7, 31, 32, 33, 500, 970, 1001])
def test_the_cheapest_layout_counts(kept: int, dtype: type) -> None:
    tensor = np.zeros(1001, dtype)
    tensor[:kept] = 1
    assert sparse_bytes(kept, 1001, tensor.itemsize) == min(layouts(tensor))


def test_each_layout_is_the_cheapest_somewhere() -> None:
    # Indices, a bitmap, everything.
    assert [sparse_bytes(kept, 1001) for kept in (10, 100, 1001)] == [10 * 8, 100 * 4 + 126, 1001 * 4]


@pytest.mark.parametrize("kept", [-1, 6])
def test_more_kept_than_there_is_or_less_than_nothing_is_refused(kept: int) -> None:
    with pytest.raises(ValueError, match=rf"\[0, 5\], got {kept}"):
        sparse_bytes(kept, 5)


def test_an_upload_is_the_sum_of_its_tensors() -> None:
    a, b = torch.zeros(10, 100, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool)
    a[0, :5] = True
    assert sparse_upload({"q": (a, b), "v": (b,)}) == 5 * 8 + 12 * 4 + 12 * 4


def test_fedavg_moves_every_adapter_both_ways_in_every_round() -> None:
    assert one_shot_bytes([100, 150, 50]) == 300
    assert fedavg_bytes([100, 150, 50], rounds=10) == 10 * (300 + 300)


def test_triplets_are_sent_as_their_two_vectors() -> None:
    masks = {"q": (torch.tensor([True, False, True]),), "fc1": (torch.tensor([False, False]),)}
    assert triplets_upload(masks, {"q": (24, 24), "fc1": (32, 24)}) == 2 * (24 + 24) * 4
