"""The folder that `flwr run` takes: it names the two parts of this package that every site has installed itself."""

from __future__ import annotations

from pathlib import Path

from sap_lightning import __version__
from sap_lightning.files import new_folder

PROJECT_FILE = "pyproject.toml"
PROJECT = f"""\
# sap-lightning over Flower: flwr run <this folder> <connection> --stream. See docs/flower.md.

[project]
name = "sap-lightning-round"
version = "{__version__}"
description = "Asks every site for its adapter, merges and evaluates"
license = "Apache-2.0"
dependencies = []  # sites install sap-lightning[flower] themselves; nothing of it is sent to them

[tool.flwr.app]
publisher = "sap-lightning"

[tool.flwr.app.components]
serverapp = "sap_lightning.flower.server:app"
clientapp = "sap_lightning.flower.client:app"

[tool.flwr.app.config]
config = ""      # the server's YAML file, on the server's machine
quorum = 2       # uploads without which nothing is merged
timeout = 3600   # seconds to wait, in each round, for those that have not answered
"""


def write_app(folder: str) -> None:
    """Write the app folder that flwr run takes.

    Args:
        folder: must not exist.

    Raises:
        InputError: it exists, or cannot be written.
    """
    with new_folder(folder) as staging:
        (staging / PROJECT_FILE).write_text(PROJECT, encoding="utf-8")
    print(f"App: {Path(folder)}")
