"""Scores of many adapters in one temporary file."""

from __future__ import annotations

import gc
import tempfile
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from references import randn

from sap_lightning.errors import InputError
from sap_lightning.functional.spaces import Parameters
from sap_lightning.models.scores import ScoreFile


def scores(seed: int) -> dict[str, Parameters]:
    """Of two layers: A and B, which lies crosswise in memory; singular values, and none of a layer of rank 0."""
    return {
        "q": (randn(seed, 2, 6), randn(seed + 1, 2, 5).T),
        "v": (randn(seed + 2, 4).double(),),
        "none": (torch.empty(0),),
    }


def test_what_is_kept_of_several_adapters_comes_back_whole_in_any_order() -> None:
    file = ScoreFile()
    kept = {seed: file.keep(scores(seed)) for seed in (10, 20, 30)}
    for seed in (20, 30, 10, 20):
        expected = scores(seed)
        assert list(kept[seed]) == list(expected) and len(kept[seed]) == 3
        for name in reversed(expected):
            for read, tensor in zip(kept[seed][name], expected[name], strict=True):
                assert read.dtype == tensor.dtype and torch.equal(read, tensor)


def test_what_is_read_may_be_changed() -> None:
    kept = ScoreFile().keep(scores(0))
    kept["v"][0].zero_()
    assert torch.equal(kept["v"][0], scores(0)["v"][0])


def test_what_is_kept_is_not_in_memory() -> None:
    given = scores(0)
    there = weakref.ref(given["q"][0])
    kept = ScoreFile().keep(given)
    del given
    gc.collect()
    assert there() is None and kept["q"][0].shape == (2, 6)


def test_no_file_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept = ScoreFile().keep(scores(0))
    assert list(tmp_path.iterdir()) == [], "not even if the process is killed now"
    assert torch.equal(kept["v"][0], scores(0)["v"][0])


def test_no_room_for_temporary_files_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", partial(open, "/dev/full", "r+b"))
    with pytest.raises(InputError, match=rf"{tempfile.gettempdir()}: cannot be written \(.*; check .*room on the disk"):
        ScoreFile().keep({"q": (torch.ones(100_000),)})
