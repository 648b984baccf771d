from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from sap_lightning.errors import InputError
from sap_lightning.fingerprints import config_hash, digest, file_fingerprint, fingerprint


def test_a_digest_depends_on_every_value_and_not_on_key_order():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert len({digest(1, 2), digest(2, 1), digest([1, 2]), digest(1), digest("1")}) == 5


def test_a_config_s_hash_depends_on_every_value_and_not_on_key_order():
    one = config_hash({"data": {"root": Path("images"), "seed": 0}, "rank": 8})
    assert one == config_hash({"rank": 8, "data": {"seed": 0, "root": "images"}})
    assert len(one) == 12 and int(one, 16) >= 0
    assert len({one, config_hash({"rank": 8}), config_hash({"rank": "8"}), config_hash({})}) == 4


def test_a_model_s_fingerprint_is_of_its_names_shapes_and_float32_values():
    module = nn.ModuleDict(OrderedDict(b=nn.Linear(2, 1), a=nn.Linear(1, 2, bias=False)))
    expected = hashlib.sha256()
    for name, tensor in (
        ("a.weight", module["a"].weight),
        ("b.bias", module["b"].bias),
        ("b.weight", module["b"].weight),
    ):
        expected.update(f"{name}\0{tuple(tensor.shape)}\0".encode() + tensor.detach().numpy().tobytes())
    assert fingerprint(module) == expected.hexdigest()
    renamed = nn.ModuleDict({"b": module["b"], "c": module["a"]})
    assert fingerprint(renamed) != fingerprint(module)


def test_a_model_s_fingerprint_tells_values_and_shapes_apart_but_not_precisions():
    module = nn.Linear(2, 1, bias=False)
    nn.init.constant_(module.weight, 0.5)
    before = fingerprint(module)
    assert fingerprint(module.half()) == before
    module.weight.data = module.weight.data.view(2, 1)
    assert fingerprint(module) != before
    module.weight.data = torch.tensor([[0.5, 0.25]])
    assert fingerprint(module) != before


def test_rewrites_in_quick_succession_with_mtime_kept_all_show(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"0")
    stat = file.stat()
    seen = set()
    for number in range(5):
        file.write_bytes(str(number).encode())
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        seen.add(file_fingerprint([file]))
    assert len(seen) == 5


def test_files_of_equal_stats_elsewhere_are_told_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"same")
    assert file_fingerprint([tmp_path / "a" / "file"]) != file_fingerprint([tmp_path / "b" / "file"])


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone: cannot be read: No such file"):
        file_fingerprint([tmp_path / "gone"])
