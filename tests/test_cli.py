"""The command line: names, links and help; what the commands do is tested where it is done."""

from __future__ import annotations

import inspect
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import yaml
from lightning.pytorch.callbacks import ProgressBar, Timer
from lightning.pytorch.loggers import CSVLogger
from places import REPOSITORY

from sap_lightning import __main__, cli
from sap_lightning.callbacks.progress import TitledProgressBar
from sap_lightning.errors import InputError
from sap_lightning.federation.one_shot import UNTRAINED
from sap_lightning.merging import METHODS, MergeMethod

COMMANDS = {
    "fit": cli.fit,
    "sweep": cli.sweep,
    "client": cli.client,
    "merge": cli.merge,
    "test": cli.test,
    "predict": cli.predict,
}
GROUPS = ("model", "data", "anchors", "prune", "merge", "federation")
CONTRACT = [
    "--model.base",
    "--model.rank",
    "--model.alpha",
    "--data.root",
    "--data.domain",
    "--data.class_names",
    "--anchors.root",
    "--anchors.num_pairs",
    "--prune.sparsity",
    "--prune.space",
    "--prune.scope",
    "--prune.reduction",
    "--prune.loss",
    "--prune.sign_aware",
    "--merge.method",
    "--merge.rescale",
    "--merge.weights",
    "--merge.output",
    "--merge.report",
    "--merge.push_to_hub",
    "--federation.unseen",
    "--federation.run_dir",
    "--trainer.max_epochs",
    "--seed_everything",
]


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
    def parse(*more: str, command: str = "fit", **extra: Any) -> cli.SapCLI:
        return cli.SapCLI(COMMANDS[command], [*options, *more], **extra)

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


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_the_table_of_commands_and_no_error(main, capsys, flag):
    assert main(flag) == 0
    assert "fit" in capsys.readouterr().out


def test_a_faulty_setting_ends_in_one_line(main, options):
    assert main("fit", *options, "--prune.sparsity=2") == "error: prune.sparsity must lie in [0, 1], got 2.0"
    assert main("fit", *options, "--model.rank=0") == "error: model.rank must be at least 1, got 0"


@pytest.mark.parametrize(
    ("command", "own"),
    [
        ("fit", set()),
        ("client", set()),
        ("merge", {"--uploads"}),
        ("test", {"--adapter"}),
        ("predict", {"--adapter", "--images", "--class_names", "--output"}),
    ],
)
def test_every_command_explains_itself_and_has_the_contract_s_options(capsys, command, own):
    with pytest.raises(SystemExit) as end:
        COMMANDS[command](["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert f"python -m sap_lightning {command}" in shown
    assert " ".join(COMMANDS[command].__doc__.split()) in " ".join(shown.split())
    for option in [*CONTRACT, *own]:
        assert re.search(rf"{re.escape(option)}\b", shown), option
    for foreign in {"--uploads", "--adapter", "--images"} - own:
        assert not re.search(rf"  {foreign} ", shown)


def test_the_seed_reaches_model_and_data(parsed):
    fit = parsed("--seed_everything=7")
    assert fit.model.seed == fit.datamodule.seed == 7


def test_the_base_and_the_templates_reach_every_part(parsed):
    fit = parsed('--model.templates=["a {} drawn"]')
    base = fit.model.base
    assert base.endswith("shapes_clip")
    assert fit.datamodule.base == fit.config_init.anchors.base == fit.config_init.merge.base == base
    assert fit.model.templates == fit.config_init.merge.templates == ["a {} drawn"]


def test_a_linked_setting_has_no_option_of_its_own(parsed, capsys):
    with pytest.raises(SystemExit):
        parsed("--data.seed=3")
    assert "data.seed" in capsys.readouterr().err


def methods_settings(method: type[MergeMethod]) -> dict[str, Any]:
    """The constructor's arguments and their defaults, as a config has them."""
    return {name: json.loads(json.dumps(p.default)) for name, p in inspect.signature(method).parameters.items()}


OTHERS = sorted(METHODS.keys() - {"sap"})
FIRST_SETTINGS = [(name, setting) for name in OTHERS for setting in list(methods_settings(METHODS[name]))[:1]]


@pytest.mark.parametrize("line", [["--merge.method", "{}"], ["--merge.method={}"]], ids=["NAME", "=NAME"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_merge_method_is_known_by_its_name(parsed, name, line):
    fit = parsed(*(part.format(name) for part in line))
    assert type(fit.config_init.merge.method) is METHODS[name]
    assert fit.settings()["merge"]["method"].get("init_args", {}) == methods_settings(METHODS[name])


@pytest.mark.parametrize(("name", "setting"), FIRST_SETTINGS)
def test_a_merge_method_s_settings_are_options_of_their_own(parsed, name, setting):
    default = methods_settings(METHODS[name])[setting]
    other = default[:1] if isinstance(default, list) else default / 2 if isinstance(default, float) else default
    fit = parsed(f"--merge.method={name}", f"--merge.method.{setting}={json.dumps(other)}")
    assert fit.settings()["merge"]["method"]["init_args"] == methods_settings(METHODS[name]) | {setting: other}
    assert getattr(fit.config_init.merge.method, setting) == other


def test_every_setting_of_a_merge_method_reaches_it(parsed):
    options = ["sparsity=0.5", "scale=2", "variant=mergekit", "majority=frequency"]
    fit = parsed("--merge.method=ties", *(f"--merge.method.{option}" for option in options))
    settings = {"sparsity": 0.5, "scale": 2.0, "variant": "mergekit", "majority": "frequency"}
    assert fit.config_init.merge.method.settings == settings


def test_no_merge_method_is_sap_as_the_group_prune_says(parsed):
    for line in ([], ["--merge.method", "sap"], ["--merge.method=ties", "--merge.method=sap"], ["--merge.method=null"]):
        fit = parsed(*line, "--prune.sparsity=0.3", "--merge.rescale=l1")
        assert fit.config_init.merge.method is None
        method = fit.config_init.prune.method_for(fit.config_init.merge)
        assert (method.name, method.sparsity, method.rescale) == ("sap", 0.3, "l1")


def test_a_merge_method_of_one_s_own_is_named_by_its_class_path(parsed, tmp_path, monkeypatch):
    (tmp_path / "own_merge.py").write_text(
        "from sap_lightning.merging import Average\n"
        "class Half(Average):\n"
        "    def __init__(self, share: float = 0.5) -> None:\n"
        "        self.share = share\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    method = parsed("--merge.method=own_merge.Half", "--merge.method.share=0.25").config_init.merge.method
    assert (method.name, method.settings) == ("Half", {"share": 0.25})


@pytest.mark.parametrize("line", [["--merge.method", "tise"], ["--merge.method=tise"]])
def test_an_unknown_merge_method_is_refused_with_those_there_are(main, options, line):
    error = main("fit", *options, *line)
    assert error.startswith(f"error: merge.method tise: no such method; there are {', '.join(METHODS)}; ")


def test_a_misspelled_setting_of_a_merge_method_is_refused_by_name(parsed, capsys):
    with pytest.raises(SystemExit) as end:
        parsed("--merge.method=ties", "--merge.method.sparsty=0.5")
    assert end.value.code == 2
    assert "sparsty" in capsys.readouterr().err


def test_a_faulty_setting_of_a_merge_method_ends_in_one_line(main, options):
    error = main("fit", *options, "--merge.method=ties", "--merge.method.sparsity=2")
    assert error == "error: merge.method.sparsity must lie in [0, 1], got 2.0"


def test_a_misspelled_option_is_refused_by_name(parsed, capsys):
    with pytest.raises(SystemExit) as end:
        parsed("--prune.sparsty=0.5")
    assert end.value.code == 2
    assert "prune.sparsty" in capsys.readouterr().err


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


def test_a_trial_with_few_batches_trains_on_few_and_measures_all(parsed):
    few = ["--trainer.limit_train_batches=2", "--trainer.limit_test_batches=1", "--trainer.limit_val_batches=1"]
    cli = parsed(*few)
    assert cli.make_trainer().limit_train_batches == 2
    trainer = cli.make_trainer(**UNTRAINED)
    assert (trainer.limit_test_batches, trainer.limit_val_batches) == (1.0, 1.0)


def test_a_progress_bar_that_is_turned_off_stays_off(parsed):
    fit = parsed("--trainer.enable_progress_bar=false")
    trainer = fit.make_trainer(callbacks=[TitledProgressBar("client")], enable_progress_bar=True)
    assert not any(isinstance(callback, ProgressBar) for callback in trainer.callbacks)


def test_a_client_without_a_domain_is_told_which_there_are(run, tmp_path):
    with pytest.raises(InputError, match=r"data\.domain is not set; choose one of cartoon, painting, photo, sketch"):
        run("client", f"--federation.run_dir={tmp_path}")


def test_a_merge_without_an_output_is_refused_before_anything_is_read(run):
    with pytest.raises(InputError, match=r"merge\.output is not set"):
        run("merge", "--uploads", "/nowhere")


@pytest.mark.parametrize("name", ["pacs", "shapes"])
def test_a_config_names_every_setting(capsys, name):
    file = REPOSITORY / "configs" / f"{name}.yaml"
    with pytest.raises(SystemExit):
        cli.fit([f"--config={file}", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert settings_in(yaml.safe_load(file.read_text())) == settings_in(printed)


@pytest.mark.parametrize("name", ["pacs", "shapes"])
def test_a_config_explains_every_group_or_its_keys(name):
    lines = (REPOSITORY / "configs" / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")
    for group in (*GROUPS, "trainer"):
        at = next(number for number, line in enumerate(lines) if line.startswith(f"{group}:"))
        assert "#" in lines[at] or "#" in lines[at + 1], group
