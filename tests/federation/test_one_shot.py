"""The whole job, by its real commands."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from damage import flip
from federation.runs import DOMAINS, SCALED, bytes_of_pruned, lines_of, outcome, stored, table, times
from places import REPOSITORY
from references import contents
from safetensors.torch import load_file

from sap_lightning.data.domains import DomainDataModule
from sap_lightning.errors import InputError
from sap_lightning.federation.evaluation import features_file
from sap_lightning.io.adapter import read_adapter, sha256_of, write_adapter
from sap_lightning.results import Results

CLIENTS = [f"client {domain}" for domain in DOMAINS]


def test_the_table_has_every_model_on_every_unseen_domain(finished):
    rows = table(finished)
    assert set(rows) == {"zero-shot", *CLIENTS, "average", "sap"}
    for model, accuracies in rows.items():
        expected = [domain for domain in DOMAINS if model != f"client {domain}"]
        assert list(accuracies) == expected, "a client has seen its own domain"
        assert all(0 <= accuracy <= 1 for accuracy in accuracies.values())


def test_a_line_of_results_csv_is_one_point_with_what_it_was_made_with(finished):
    lines = lines_of(finished)
    assert len(lines) == 4 * (1 + 3 + 2)
    assert list(lines[0]) == [
        "row", "model", "sparsity", "unseen", "seed", "condition", "variant", "accuracy", "macro_accuracy", "ece",
        "personal_accuracy", "rounds", "bytes", "rejected",
        "settings", "sources", "measurement", "config", "commit", "versions",
    ]  # fmt: skip
    for line in lines:
        assert line["seed"] == "0" and line["variant"] == line["rejected"] == ""
        assert 0 <= float(line["ece"]) <= 1 and 0 <= float(line["macro_accuracy"]) <= 1
        assert len(line["config"]) == 12 and "torch " in line["versions"]
        assert (finished / "predictions" / f"{line['measurement']}.safetensors").is_file()
        assert line["sparsity"] == ("0.9" if line["model"] == "sap" else "")
    assert len({line["measurement"] for line in lines}) == len(lines)
    sizes = {one: sum(map(len, contents(finished / "uploads" / one).values())) for one in DOMAINS}
    for line in lines:
        others = sum(size for one, size in sizes.items() if one != line["unseen"])
        expected = {"zero-shot": 0, "average": others, "sap": others}
        assert int(line["bytes"]) == expected.get(line["model"], sizes.get(line["model"].removeprefix("client ")))
        assert line["rounds"] == ("0" if line["model"] == "zero-shot" else "1")


def test_the_run_folder_holds_config_clients_uploads_and_merged_models(finished):
    assert yaml.safe_load((finished / "config.yaml").read_text())["prune"]["space"] == "factor"
    for domain in DOMAINS:
        assert (finished / "clients" / domain / "last.ckpt").is_file()
        assert {path.name for path in (finished / "uploads" / domain).iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "manifest.json",
        }
        for method in ("average", "sap"):
            assert {"adapter_model.safetensors", "merge.json", "README.md"} <= {
                path.name for path in (finished / "merged" / domain / method).iterdir()
            }


def test_without_a_method_and_settings_of_sap_the_clients_reach_decides(run, tmp_path):
    folder = tmp_path / "run"
    line = ["--config={prune: {sparsity: 0.8, space: delta}}", "--trainer.limit_train_batches=1"]
    line += ["--federation.unseen=[photo]", f"--federation.run_dir={folder}"]
    run("fit", *line)
    assert stored(folder, "sap_auto", "photo")["settings"]["weights"] == "reach"
    record = json.loads((folder / "merged" / "photo" / "sap_auto" / "merge.json").read_text())
    assert record["findings"]["won_at_home"] is not None and "sap_auto" in (folder / "report.html").read_text()
    before = outcome(folder)
    run("fit", *line)
    assert outcome(folder) == before


def test_running_again_changes_nothing(finished, run):
    before = contents(finished)
    checkpoints = times(finished, "clients/*/last.ckpt")
    run("fit", f"--federation.run_dir={finished}")
    assert contents(finished) == before
    assert times(finished, "clients/*/last.ckpt") == checkpoints


def features_on(unseen: str, run: Path) -> Path:
    """Those of zero-shot, which the report reads."""
    results = Results(run)
    (point,) = (row for row in results.of("zero-shot") if row.unseen == unseen)
    root = yaml.safe_load((run / "config.yaml").read_text())["data"]["root"]
    return features_file(results, point, DomainDataModule(root, unseen))


def test_damaged_files_of_a_run_are_named_and_made_anew_to_the_same_bytes(copy, finished, run, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sap_lightning"), "propagate", True)
    run("fit", f"--federation.run_dir={copy}")
    before, trained = contents(copy), times(copy, "uploads/*/*")
    damaged = [
        "config.yaml",
        "results.jsonl",
        "results.csv",
        "table.md",
        "merged/photo/sap/merge.json",
        "merged/sketch/average/adapter_model.safetensors",
        f"predictions/{lines_of(copy)[0]['measurement']}.safetensors",  # of zero-shot, which is not measured anew
        str(features_on("sketch", copy).relative_to(copy)),
    ]
    for name in damaged:
        flip(copy / name)
    run("fit", f"--federation.run_dir={copy}")
    after = {name: content for name, content in contents(copy).items() if not name.endswith(".damaged")}
    # What was measured anew stands at the end, once more where its model alone was damaged.
    for name in ("results.jsonl", "results.csv"):
        assert {*after.pop(name).split(b"\n")} == {*before.pop(name).split(b"\n")}
    before["config.yaml"] = before["config.yaml"].replace(bytes(finished), bytes(copy))
    assert after.pop("config.yaml").split(b"\n")[1:] == before.pop("config.yaml").split(b"\n")[1:]
    assert after == before and times(copy, "uploads/*/*") == trained
    for name in set(damaged) - {"results.csv", "table.md"}:
        assert f"{copy / name}" in caplog.text


def test_the_settings_that_a_row_names_by_their_hash_are_kept(copy):
    for line in lines_of(copy):
        settings = yaml.safe_load((copy / "configs" / f"{line['config']}.yaml").read_text())
        assert settings["prune"]["sparsity"] == 0.9 and "run_dir" not in settings["federation"]


@pytest.mark.parametrize("written", ["{world}/domains", "~/domains"])
def test_anchors_from_the_unseen_domain_are_refused(run, world, tmp_path, monkeypatch, written):
    monkeypatch.setenv("HOME", str(world))
    leak = [f"--anchors.root={written.format(world=world)}/photo", f"--federation.run_dir={tmp_path}"]
    with pytest.raises(InputError, match=r"anchors\.root .*photo holds images of photo, which is to be unseen"):
        run("fit", *leak)
    assert not (tmp_path / "uploads").exists()


def test_other_settings_are_refused_with_what_differs(finished, run):
    with pytest.raises(InputError, match=r"prune\.sparsity was 0\.9, is 0\.5"):
        run("fit", f"--federation.run_dir={finished}", "--prune.sparsity=0.5")


def test_one_unseen_domain_needs_no_client_of_its_own(finished, run, tmp_path):
    run("fit", "--federation.unseen=sketch", f"--federation.run_dir={tmp_path}")
    assert sorted(path.name for path in (tmp_path / "uploads").iterdir()) == ["cartoon", "painting", "photo"]
    assert table(tmp_path)["sap"]["sketch"] == table(finished)["sap"]["sketch"]


def test_an_unknown_unseen_domain_is_refused(run, tmp_path):
    with pytest.raises(InputError, match=r"clipart.*cartoon, painting, photo, sketch"):
        run("fit", "--federation.unseen=clipart", f"--federation.run_dir={tmp_path}")


def test_killed_during_the_second_client_it_continues_to_the_same_bits(options, run, tmp_path):
    two_epochs = ["--trainer.max_epochs=3", "--federation.unseen=[photo,sketch]"]
    # The config's hash is in the results, and the run folder in the config: both bear one name.
    halves = tmp_path / "run"
    run("fit", *two_epochs, f"--federation.run_dir={halves}")
    halves.rename(tmp_path / "whole")
    line = [sys.executable, "-m", "sap_lightning", "fit", *options, *two_epochs, f"--federation.run_dir={halves}"]
    process = subprocess.Popen(line, cwd=REPOSITORY, env=os.environ, stderr=subprocess.DEVNULL)
    second = halves / "clients" / "painting" / "last.ckpt"
    while not second.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (halves / "uploads" / "painting").exists(), "it should have been killed before the client was done"
    first = times(halves, "*/cartoon/*")
    run("fit", *two_epochs, f"--federation.run_dir={halves}")
    assert times(halves, "*/cartoon/*") == first
    assert outcome(halves) == outcome(tmp_path / "whole")


def test_two_processes_train_score_and_evaluate_as_one_does(finished, run_in_shell, tmp_path):
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--federation.unseen=sketch"]
    done = run_in_shell("fit", *two, *SCALED, f"--federation.run_dir={tmp_path}", timeout=300)
    assert done.returncode == 0, done.stderr
    for domain in ("cartoon", "painting", "photo"):
        one_process = load_file(finished / "uploads" / domain / "adapter_model.safetensors")
        for key, tensor in load_file(tmp_path / "uploads" / domain / "adapter_model.safetensors").items():
            assert (tensor - one_process[key]).abs().max() < 1e-4, key
    assert {"client photo, photo scale", "average, photo scale", "sap, photo scale"} <= table(tmp_path).keys()
    for model, row in table(finished).items():
        if "sketch" in row:
            assert row["sketch"] == pytest.approx(table(tmp_path)[model]["sketch"], abs=0.045)
    both, one = Results(tmp_path), Results(finished)
    every = one.predictions(next(row for row in one.rows if row.unseen == "sketch"))
    for row in both.rows:
        assert torch.equal(both.predictions(row).labels, every.labels), "each image once, in the domain's order"
        assert torch.equal(both.predictions(row).images, every.images)


def test_too_few_clients_for_a_method_are_refused_before_any_is_trained(run, tmp_path):
    krum = ["--merge.method=krum", "--merge.method.byzantine=1"]
    with pytest.raises(InputError, match="krum needs at least 5 clients at these settings, an unseen domain leaves 3"):
        run("fit", *krum, f"--federation.run_dir={tmp_path}")
    assert not (tmp_path / "uploads").exists()


@pytest.mark.parametrize("silent", ["--model.reach=false", "--data.val_fraction=0"])
@pytest.mark.parametrize(("setting", "value"), [("merge.method", "at_reach"), ("merge.weights", "reach")])
def test_what_asks_how_far_clients_reach_is_refused_before_clients_train_that_will_not_say(
    run, tmp_path, silent, setting, value
):
    with pytest.raises(InputError, match=f"{setting} {value}: the clients would not say how far"):
        run("fit", f"--{setting}={value}", silent, f"--federation.run_dir={tmp_path}")
    assert not (tmp_path / "uploads").exists()


@pytest.mark.parametrize("unseen", ["/{}/elsewhere", "../../elsewhere"])
def test_an_unseen_domain_of_a_table_that_would_lead_elsewhere_is_refused_first(run, world, tmp_path, unseen):
    unseen = unseen.format(tmp_path)
    kept = tmp_path / "elsewhere" / "sap" / "mine.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    images = [str(path) for path in sorted((world / "domains" / "photo").glob("*/*"))]
    rows = {
        "image": 2 * images,
        "domain": len(images) * ["photo"] + len(images) * [unseen],
        "label": 2 * [Path(image).parent.name for image in images],
    }
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "set")
    folder = tmp_path / "run" / "merged"
    with pytest.raises(InputError, match=r"domain '.*elsewhere': its name must be at most 64 letters"):
        run("fit", f"--data.root={tmp_path / 'set'}", f"--federation.unseen={unseen}", f"--federation.run_dir={folder}")
    assert contents(folder) == {".lock": b""}
    assert kept.read_text() == "mine"


def test_bfloat16_trains_and_scores(run, tmp_path):
    few = ["--federation.unseen=sketch", "--federation.report=false"]
    run("fit", "--trainer.precision=bf16-mixed", *few, f"--federation.run_dir={tmp_path}")
    assert table(tmp_path)["sap"]["sketch"] > 0


def test_bad_input_ends_in_one_line_and_exit_code_1(run_in_shell, tmp_path):
    done = run_in_shell("fit", "--model.base=/nowhere", f"--federation.run_dir={tmp_path}")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "/nowhere" in done.stderr


def test_every_setting_can_be_printed(run_in_shell):
    done = run_in_shell("fit", "--print_config")
    config = yaml.safe_load(done.stdout)
    assert {"model", "data", "anchors", "prune", "merge", "federation", "trainer", "seed_everything"} <= set(config)


# Clients that do harm


def test_a_scaled_client_gets_rows_of_its_own_beside_the_honest_ones(copy, finished, run):
    run("fit", *SCALED, "--federation.unseen=sketch", f"--federation.run_dir={copy}")
    rows, before = table(copy), table(finished)
    assert rows.keys() - before.keys() == {"client photo, photo scale", "average, photo scale", "sap, photo scale"}
    assert {model: rows[model] for model in before} == before
    for part in ("clients", "uploads", "merged"):
        assert contents(copy, f"{part}/**/*") == contents(finished, f"{part}/**/*"), "what is honest stays as it is"
    honest = read_adapter(copy / "uploads" / "photo")
    harmful = read_adapter(copy / "poisoned" / "photo-scale-1" / "uploads" / "photo")
    for name, layer in honest.layers.items():
        torch.testing.assert_close(harmful.layers[name].delta(), 10 * layer.delta(), atol=1e-6, rtol=1e-5)
    with_harm, without = (set(stored(copy, model, "sketch")["sources"]) for model in ("sap, photo scale", "sap"))
    assert (with_harm - without, without - with_harm) == ({harmful.sha256}, {honest.sha256})
    assert stored(copy, "client photo, photo scale", "sketch")["sources"] == [harmful.sha256]


def test_a_poisoned_run_again_changes_nothing(copy, run):
    again = [*SCALED, "--federation.unseen=sketch", f"--federation.run_dir={copy}"]
    run("fit", *again)
    before = contents(copy)
    run("fit", *again)
    assert contents(copy) == before


def test_too_few_clients_to_reject_one_are_refused_before_any_is_trained(finished, run, tmp_path):
    two = ["--federation.clients=[cartoon,photo]", "--federation.unseen=sketch", "--merge.reject_outliers=true"]
    with pytest.raises(InputError, match=r"merge\.reject_outliers needs at least 3 clients in a merge, here are 2"):
        run("fit", *two, f"--federation.run_dir={tmp_path}")
    assert not (tmp_path / "uploads").exists()
    uploads = [str(finished / "uploads" / name) for name in ("cartoon", "photo")]
    with pytest.raises(InputError, match=r"merge\.reject_outliers needs at least 3 clients in a merge, here are 2"):
        run("merge", "--merge.reject_outliers=true", f"--merge.output={tmp_path / 'merged'}", "--uploads", *uploads)
    assert not (tmp_path / "merged").exists()


def test_a_client_that_breaks_the_base_is_rejected_and_the_run_ends_with_its_report(copy, run, capsys):
    upload = copy / "uploads" / "photo"
    honest = read_adapter(upload)
    layers = {name: layer._replace(B=1e22 * layer.B) for name, layer in honest.layers.items()}
    assert honest.manifest is not None
    shutil.rmtree(upload)
    manifest = replace(honest.manifest, tensors_sha256=sha256_of(layers))
    write_adapter(upload, layers, manifest.base, manifest, honest.peft)
    run("fit", "--merge.reject_outliers=true", "--federation.unseen=sketch", f"--federation.run_dir={copy}")
    assert "(rejecting outliers): photo." in capsys.readouterr().out
    page = (copy / "report.html").read_text(encoding="utf-8")
    assert "The anchors single out photo." in page and "(rejecting outliers): photo." in page
    pruned = bytes_of_pruned(copy)
    assert pruned.pop("photo") == "" and all(pruned.values())


def test_wrong_labels_are_trained_on_beside_the_honest_client(copy, finished, run):
    flipped = ["--federation.poison.domain=photo", "--federation.poison.fraction=0.5", "--federation.unseen=sketch"]
    run("fit", *flipped, f"--federation.run_dir={copy}")
    for part in ("clients", "uploads", "merged"):
        assert contents(copy, f"{part}/**/*") == contents(finished, f"{part}/**/*")
    harmful = copy / "poisoned" / "photo-label_flip-0.5"
    assert (harmful / "clients" / "photo" / "last.ckpt").is_file()
    assert read_adapter(harmful / "uploads" / "photo").sha256 != read_adapter(copy / "uploads" / "photo").sha256
    assert {"client photo, photo label_flip 0.5", "sap, photo label_flip 0.5"} <= table(copy).keys()


def test_a_poisoned_domain_that_is_no_client_is_refused_before_training(run, tmp_path):
    with pytest.raises(InputError, match=r"federation\.poison\.domain clipart: no such domain; there are cartoon"):
        run("fit", "--federation.poison.domain=clipart", f"--federation.run_dir={tmp_path}")
    others = ["--federation.clients=[cartoon,sketch]", "--federation.poison.domain=photo"]
    with pytest.raises(InputError, match=r"federation\.poison\.domain photo"):
        run("fit", *others, f"--federation.run_dir={tmp_path}")
    with pytest.raises(InputError, match=r"federation\.unseen photo: the poisoned client has no part"):
        run("fit", *SCALED, "--federation.unseen=[photo,sketch]", f"--federation.run_dir={tmp_path}")
    assert not (tmp_path / "uploads").exists()


def test_only_the_clients_that_take_part_train(finished, run, tmp_path):
    some = ["--federation.clients=[cartoon,photo]", "--federation.unseen=[photo,sketch]"]
    run("fit", *some, f"--federation.run_dir={tmp_path}")
    assert sorted(path.name for path in (tmp_path / "uploads").iterdir()) == ["cartoon", "photo"]
    assert contents(tmp_path, "uploads/**/*") == {
        n: c for n, c in contents(finished, "uploads/**/*").items() if n.split("/")[1] in ("cartoon", "photo")
    }
    rows = table(tmp_path)
    assert set(rows) == {"zero-shot", "client cartoon", "client photo", "average", "sap"}
    assert rows["average"]["photo"] == rows["client cartoon"]["photo"], "an average of one"


def test_a_poisoned_client_can_be_alone(finished, copy, run):
    alone = ["--federation.clients=[photo]", "--federation.poison.domain=photo", "--federation.poison.kind=scale"]
    run("fit", *alone, "--federation.unseen=[sketch]", f"--federation.run_dir={copy}")
    assert stored(copy, "average, photo scale", "sketch")["metrics"]


def test_a_domain_that_an_upload_cannot_name_is_refused_before_training(world, run, tmp_path):
    shutil.copytree(world / "domains", tmp_path / "domains")
    (tmp_path / "domains" / "sketch").rename(tmp_path / "domains" / "Gemälde")
    with pytest.raises(InputError, match="domain 'Gemälde': its name must be at most 64 letters"):
        run("fit", f"--data.root={tmp_path / 'domains'}", f"--federation.run_dir={tmp_path / 'run'}")
    assert not list((tmp_path / "run").rglob("*.ckpt"))


@pytest.mark.parametrize("clients", ["[]", "[clipart]", "[photo,photo]"])
def test_clients_that_are_none_or_unknown_are_refused(run, tmp_path, clients):
    with pytest.raises(InputError, match=r"federation\.clients"):
        run("fit", f"--federation.clients={clients}", f"--federation.run_dir={tmp_path}")


def test_a_lone_client_cannot_be_merged_for_its_own_domain(run, tmp_path):
    with pytest.raises(InputError, match=r"federation\.clients: there is none but photo, which is to be unseen"):
        run("fit", "--federation.clients=[photo]", "--federation.unseen=photo", f"--federation.run_dir={tmp_path}")
