"""The whole job, by its real commands."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from places import REPOSITORY
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sap_lightning.errors import InputError
from sap_lightning.federation import client as federation
from sap_lightning.functional.traffic import sparse_upload
from sap_lightning.io.adapter import read_adapter, sha256_of, write_adapter
from sap_lightning.merging import TIES
from sap_lightning.results import Results

DOMAINS = ["cartoon", "painting", "photo", "sketch"]
CLIENTS = [f"client {domain}" for domain in DOMAINS]


def contents(folder: Path, pattern: str = "**/*") -> dict[str, bytes]:
    """Every file by its path in the folder, but for TensorBoard's events, which hold the time."""
    files = (path for path in folder.glob(pattern) if path.is_file() and "tfevents" not in path.name)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


def outcome(folder: Path) -> dict[str, bytes]:
    """All that a run is for."""
    return {
        name: content
        for part in ("uploads/**/*", "merged/**/*", "results.*")
        for name, content in contents(folder, part).items()
    }


def lines_of(folder: Path) -> list[dict[str, str]]:
    """The points of results.csv."""
    with (folder / "results.csv").open() as lines:
        return list(csv.DictReader(lines))


def model_of(row: dict[str, str]) -> str:
    """What a row of the results is of, and under which condition."""
    return ", ".join(filter(None, [row["model"], row["condition"]]))


def table(folder: Path) -> dict[str, dict[str, float]]:
    """Accuracy by model and unseen domain."""
    rows: dict[str, dict[str, float]] = {}
    for line in lines_of(folder):
        rows.setdefault(model_of(line), {})[line["unseen"]] = float(line["accuracy"])
    return rows


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
        "rejected",
        "settings", "sources", "measurement", "config", "commit", "versions",
    ]  # fmt: skip
    for line in lines:
        assert line["seed"] == "0" and line["variant"] == line["rejected"] == ""
        assert 0 <= float(line["ece"]) <= 1 and 0 <= float(line["macro_accuracy"]) <= 1
        assert len(line["config"]) == 12 and "torch " in line["versions"]
        assert (finished / "predictions" / f"{line['measurement']}.safetensors").is_file()
        assert line["sparsity"] == ("0.95" if line["model"] == "sap" else "")
    assert len({line["measurement"] for line in lines}) == len(lines)


def test_predictions_are_those_that_the_accuracy_was_measured_by(finished):
    results = Results(finished)
    for row in results.rows:
        predictions = results.predictions(row)
        assert float(predictions.correct.float().mean()) == pytest.approx(row.metrics["accuracy"], abs=1e-6)
        assert predictions.images.tolist() == sorted(set(predictions.images.tolist()))
        torch.testing.assert_close(predictions.probabilities.sum(1), torch.ones(len(predictions.labels)))


def test_results_json_says_what_each_row_was_made_from(finished):
    rows = json.loads((finished / "results.json").read_text())
    sources = {(row["model"], row["unseen"]): row["sources"] for row in rows}
    assert sources["zero-shot", "photo"] == []
    assert len(sources["sap", "photo"]) == 3
    assert not set(sources["sap", "photo"]) & set(sources["client photo", "sketch"])
    settings = {(row["model"], row["unseen"]): row["settings"] for row in rows}
    assert settings["zero-shot", "photo"] == settings["client photo", "sketch"] == {}
    assert settings["average", "photo"] == {"method": "average", "weights": "uniform"}
    assert settings["sap", "photo"]["sparsity"] == 0.95
    assert settings["sap", "photo"]["anchors"]["num_pairs"] == 8


def test_the_run_folder_holds_config_clients_uploads_and_merged_models(finished):
    assert yaml.safe_load((finished / "config.yaml").read_text())["prune"]["space"] == "delta"
    for domain in DOMAINS:
        assert (finished / "clients" / domain / "last.ckpt").is_file()
        assert {path.name for path in (finished / "uploads" / domain).iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "manifest.json",
        }
        assert (finished / "merged" / domain / "average" / "adapter_model.safetensors").is_file()
        assert (finished / "merged" / domain / "sap" / "model.safetensors").is_file()
        for method in ("average", "sap"):
            assert {"merge.json", "README.md"} <= {
                path.name for path in (finished / "merged" / domain / method).iterdir()
            }


def test_tensorboard_shows_clients_pruning_and_results(finished):
    client = EventAccumulator(str(finished / "clients" / "photo")).Reload()
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy"} <= set(client.Tags()["scalars"])
    server = EventAccumulator(str(finished / "server")).Reload()
    for domain in DOMAINS:
        assert f"anchor_loss_before_pruning/{domain}" in server.Tags()["scalars"]
        assert f"anchor_loss_after_pruning/{domain}" in server.Tags()["scalars"]
        assert f"share_kept/{domain}" in server.Tags()["images"]
        assert f"log10_saliency/{domain}" in server.Tags()["histograms"]
    assert "results/text_summary" in server.Tags()["tensors"]


def test_running_again_changes_nothing(finished, run):
    before = contents(finished)
    checkpoints = {path: path.stat().st_mtime_ns for path in finished.glob("clients/*/last.ckpt")}
    run("fit", f"--federation.run_dir={finished}")
    assert contents(finished) == before
    assert {path: path.stat().st_mtime_ns for path in checkpoints} == checkpoints


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """The finished run in another place, to be continued."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_another_merge_method_in_a_finished_run_adds_a_row_and_leaves_the_others(copy, finished, run):
    kept = {name: content for part in ("clients", "uploads", "merged", "predictions")
            for name, content in contents(copy, f"{part}/**/*").items()}  # fmt: skip
    times = {path: path.stat().st_mtime_ns for path in copy.glob("merged/*/*/*")}
    run("fit", "--merge.method=ties", "--merge.method.sparsity=0.5", f"--federation.run_dir={copy}")
    before, after = table(finished), table(copy)
    assert sorted(after) == sorted([*before, "ties"])
    assert {row: after[row] for row in before} == before
    assert list(after["ties"]) == DOMAINS
    now = contents(copy)
    assert {name: now[name] for name in kept} == kept
    assert {path: path.stat().st_mtime_ns for path in times} == times
    for domain in DOMAINS:
        record = json.loads((copy / "merged" / domain / "ties" / "merge.json").read_text())
        assert (record["method"], record["settings"]["sparsity"]) == ("ties", 0.5)
        assert record["metrics"][f"accuracy on {domain}"] == pytest.approx(after["ties"][domain], abs=1e-6)


def test_a_merge_method_with_other_settings_takes_the_place_of_its_row_and_of_its_models(copy, run):
    shown = []
    for sparsity in (0.5, 1, 0.5):
        run("fit", "--merge.method=ties", f"--merge.method.sparsity={sparsity}", "--federation.unseen=photo",
            f"--federation.run_dir={copy}")  # fmt: skip
        record = json.loads((copy / "merged" / "photo" / "ties" / "merge.json").read_text())
        assert record["settings"]["sparsity"] == sparsity
        shown.append(shown_rows(copy))
    assert shown[0]["ties"] == shown[2]["ties"]
    assert shown[1]["ties"] == shown[1]["zero-shot"], "nothing of the adapters is left at sparsity 1"
    of_ties = [row for row in json.loads((copy / "results.json").read_text()) if row["model"] == "ties"]
    assert sorted(row["settings"]["sparsity"] for row in of_ties) == [0.5, 1], "what was measured is kept"


def shown_rows(folder: Path) -> dict[str, list[str]]:
    """Cells of the table of the last command, without the differences."""
    lines = [line.strip("| \n").split(" | ") for line in (folder / "table.md").read_text().splitlines()[2:]]
    return {label: [cell.strip("*") for cell in cells[:-3]] for label, *cells in lines}


def test_the_table_is_of_the_clients_that_take_part(copy, run):
    run("fit", "--merge.method=ties", f"--federation.run_dir={copy}")
    before = shown_rows(copy)
    two = ["--federation.clients=[cartoon,photo]", "--federation.unseen=sketch", f"--federation.run_dir={copy}"]
    run("fit", *two)
    after = shown_rows(copy)
    assert list(after) == ["zero-shot", "client cartoon", "client photo", "best client", "average", "sap"]
    assert len(before) == 9 and len(lines_of(copy)) == 4 * 7 + 2, "what was measured of all clients is kept"
    record = json.loads((copy / "merged" / "sketch" / "sap" / "merge.json").read_text())
    assert [source["name"] for source in record["sources"]] == ["cartoon", "photo"]
    run("fit", f"--federation.run_dir={copy}")
    assert {**shown_rows(copy), "ties": before["ties"]} == before, "earlier merges of the same clients stand beside"
    record = json.loads((copy / "merged" / "sketch" / "sap" / "merge.json").read_text())
    assert len(record["sources"]) == 3


def test_the_settings_that_a_row_names_by_their_hash_are_kept(copy):
    for line in lines_of(copy):
        settings = yaml.safe_load((copy / "configs" / f"{line['config']}.yaml").read_text())
        assert settings["prune"]["sparsity"] == 0.95 and "run_dir" not in settings["federation"]


def test_the_report_s_masks_are_those_of_the_method_it_is_about(copy, run):
    run("fit", "--merge.method=ties", "--federation.unseen=sketch", f"--federation.run_dir={copy}")
    adapter = read_adapter(copy / "uploads" / "photo")
    ties = TIES()
    ties.prepare([adapter], [1.0])
    assert bytes_of_pruned(copy)["photo"] == str(sparse_upload(ties.kept(adapter, ties.sparsity)))
    assert (copy / "figures" / "share_kept_photo.svg").is_file()


def test_the_report_of_a_method_that_prunes_nothing_has_no_masks(copy, run):
    run("fit", "--merge.method=median", "--federation.unseen=sketch", f"--federation.run_dir={copy}")
    assert set(bytes_of_pruned(copy).values()) == {""}
    assert not list((copy / "figures").glob("share_kept*")) and (copy / "figures" / "anchor_loss.svg").is_file()


def bytes_of_pruned(folder: Path) -> dict[str, str]:
    with (folder / "clients.csv").open() as lines:
        return {row["name"]: row["sparse_bytes"] for row in csv.DictReader(lines)}


@pytest.mark.parametrize("written", ["{world}/domains", "~/domains"])
def test_anchors_from_the_unseen_domain_are_refused(run, world, tmp_path, monkeypatch, written):
    monkeypatch.setenv("HOME", str(world))
    leak = [f"--anchors.root={written.format(world=world)}/photo", f"--federation.run_dir={tmp_path}"]
    with pytest.raises(InputError, match=r"anchors\.root .*photo holds images of photo, which is to be unseen"):
        run("fit", *leak)
    assert not (tmp_path / "uploads").exists()


def test_running_another_merge_method_again_changes_nothing(copy, run):
    again = ["--merge.method=median", "--federation.unseen=photo", f"--federation.run_dir={copy}"]
    run("fit", *again)
    before = contents(copy)
    run("fit", *again)
    assert contents(copy) == before


def test_the_table_is_printed_before_the_report_is_made(copy, run, monkeypatch, capsys):
    def fail(of: object) -> None:
        raise InputError("the disk is full")

    monkeypatch.setattr(federation, "collect_evidence", fail)
    with pytest.raises(InputError, match="the disk is full"):
        run("fit", f"--federation.run_dir={copy}")
    assert "top-1 accuracy on unseen domains" in capsys.readouterr().out


def test_a_merged_model_that_is_gone_from_disk_is_merged_again(copy, run):
    before, rows = outcome(copy), table(copy)
    shutil.rmtree(copy / "merged" / "photo" / "sap")
    run("fit", f"--federation.run_dir={copy}")
    merged = {name: content for name, content in outcome(copy).items() if name.startswith("merged/")}
    assert merged == {name: content for name, content in before.items() if name.startswith("merged/")}
    assert table(copy) == rows


def test_other_settings_are_refused_with_what_differs(finished, run):
    with pytest.raises(InputError, match=r"prune\.sparsity was 0\.95, is 0\.5"):
        run("fit", f"--federation.run_dir={finished}", "--prune.sparsity=0.5")


def test_a_client_alone_uploads_the_same_bits_as_in_a_federation(finished, run, tmp_path):
    run("client", "--data.domain=photo", f"--federation.run_dir={tmp_path}")
    assert contents(tmp_path / "uploads" / "photo") == contents(finished / "uploads" / "photo")


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
    first = {path: path.stat().st_mtime_ns for path in halves.glob("*/cartoon/*")}
    run("fit", *two_epochs, f"--federation.run_dir={halves}")
    assert {path: path.stat().st_mtime_ns for path in first} == first
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


def test_bfloat16_trains_and_scores(run, tmp_path):
    run("fit", "--trainer.precision=bf16-mixed", "--federation.unseen=sketch", f"--federation.run_dir={tmp_path}")
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

SCALED = ["--federation.poison.domain=photo", "--federation.poison.kind=scale"]


def stored(folder: Path, model: str, unseen: str) -> dict[str, object]:
    """The latest result of a model on an unseen domain."""
    rows = json.loads((folder / "results.json").read_text())
    return [row for row in rows if (model_of(row), row["unseen"]) == (model, unseen)][-1]


def only(folder: Path, part: str) -> dict[str, bytes]:
    return contents(folder, f"{part}/**/*")


def test_a_scaled_client_gets_rows_of_its_own_beside_the_honest_ones(copy, finished, run):
    run("fit", *SCALED, "--federation.unseen=sketch", f"--federation.run_dir={copy}")
    rows, before = table(copy), table(finished)
    assert rows.keys() - before.keys() == {"client photo, photo scale", "average, photo scale", "sap, photo scale"}
    assert {model: rows[model] for model in before} == before
    for part in ("clients", "uploads", "merged"):
        assert only(copy, part) == only(finished, part), "what is honest stays as it is"
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


def test_a_rejected_client_has_no_part_in_the_merge(copy, run):
    rejecting = [
        *SCALED,
        "--federation.poison.domain=painting",
        "--merge.reject_outliers=true",
        "--federation.unseen=sketch",
    ]
    run("fit", *rejecting, f"--federation.run_dir={copy}")
    rejected = {
        model: stored(copy, f"{model}, painting scale, rejecting outliers", "sketch") for model in ("average", "sap")
    }
    assert [row["rejected"] for row in rejected.values()] == [["painting"], ["painting"]]
    assert [
        line["rejected"] for line in lines_of(copy) if line["condition"] == "painting scale, rejecting outliers"
    ] == ["painting"] * 2
    honest = stored(copy, "sap, rejecting outliers", "sketch")["rejected"]
    assert honest == [], "it is the scaled update that stands out"
    run("fit", "--federation.clients=[cartoon,photo]", "--federation.unseen=sketch", f"--federation.run_dir={copy}")
    for model, row in rejected.items():
        without = stored(copy, model, "sketch")
        assert len(without["sources"]) == 2 and without["metrics"] == row["metrics"], model
        together, apart = (load_file(copy / "predictions" / f"{r['measurement']}.safetensors") for r in (row, without))
        assert all(torch.equal(together[name], apart[name]) for name in apart), model


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
        assert only(copy, part) == only(finished, part)
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
    assert only(tmp_path, "uploads") == {
        n: c for n, c in only(finished, "uploads").items() if n.split("/")[1] in ("cartoon", "photo")
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
    for command in ("fit", "client"):
        with pytest.raises(InputError, match="domain 'Gemälde': its name must be at most 64 letters"):
            run(
                command,
                f"--data.root={tmp_path / 'domains'}",
                "--data.domain=Gemälde",
                f"--federation.run_dir={tmp_path / command}",
            )
        assert not list((tmp_path / command).rglob("*.ckpt"))


@pytest.mark.parametrize("clients", ["[]", "[clipart]", "[photo,photo]"])
def test_clients_that_are_none_or_unknown_are_refused(run, tmp_path, clients):
    with pytest.raises(InputError, match=r"federation\.clients"):
        run("fit", f"--federation.clients={clients}", f"--federation.run_dir={tmp_path}")


def test_a_lone_client_cannot_be_merged_for_its_own_domain(run, tmp_path):
    with pytest.raises(InputError, match=r"needs at least 1 clients .* leaves 0"):
        run("fit", "--federation.clients=[photo]", "--federation.unseen=photo", f"--federation.run_dir={tmp_path}")
