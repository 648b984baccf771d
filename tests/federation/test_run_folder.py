from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from damage import cut, empty, flip
from federation.runs import DOMAINS, shown_rows, times
from lightning.pytorch.utilities import rank_zero_only
from references import contents

from sap_lightning.errors import InputError
from sap_lightning.federation.run_folder import (
    CONFIG_FILE,
    SERVER_SETTINGS,
    RunFolder,
    is_held_to,
    read_settings,
    require_settings,
    write_settings,
)

CONFIG: dict[str, Any] = {
    "seed_everything": 0,
    "model": {"rank": 8, "targets": ["q_proj", "v_proj"]},
    "data": {"root": "images", "batch_size": 32},
    "anchors": {"num_pairs": 8},
    "prune": {"sparsity": 0.8},
    "federation": {"run_dir": "runs/a", "unseen": None},
}


def changed(**groups: dict[str, Any]) -> dict[str, Any]:
    return CONFIG | {name: CONFIG.get(name, {}) | values for name, values in groups.items()}


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run folder whose first client has a checkpoint."""
    require_settings(tmp_path, CONFIG)
    client = RunFolder(tmp_path).client("photo")
    client.mkdir(parents=True)
    (client / "last.ckpt").touch()
    return tmp_path


def test_everything_has_its_place() -> None:
    folder = RunFolder("run")
    assert folder.client("photo") == Path("run/clients/photo")
    assert folder.upload("photo") == Path("run/uploads/photo")
    assert folder.merged("photo", "sap") == Path("run/merged/photo/sap")
    assert folder.poisoned("photo-scale-1").upload("photo") == Path("run/poisoned/photo-scale-1/uploads/photo")


@pytest.mark.parametrize("domain", ["..", "../../x", "/abs/x", "", ".", "a/b", "photo\n"])
@pytest.mark.parametrize("place", ["client", "epochs", "upload", "merged"])
def test_no_domain_leads_out_of_the_folder(place: str, domain: str) -> None:
    rest = ["sap"] if place == "merged" else []
    with pytest.raises(InputError, match=r"^domain .*: its name must be at most 64 letters"):
        getattr(RunFolder("run"), place)(domain, *rest)


def test_settings_are_written_as_yaml_in_their_order(tmp_path: Path) -> None:
    require_settings(tmp_path / "run", CONFIG)
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written == CONFIG
    assert list(written) == list(CONFIG)


def test_of_several_processes_the_first_alone_writes_settings(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    write_settings(tmp_path / CONFIG_FILE, {"seed": 0})
    assert not list(tmp_path.iterdir())


def test_the_same_settings_are_held_to(begun: Path) -> None:
    before = (begun / "config.yaml").stat().st_mtime_ns
    require_settings(begun, CONFIG)
    assert (begun / "config.yaml").stat().st_mtime_ns == before


def test_every_difference_is_named(begun: Path) -> None:
    other = changed(model={"rank": 4, "targets": ["q_proj"]}, prune={"sparsity": 0.5}) | {"seed_everything": 1}
    with pytest.raises(InputError) as refused:
        require_settings(begun, other)
    for difference in (
        "model.rank was 8, is 4",
        "model.targets was ['q_proj', 'v_proj'], is ['q_proj']",
        "prune.sparsity was 0.8, is 0.5",
        "seed_everything was 0, is 1",
    ):
        assert difference in str(refused.value)
    assert "data" not in str(refused.value), "what is the same is not named"
    assert yaml.safe_load((begun / "config.yaml").read_text()) == CONFIG


def test_a_setting_that_is_new_or_gone_is_a_difference(begun: Path) -> None:
    with pytest.raises(InputError, match=r"prune\.space was None, is 'delta'"):
        require_settings(begun, changed(prune={"space": "delta"}))
    with pytest.raises(InputError, match=r"prune\.sparsity was 0\.8, is None"):
        require_settings(begun, CONFIG | {"prune": {}})


@pytest.mark.parametrize(
    "free",
    [
        {"federation": {"run_dir": "runs/b", "unseen": ["photo"]}},
        {"data": {"domain": "photo"}},
        {"merge": {"method": {"class_path": "sap_lightning.merging.ties.TIES", "init_args": {"sparsity": 0.8}}}},
        {"merge": {"reject_outliers": True}},
        {"federation": {"last_method": "ties"}},
        {"federation": {"rounds": 1, "share": 1.0, "aggregation": "flexlora", "optimizer": "reset"}},
        {"federation": {"clients": ["photo"]}},
        {"federation": {"parallel": 4}},
        {"merge": {"weights": "samples", "max_share": 0.5}},
        {"federation": {"poison": {"domain": "photo", "kind": "scale", "fraction": 0.5}}},
    ],
    ids=str,
)
def test_what_the_folder_does_not_depend_on_may_change(begun: Path, free: dict[str, Any]) -> None:
    require_settings(begun, changed(**free))
    assert yaml.safe_load((begun / "config.yaml").read_text()) == CONFIG


SERVERS = {"anchors": {"num_pairs": 4}, "prune": {"sparsity": 0.5}, "merge": {"format": "model"}}


def test_rounds_are_held_to(begun: Path) -> None:
    for name, value in {"rounds": 2, "epochs_per_round": 3, "total_epochs": 4, "ranks": {"photo": 2}}.items():
        with pytest.raises(InputError, match=rf"federation\.{name}.* was None, is {value if name != 'ranks' else 2}"):
            require_settings(begun, changed(federation={name: value}), SERVER_SETTINGS)


def test_clients_are_held_only_to_what_is_not_free(begun: Path) -> None:
    require_settings(begun, changed(**SERVERS) | {"sweep": {"seeds": [0, 1]}}, (*SERVER_SETTINGS, "sweep"))
    with pytest.raises(InputError, match=r"other settings: model\.rank was 8, is 4\. "):
        require_settings(begun, changed(**SERVERS, model={"rank": 4}), SERVER_SETTINGS)
    with pytest.raises(InputError, match=r"anchors\.num_pairs .*merge\.format .*prune\.sparsity"):
        require_settings(begun, changed(**SERVERS))
    with pytest.raises(InputError, match=r"data\.domain was None, is 'photo'"):
        require_settings(begun, changed(data={"domain": "photo"}), ())
    with pytest.raises(InputError, match=r"data\.batch_size was 32, is 4"):
        require_settings(begun, changed(data={"batch_size": 4}), SERVER_SETTINGS)


def test_one_merge_method_may_follow_another(begun: Path) -> None:
    for method in ({"class_path": "TIES", "init_args": {"sparsity": 0.8}}, {"class_path": "DARE"}, None):
        require_settings(begun, changed(merge={"method": method}))


def test_a_setting_whose_name_only_begins_like_a_free_one_is_held(begun: Path) -> None:
    with pytest.raises(InputError, match=r"merge\.methods was None, is 'ties'"):
        require_settings(begun, changed(merge={"methods": "ties"}))


def test_before_training_began_the_settings_may_still_change(tmp_path: Path) -> None:
    require_settings(tmp_path, CONFIG)
    require_settings(tmp_path, changed(model={"rank": 4}))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]["rank"] == 4


def test_an_upload_alone_holds_the_folder_to_its_settings(tmp_path: Path) -> None:
    require_settings(tmp_path, CONFIG)
    RunFolder(tmp_path).upload("photo").mkdir(parents=True)
    with pytest.raises(InputError, match=r"model\.rank"):
        require_settings(tmp_path, changed(model={"rank": 4}))


@pytest.mark.parametrize("damage", [cut, empty, flip])
def test_damaged_settings_are_named_and_written_anew(begun: Path, caplog, monkeypatch, damage) -> None:
    monkeypatch.setattr(logging.getLogger("sap_lightning"), "propagate", True)
    file = begun / "config.yaml"
    whole = file.read_bytes()
    damage(file)
    with pytest.raises(
        InputError, match=rf"{file}: has changed since it was written; fit, run as it was, writes it anew"
    ):
        read_settings(file)
    require_settings(begun, CONFIG)
    assert f"{file}: has changed" in caplog.text and file.read_bytes() == whole


def test_settings_that_an_earlier_version_wrote_are_held_to(begun: Path) -> None:
    (begun / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    assert is_held_to(begun, CONFIG)
    with pytest.raises(InputError, match=r"model\.rank was 8, is 4"):
        require_settings(begun, changed(model={"rank": 4}))


EARLIER = r"version before 0\.2.* use another --federation\.run_dir"


def test_a_folder_of_an_earlier_version_is_refused_whatever_the_settings(begun: Path) -> None:
    (begun / "results.json").write_text("[]")
    before = contents(begun)
    for config in (CONFIG, changed(model={"rank": 4})):
        with pytest.raises(InputError, match=EARLIER):
            require_settings(begun, config)
    assert contents(begun) == before


@pytest.fixture
def earlier(copy) -> Path:
    """A run of an earlier version: its points stand in results.json."""
    (copy / "results.jsonl").rename(copy / "results.json")
    (copy / ".lock").unlink(missing_ok=True)
    return copy


def refusal(run: Callable[..., None], folder: Path, *line: str) -> str:
    with pytest.raises(InputError, match=EARLIER) as refused:
        run(*line, f"--federation.run_dir={folder}")
    return str(refused.value)


ONE_SWEEP = ["sweep", "--sweep.methods=[average]", "--sweep.unseen=[sketch]"]


@pytest.mark.parametrize(
    "line",
    [["fit"], ["client", "--data.domain=photo"], ONE_SWEEP, [*ONE_SWEEP, "--sweep.seeds=[5]"]],
    ids=["fit", "client", "sweep", "sweep of other seeds"],
)
def test_a_run_of_an_earlier_version_is_refused_before_anything_is_written_there(earlier, run, monkeypatch, line):
    monkeypatch.setattr(L.Trainer, "fit", lambda *_, **__: pytest.fail("nothing is to be trained"))
    shutil.rmtree(earlier / "uploads" / "photo")
    before, written = contents(earlier), times(earlier, "**/*")
    said = refusal(run, earlier, *line)
    assert said.startswith(f"{earlier}: ") and "\n" not in said
    (earlier / ".lock").unlink(missing_ok=True)
    assert contents(earlier) == before and times(earlier, "**/*") == written


def test_not_even_a_lock_is_left_in_a_run_of_an_earlier_version(earlier, run):
    refusal(run, earlier, "fit")
    assert not (earlier / ".lock").exists()


def test_a_sweep_of_an_earlier_version_is_refused_to_a_client_too(run, tmp_path, monkeypatch):
    monkeypatch.setattr(L.Trainer, "fit", lambda *_, **__: pytest.fail("nothing is to be trained"))
    (tmp_path / "results.json").write_text("[]")
    refusal(run, tmp_path, "client", "--data.domain=photo")


def test_the_advice_to_copy_the_uploads_of_an_earlier_version_gives_its_table_without_training(earlier, run, tmp_path):
    new = tmp_path / "new"
    shutil.copytree(earlier / "uploads", new / "uploads")
    before = times(new, "uploads/**/*")
    run("fit", f"--federation.run_dir={new}", "--federation.report=false")
    assert not (new / "clients").exists(), "no client is trained again"
    assert times(new, "uploads/**/*") == before and len(list((new / "uploads").iterdir())) == len(DOMAINS)
    assert shown_rows(new) == shown_rows(earlier)
    assert (new / "table.md").read_text() == (earlier / "table.md").read_text()
