"""The command fuse: what it imports, and what it makes of a command line and of config files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import REPOSITORY

from sap_lightning.checkpoints.methods import WholeSAP
from sap_lightning.errors import InputError
from sap_lightning.fuse import configured
from sap_lightning.merging import TIES

LINE = ["--fuse.models=[a,b]", "--fuse.base=c", "--fuse.output=out"]
SLOW = {"lightning", "transformers", "peft", "datasets", "torchmetrics", "matplotlib"}


def test_a_fusion_of_weights_imports_no_more_than_it_needs() -> None:
    code = (
        "import sys; from sap_lightning.__main__ import main; sys.argv[1:] = sys.argv[1:] or ['fuse']\n"
        "try: main()\nexcept SystemExit as end: print(end.code, file=sys.stderr)\n"
        f"print(sorted({SLOW} & set(sys.modules)))"
    )
    line = [sys.executable, "-c", code, "fuse", *LINE, "--fuse.method=ties", "--fuse.method.sparsity=0.5"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    said = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert said.stderr == "error: a: no such folder; expected a model as save_pretrained writes it\n"
    assert said.stdout == "[]\n"


def test_methods_are_named_with_or_without_settings() -> None:
    assert configured([*LINE, "--fuse.method", "ties", "--fuse.method.sparsity", "0.5"]).method == TIES(0.5)
    fusion = configured([*LINE, "--fuse.method=sap", "--fuse.method.scope=global", "--fuse.texts=t.txt"])
    assert fusion.method == WholeSAP(scope="global") and fusion.anchors is None


def test_anchors_are_those_that_are_named_and_prepared_as_the_first_model_wants_them() -> None:
    fusion = configured([*LINE, "--fuse.method=sap", "--anchors.root=pairs", "--anchors.num_pairs=3"])
    assert (fusion.anchors.root, fusion.anchors.num_pairs, fusion.anchors.base) == ("pairs", 3, "a")
    with pytest.raises(InputError, match=r"^fuse.method sap looks at data: give --fuse.texts"):
        configured([*LINE, "--fuse.method=sap", "--anchors.num_pairs=3"])
    with pytest.raises(InputError, match=r"^fuse.texts t.txt: is for language models, anchors.root for CLIP models"):
        configured([*LINE, "--fuse.method=sap", "--anchors.root=pairs", "--fuse.texts=t.txt"])


def test_a_config_file_need_not_name_anchors(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("fuse: {models: [a, b], output: o, base: c}")
    assert configured(["--config", str(file)]).models == ["a", "b"]


def test_what_a_config_file_has_for_other_commands_is_passed_over(tmp_path: Path) -> None:
    pacs = f"--config={REPOSITORY / 'configs' / 'pacs.yaml'}"
    assert configured([pacs, *LINE]).method.name == "average"
    (tmp_path / "own.yaml").write_text("fuse: {models: [a, b], base: c, output: out, method: ties}")
    assert configured([f"--config={tmp_path / 'own.yaml'}"]).method == TIES()
    assert configured([f"--config={tmp_path / 'own.yaml'}", "--fuse.method=median"]).method.name == "median"
    (tmp_path / "wrong.yaml").write_text("fuze: {models: [a, b]}")
    with pytest.raises(InputError, match="fuze"):
        configured([f"--config={tmp_path / 'wrong.yaml'}", *LINE])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.rank=8", "--model.rank: fuse would ignore it; it is an option of fit, sweep, client"),
        ("--prune.sparsity=0.5", "--prune.sparsity: fuse would ignore it"),
        ("--fuse.weight=[1]", "fuse.weight: no such option; did you mean fuse.weights"),
        ("--fuse.weights=many", "fuse.weights"),
        ("--fuse.method.sparsity=2", "^fuse.method.sparsity must lie in"),
    ],
)
def test_what_is_wrong_with_an_option_is_said_as_by_other_commands(option: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        configured([*LINE, "--fuse.method=ties", option])
