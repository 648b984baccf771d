"""``fit`` for clients that are tuned on instructions, from its command line to what it leaves behind."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from llava import conversations, tiny_llava
from places import REPOSITORY
from safetensors.torch import load_file

from sap_lightning.commands import COMMANDS
from sap_lightning.data.instructions import InstructionDataModule
from sap_lightning.errors import InputError
from sap_lightning.federation.systems import SYSTEMS
from sap_lightning.instruction_cli import InstructionCLI, tunes_on_instructions
from sap_lightning.instruction_results import InstructionResults

CONFIG = REPOSITORY / "configs" / "pilot_shapes.yaml"
CLIENTS = {"vqa_a": "vqa", "caption_a": "caption"}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("options")
    base, root = tiny_llava(folder / "base"), conversations(folder / "clients", CLIENTS, count=3)
    (root / "vqa_a" / "train.jsonl").rename(root / "anchors.jsonl")
    (root / "images").symlink_to(root / "vqa_a" / "images")
    (root / "vqa_a" / "train.jsonl").write_bytes((root / "vqa_a" / "test.jsonl").read_bytes())
    return [
        f"--config={CONFIG}", f"--model.base={base}", f"--data.root={root}", "--federation.rounds=1",
        "--federation.systems=[fedit,pilot]", "--federation.methods=[average,sap]",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    COMMANDS["fit"]([*options, f"--federation.run_dir={folder}"])
    return folder


def test_it_leaves_tables_answers_figures_and_events(finished):
    table = (finished / "table.md").read_text()
    assert re.findall(r"^\| (\w+) \|", table, re.MULTILINE) == [
        "system", "base", "fedit", "pilot", "base", "average", "sap",
    ]  # fmt: skip
    page = (finished / "report.html").read_text()
    (config,) = finished.glob("configs/*.yaml")
    assert f"--config {config} --federation.run_dir {finished}_again" in page
    assert InstructionCLI([f"--config={config}"]).settings() == yaml.safe_load(config.read_text())
    assert {file.name for file in (finished / "figures").iterdir()} == {
        "score.png", "score.svg", "perplexity.png", "perplexity.svg",
    }  # fmt: skip
    assert list(finished.glob("server/pilot/events.out.*"))
    with (finished / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["system"], row["turn"]) for row in rows} == {
        ("base", "0"), ("fedit", "1"), ("fedit", "2"), ("pilot", "1"), ("pilot", "2"), ("average", "1"), ("sap", "1"),
    }  # fmt: skip
    assert all(0 <= float(row["score"]) <= 1 and float(row["perplexity"]) > 1 for row in rows)


def test_two_processes_train_and_measure_as_one_does(tmp_path):
    base, root = tiny_llava(tmp_path / "base"), conversations(tmp_path / "clients", CLIENTS, count=4)
    for file in root.glob("*/train.jsonl"):  # answers of other lengths, so that processes have other numbers of tokens
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for number, line in enumerate(lines):
            line["conversations"][1]["value"] += number**2 * " red"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for file in root.glob("*/test.jsonl"):  # of which one process has a single one
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    line = [
        f"--config={CONFIG}", f"--model.base={base}", f"--data.root={root}", "--federation.rounds=1",
        "--federation.systems=[fedit,pilot]", "--federation.methods=[]", "--data.batch_size=4", "--model.dropout=0",
        "--federation.epochs_per_round=3",  # AdamW's first step says of a gradient little but its sign
    ]  # fmt: skip
    COMMANDS["fit"]([*line, f"--federation.run_dir={tmp_path / 'one'}"])
    two = [f"--federation.run_dir={tmp_path / 'two'}", "--trainer.devices=2", "--trainer.strategy=ddp"]
    command = [sys.executable, "-m", "sap_lightning", "fit", *line, *two]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Tuned together") == done.stdout.count("Report:") == 1
    for way, within in (("fedit/turns/1", 1e-4), ("first/task", 1e-4), ("pilot/turns/1", 0.02)):
        for client in CLIENTS:
            for file in ("adapter_model.safetensors", "connector.safetensors"):
                alone, both = (load_file(tmp_path / run / way / "uploads" / client / file) for run in ("one", "two"))
                assert max((alone[key] - both[key]).abs().max() for key in alone) < within, (way, client, file)
    alone, both = (InstructionResults(tmp_path / run).all for run in ("one", "two"))
    for one, other in zip(alone, both, strict=True):
        assert (other.system, other.turn, other.client) == (one.system, one.turn, one.client)
        assert [said["answer"] for said in other.said] == [said["answer"] for said in one.said]
        assert other.perplexity == pytest.approx(one.perplexity, rel=1e-3)
        assert other.perplexity_other_image == pytest.approx(one.perplexity_other_image, rel=1e-3)


def test_settings_are_held_to(finished, options):
    with pytest.raises(InputError, match=r"was started with other settings: model.init_args.rank was 8, is 4"):
        COMMANDS["fit"]([*options, f"--federation.run_dir={finished}", "--model.rank=4"])


def test_ways_may_be_added_and_nothing_is_trained_again(finished, options, capsys):
    COMMANDS["fit"]([*options, f"--federation.run_dir={finished}", "--federation.systems=[fedit,local]"])
    assert {"local", "fedit"} <= {file.name for file in finished.glob("answers/*")}


def test_the_config_s_values_are_taken(tmp_path):
    cli = InstructionCLI([f"--config={CONFIG}", "--model.losses.form=raw", "--data.scores={diagnosis: exact}"])
    assert cli.model.losses.form == "raw" and cli.model.losses.difference == 0.1
    assert cli.datamodule.score_of("diagnosis") == "exact"
    assert cli.federation().systems == [name for name in SYSTEMS if name != "fedit_exact"]


def test_the_plain_config_names_every_setting_at_its_default():
    """But for seeds, which follow from seed_everything."""
    plain = InstructionCLI([f"--config={CONFIG.with_name('pilot.yaml')}"]).settings()
    default = InstructionCLI(["--model=VLMLoRAModule"]).settings()
    assert default["data"].pop("scores") is None
    assert InstructionDataModule().scores == plain["data"].pop("scores")
    assert plain["model"]["init_args"] == default["model"]["init_args"]
    assert (plain["data"], plain["federation"]) == (default["data"], default["federation"])
    written = yaml.safe_load(CONFIG.with_name("pilot.yaml").read_text())
    assert set(written["federation"]) == set(default["federation"])
    assert set(written["data"]) == {*default["data"], "scores"} - {"seed"}
    assert set(written["model"]["init_args"]) == set(default["model"]["init_args"]) - {"seed"}


def test_the_class_is_found_in_a_config_or_on_the_command_line(tmp_path):
    assert tunes_on_instructions([f"--config={CONFIG}"])
    assert tunes_on_instructions(["--model", "VLMLoRAModule"])
    assert not tunes_on_instructions([f"--config={REPOSITORY / 'configs' / 'shapes.yaml'}"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--federation.unseen=photo", "federation.unseen"),
        ("--anchors.num_pairs=3", "anchors.num_pairs"),
        ("--trainer.max_epochs=3", "federation.epochs_per_round says how long"),
        ("--data.longest_answer=0", "data.longest_answer must be at least 1"),
        ("--data.batch_size=0", "data.batch_size must be at least 1"),
        ("--model.rank=0", "model.rank must be at least 1"),
        ("--model.rank=4097", "model.rank 4097: the server takes adapters of rank 4096 at most"),
        ("--model.dropout=1", "model.dropout is 1"),
        ("--model.losses.balance=-1", "model.losses.balance must be at least 0"),
        ("--trainer.max_steps=0", "trainer.max_steps is 0, at which nothing is trained"),
        ("--data.root=", "data.root is empty"),
        ("--federation.systems=[none]", "federation.systems"),
        ("--federation.methods=[none]", "federation.methods none: no such method"),
        ("--trainer.precision=bf16-true", "what is trained stays in float32"),
        ("--data.scores={vqa: nothing}", "data.scores"),
    ],
)
def test_a_faulty_option_is_named(options, tmp_path, option, message):
    with pytest.raises(InputError, match=re.escape(message)):
        COMMANDS["fit"]([*options, f"--federation.run_dir={tmp_path}", option])


def test_other_commands_do_not_know_these_clients():
    with pytest.raises(InputError, match=r"no such class of clients; .* VLMLoRAModule is for fit alone"):
        COMMANDS["client"]([f"--config={CONFIG}"])


def test_the_config_s_groups_are_those_of_the_command():
    config = yaml.safe_load(CONFIG.read_text())
    assert set(config) == {"model", "data", "federation", "trainer"}
