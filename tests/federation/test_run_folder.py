from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sap_lightning.errors import InputError
from sap_lightning.federation.run_folder import SERVER_SETTINGS, RunFolder, hold_to

CONFIG: dict[str, Any] = {
    "seed_everything": 0,
    "model": {"rank": 8, "targets": ["q_proj", "v_proj"]},
    "data": {"root": "images", "num_workers": 0},
    "anchors": {"num_workers": 0},
    "prune": {"sparsity": 0.8},
    "federation": {"run_dir": "runs/a", "unseen": None},
}


def changed(**groups: dict[str, Any]) -> dict[str, Any]:
    return CONFIG | {name: CONFIG.get(name, {}) | values for name, values in groups.items()}


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run folder whose first client has a checkpoint."""
    hold_to(tmp_path, CONFIG)
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


def test_settings_are_written_as_yaml_in_their_order(tmp_path: Path) -> None:
    hold_to(tmp_path / "run", CONFIG)
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written == CONFIG
    assert list(written) == list(CONFIG)


def test_the_same_settings_are_held_to(begun: Path) -> None:
    before = (begun / "config.yaml").stat().st_mtime_ns
    hold_to(begun, CONFIG)
    assert (begun / "config.yaml").stat().st_mtime_ns == before


def test_every_difference_is_named(begun: Path) -> None:
    other = changed(model={"rank": 4, "targets": ["q_proj"]}, prune={"sparsity": 0.5}) | {"seed_everything": 1}
    with pytest.raises(InputError) as refused:
        hold_to(begun, other)
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
        hold_to(begun, changed(prune={"space": "delta"}))
    with pytest.raises(InputError, match=r"prune\.sparsity was 0\.8, is None"):
        hold_to(begun, CONFIG | {"prune": {}})


@pytest.mark.parametrize(
    "free",
    [
        {"data": {"num_workers": 4}},
        {"anchors": {"num_workers": 4}},
        {"federation": {"run_dir": "runs/b", "unseen": ["photo"]}},
        {"data": {"domain": "photo"}},
        {"merge": {"method": {"class_path": "sap_lightning.merging.ties.TIES", "init_args": {"sparsity": 0.8}}}},
        {"merge": {"report": True}},
        {"merge": {"reject_outliers": True}},
        {"federation": {"clients": ["photo"]}},
        {"federation": {"poison": {"domain": "photo", "kind": "scale", "fraction": 0.5}}},
    ],
    ids=str,
)
def test_what_the_folder_does_not_depend_on_may_change(begun: Path, free: dict[str, Any]) -> None:
    hold_to(begun, changed(**free))
    assert yaml.safe_load((begun / "config.yaml").read_text()) == CONFIG


SERVERS = {"anchors": {"num_pairs": 4}, "prune": {"sparsity": 0.5}, "merge": {"rescale": "l1"}}


def test_clients_are_held_only_to_what_is_not_free(begun: Path) -> None:
    hold_to(begun, changed(**SERVERS) | {"sweep": {"seeds": [0, 1]}}, (*SERVER_SETTINGS, "sweep"))
    with pytest.raises(InputError, match=r"other settings: model\.rank was 8, is 4\. "):
        hold_to(begun, changed(**SERVERS, model={"rank": 4}), SERVER_SETTINGS)
    with pytest.raises(InputError, match=r"anchors\.num_pairs .*merge\.rescale .*prune\.sparsity"):
        hold_to(begun, changed(**SERVERS))
    with pytest.raises(InputError, match=r"data\.num_workers"):
        hold_to(begun, changed(data={"num_workers": 4}), ())


def test_one_merge_method_may_follow_another(begun: Path) -> None:
    for method in ({"class_path": "TIES", "init_args": {"sparsity": 0.8}}, {"class_path": "DARE"}, None):
        hold_to(begun, changed(merge={"method": method}))


def test_a_setting_whose_name_only_begins_like_a_free_one_is_held(begun: Path) -> None:
    with pytest.raises(InputError, match=r"merge\.methods was None, is 'ties'"):
        hold_to(begun, changed(merge={"methods": "ties"}))


def test_before_training_began_the_settings_may_still_change(tmp_path: Path) -> None:
    hold_to(tmp_path, CONFIG)
    hold_to(tmp_path, changed(model={"rank": 4}))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]["rank"] == 4


def test_an_upload_alone_holds_the_folder_to_its_settings(tmp_path: Path) -> None:
    hold_to(tmp_path, CONFIG)
    RunFolder(tmp_path).upload("photo").mkdir(parents=True)
    with pytest.raises(InputError, match=r"model\.rank"):
        hold_to(tmp_path, changed(model={"rank": 4}))
