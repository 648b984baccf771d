"""The command line: names, links and help; what the commands do is tested where it is done."""

from __future__ import annotations

import json
import logging
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from lightning.pytorch.callbacks import ProgressBar, Timer
from lightning.pytorch.loggers import CSVLogger
from places import REPOSITORY, SHAPES_CLIP

import sap_lightning
from sap_lightning import __main__, cli
from sap_lightning.callbacks.progress import TitledProgressBar
from sap_lightning.commands import COMMANDS
from sap_lightning.errors import InputError
from sap_lightning.federation.client import UNTRAINED
from sap_lightning.merging import METHODS, SAP, Average, MergeMethod, SAPAuto
from sap_lightning.modules import CLIPPromptModule
from sap_lightning.options import EVERY, TAKEN_BY, is_taken, takers

GROUPS = ("model", "data", "anchors", "prune", "merge", "federation")
EVERYWHERE = {"--config", "--print_config", "--model.base", "--trainer.precision", "--trainer.accelerator"}
OWN = {
    "fit": {
        "--seed_everything", "--model.rank", "--model.templates", "--data.root", "--data.class_names", "--anchors.root",
        "--anchors.num_pairs", "--prune.sparsity", "--prune.space", "--prune.scope", "--prune.reduction",
        "--prune.rescale", "--prune.rescale_scope", "--prune.scale", "--prune.loss", "--prune.sign_aware",
        "--merge.method", "--merge.weights", "--merge.reject_outliers", "--merge.format", "--merge.rank",
        "--federation.unseen", "--federation.run_dir", "--federation.poison.domain", "--trainer.max_epochs",
    },
    "sweep": {
        "--model.rank", "--data.root", "--anchors.root", "--prune.sparsity", "--merge.weights", "--federation.run_dir",
        "--federation.clients", "--sweep.methods", "--sweep.seeds", "--trainer.max_epochs",
    },
    "client": {
        "--seed_everything", "--model.rank", "--data.root", "--data.domain", "--data.augment", "--federation.run_dir",
        "--trainer.max_epochs",
    },
    "merge": {
        "--uploads", "--anchors.root", "--prune.sparsity", "--prune.rescale", "--merge.method", "--merge.output",
        "--merge.report", "--merge.push_to_hub", "--merge.rank", "--federation.run_dir", "--trainer.devices",
    },
    "test": {"--uploads", "--model.templates", "--data.root", "--data.domain", "--data.batch_size"},
    "predict": {"--uploads", "--predict.images", "--predict.output", "--data.class_names", "--data.batch_size"},
}  # fmt: skip
"""What each command takes; what only others take it neither shows nor accepts."""
FOREIGN = {
    "fit": ["--uploads", "--merge.output", "--data.domain", "--sweep.seeds", "--predict.output"],
    "sweep": ["--seed_everything", "--merge.method", "--merge.rank", "--federation.unseen", "--data.domain"],
    "client": ["--anchors.root", "--prune.sparsity", "--merge.method", "--federation.unseen", "--uploads"],
    "merge": ["--data.root", "--model.rank", "--model.templates", "--federation.clients", "--trainer.max_epochs"],
    "test": ["--anchors.root", "--merge.weights", "--data.augment", "--federation.run_dir", "--predict.images"],
    "predict": ["--data.root", "--prune.space", "--merge.output", "--trainer.devices", "--trainer.max_epochs"],
}
ONCE = [(name, option) for name, options in FOREIGN.items() for option in options]


@pytest.fixture
def main(monkeypatch) -> Iterator[Any]:
    """Runs ``python -m sap_lightning`` in this process and returns its exit code."""
    package = logging.getLogger("sap_lightning")
    before = package.handlers[:], package.level, package.propagate

    def run_main(*args: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["sap_lightning", *args])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
            __main__.main()
        return end.value.code

    yield run_main
    package.handlers[:], package.level, package.propagate = before


@pytest.fixture
def parsed(options):
    def parse(*more: str, command: str = "fit") -> cli.SapCLI:
        return cli.SapCLI(command, [*options, *more])

    return parse


def flat(config: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(config, dict):
        for key, value in config.items():
            yield from flat(value, f"{prefix}.{key}")
    else:
        yield prefix.removeprefix(".")


def settings_in(config: dict[str, Any]) -> set[str]:
    return {name for group in GROUPS for name in flat(config[group], group)}


@pytest.mark.parametrize("args", [[], ["train"], ["--config"]])
def test_without_a_known_command_there_is_the_table_of_commands(main, capsys, args):
    assert main(*args) == 2
    shown = capsys.readouterr().out
    assert "python -m sap_lightning COMMAND" in shown
    for name, function in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(function.__doc__)}$", shown, re.MULTILINE)


def test_a_mistyped_command_is_named(main, capsys):
    assert main("fti", "--config", "x.yaml") == 2
    assert capsys.readouterr().err == "error: no command 'fti'\n"


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_the_table_of_commands_and_no_error(main, capsys, flag):
    assert main(flag) == 0
    assert "fit" in capsys.readouterr().out


def test_a_faulty_setting_ends_in_one_line(main, options):
    assert main("fit", *options, "--prune.sparsity=2") == "error: prune.sparsity must lie in [0, 1], got 2.0"
    assert main("fit", *options, "--model.rank=0") == "error: model.rank must be at least 1, got 0"


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--seed_everything=-1", "seed_everything: -1 lies outside"),
        ("--seed_everything=4294967296", "seed_everything: 4294967296 lies outside"),
        ("--trainer.precision=bf16-true", "trainer.precision bf16-true: what is trained stays in float32"),
        ("--trainer.precision=64-true", "trainer.precision 64-true: what is trained stays in float32"),
        ("--federation.run_dir=a\0b", "federation.run_dir: has a NUL character"),
        ("--federation.run_dir=", "federation.run_dir is empty"),
        ("--data.root=", "data.root is empty"),
        ("--anchors.root=", "anchors.root is empty"),
        ("--trainer.max_epochs=-1", "training has no end in steps, by which the learning rate"),
        ("--federation.poison.kind=noise", "federation.poison noise to 1: of which client?"),
        ("--anchors.batch_size=0", "anchors.batch_size must be at least 1, got 0"),
        ("--data.batch_size=0", "data.batch_size must be at least 1, got 0"),
        ("--model.rank=4097", "model.rank 4097: the server takes adapters of rank 4096 at most"),
        ("--model.dropout=1", "model.dropout is 1"),
    ],
)
def test_what_would_end_in_a_traceback_or_after_training_is_refused_first(main, options, tmp_path, option, said):
    folder = f"--federation.run_dir={tmp_path / 'run'}"
    assert main("fit", *options, folder, option).startswith(f"error: {said}")


@pytest.mark.parametrize("setting", ["max_epochs", "max_steps", "limit_train_batches"])
@pytest.mark.parametrize("command", ["fit", "sweep", "client"])
def test_a_trainer_that_trains_nothing_is_refused_before_anything_is_written(refusal, tmp_path, command, setting):
    folder = tmp_path / "run"
    line = [f"--trainer.{setting}=0", f"--federation.run_dir={folder}"]
    said = f"error: trainer.{setting} is 0, at which nothing is trained; set it to 1 or more, or leave it out"
    assert refusal(command, *line) == said
    assert not folder.exists()
    in_sweep = [f"--sweep.over={{trainer.{setting}: [0, 1]}}", f"--federation.run_dir={folder}"]
    if command == "sweep":
        assert refusal(command, *in_sweep) == said and not folder.exists()


def test_the_version_is_said(main, capsys):
    assert main("--version") == 0
    assert capsys.readouterr().out == f"sap-lightning {version('sap-lightning')}\n"


def test_the_console_script_is_the_same_program():
    script = Path(sys.executable).with_name("sap-lightning")
    said = subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout
    assert said == f"sap-lightning {sap_lightning.__version__}\n"


def shown_by(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        COMMANDS[command](["--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", OWN)
def test_a_command_explains_itself_and_shows_its_own_options_and_no_more(capsys, command):
    shown = shown_by(command, capsys)
    assert f"python -m sap_lightning {command}" in shown
    assert " ".join(COMMANDS[command].__doc__.split()) in " ".join(shown.split())
    options = set(re.findall(r"^  (?:-\w[^,]*, )?(--[\w.]+)", shown, re.MULTILINE))
    assert OWN[command] | EVERYWHERE <= options
    assert {option for option in options if not is_taken(option.removeprefix("--"), command)} == set()
    assert not options & set(FOREIGN[command])
    titles = re.findall(r"^(?! )(?!usage)(.+):$", shown, re.MULTILINE)
    assert all(re.search(rf"^{re.escape(title)}:\n +\S", shown, re.MULTILINE) for title in titles), "an empty group"


@pytest.mark.parametrize("form", ["{}=1", "{} 1"])
@pytest.mark.parametrize(("command", "option"), ONCE)
def test_an_option_that_a_command_would_ignore_is_refused_with_those_that_take_it(main, command, option, form):
    error = main(command, *form.format(option).split())
    able = ", ".join(takers(option.removeprefix("--")))
    assert error == f"error: {option}: {command} would ignore it; it is an option of {able}"


def test_settings_that_the_commands_make_themselves_are_refused(main):
    assert main("fit", "--trainer.enable_checkpointing=false") == (
        "error: --trainer.enable_checkpointing: fit would ignore it; it is set by the commands themselves"
    )


def test_every_option_in_the_table_of_takers_is_one(capsys):
    shown = {command: shown_by(command, capsys) for command in EVERY}
    for option, commands in TAKEN_BY.items():
        for command in commands:
            assert option == "h" or re.search(rf"--{re.escape(option)}\b", shown[command]), (option, command)


def test_a_config_file_is_for_all_commands(parsed, options):
    for command in OWN:
        kept = [option for option in options if is_taken(option.partition("=")[0].removeprefix("--"), command)]
        more = ["--predict.images=photos"] if command == "predict" else []
        assert cli.SapCLI(command, [*kept, *more]).config_init.prune.sparsity == 0.9


@pytest.mark.parametrize(
    ("more", "command", "method"),
    [
        ([], "fit", SAPAuto()),
        ([], "merge", SAP()),
        (["--prune.sparsity=0.8"], "fit", SAP()),
        (["--prune.scale=0.5"], "fit", SAP(scale=0.5)),
        (["--merge.method=sap"], "fit", SAP()),
        (["--model.reach=false"], "fit", SAP()),
        (["--data.val_fraction=0"], "fit", SAP()),
        (["--federation.rounds=2", "--federation.epochs_per_round=1"], "fit", SAP()),
        (["--model=CLIPPromptModule"], "fit", Average()),
    ],
)
def test_what_merges_where_none_is_named(world, more, command, method):
    line = [f"--config={REPOSITORY / 'configs' / 'pacs.yaml'}", f"--model.base={SHAPES_CLIP}"]
    line += [f"--data.root={world / 'domains'}"] if command == "fit" else []
    made = cli.SapCLI(command, [*line, *more])
    assert made.merge.method == method
    again = cli.SapCLI(command, ["--config", yaml.safe_dump(made.settings())])
    assert again.merge.method == method, "what is recorded says it, too"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--merge.method=sap"], "null"),
        (["--merge.method=ties"], "null"),
        (["--merge.weights=uniform"], "uniform"),
    ],
)
def test_a_largest_share_is_refused_where_clients_count_alike(options, more, said):
    with pytest.raises(InputError, match=rf"max_share 0\.5 is for merge\.weights samples or reach, got {said}"):
        cli.SapCLI("fit", [*options, *more, "--merge.max_share=0.5"])
    assert cli.SapCLI("fit", [*options, "--merge.method=sap_auto", "--merge.max_share=0.5"]).merge.max_share == 0.5


def test_the_seed_reaches_model_and_data(parsed):
    fit = parsed("--seed_everything=7")
    assert fit.model.seed == fit.datamodule.seed == 7


def test_the_base_and_the_templates_reach_every_part(parsed):
    fit = parsed('--model.templates=["a {} drawn"]')
    base = fit.model.base
    assert base.endswith("shapes_clip")
    assert fit.datamodule.base == fit.config_init.anchors.base == fit.merge.base == base
    assert fit.model.templates == fit.merge.templates == ["a {} drawn"]


def test_a_variant_takes_no_null_either(parsed):
    with pytest.raises(InputError, match=r"data\.augment: takes bool, got null"):
        parsed(command="sweep").varied({"data.augment": None})


def test_the_user_s_folder_is_meant_by_a_tilde_wherever_a_place_is_named(parsed, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/someone")
    file = tmp_path / "config.yaml"
    file.write_text("federation: {run_dir: ~/runs}")
    fit = parsed(f"--config={file}", "--model.base=~/base", "--anchors.root=~/anchors")
    home = "/home/someone"
    assert fit.model.base == fit.datamodule.base == fit.config_init.anchors.base == fit.merge.base == f"{home}/base"
    assert (fit.config_init.federation.run_dir, fit.config_init.anchors.root) == (f"{home}/runs", f"{home}/anchors")


def test_a_linked_setting_has_no_option_of_its_own(parsed):
    with pytest.raises(InputError, match=r"data\.seed.*seed_everything"):
        parsed("--data.seed=3")


def methods_settings(method: type[MergeMethod]) -> dict[str, Any]:
    """The constructor's arguments and their defaults, as a config has them."""
    return method().settings


OTHERS = sorted(METHODS.keys() - {"sap"})
FIRST_SETTINGS = [
    (name, setting)
    for name in OTHERS
    for setting, default in list(methods_settings(METHODS[name]).items())[:1]
    if not isinstance(default, str)  # of methods on top of others: see tests/merging/test_on_top.py
]


@pytest.mark.parametrize("line", [["--merge.method", "{}"], ["--merge.method={}"]], ids=["NAME", "=NAME"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_merge_method_is_known_by_its_name(parsed, name, line):
    fit = parsed(*(part.format(name) for part in line))
    assert type(fit.merge.method) is METHODS[name]
    assert fit.settings()["merge"]["method"].get("init_args", {}) == methods_settings(METHODS[name])


@pytest.mark.parametrize(("name", "setting"), FIRST_SETTINGS)
def test_a_merge_method_s_settings_are_options_of_their_own(parsed, name, setting):
    default = methods_settings(METHODS[name])[setting]
    other = default[:1] if isinstance(default, list) else default
    if isinstance(default, float):
        other = default / 2 if default < 1 else 2 * default  # shares stay shares
    fit = parsed(f"--merge.method={name}", f"--merge.method.{setting}={json.dumps(other)}")
    assert fit.settings()["merge"]["method"]["init_args"] == methods_settings(METHODS[name]) | {setting: other}
    assert fit.merge.method.settings[setting] == other


def test_every_setting_of_a_merge_method_reaches_it(parsed):
    options = ["sparsity=0.5", "scale=2", "variant=mergekit", "majority=frequency"]
    fit = parsed("--merge.method=ties", *(f"--merge.method.{option}" for option in options))
    settings = {"sparsity": 0.5, "scale": 2.0, "variant": "mergekit", "majority": "frequency"}
    assert fit.merge.method.settings == settings


def test_no_merge_method_is_sap_as_the_group_prune_says(parsed):
    for line in ([], ["--merge.method", "sap"], ["--merge.method=ties", "--merge.method=sap"], ["--merge.method=null"]):
        fit = parsed(*line, "--prune.sparsity=0.3", "--prune.rescale=l1")
        assert fit.merge.method == SAP(sparsity=0.3, space="factor", rescale="l1")


def test_sap_s_config_file_is_sap_as_the_group_prune_says(parsed):
    file = REPOSITORY / "configs" / "merge" / "sap.yaml"
    assert parsed(f"--config={file}", "--prune.space=singular").merge.method == SAP(space="singular")


@pytest.mark.parametrize(
    "line",
    [
        ["--merge.method.class_path=sap_lightning.merging.SAP"],
        ["--merge.method=sap_lightning.merging.SAP", "--prune.sparsity=0.95"],
        ["--merge.method.class_path=sap_lightning.merging.SAP", "--merge.method.init_args.sparsity=0.8"],
        ["--merge.method=sap", "--merge.method.sparsity=0.9"],
        ["--merge.method", "SAP"],
    ],
)
@pytest.mark.parametrize("command", ["fit", "merge"])
def test_settings_of_sap_stand_in_the_group_prune_alone(run, tmp_path, command, line):
    rest = ["--uploads", "/nowhere"] if command == "merge" else []
    with pytest.raises(InputError, match=r"merge\.method: the settings of sap have their place in the group prune"):
        run(command, *line, f"--federation.run_dir={tmp_path / 'run'}", *rest)
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize("command", ["fit", "merge"])
@pytest.mark.parametrize("name", ["ties", "sap_auto"])
def test_settings_of_the_group_prune_beside_another_method_are_refused(run, tmp_path, command, name):
    rest = ["--uploads", "/nowhere"] if command == "merge" else []
    with pytest.raises(InputError, match=r"--prune\.sparsity: merge\.method is not sap, so nothing would use it"):
        run(command, f"--merge.method={name}", "--prune.sparsity=0.95", f"--federation.run_dir={tmp_path}/run", *rest)


@pytest.mark.parametrize("line", [["--prune.space=factor"], ["--sweep.over", "{prune.space: [factor, delta]}"]])
def test_settings_of_the_group_prune_in_a_sweep_without_sap_are_refused(run, tmp_path, line):
    with pytest.raises(InputError, match=r"prune\.space: sweep\.methods does not name sap"):
        run("sweep", "--sweep.methods=[average,ties]", *line, f"--federation.run_dir={tmp_path}/run")


# The class of the clients


@pytest.mark.parametrize("line", [["--model", "CLIPPromptModule"], ["--model=sap_lightning.modules.CLIPPromptModule"]])
def test_a_class_of_clients_is_named_as_in_lightning_s_subclass_mode(parsed, line):
    fit = parsed(*line, "--model.tokens=4", "--model.memory.alpha=2", "--seed_everything=7")
    assert type(fit.model) is CLIPPromptModule and type(fit.merge.method) is Average
    assert (fit.model.tokens, fit.model.memory.alpha, fit.model.seed) == (4, 2.0, 7)
    assert fit.model.base == fit.datamodule.base == fit.merge.base
    assert fit.model.learning_rate == 0.002 and fit.model.weight_decay == 5e-4, "its own, not those of the LoRA's file"
    settings = fit.settings()["model"]
    assert settings["class_path"] == "sap_lightning.modules.clip_prompt.CLIPPromptModule"
    assert settings["init_args"]["tokens"] == 4 and "seed" not in settings["init_args"]


@pytest.mark.parametrize("command", ["fit", "client", "merge", "test"])
def test_what_a_config_file_says_of_other_clients_is_passed_over(command, tmp_path):
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("model: {class_path: CLIPPromptModule, init_args: {tokens: 3}}")
    pacs = REPOSITORY / "configs" / "pacs.yaml"
    for line in ([f"-c{prompts}", "--config", f"{pacs}"], [f"--config={pacs}", "-c", f"{prompts}"]):
        command_line = cli.SapCLI(command, line)
        assert type(command_line.model) is CLIPPromptModule and command_line.model.tokens == 3
        assert command_line.model.base == command_line.datamodule.base == "openai/clip-vit-base-patch16"


def test_settings_that_no_class_of_clients_has_are_not_passed_over(tmp_path):
    (tmp_path / "faulty.yaml").write_text("model: {rnak: 3}")
    with pytest.raises(InputError, match=r"model\.rnak: CLIPPromptModule has no such setting; it has base"):
        cli.SapCLI("fit", [f"--config={tmp_path / 'faulty.yaml'}", "--model=CLIPPromptModule"])


def test_the_settings_of_other_clients_are_a_config_file_of_theirs(parsed, tmp_path):
    fit = parsed("--model=CLIPPromptModule", "--model.class_position=front")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(fit.settings()))
    again = cli.SapCLI("fit", [f"--config={tmp_path / 'again.yaml'}"])
    assert again.settings() == fit.settings() and again.model.class_position == "front"


def test_the_usual_class_may_be_named_and_nothing_changes(parsed):
    assert parsed("--model=CLIPLoRAModule", "--model.rank=4").settings() == parsed("--model.rank=4").settings()


@pytest.mark.parametrize("name", ["CLIPPromtModule", "MergeModule", "lightning.Trainer", "no.such.Module"])
def test_an_unknown_class_of_clients_is_refused_with_those_there_are(main, options, name):
    said = (
        f"error: model {name}: no such class of clients; there are CLIPLoRAModule, CLIPPromptModule, or name your own"
    )
    assert main("fit", *options, f"--model={name}") == f"{said} by its path"


def test_settings_of_other_clients_are_checked_as_theirs(main, options):
    line = [*options, "--model=CLIPPromptModule"]
    assert main("fit", *line, "--model.tokens=x") == "error: model.tokens: takes int or null, got 'x'"
    assert main("fit", *line, "--model.rank=4").startswith("error: model.rank: CLIPPromptModule has no such setting")
    assert main("fit", *line, "--prune.sparsity=0.5").startswith("error: --prune.sparsity: merge.method is not sap")


def test_a_sweep_varies_settings_of_other_clients(parsed):
    other = parsed("--model=CLIPPromptModule", command="sweep").varied({"model.init_args.tokens": 2})
    assert type(other.model) is CLIPPromptModule and other.model.tokens == 2


@pytest.mark.parametrize("name", ["merge.rank", "data.domain", "trainer.enable_checkpointing"])
def test_what_a_sweep_would_ignore_cannot_be_gone_through(run, tmp_path, name):
    with pytest.raises(InputError, match=rf"--{re.escape(name)}: sweep would ignore it"):
        run("sweep", "--sweep.over", f"{{{name}: [1, 2]}}", f"--federation.run_dir={tmp_path}/run")


@pytest.mark.parametrize("name", ["data.seed", "model.base.x", "prune", "federation.poison", "merge", "model.rnak"])
def test_what_is_no_single_setting_cannot_be_gone_through(run, tmp_path, name):
    with pytest.raises(InputError, match=rf"sweep\.over\.{re.escape(name)}: no setting of its own"):
        run(
            "sweep",
            "--sweep.methods=[sap]",
            "--sweep.over",
            f"{{{name}: [1, 2]}}",
            f"--federation.run_dir={tmp_path}/r",
        )


@pytest.mark.parametrize(
    ("command", "line", "setting"),
    [
        ("fit", ["--data={domain: photo}"], "data.domain"),
        ("test", ["--trainer", "{precision: 32-true, max_epochs: 3}"], "trainer.max_epochs"),
        ("sweep", ["--merge", "{rank: 3}"], "merge.rank"),
    ],
)
def test_a_group_that_is_given_whole_is_judged_by_what_stands_in_it(main, command, line, setting):
    assert main(command, *line).startswith(f"error: --{setting}: {command} would ignore it; ")


@pytest.mark.parametrize("line", ["--merge.meth=ties", "--prune.spars=0.5", "--seed=3"])
def test_an_abbreviated_option_is_not_guessed(parsed, line):
    with pytest.raises(InputError, match=rf"^{line.partition('=')[0].lstrip('-')}: no such option; "):
        parsed(line)


def test_what_a_command_does_not_use_of_a_config_file_is_not_judged(parsed, tmp_path):
    (tmp_path / "sap.yaml").write_text("merge: {method: {class_path: sap_lightning.merging.SAP}}")
    assert cli.SapCLI("test", [f"--config={tmp_path / 'sap.yaml'}"]).uploads == []


@pytest.mark.parametrize(("given", "uploads"), [("merged", ["merged"]), ("[a, b]", ["a", "b"]), ("null", [])])
def test_uploads_may_stand_in_a_config_file(tmp_path, given, uploads):
    (tmp_path / "uploads.yaml").write_text(f"uploads: {given}")
    assert cli.SapCLI("test", [f"--config={tmp_path / 'uploads.yaml'}"]).uploads == uploads


def test_every_command_is_in_the_table_of_takers():
    assert set(EVERY) == set(COMMANDS) - {"flower"}, "which has options of its own"


def test_a_variation_changes_what_it_names_and_all_that_is_linked_to_it(parsed):
    whole = parsed("--prune.sparsity=0.3", command="sweep")
    other = whole.varied({"seed_everything": 5, "model.rank": 2, "anchors.num_pairs": 4, "model.targets": ["v_proj"]})
    assert (other.model.rank, other.model.targets, other.config_init.anchors.num_pairs) == (2, ["v_proj"], 4)
    assert other.model.seed == other.datamodule.seed == 5
    assert other.merge.method.sparsity == 0.3
    assert (whole.model.rank, whole.model.seed, whole.config_init.anchors.num_pairs) == (8, 0, 8)
    expected = whole.settings()
    expected["seed_everything"], expected["anchors"]["num_pairs"] = 5, 4
    expected["model"] |= {"rank": 2, "targets": ["v_proj"]}
    assert other.settings() == expected


def test_an_unknown_setting_cannot_be_varied(parsed):
    with pytest.raises(InputError, match=r"^model\.rnak: no such option; did you mean model\.rank\?$"):
        parsed(command="sweep").varied({"model.rnak": 2})


def test_a_merge_method_of_one_s_own_is_named_by_its_class_path(parsed, tmp_path, monkeypatch):
    (tmp_path / "own_merge.py").write_text(
        "from sap_lightning.merging import Average\n"
        "class Half(Average):\n"
        "    def __init__(self, share: float = 0.5) -> None:\n"
        "        self.share = share\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    method = parsed("--merge.method=own_merge.Half", "--merge.method.share=0.25").merge.method
    assert (method.name, method.settings) == ("Half", {"share": 0.25})


@pytest.mark.parametrize("line", [["--merge.method", "tise"], ["--merge.method=tise"]])
def test_an_unknown_merge_method_is_refused_with_those_there_are(main, options, line):
    error = main("fit", *options, *line)
    assert error.startswith(f"error: merge.method tise: no such method; there are {', '.join(METHODS)}; ")


def test_a_class_with_a_setting_that_it_lacks_in_one_mapping_is_told_how_to_ask(main, options):
    given = '{"class_path": "sap_lightning.merging.TIES", "init_args": {"densiti": 0.2}}'
    error = main("fit", *options, f"--merge.method={given}")
    assert error.startswith(f"error: merge.method {given}: names no class that Python can import, or a setting that ")


@pytest.mark.parametrize("command", ["fit", "sweep"])
def test_weights_in_numbers_are_refused_where_uploads_have_no_order(main, options, command):
    error = main(command, *options, "--merge.weights=[0.5,0.5]")
    assert error.startswith("error: merge.weights [0.5, 0.5]: numbers are for the uploads that the command merge names")


def test_a_client_takes_a_config_with_weights_in_numbers(options, tmp_path):
    (tmp_path / "shared.yaml").write_text("merge: {weights: [0.5, 0.5]}")
    kept = [option for option in options if is_taken(option.partition("=")[0].removeprefix("--"), "client")]
    parsed = cli.SapCLI("client", [f"--config={tmp_path / 'shared.yaml'}", *kept, "--data.domain=photo"])
    assert parsed.config_init.merge.weights == [0.5, 0.5]


def test_a_faulty_setting_of_a_merge_method_ends_in_one_line(main, options):
    error = main("fit", *options, "--merge.method=ties", "--merge.method.sparsity=2")
    assert error == "error: merge.method.sparsity must lie in [0, 1], got 2.0"


@pytest.mark.parametrize(("name", "setting"), FIRST_SETTINGS)
def test_a_setting_of_a_merge_method_of_another_type_is_refused_by_name(parsed, name, setting):
    with pytest.raises(InputError, match=rf"^merge\.method\.{setting}: takes .*, got 'three'$"):
        parsed(f"--merge.method={name}", f"--merge.method.{setting}=three")


def test_settings_are_plain_values_without_links(parsed):
    settings = parsed("--prune.sparsity=0.5").settings()
    assert settings["prune"]["sparsity"] == 0.5
    assert "base" not in settings["data"] and "seed" not in settings["model"] and "config" not in settings
    assert yaml.safe_load(yaml.safe_dump(settings)) == settings


def test_configured_callbacks_and_logger_stay_beside_the_command_s_own(parsed, tmp_path):
    fit = parsed(
        "--trainer.callbacks=lightning.pytorch.callbacks.Timer",
        "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        f"--trainer.logger.save_dir={tmp_path}",
    )
    own = L.Callback()
    trainers = [fit.make_trainer(callbacks=[own], logger=False) for _ in range(2)]
    for trainer in trainers:
        assert own in trainer.callbacks
        assert sum(isinstance(callback, Timer) for callback in trainer.callbacks) == 1
        assert isinstance(trainer.logger, CSVLogger)
    timers = [callback for trainer in trainers for callback in trainer.callbacks if isinstance(callback, Timer)]
    assert timers[0] is not timers[1], "each training has callbacks of its own"


def test_each_trainer_has_the_configured_list_of_callbacks_once(parsed, tmp_path):
    listed = [{"class_path": "Timer"}, {"class_path": "LearningRateMonitor"}]
    (tmp_path / "callbacks.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": listed}}))
    fit = parsed(f"--config={tmp_path / 'callbacks.yaml'}")
    for trainer in [fit.make_trainer(enable_progress_bar=False) for _ in range(2)]:
        names = [type(callback).__name__ for callback in trainer.callbacks]
        assert names.count("Timer") == names.count("LearningRateMonitor") == names.count("ModelCheckpoint") == 1
        assert not any(isinstance(callback, ProgressBar) for callback in trainer.callbacks)


@pytest.mark.parametrize(
    ("option", "said"),
    [("accelerator=tpu", "torch_xla"), ("strategy=dpp", "'dpp'"), ("devices=0", "devices")],
)
def test_what_lightning_says_of_a_trainer_option_ends_in_one_line(main, options, option, said):
    told = main("fit", *options, f"--trainer.{option}")
    assert told.startswith("error: trainer: ") and said in told and "\n" not in told


def test_an_option_wins_over_a_config_file_wherever_it_stands(tmp_path):
    files = [tmp_path / "first.yaml", tmp_path / "second.yaml"]
    files[0].write_text("{prune: {sparsity: 0.1, scale: 3.0}, merge: {method: null, output: null}}")
    files[1].write_text("prune: {sparsity: 0.2}")
    first, second = map(str, files)
    for line in (
        ["--merge.method", "ties", "--config", first, f"--config={second}", "--merge.output=out"],
        ["--config", first, "--merge.method=ties", "--merge.output", "out", "-c", second],
        ["--merge.method=ties", f"-c={first}", "--merge.output=out", f"-c{second}"],
    ):
        command = cli.SapCLI("merge", line)
        assert type(command.merge.method).__name__ == "TIES" and command.config_init.merge.output == "out"
        assert (command.config_init.prune.sparsity, command.config_init.prune.scale) == (0.2, 3.0)


def test_a_trial_with_few_batches_trains_on_few_and_measures_all(parsed):
    few = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    cli = parsed(*few)
    assert cli.make_trainer().limit_train_batches == 2
    trainer = cli.make_trainer(**UNTRAINED)
    assert (trainer.limit_test_batches, trainer.limit_val_batches) == (1.0, 1.0)


def test_a_progress_bar_that_is_turned_off_stays_off(parsed):
    fit = parsed("--trainer.enable_progress_bar=false")
    trainer = fit.make_trainer(callbacks=[TitledProgressBar("client")], enable_progress_bar=True)
    assert not any(isinstance(callback, ProgressBar) for callback in trainer.callbacks)


def test_another_process_makes_trainers_as_they_were_configured(parsed, tmp_path):
    file = tmp_path / "trainer.yaml"
    file.write_text(
        yaml.safe_dump({"trainer": {"min_epochs": 3, "callbacks": [{"class_path": "LearningRateMonitor"}]}})
    )
    given = ["--merge.method=ties", "--trainer.precision=bf16-mixed", "--trainer.limit_train_batches=3"]
    sent = pickle.dumps(cli.TrainerMaker(parsed(f"--config={file}", *given)))
    file.unlink()
    trainer = pickle.loads(sent)(logger=False, limit_train_batches=2)
    assert (trainer.min_epochs, trainer.precision, trainer.limit_train_batches) == (3, "bf16-mixed", 2)
    assert trainer.logger is None
    assert [type(callback).__name__ for callback in trainer.callbacks].count("LearningRateMonitor") == 1


def test_a_client_without_a_domain_is_told_which_there_are(run, tmp_path):
    with pytest.raises(InputError, match=r"data\.domain is not set; choose one of cartoon, painting, photo, sketch"):
        run("client", f"--federation.run_dir={tmp_path}")


def test_a_merge_without_an_output_is_refused_before_anything_is_read(run):
    with pytest.raises(InputError, match=r"merge\.output is not set"):
        run("merge", "--uploads", "/nowhere")


def printed(*args: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    with pytest.raises(SystemExit):
        COMMANDS["fit"]([*args, "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    return {name: value for name, value in config.items() if name != "config"}


def test_the_main_config_names_every_setting_at_its_default(capsys):
    file = REPOSITORY / "configs" / "pacs.yaml"
    written, defaults = yaml.safe_load(file.read_text()), printed(capsys=capsys)
    assert settings_in(written) == settings_in(defaults)
    assert printed(f"--config={file}", capsys=capsys) == defaults | {
        "federation": defaults["federation"] | {"run_dir": "runs/pacs"}
    }


def test_an_overlay_says_only_what_is_other_than_the_defaults(capsys):
    overlay = yaml.safe_load((REPOSITORY / "configs" / "shapes.yaml").read_text())
    defaults = printed(capsys=capsys)
    for group, settings in overlay.items():
        for name, value in settings.items():
            assert name in defaults[group] and defaults[group][name] != value


def test_the_main_config_explains_every_group_or_its_keys():
    lines = (REPOSITORY / "configs" / "pacs.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")
    for group in (*GROUPS, "trainer"):
        at = next(number for number, line in enumerate(lines) if line.startswith(f"{group}:"))
        assert "#" in lines[at] or "#" in lines[at + 1], group
