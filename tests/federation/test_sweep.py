"""Sweeps: their checks and names, and the whole of them by the real command."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from federation.runs import lines_of, rows_of, times
from places import REPOSITORY
from references import contents

from sap_lightning.cli import SapCLI
from sap_lightning.errors import InputError
from sap_lightning.federation.run_folder import SERVER_SETTINGS_OF_ROUNDS
from sap_lightning.federation.sweep import SEED, Sweep, folder_of, label_of
from sap_lightning.merging import METHODS, SAP, TIES, Average, CoreSpace, LiNeS, MergeMethod, SAPAuto
from sap_lightning.results import Predictions, Result, Results

UNSEEN = ["photo", "sketch"]
PLAN = [
    "--sweep.methods=[average,sap]",
    "--sweep.sparsities=[0,0.5]",
    "--sweep.seeds=[0,1]",
    "--sweep.unseen=[photo,sketch]",
]
ONE_SEED = [*PLAN, "--sweep.seeds=[0]"]


def results_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("results.csv", "results.jsonl")}


@pytest.fixture(scope="module")
def swept(run, tmp_path_factory) -> Path:
    """The run folder of a sweep that ran through: 2 methods, 2 sparsities, 2 seeds, 2 unseen domains."""
    folder = tmp_path_factory.mktemp("swept") / "run"
    run("sweep", *PLAN, f"--federation.run_dir={folder}")
    return folder


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        ({"methods": []}, r"^sweep\.methods is empty$"),
        ({"methods": "ties"}, r"^sweep\.methods: got 'ties', expected a list such as \[ties\], or all$"),
        ({"seeds": []}, r"^sweep\.seeds is empty$"),
        ({"seeds": [-1]}, r"^sweep\.seeds: -1 lies outside \[0, 4294967296\)$"),
        ({"seeds": [0, 1, 0]}, r"^sweep\.seeds names 0 twice$"),
        ({"sparsities": [0.5, 0.5]}, r"^sweep\.sparsities names 0\.5 twice$"),
        ({"over": {"seed_everything": [0, 1]}}, r"^sweep\.over\.seed_everything: that is what sweep\.seeds is for$"),
        ({"over": {"merge.method": ["ties"]}}, r"^sweep\.over\.merge\.method: that is what sweep\.methods is for$"),
        ({"unseen": []}, r"^sweep\.unseen is empty$"),
        ({"sparsities": [0.5, 2.0]}, r"^sweep\.sparsities must lie in \[0, 1\], got 2\.0$"),
        ({"methods": ["average", "tise"]}, r"^sweep\.methods: no method 'tise'; there are average, fedavg, .*krum, .*"),
        ({"over": {"model.rank": []}}, r"^sweep\.over\.model\.rank must be a list of values, got \[\]$"),
        ({"over": {"model.rank": 4}}, r"^sweep\.over\.model\.rank must be a list of values, got 4$"),
    ],
)
def test_a_faulty_plan_is_refused_in_one_line(settings: dict[str, Any], refusal: str) -> None:
    with pytest.raises(InputError, match=refusal):
        Sweep(**settings)


def test_sparsities_that_no_method_looks_at_are_refused() -> None:
    with pytest.raises(InputError, match=r"^sweep\.sparsities: no method of sweep\.methods prunes"):
        Sweep(["average", "krum"], sparsities=[0.5]).plan_of({}, SAP())


def test_variants_are_every_seed_with_every_combination() -> None:
    sweep = Sweep(seeds=[3, 5], over={"anchors.num_pairs": [4, 8], "anchors.noise": [True]})
    assert list(sweep.variants()) == [
        (3, {"anchors.num_pairs": 4, "anchors.noise": True}),
        (3, {"anchors.num_pairs": 8, "anchors.noise": True}),
        (5, {"anchors.num_pairs": 4, "anchors.noise": True}),
        (5, {"anchors.num_pairs": 8, "anchors.noise": True}),
    ]
    assert list(Sweep(seeds=[7]).variants()) == [(7, {})]


def test_methods_go_by_their_names_and_sap_is_the_one_given() -> None:
    sap = SAP(sparsity=0.3, rescale="none")
    ties = TIES(scale=2)
    methods = Sweep(methods=["average", "sap", "ties", ties]).labelled(sap)
    assert list(methods) == ["average", "sap", "ties", "ties (scale 2)"]
    assert methods["sap"] is sap
    assert methods["ties (scale 2)"] is ties
    assert (methods["average"], methods["ties"]) == (Average(), TIES())


@pytest.mark.parametrize("methods", [["ties", "ties"], ["ties", TIES()], [SAP(), "sap"]])
def test_two_methods_of_one_name_are_refused(methods: list[MergeMethod | str]) -> None:
    with pytest.raises(InputError, match=r"^sweep\.methods: (ties|sap) is named twice$"):
        Sweep(methods=methods).labelled(SAP())


@dataclass(frozen=True)
class Needy(Average):
    """A method of one's own without a default for its argument."""

    name: ClassVar[str] = "needy"

    share: float


@pytest.mark.parametrize(
    ("method", "label"),
    [
        (SAP(), "sap"),
        (SAP(sparsity=0.1), "sap"),
        (SAP(space="factor"), "sap (space factor)"),
        (SAP(rescale="l1", rescale_scope="global"), "sap (rescale l1, rescale_scope global)"),
        (SAPAuto(sparsities=[0.5]), "sap_auto (sparsities [0.5])"),
        (Needy(0.5), "needy (share 0.5)"),
        (LiNeS("ties", beta=0.5), "lines (method ties, beta 0.5)"),
        (LiNeS(TIES()), "lines (method ties)"),
        (LiNeS(CoreSpace(TIES(0.9, scale=0.5))), "lines (method core_space (method ties (scale 0.5)))"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_label_names_the_settings_but_sparsity_that_are_not_defaults(method: MergeMethod, label: str) -> None:
    assert label_of(method, SAP()) == label


def test_a_label_names_sparsity_where_it_is_not_swept() -> None:
    assert label_of(SAP(0.9), SAP(), with_sparsity=True) == "sap (sparsity 0.9)"
    assert label_of(SAP(), SAP(), with_sparsity=True) == "sap"


def test_sap_with_settings_of_its_own_is_told_from_what_the_name_stands_for() -> None:
    configured = SAP(sparsity=0.95, space="factor")
    plan = Sweep(methods=["sap", SAP(), TIES()])
    assert list(plan.labelled(configured)) == ["sap", "sap (sparsity 0.8, space delta)", "ties"]


@pytest.fixture
def sweep_cli(options) -> Callable[..., SapCLI]:
    """The command as it reads its line."""
    return lambda *more: SapCLI("sweep", [*options, *more])


def setting(settings: dict[str, Any], name: str) -> Any:
    """The value of a setting by its name, such as model.rank."""
    value: Any = settings
    for part in name.split("."):
        value = value[part]
    return value


VALUES = [
    ("anchors.num_pairs", 4),
    ("anchors.noise", True),
    ("model.targets", ["q_proj", "v_proj"]),
    ("model.templates", ["a photo of a {}.", 'a "sketch", of a {}: #1']),
    ("model.templates", ["-- {}", "{}\n=[", " {} "]),
    ("model.learning_rate", 1e-5),
    ("federation.clients", ["photo", "sketch"]),
    ("federation.clients", None),
    ("federation.poison.domain", "photo"),
    ("prune.space", "factor"),
    ("anchors.root", "/data/co co: 1"),
    ("anchors.root", "1e3"),
    ("anchors.root", "null"),
    ("merge.method", None),
]


@pytest.mark.parametrize(("name", "value"), VALUES)
def test_a_variant_is_the_command_s_settings_with_some_values_laid_over_them(sweep_cli, name, value):
    command = sweep_cli()
    before = command.settings()
    varied = command.varied({SEED: 5, name: value}).settings()
    assert varied[SEED] == 5
    assert setting(varied, name) == value and type(setting(varied, name)) is type(value)
    assert command.settings() == before, "the command itself stays as it was"
    back = command.varied({SEED: 5, name: value}).varied({SEED: before[SEED], name: setting(before, name)})
    assert back.settings() == before, "nothing but these values was changed"


def test_a_variant_has_parts_of_its_own_made_of_its_values(sweep_cli):
    command = sweep_cli("--prune.sparsity=0.5")
    varied = command.varied({SEED: 5, "model.rank": 3, "prune.space": "singular", "anchors.num_pairs": 4})
    assert varied.model.seed == varied.datamodule.seed == 5 and varied.model.rank == 3
    assert varied.config_init.prune == SAP(0.5, "singular") == varied.merge.method
    assert varied.config_init.anchors.num_pairs == 4
    assert (command.model.seed, command.model.rank, command.merge.method) == (0, 8, SAP(0.5, "factor"))
    for part in ("model", "datamodule", "merge"):
        assert getattr(varied, part) is not getattr(command, part)


def test_a_variant_of_the_base_reaches_every_part_that_is_linked_to_it(sweep_cli):
    varied = sweep_cli().varied({"model.base": "elsewhere"})
    assert varied.datamodule.base == varied.config_init.anchors.base == varied.merge.base == "elsewhere"


@pytest.mark.parametrize(
    ("variant", "refusal"),
    [({"prune.sparsity": 2.0}, r"prune\.sparsity must lie in"), ({"model.rank": 0}, r"model\.rank")],
)
def test_a_faulty_value_of_a_variant_is_refused_as_the_command_would(sweep_cli, variant, refusal):
    with pytest.raises(InputError, match=refusal):
        sweep_cli().varied(variant)


def test_a_seed_and_settings_of_training_have_a_folder_of_their_own(tmp_path: Path) -> None:
    assert folder_of("run", 3, {}) == Path("run/seed_3")
    server = {"anchors.num_pairs": 4, "prune.space": "factor", "prune.rescale": "l1", "federation.clients": ["photo"]}
    assert folder_of("run", 3, server) == Path("run/seed_3")
    assert folder_of("run", 3, {"model.rank": 4, **server}) == Path("run/seed_3,model.rank=4")
    assert folder_of("run", 3, {"federation.rounds": 5}) == Path("run/seed_3,federation.rounds=5")
    of_rounds = folder_of("run", 3, server, SERVER_SETTINGS_OF_ROUNDS)
    assert of_rounds == Path("run/seed_3,anchors.num_pairs=4"), "what a round hands over may hang on it"
    targets = [folder_of(tmp_path, 0, {"model.targets": names}) for names in (["q_proj"], ["q_proj", "v_proj"])]
    assert targets[0] != targets[1]
    assert all(folder.parent == tmp_path for folder in targets), "a value is no path"
    assert folder_of(tmp_path, 0, {"data.root": "/data/../x"}).parent == tmp_path


def test_a_folder_s_name_fits_a_file_system_and_tells_long_values_apart() -> None:
    templates = [["a photo of a {}."] * 12 + [last] for last in ("a sketch of a {}.", "a drawing of a {}.")]
    names = {folder_of("run", 0, {"model.templates": given}).name for given in templates}
    assert len(names) == 2 and all(len(name.encode()) < 255 for name in names)


def test_values_that_differ_only_in_what_a_folder_s_name_cannot_hold_have_a_folder_each() -> None:
    names = {folder_of("run", 0, {"model.templates": [given]}).name for given in ("a {}", "a {}?")}
    assert len(names) == 2


def test_a_point_is_known_again_when_it_is_read_back_whatever_the_order_of_the_settings(tmp_path: Path) -> None:
    plan = Sweep(over={"prune.space": ["delta", "factor"], "prune.scope": ["layer"]})
    results = Results(tmp_path)
    points = [
        Result("merge", "sap", "photo", f"{number}", variant=variant)
        for number, (_, variant) in enumerate(plan.variants())
    ]
    for point in points:
        results.keep_predictions(point.measurement, Predictions(torch.ones(1, 1), torch.zeros(1), torch.zeros(1)))
        results.add(replace(point, metrics={"accuracy": 1.0, "macro_accuracy": 1.0, "ece": 0.0}))
    assert all(Results(tmp_path).has(point) for point in points)


def test_clients_that_fit_has_trained_are_used_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 3}))
    assert folder_of(tmp_path, 3, {"anchors.num_pairs": 4}) == tmp_path
    assert folder_of(tmp_path, 4, {}) == tmp_path / "seed_4"
    assert folder_of(tmp_path, 3, {"model.rank": 4}) == tmp_path / "seed_3,model.rank=4"


def test_all_stands_for_every_method_there_is() -> None:
    sap = SAP(sparsity=0.7)
    methods = Sweep(methods="all").labelled(sap)
    assert list(methods) == list(METHODS)
    assert methods["sap"] is sap


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--sweep.methods=[average,tise]", "error: sweep.methods: no method 'tise'; there are average, "),
        ("--sweep.seeds=[]", "error: sweep.seeds is empty"),
        ("--sweep.sparsities=[0.5,2]", "error: sweep.sparsities must lie in [0, 1], got 2.0"),
        ("--sweep.unseen=[clipart]", "error: sweep.unseen clipart: no such domain"),
        ("--federation.unseen=[photo]", "error: --federation.unseen: sweep would ignore it; it is an option of fit"),
        ("--merge.method=ties", "error: --merge.method: sweep would ignore it; it is an option of fit, merge"),
        ("--seed_everything=3", "error: --seed_everything: sweep would ignore it; it is an option of fit, client, "),
    ],
)
def test_a_faulty_option_ends_in_one_line_and_exit_code_1(refusal, tmp_path, option, expected):
    assert refusal("sweep", option, f"--federation.run_dir={tmp_path}").startswith(expected)
    assert not list(tmp_path.rglob("uploads"))


@pytest.mark.parametrize(
    ("config", "refusal"),
    [
        ({"federation": {"unseen": ["photo"]}}, r"^federation\.unseen is for fit; name domains in sweep\.unseen$"),
        (
            {"federation": {"last_method": "ties"}},
            r"^federation\.last_method is for fit; name methods in sweep\.methods$",
        ),
        ({"merge": {"method": "ties"}}, r"^merge\.method is for fit and merge; name methods in sweep\.methods$"),
    ],
)
def test_what_a_sweep_names_otherwise_is_refused_in_a_config_file_too(run, tmp_path, config, refusal):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=refusal):
        run("sweep", f"--config={tmp_path / 'config.yaml'}", f"--federation.run_dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_the_table_has_a_line_for_every_point(swept):
    lines = lines_of(swept)
    points = [(line["model"], line["sparsity"], line["unseen"], line["seed"]) for line in lines]
    clients = {"photo": ["cartoon", "painting", "sketch"], "sketch": ["cartoon", "painting", "photo"]}
    expected = [
        (model, sparsity, unseen, seed)
        for seed in "01"
        for unseen in UNSEEN
        for model, sparsity in [
            ("zero-shot", ""),
            *((f"client {name}", "") for name in clients[unseen]),
            ("average", ""),
            ("sap", "0.0"),
            ("sap", "0.5"),
        ]
    ]
    assert sorted(points) == sorted(expected)
    for line in lines:
        assert len(line["config"]) == 12 and line["versions"].startswith("lightning ") and line["variant"] == ""
    assert len({line["config"] for line in lines}) == 2, "a seed is a setting"
    assert len({line["commit"] for line in lines}) == 1
    merged = {
        line["seed"]: line["sources"] for line in lines if (line["model"], line["unseen"]) == ("average", "photo")
    }
    assert merged["0"] != merged["1"], "clients of another seed"
    assert [row.label for row in Results(swept).rows if row.model == "sap"][:2] == ["sap ρ=0", "sap ρ=0.5"]


def test_every_seed_has_clients_of_its_own_and_no_merged_models(swept):
    for seed in (0, 1):
        home = swept / f"seed_{seed}"
        assert yaml.safe_load((home / "config.yaml").read_text())["seed_everything"] == seed
        assert len(list(home.glob("uploads/*"))) == 4
        assert not (home / "merged").exists()
        assert not (home / "results.jsonl").exists()


def test_a_second_run_measures_nothing_and_changes_no_byte(swept, run):
    before, predictions = contents(swept), times(swept, "predictions/*")
    checkpoints = times(swept, "seed_*/clients/*/last.ckpt")
    run("sweep", *PLAN, f"--federation.run_dir={swept}")
    assert times(swept, "predictions/*") == predictions
    assert times(swept, "seed_*/clients/*/last.ckpt") == checkpoints
    assert contents(swept) == before


def test_killed_in_the_middle_it_continues_to_the_same_bytes(swept, options, run, tmp_path):
    # The config's hash is in the results, and the run folder in the config: both must bear one name.
    whole = tmp_path / "whole"
    swept.rename(whole)
    try:
        line = [sys.executable, "-m", "sap_lightning", "sweep", *options, *PLAN, f"--federation.run_dir={swept}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(line, cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (swept / "seed_1" / "clients" / "painting" / "last.ckpt").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert 0 < len(rows_of(swept)) < len(rows_of(whole)), "it should have been killed midway"
        first = times(swept, "seed_0/clients/*/last.ckpt") | times(swept, "predictions/*")
        run("sweep", *PLAN, f"--federation.run_dir={swept}")
        now = times(swept, "seed_0/clients/*/last.ckpt") | times(swept, "predictions/*")
        assert {name: now[name] for name in first} == first, "what was done is not done again"
        assert results_of(swept) == results_of(whole)
    finally:
        shutil.rmtree(swept, ignore_errors=True)
        whole.rename(swept)


def test_points_of_fit_are_known_and_its_clients_not_trained_again(copy, finished, run):
    checkpoints, measured = times(copy, "clients/*/last.ckpt"), times(copy, "predictions/*")
    run("sweep", *ONE_SEED, "--sweep.sparsities=[0.9,0.5]", f"--federation.run_dir={copy}")
    assert times(copy, "clients/*/last.ckpt") == checkpoints
    assert not list(copy.glob("seed_*"))
    now = times(copy, "predictions/*")
    assert {name: now[name] for name in measured} == measured
    assert len(now) - len(measured) == len(UNSEEN), "sap at 0.5 is all that is new"
    before, after = lines_of(finished), lines_of(copy)
    assert [line for line in after if line in before] == before, "rows of fit stay"
    (swept,) = [line for line in after if (line["model"], line["sparsity"], line["unseen"]) == ("sap", "0.5", "photo")]
    assert swept["config"] != before[0]["config"] or swept["commit"]
    by_name = {(row.label, row.unseen): row for row in Results(copy).rows}
    assert by_name["sap ρ=0.9", "photo"].metrics == by_name["sap", "photo"].metrics


def test_a_setting_of_the_server_trains_nothing_anew(copy, run):
    checkpoints = times(copy, "**/last.ckpt")
    over = ["--sweep.methods=[average,sap]", "--sweep.unseen=[photo]", '--sweep.over={"anchors.num_pairs": [4, 8]}']
    run("sweep", *over, f"--federation.run_dir={copy}")
    assert times(copy, "**/last.ckpt") == checkpoints
    rows = {row.label: row for row in Results(copy).rows if row.unseen == "photo"}
    assert {"average, num_pairs=4", "average, num_pairs=8", "sap, num_pairs=4", "sap, num_pairs=8"} <= rows.keys()
    assert rows["average, num_pairs=4"].measurement == rows["average"].measurement, "it looks at no anchors"
    assert rows["sap, num_pairs=8"].measurement == rows["sap"].measurement, "fit had 8 pairs too"
    assert rows["sap, num_pairs=4"].measurement != rows["sap"].measurement
    assert rows["sap, num_pairs=4"].settings["anchors"]["num_pairs"] == 4
    assert rows["sap, num_pairs=4"].variant == {"anchors.num_pairs": 4}


def test_a_setting_of_training_has_clients_of_its_own(copy, run):
    checkpoints = times(copy, "clients/*/last.ckpt")
    over = ["--sweep.methods=[average]", "--sweep.unseen=[photo]", '--sweep.over={"model.rank": [2]}']
    run("sweep", *over, f"--federation.run_dir={copy}")
    assert times(copy, "clients/*/last.ckpt") == checkpoints
    own = copy / "seed_0,model.rank=2"
    configs = [json.loads(file.read_text()) for file in own.glob("uploads/*/adapter_config.json")]
    assert [config["r"] for config in configs] == [2, 2, 2], "photo is not trained where it is unseen"
    rows = {row.label: row for row in Results(copy).rows if row.unseen == "photo"}
    assert not set(rows["average, rank=2"].sources) & set(rows["average"].sources)


def test_sap_that_prunes_nothing_and_does_not_rescale_is_the_average(copy, run):
    nothing = ["--sweep.methods=[average,sap]", "--sweep.sparsities=[0]", "--prune.rescale=none"]
    run("sweep", *nothing, "--sweep.unseen=[sketch]", f"--federation.run_dir={copy}")
    results = Results(copy)
    (average,) = [row for row in results.of("average") if row.unseen == "sketch"]
    (sap,) = results.of("sap ρ=0")
    assert sap.measurement != average.measurement
    one, other = (results.predictions(row) for row in (average, sap))
    assert (one.probabilities - other.probabilities).abs().max() < 1e-5
    assert one.images.tolist() == other.images.tolist()


def test_a_method_with_settings_of_its_own_has_a_row_of_its_own(copy, run):
    own = {"class_path": "sap_lightning.merging.SAP", "init_args": {"space": "factor", "rescale": "none"}}
    methods = [f"--sweep.methods={json.dumps(['sap', own])}", "--sweep.sparsities=[0.5]", "--sweep.unseen=[sketch]"]
    run("sweep", *methods, f"--federation.run_dir={copy}")
    rows = {row.label: row.settings for row in Results(copy).rows}
    assert rows["sap ρ=0.5"]["rescale"] == "l2"
    assert rows["sap (rescale none) ρ=0.5"]["rescale"] == "none"


def test_other_settings_of_training_are_refused_in_a_folder_of_clients(copy, run):
    with pytest.raises(InputError, match=r"was started with other settings: model\.rank was 8, is 4"):
        run("sweep", *ONE_SEED, "--model.rank=4", f"--federation.run_dir={copy}")


def test_values_that_the_table_would_show_alike_are_refused() -> None:
    with pytest.raises(InputError, match=r"^sweep\.over\.anchors\.root: two values are root=coco in the table"):
        Sweep(over={"anchors.root": ["/a/coco", "/b/coco"]})


def test_fit_after_a_sweep_in_its_folder_leaves_the_merged_models_too(copy, run) -> None:
    folder = f"--federation.run_dir={copy}"
    shutil.rmtree(copy / "merged")
    run("sweep", "--sweep.unseen=[sketch]", "--sweep.methods=[average,krum]", folder)
    assert not (copy / "merged").exists()
    run("fit", "--federation.unseen=sketch", folder)
    assert {path.name for path in (copy / "merged" / "sketch").iterdir()} == {"average", "sap"}


def test_noise_for_anchors_is_scored_anew_by_a_method_with_settings(finished, tmp_path, run) -> None:
    method = json.dumps(
        [
            {
                "class_path": "sap_lightning.merging.SAP",
                "init_args": {"space": "factor", "scope": "layer", "sparsity": 0.9},
            }
        ]
    )
    for name, noise in (("both", [False, True]), ("alone", [True])):
        over = json.dumps({"anchors.noise": noise})
        shutil.copytree(finished, tmp_path / name)
        options = [f"--sweep.methods={method}", f"--sweep.over={over}", "--sweep.unseen=[sketch]"]
        run("sweep", *options, f"--federation.run_dir={tmp_path / name}", "--federation.report=false")
    label = "sap (scope layer), noise=True"
    both, alone = (Results(tmp_path / name) for name in ("both", "alone"))
    (together,), (apart,) = both.of(label), alone.of(label)
    assert torch.equal(both.predictions(together).probabilities, alone.predictions(apart).probabilities)


def test_a_faulty_value_is_refused_before_anything_is_trained(tmp_path, run_in_shell) -> None:
    over = json.dumps({"prune.space": ["delta", "foo"]})
    # In a shell, as it is the parser that ends the program.
    done = run_in_shell("sweep", f"--sweep.over={over}", f"--federation.run_dir={tmp_path / 'run'}")
    assert done.returncode != 0 and "foo" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_fault_in_the_last_variant_is_found_before_the_first_is_measured(copy, run) -> None:
    run("sweep", *ONE_SEED, f"--federation.run_dir={copy}")
    before = contents(copy)
    over = json.dumps({"anchors.num_pairs": [4, 100_000]})
    with pytest.raises(InputError, match="num_pairs is 100000"):
        run("sweep", *ONE_SEED, f"--sweep.over={over}", f"--federation.run_dir={copy}")
    assert contents(copy) == before


def test_a_method_of_one_s_own_is_measured_again_when_its_code_has_changed(copy, run, tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "my_scaled_method.py"
    text = (
        "from sap_lightning.functional.consensus import weighted_sum\n"
        "from sap_lightning.merging import LayerwiseMethod\n\n"
        "class Scaled(LayerwiseMethod):\n"
        "    def merge_layer(self, layers, weights):\n"
        "        return weighted_sum(layers, [{scale} * w for w in weights])\n"
    )
    own = ["--sweep.methods=[{class_path: my_scaled_method.Scaled}]", "--sweep.unseen=[sketch]"]

    def accuracy(scale: float) -> float:
        module.write_text(text.format(scale=scale))
        sys.modules.pop("my_scaled_method", None)
        importlib.invalidate_caches()
        run("sweep", *own, f"--federation.run_dir={copy}")
        return [row for row in Results(copy).rows if row.model == "Scaled"][-1].metrics["accuracy"]

    assert accuracy(0.0) != accuracy(-50.0)
    sys.modules.pop("my_scaled_method", None)


def test_points_of_other_settings_stay_known(copy, run) -> None:
    def measured() -> int:
        return len([row for row in Results(copy).rows if row.model == "sap" and row.unseen == "sketch"])

    own = ["--sweep.unseen=[sketch]", "--sweep.methods=[average,sap]", f"--federation.run_dir={copy}"]
    own += ["--federation.report=false"]
    run("sweep", *own)
    known = measured()
    run("sweep", *own, "--anchors.num_pairs=4")
    assert measured() == known + 1
    before = times(copy, "predictions/*")
    run("sweep", *own)
    assert times(copy, "predictions/*") == before and measured() == known + 1
