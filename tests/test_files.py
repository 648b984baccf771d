from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import REPOSITORY
from safetensors.torch import load_file

from sap_lightning.errors import InputError
from sap_lightning.files import (
    append_bytes,
    as_json,
    cache_folder,
    clear_unfinished_at,
    folder_named,
    locked,
    new_folder,
    refuse_existing,
    write_bytes,
    write_csv,
    write_json,
    write_tensors,
    write_text,
)


def test_a_new_folder_appears_with_all_that_was_put_into_it(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "down" / "folder"
    with new_folder(target) as staging:
        (staging / "file").write_text("content")
        assert not target.exists()
    assert (target / "file").read_text() == "content"
    assert list(target.parent.iterdir()) == [target]


def test_nothing_is_left_when_filling_it_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "folder") as staging:
        (staging / "half").write_text("written")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "precious").write_text("content")


def make_file(path: Path) -> None:
    path.write_text("content")


def make_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [make_folder, make_file, make_dangling_link])
def test_what_already_stands_is_refused_and_kept(tmp_path: Path, make) -> None:
    target = tmp_path / "target"
    make(target)
    before = [(path.name, path.lstat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))]
    with pytest.raises(InputError, match=r"target: already exists"):
        refuse_existing(target)
    with pytest.raises(InputError, match=r"target: already exists"), new_folder(target):
        pytest.fail("there is nothing to fill")
    assert [(path.name, path.lstat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))] == before


def test_of_two_that_write_one_folder_the_second_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with pytest.raises(InputError, match="folder: cannot be written"), new_folder(target) as slower:
        (slower / "file").write_text("slower")
        with new_folder(target) as quicker:
            (quicker / "file").write_text("quicker")
    assert (target / "file").read_text() == "quicker"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_inside_a_file_cannot_be_written(tmp_path: Path) -> None:
    make_file(tmp_path / "file")
    with pytest.raises(InputError, match=r"file/folder: cannot be written"), new_folder(tmp_path / "file" / "folder"):
        pytest.fail("there is nowhere to write")


def test_a_run_folder_that_is_a_file_is_refused_in_one_line(tmp_path: Path) -> None:
    make_file(tmp_path / "file")
    with pytest.raises(InputError, match=r"file: cannot be written \("), locked(tmp_path / "file"):
        pytest.fail("there is nothing to hold")


def test_text_replaces_a_file_in_one_step_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with path.open() as reader:
        write_text(path, "new · ρ")
        assert reader.read() == "old", "who reads the old file must not see a half of the new one"
    assert path.read_text(encoding="utf-8") == "new · ρ"
    assert list(tmp_path.iterdir()) == [path]


def test_bytes_of_a_name_that_are_no_utf_8_can_be_written_and_read_back_from_json(tmp_path: Path) -> None:
    write_text(tmp_path / "text", "caf\udce9")
    assert (tmp_path / "text").read_text(encoding="utf-8") == r"caf\udce9"
    write_json(tmp_path / "json", {"name": "caf\udce9"})
    assert json.loads((tmp_path / "json").read_text(encoding="utf-8")) == {"name": "caf\udce9"}


def test_equal_content_gives_equal_json_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "one", {"b": [1, 0.1], "a": {"y": "ρ", "x": None}})
    write_json(tmp_path / "other", {"a": {"x": None, "y": "ρ"}, "b": [1, 0.1]})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    assert json.loads((tmp_path / "one").read_text(encoding="utf-8")) == {"a": {"x": None, "y": "ρ"}, "b": [1, 0.1]}


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "file", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "file", {"folder": tmp_path})
    assert (tmp_path / "file").read_text() == "1\n"


def test_a_folder_that_is_held_is_refused_to_another_command_until_it_is_free(tmp_path):
    refused = pytest.raises(InputError, match=r"run: another command is writing there")
    with locked(tmp_path / "run"), refused, locked(tmp_path / "run"):
        pass
    with locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


def test_a_folder_below_which_another_command_writes_is_refused(tmp_path):
    below = tmp_path / "run" / "clients" / "photo"
    refused = pytest.raises(InputError, match=r"photo: another command is writing there")
    with locked(below), refused, locked(tmp_path / "run"):
        pytest.fail("it may not be held")
    with locked(tmp_path / "run"), locked(below):
        assert below.is_dir(), "a command may hold both"


def kill_while_it_writes(folder: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from sap_lightning.files import new_folder, replacing\n"
        "with new_folder(Path(sys.argv[1], 'model')) as model, replacing(Path(sys.argv[1], 'file')) as file:\n"
        "    (model / 'tensors').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, folder], cwd=REPOSITORY).returncode == -signal.SIGKILL
    assert len(list(folder.iterdir())) == 2


def test_what_a_killed_command_left_unfinished_is_cleared_away_by_the_next(tmp_path: Path) -> None:
    below = tmp_path / "run" / "merged"
    below.mkdir(parents=True)
    kill_while_it_writes(below)
    make_file(below / ".hidden")
    make_file(below / "thesis.unfinished")
    with locked(tmp_path / "run"):
        assert {path.name for path in below.iterdir()} == {".hidden", "thesis.unfinished"}


def test_what_is_unfinished_of_one_name_is_cleared_away_alone(tmp_path: Path) -> None:
    with new_folder(tmp_path / "photo") as photo, new_folder(tmp_path / "photo.2") as other:
        clear_unfinished_at(tmp_path / "photo")
        assert not photo.exists() and other.exists()
        photo.mkdir()


def test_what_is_unfinished_of_another_name_is_not_looked_into(tmp_path: Path) -> None:
    with new_folder(tmp_path / "sketch") as beside, new_folder(beside / "photo") as within:
        clear_unfinished_at(tmp_path / "photo")
        assert within.exists(), "its writer may take its name away at any moment"


def test_a_line_is_added_to_a_file(tmp_path: Path) -> None:
    make_file(tmp_path / "file")
    append_bytes(tmp_path / "file", b" and more")
    assert (tmp_path / "file").read_text() == "content and more"


def test_on_a_full_disk_a_file_stays_as_it_is(small_disk: Path) -> None:
    file, much = small_disk / "file", bytes(4_000_000)
    make_file(file)
    for write in (write_bytes, append_bytes):
        with pytest.raises(InputError, match=r"file: cannot be written \(No space left on device\); check "):
            write(file, much)
    with (
        pytest.raises(InputError, match=r"folder: cannot be written \(No space"),
        new_folder(small_disk / "folder") as new,
    ):
        (new / "file").write_bytes(much)
    assert file.read_text() == "content" and list(small_disk.iterdir()) == [file]


@pytest.mark.parametrize("write", [lambda path: write_bytes(path, b""), lambda path: new_folder(path).__enter__()])
def test_where_nothing_may_be_written_is_said_in_one_line(small_disk: Path, write) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for path in (small_disk / "path", small_disk / "folder" / "path"):
        with pytest.raises(InputError, match=r"path: cannot be written \(Read-only file system\)"):
            write(path)
    with pytest.raises(InputError, match=r"disk: cannot be written \(Read-only"), locked(small_disk):
        pytest.fail("there is nothing to hold")


def test_content_and_name_are_on_the_disk_before_anyone_relies_on_them(tmp_path: Path, monkeypatch) -> None:
    synced: list[Path] = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (synced.append(Path(os.readlink(f"/proc/self/fd/{file}"))), fsync(file))
    )
    write_text(tmp_path / "file", "content")
    unfinished, folder = synced
    assert unfinished.name.startswith(".file.") and folder == tmp_path
    synced.clear()
    with new_folder(tmp_path / "folder") as staging:
        make_file(staging / "file")
    assert synced == [staging / "file", staging, tmp_path]
    synced.clear()
    append_bytes(tmp_path / "file", b"more")
    assert synced == [tmp_path / "file"]


def test_a_csv_file_is_the_same_on_every_system_and_quotes_what_it_must(tmp_path: Path) -> None:
    write_csv(tmp_path / "file", [["name", "share"], ['a "b", c', 0.5], ["ρ", None]])
    assert (tmp_path / "file").read_bytes() == 'name,share\n"a ""b"", c",0.5\nρ,\n'.encode()


def test_what_json_does_not_know_becomes_text() -> None:
    assert as_json({"folder": Path("runs"), "sizes": (1, 2), 3: None}) == {"folder": "runs", "sizes": [1, 2], "3": None}


def test_the_cache_is_where_the_environment_says_or_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAP_LIGHTNING_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.setenv("SAP_LIGHTNING_CACHE", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/sap_lightning")


def test_tensors_come_back_from_a_file_in_a_folder_that_was_not_there(tmp_path: Path) -> None:
    file, matrix = tmp_path / "deep" / "down" / "tensors.safetensors", torch.arange(6.0).view(2, 3)
    write_tensors(file, {"transposed": matrix.T, "labels": torch.tensor([1, 2])})
    read = load_file(file)
    assert torch.equal(read["transposed"], matrix.T) and torch.equal(read["labels"], torch.tensor([1, 2]))
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("name", ["", ".", "/", "..", "a/..", "a\0b"])
def test_a_new_folder_has_a_name(name: str) -> None:
    with pytest.raises(InputError, match=r"^fuse.output .*: is no name of a new folder; give one"):
        folder_named("fuse.output", name)
    assert folder_named("fuse.output", "a/b/") == Path("a/b")
