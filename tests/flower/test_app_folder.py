"""The folder that `flwr run` takes."""

from __future__ import annotations

import zipfile
from io import BytesIO

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.supercore.object_ref import load_app

from sap_lightning.commands import flower
from sap_lightning.errors import InputError
from sap_lightning.flower.server import run_config_from


@pytest.fixture
def app(tmp_path):
    flower(["init", str(tmp_path / "round")])
    return tmp_path / "round"


def test_flower_finds_both_parts_in_the_installed_package(app):
    config, warnings = load_and_validate(app / "pyproject.toml")
    assert warnings == []
    components = config["tool"]["flwr"]["app"]["components"]
    kinds = {"clientapp": ClientApp, "serverapp": ServerApp}
    assert components.keys() == kinds.keys()
    for name, kind in kinds.items():
        assert isinstance(load_app(components[name], ImportError, app), kind)


def test_its_settings_are_those_of_a_run_but_for_the_server_s_file(app):
    config, _ = load_and_validate(app / "pyproject.toml")
    defaults = config["tool"]["flwr"]["app"]["config"]
    assert defaults.pop("config") == ""
    assert run_config_from(defaults | {"config": "server.yaml"}).quorum == 2


def test_no_code_of_the_package_is_sent_to_the_sites(app):
    names = zipfile.ZipFile(BytesIO(build_fab_from_disk(app))).namelist()
    assert sorted(names) == [".info/CONTENT", "pyproject.toml"]


def test_a_folder_that_stands_is_left_alone(app):
    before = (app / "pyproject.toml").read_bytes()
    with pytest.raises(InputError, match="already exists"):
        flower(["init", str(app)])
    assert (app / "pyproject.toml").read_bytes() == before


@pytest.mark.parametrize("line", [[], ["init"], ["run", "folder"]])
def test_another_command_line_is_told_what_there_is(line, capsys):
    with pytest.raises(SystemExit) as end:
        flower(line)
    assert end.value.code == 2
    assert "python -m sap_lightning flower" in capsys.readouterr().err
