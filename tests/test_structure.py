"""The rooms of the package: imports run down one order of rooms, and in no circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from places import REPOSITORY

PACKAGE = REPOSITORY / "sap_lightning"
ORDER = (
    ("functional", "errors"),
    ("escapes",),
    ("files", "fingerprints", "console"),
    ("data",),
    ("figures", "instruction_results", "io", "results"),
    ("models",),
    ("merging",),
    ("checkpoints",),
    ("compression",),
    ("modules",),
    ("callbacks",),
    ("federation",),
    ("reporting",),
    ("option_errors", "options"),
    ("config_files",),
    ("command_cli", "fuse"),
    ("cli", "instruction_cli"),
    ("flower",),
    ("commands",),
    ("__main__",),
)
"""Rooms, and modules beside them, from the ground up; those of one line do not import each other."""
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    parts = ("sap_lightning", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(file) for file in MODULES}


def imports_of(file: Path) -> set[str]:
    """Modules of the package that a file imports, also inside functions and for types alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            both = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (both & NAMES) | ({str(node.module)} if both - NAMES else set())
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & NAMES


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_every_room_has_its_floor():
    assert {room_of(name) for name in NAMES} - {"__init__"} == set(FLOOR)


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_no_import_runs_up(file):
    own = room_of(name_of(file))
    if own == "__init__":
        assert imports_of(file) == set()
        return
    up = {
        module
        for module in imports_of(file)
        if (room := room_of(module)) not in (own, "__init__") and FLOOR[room] >= FLOOR[own]
    }
    assert up == set()


def test_no_circle_is_closed():
    try:
        TopologicalSorter({name_of(file): imports_of(file) for file in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' → '.join(error.args[1])}")


def test_functional_imports_nothing_of_ours_but_itself():
    for file in (PACKAGE / "functional").glob("*.py"):
        assert {room_of(module) for module in imports_of(file)} <= {"functional"}
