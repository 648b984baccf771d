"""What the README tells a person to type, typed."""

from __future__ import annotations

import re
import shlex
import sys
from types import ModuleType
from typing import Any

import pytest
import yaml
from places import REPOSITORY

from sap_lightning import options
from sap_lightning.commands import COMMANDS
from sap_lightning.merging import Average

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
LINES = [" ".join(line.split()) for line in re.findall(r"python -m sap_lightning ([^`]+?)(?=\n[^-\s]|\n\n|`)", README)]
LINES = [line for line in LINES if "--help" not in line]
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def my_methods(monkeypatch) -> None:
    """The module that the README takes for a person's own."""
    module = ModuleType("my_methods")
    module.Mine = type("Mine", (Average,), {"__module__": "my_methods"})
    monkeypatch.setitem(sys.modules, "my_methods", module)


def printed(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The configuration that a command line comes to."""
    command, *args = shlex.split(line)
    with pytest.raises(SystemExit) as end:
        COMMANDS[command]([*args, "--print_config"])
    shown = capsys.readouterr()
    assert not end.value.code, shown.err
    return shown.out


def test_every_command_is_shown():
    assert {line.split()[0] for line in LINES} == set(COMMANDS)


@pytest.mark.parametrize("line", [line for line in LINES if line.split()[0] in options.EVERY])
def test_a_command_line_is_understood(line, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    config = yaml.safe_load(printed(line, capsys))
    for option, value in re.findall(r"--([\w.]+) (\S+)", line):
        if option not in ("config", "uploads"):
            found = config
            for key in option.split("."):
                found = found[key]
            if option == "merge.method":
                found, value = found["class_path"], options.with_class_paths([f"--{option}", value])[-1]
            assert str(found) == value or found == yaml.safe_load(value), option


@pytest.mark.parametrize("option", sorted(set(re.findall(r"`(--[^`]+)`", README))))
def test_an_option_in_the_text_is_understood(option, capsys, monkeypatch, my_methods):
    monkeypatch.chdir(REPOSITORY)
    if " " in option:
        command, *_ = options.takers(option.split()[0].removeprefix("--"))
        printed(f"{command} --config configs/pacs.yaml {option}", capsys)
    else:
        shown = ""
        for command in COMMANDS:
            with pytest.raises(SystemExit):
                COMMANDS[command](["--help"])
            shown += capsys.readouterr().out
        assert re.search(rf"{re.escape(option)}\b", shown)


def test_the_python_examples_run_as_they_are_written(finished, world, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "sap_lightning").symlink_to(REPOSITORY / "sap_lightning")
    (tmp_path / "runs" / "shapes").symlink_to(finished)
    (tmp_path / "runs" / "shapes_world").symlink_to(world)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_photos").symlink_to(world / "domains" / "photo")
    names: dict[str, Any] = {}
    for example in BLOCKS:
        exec(compile(example, "README.md", "exec"), names)
    assert names["probabilities"].shape == (len(names["images"].names), 3)
    assert (tmp_path / "runs" / "merged" / "adapter_model.safetensors").is_file()


def test_every_link_leads_to_a_file():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


def test_every_make_target_is_there():
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert targets
    makefile = (REPOSITORY / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
