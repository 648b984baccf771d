"""What docs/merging.md tells a person to write, written and run."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
import yaml
from places import REPOSITORY

from sap_lightning.functional.lora import dense
from sap_lightning.io.adapter import read_adapter
from sap_lightning.merging import METHODS, SAP

DOCUMENT = (REPOSITORY / "docs" / "merging.md").read_text(encoding="utf-8")


def test_every_method_is_in_the_table_and_nothing_else():
    rows = re.findall(r"^\| (`[^|]+) \|", DOCUMENT, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(METHODS)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"sap"}))
def test_every_method_has_a_config_that_names_each_of_its_settings_at_its_default(name):
    config = yaml.safe_load((REPOSITORY / "configs" / "merge" / f"{name}.yaml").read_text(encoding="utf-8"))
    method = config["merge"]["method"]
    assert method["class_path"] == f"sap_lightning.merging.{METHODS[name].__name__}"
    assert method.get("init_args", {}) == METHODS[name]().settings


def test_sap_s_config_names_each_setting_of_the_group_prune_at_its_default():
    config = yaml.safe_load((REPOSITORY / "configs" / "merge" / "sap.yaml").read_text(encoding="utf-8"))
    assert config == {"merge": {"method": "sap"}, "prune": SAP().settings}


def test_the_example_of_a_method_of_one_s_own_runs_as_it_is_written(finished, run, request, tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    (tmp_path / "my_methods.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    # Another test may have a module of that name.
    monkeypatch.delitem(sys.modules, "my_methods", raising=False)
    request.addfinalizer(lambda: sys.modules.pop("my_methods", None))
    uploads = [finished / "uploads" / domain for domain in ("cartoon", "photo")]
    out = tmp_path / "merged"
    options = ["--merge.method=my_methods.NormBalanced", "--merge.method.power=1", f"--merge.output={out}"]
    run("merge", *options, "--uploads", *map(str, uploads))
    assert json.loads((out / "merge.json").read_text())["settings"] == {"power": 1.0}
    merged = read_adapter(out).layers
    clients = [read_adapter(upload).layers for upload in uploads]
    for name, layer in merged.items():
        deltas = [client[name].delta().double() for client in clients]
        smallest = min(delta.norm() for delta in deltas)
        expected = sum(delta * smallest / delta.norm() for delta in deltas) / 2
        torch.testing.assert_close(dense(layer).double(), expected, atol=1e-6, rtol=1e-4)
