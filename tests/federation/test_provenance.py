from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

from sap_lightning.federation import provenance as installed
from sap_lightning.federation.provenance import provenance


def git(folder: Path, *arguments: str) -> str:
    person = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    line = ["git", "-C", str(folder), *person, *arguments]
    return subprocess.run(line, capture_output=True, check=True, text=True).stdout.strip()


def package_in(folder: Path) -> Path:
    """A copy of the module in a package below this folder."""
    package = folder / "sap_lightning" / "federation"
    package.mkdir(parents=True)
    return Path(shutil.copy(installed.__file__, package))


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("copied_provenance", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_repository_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A committed repository with the package at its top."""
    folder = tmp_path / "checkout"
    package_in(folder)
    (folder / "README.md").write_text("one\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "one")
    return folder


@pytest.fixture
def commit_of(checkout: Path) -> Callable[[], str]:
    module = load(checkout / "sap_lightning" / "federation" / "provenance.py")
    return lambda: module.provenance({})["commit"]


def test_the_config_counts_by_content_not_by_order() -> None:
    one = provenance({"b": {"y": 1, "x": [0.5, None]}, "a": Path("runs")})["config"]
    assert one == hashlib.sha256(b'{"a": "runs", "b": {"x": [0.5, null], "y": 1}}').hexdigest()[:12]
    assert provenance({"a": "runs", "b": {"x": [0.5, None], "y": 1}})["config"] == one
    assert provenance({"a": "runs", "b": {"x": [0.5, None], "y": 2}})["config"] != one


def test_versions_name_python_and_the_packages_in_alphabetical_order() -> None:
    versions = provenance({})["versions"]
    names = re.findall(r"([a-z-]+) \d\S*(?:, |$)", versions)
    assert names == ["lightning", "peft", "python", "sap-lightning", "torch", "torchmetrics", "transformers"]
    assert f"torch {version('torch')}," in versions


def test_a_package_that_is_not_installed_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "PACKAGES", ("no-such-package-anywhere",))
    assert provenance({})["versions"].startswith("no-such-package-anywhere unknown, python ")


def test_a_clean_checkout_is_named_by_its_commit(checkout: Path, commit_of: Callable[[], str]) -> None:
    (checkout / "runs").mkdir()
    (checkout / "runs" / "untracked.csv").write_text("x")
    assert re.fullmatch("[0-9a-f]{40}", commit_of())
    assert commit_of() == git(checkout, "rev-parse", "HEAD")


@pytest.mark.parametrize("stage", [False, True])
def test_a_changed_tracked_file_makes_it_dirty(checkout: Path, commit_of: Callable[[], str], stage: bool) -> None:
    (checkout / "README.md").write_text("two\n")
    if stage:
        git(checkout, "add", ".")
    assert commit_of() == git(checkout, "rev-parse", "HEAD") + "-dirty"
    git(checkout, "commit", "-q", "-a", "-m", "two")
    assert commit_of() == git(checkout, "rev-parse", "HEAD")


def test_a_hook_of_another_repository_changes_nothing(
    checkout: Path, commit_of: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = git(checkout, "rev-parse", "HEAD")
    git(tmp_path, "init", "-q", "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    assert commit_of() == expected


def test_the_commit_of_an_unrelated_repository_around_the_package_is_not_ours(checkout: Path) -> None:
    file = package_in(checkout / "venv" / "lib" / "site-packages")
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "vendored")
    assert load(file).provenance({})["commit"] == ""


def test_without_a_checkout_or_a_commit_there_is_none(tmp_path: Path) -> None:
    module = load(package_in(tmp_path / "plain"))
    assert module.provenance({})["commit"] == ""
    git(tmp_path / "plain", "init", "-q")
    assert module.provenance({})["commit"] == ""


def test_without_git_there_is_none(
    commit_of: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert commit_of()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of() == ""


def test_a_git_that_hangs_is_not_waited_for(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load(checkout / "sap_lightning" / "federation" / "provenance.py")
    slow = tmp_path / "bin" / "git"
    slow.parent.mkdir()
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", str(slow.parent), prepend=":")
    monkeypatch.setattr(module, "_SECONDS", 0.2)
    assert module.provenance({})["commit"] == ""
