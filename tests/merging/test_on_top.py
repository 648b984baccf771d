"""Methods on top of others, in Python, in files and on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from adapters import assert_same, random_adapter, unlike_adapters
from places import SHAPES_CLIP
from probes import random_layer

from sap_lightning.cli import SapCLI
from sap_lightning.errors import InputError
from sap_lightning.io.adapter import read_adapter, write_adapter
from sap_lightning.merging import METHODS, SAP, TIES, Average, CoreSpace, Fisher, Krum, LiNeS, Magnitude, RobustMerge
from sap_lightning.merging.merged import holds
from sap_lightning.merging.method import LayerwiseMethod, MergeMethod
from sap_lightning.merging.on_top import pruning_in
from sap_lightning.models.clip import load_base
from sap_lightning.models.layers import layer_shapes
from sap_lightning.modules.merge import MergeModule


class First(LayerwiseMethod):
    """The first client."""

    def merge_layer(self, layers, weights):
        return layers[0]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_it_needs_what_the_method_under_it_needs(name: str) -> None:
    under, method = METHODS[name](), LiNeS(name)
    assert method.inner == under
    assert (method.needs_anchors, method.has_masks) == (under.needs_anchors, under.has_masks)
    assert (method.sparsity, method.least_clients) == (under.sparsity, under.least_clients)


def test_it_needs_what_the_settings_under_it_say() -> None:
    assert LiNeS(TIES(0.9)).sparsity == 0.9
    assert LiNeS(Krum(byzantine=1)).least_clients == CoreSpace(Krum(byzantine=1)).least_clients == 5
    assert LiNeS(LiNeS(Fisher())).needs_anchors
    assert LiNeS(SAP(loss="contrastive_symmetric", reduction="mean_then_abs")).asks_by_batch


def test_what_is_pruned_is_known_through_it() -> None:
    adapters = [random_adapter(seed) for seed in range(2)]
    pruning = pruning_in(LiNeS(LiNeS(Magnitude(0.5))).prepare(adapters, [0.5, 0.5]))
    assert pruning is not None and list(pruning.adapters) == adapters
    assert pruning_in(LiNeS().prepare(adapters, [0.5, 0.5])) is None
    assert not CoreSpace("ties").has_masks, "its masks are of cores"
    assert not LiNeS(CoreSpace("ties")).has_masks and not LiNeS(RobustMerge()).has_masks


@pytest.mark.parametrize("method", [LiNeS, CoreSpace])
def test_a_name_that_there_is_not_is_refused_at_once(method: type[MergeMethod]) -> None:
    with pytest.raises(InputError, match=r"merge\.method\.method tise: no such method; there are average, "):
        method(method="tise")


def test_one_may_be_on_top_of_another_or_of_itself() -> None:
    twice = LiNeS(LiNeS(alpha=0.5, beta=0), alpha=0.5, beta=0).merge(unlike_adapters())
    assert_same(twice, {name: 0.25 * layer.delta() for name, layer in Average().merge(unlike_adapters()).items()})
    assert_same(CoreSpace(LiNeS(beta=0)).merge(unlike_adapters()), Average().merge(unlike_adapters()), 1e-5)
    assert LiNeS("lines").inner == LiNeS()


def test_methods_on_top_of_others_are_others() -> None:
    assert LiNeS(TIES(0.9)) == LiNeS(TIES(0.9)) != LiNeS(TIES(0.8)) != CoreSpace(TIES(0.8))
    assert len({LiNeS(TIES(0.9)), LiNeS(TIES(0.9)), LiNeS("ties")}) == 2


def test_the_record_has_the_settings_and_the_code_of_what_is_under_it() -> None:
    assert LiNeS("ties").settings["method"] == "ties"
    under = {"method": "ties", "code": "", "settings": TIES(0.9).settings}
    assert LiNeS(TIES(0.9)).settings == {"method": under, "alpha": None, "beta": 1.0}
    deep = CoreSpace(LiNeS(First())).settings["method"]["settings"]["method"]
    assert deep["method"] == "First" and ".First " in deep["code"]
    assert json.loads(json.dumps(CoreSpace(LiNeS(First())).settings)) == CoreSpace(LiNeS(First())).settings


# Commands


@pytest.fixture
def uploads(tmp_path: Path) -> list[str]:
    """Three uploads of two layers of the shipped base."""
    shapes = layer_shapes(load_base(SHAPES_CLIP).tower)
    names = [name for name in shapes if name.endswith("q_proj")][:2]
    for seed in range(3):
        layers = {name: random_layer(10 * seed + i, tuple(shapes[name])) for i, name in enumerate(names)}
        write_adapter(tmp_path / str(seed), layers, SHAPES_CLIP)
    return [str(tmp_path / str(seed)) for seed in range(3)]


LINES = [
    ("--merge.method lines --merge.method.method ties", LiNeS("ties")),
    ("--merge.method=lines --merge.method.method=ties", LiNeS("ties")),
    ("--merge.method lines --merge.method.method ties --merge.method.method.sparsity 0.9", LiNeS(TIES(0.9))),
    ("--merge.method=lines --merge.method.beta=0.5 --merge.method.method=average", LiNeS(beta=0.5)),
    ("--merge.method=core_space --merge.method.method=ties --merge.method.method.scale=2", CoreSpace(TIES(scale=2))),
    (
        "--merge.method=core_space --merge.method.method=lines --merge.method.method.method=ties"
        " --merge.method.method.method.scale=0.5",
        CoreSpace(LiNeS(TIES(scale=0.5))),
    ),
    ("--merge.method=lines --merge.method.method=sap", LiNeS("sap")),
    ("--merge.method=lines --merge.method.method=sap --merge.method.method.sparsity=0.9", LiNeS(SAP(0.9))),
]


@pytest.mark.parametrize(("line", "method"), LINES)
def test_the_command_line_names_both(options: list[str], line: str, method: MergeMethod) -> None:
    cli = SapCLI("fit", [*options, *line.split()])
    assert cli.merge.method == method
    again = {"merge": {"method": cli.settings()["merge"]["method"]}}
    assert again == yaml.safe_load(yaml.safe_dump(again)), "what a config file keeps are plain values"


def test_a_file_names_both(options: list[str], tmp_path: Path) -> None:
    ties = {"class_path": "sap_lightning.merging.TIES", "init_args": {"sparsity": 0.9}}
    lines = {"class_path": "sap_lightning.merging.LiNeS", "init_args": {"method": ties, "beta": 0.5}}
    (tmp_path / "lines.yaml").write_text(yaml.safe_dump({"merge": {"method": lines}}))
    assert SapCLI("fit", [*options, f"--config={tmp_path / 'lines.yaml'}"]).merge.method == LiNeS(TIES(0.9), beta=0.5)
    sweep = SapCLI("sweep", [*options, "--sweep.methods", yaml.safe_dump(["lines", lines], default_flow_style=True)])
    assert sweep.config_init.sweep.methods == ["lines", LiNeS(TIES(0.9), beta=0.5)]


def test_merge_writes_what_both_make_of_the_uploads_and_their_settings(run, uploads, tmp_path, capsys) -> None:
    line = ["--merge.method", "lines", "--merge.method.method", "core_space", "--merge.method.method.method", "median"]
    run("merge", *line, f"--merge.output={tmp_path / 'out'}", "--uploads", *uploads)
    assert "Merged 3 uploads by lines" in capsys.readouterr().out
    adapters = MergeModule(SHAPES_CLIP).read_uploads(uploads)
    method = LiNeS(CoreSpace("median"))
    assert_same(read_adapter(tmp_path / "out").layers, method.merge(adapters))
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["settings"] == method.settings
    sources = [adapter.sha256 for adapter in adapters]
    assert holds(tmp_path / "out", method, sources) and not holds(tmp_path / "out", LiNeS(CoreSpace()), sources)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--merge.method=lines", "--merge.method.method=tise"], r"^merge\.method\.method tise: no such method; "),
        (["--merge.method=core_space", "--merge.method.method=sap"], "^merge.method core_space: sap looks at anchors"),
        (
            ["--merge.method=lines", "--merge.method.method=ties", "--merge.method.method.sparsity=7"],
            r"^merge\.method\.sparsity must lie in \[0, 1\], got 7",
        ),
        (["--merge.method=lines", "--merge.method.beta=-1"], r"^merge\.method\.beta must be at least 0, got -1"),
    ],
)
def test_what_either_refuses_is_said_in_one_line(run, uploads, tmp_path, line: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        run("merge", *line, f"--merge.output={tmp_path / 'out'}", "--uploads", *uploads)
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_settings_of_the_group_prune_are_not_those_of_a_sap_under_another(run, tmp_path) -> None:
    line = ["--merge.method=lines", "--merge.method.method=sap", "--prune.sparsity=0.9"]
    with pytest.raises(InputError, match=r"--prune\.sparsity: merge\.method is not sap"):
        run("merge", *line, f"--merge.output={tmp_path / 'out'}", "--uploads", "/nowhere")
