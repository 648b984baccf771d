"""What a command shows of a run that is through: the table first, then report, figures and TensorBoard."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from federation.runs import DOMAINS, bytes_of_pruned
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sap_lightning.errors import InputError
from sap_lightning.functional.traffic import sparse_upload
from sap_lightning.io.adapter import read_adapter
from sap_lightning.merging import TIES
from sap_lightning.reporting import evidence, show
from sap_lightning.reporting.html import file_names
from sap_lightning.reporting.table import markdown_table, tabulate
from sap_lightning.results import Results


def board_of(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "server"), size_guidance={"images": 0, "tensors": 0}).Reload()


def test_the_table_is_left_as_markdown_too(finished):
    results = Results(finished)
    assert (finished / "table.md").read_text(encoding="utf-8") == markdown_table(tabulate(results, DOMAINS), DOMAINS)


def test_tensorboard_shows_pruning_and_results(finished):
    server = board_of(finished)
    for domain in DOMAINS:
        assert f"anchor_loss_before_pruning/{domain}" in server.Tags()["scalars"]
        assert f"anchor_loss_after_pruning/{domain}" in server.Tags()["scalars"]
        assert f"share_kept/{domain}" in server.Tags()["images"]
        assert f"log10_saliency/{domain}" in server.Tags()["histograms"]
    assert "results/text_summary" in server.Tags()["tensors"]
    *_, text = server.Tensors("results/text_summary")
    assert text.tensor_proto.string_val[0].decode() == (finished / "table.md").read_text(encoding="utf-8")


def test_tensorboard_has_the_figures_of_the_report(finished):
    tags = board_of(finished).Tags()["images"]
    assert sorted(file_names(tags)) == sorted(path.stem for path in (finished / "figures").glob("*.png"))


def test_the_table_is_printed_before_the_report_is_made(copy, run, monkeypatch, capsys):
    def fail(of: object) -> None:
        raise InputError("the disk is full")

    monkeypatch.setattr(show, "collect_evidence", fail)
    with pytest.raises(InputError, match="the disk is full"):
        run("fit", f"--federation.run_dir={copy}")
    assert "top-1 accuracy on unseen domains" in capsys.readouterr().out


def test_what_is_shown_says_where_the_rest_stands(copy, run, capsys):
    run("fit", f"--federation.run_dir={copy}")
    shown = capsys.readouterr().out
    for line in (f"Report: {copy / 'report.html'}", f"Table: {copy / 'results.csv'}", f"tensorboard --logdir {copy}"):
        assert line in shown


def test_without_a_report_there_is_the_table_alone(copy, run, capsys):
    for part in ("report.html", "table.md", "clients.csv"):
        (copy / part).unlink()
    shutil.rmtree(copy / "figures")
    run("fit", "--federation.report=false", f"--federation.run_dir={copy}")
    assert "Report:" not in (shown := capsys.readouterr().out) and "top-1 accuracy on unseen domains" in shown
    assert (copy / "table.md").is_file()
    assert not any((copy / part).exists() for part in ("report.html", "clients.csv", "figures"))


def test_features_are_computed_once_in_a_run(copy, run, monkeypatch):
    for part in ("report.html", "clients.csv"):
        (copy / part).unlink()
    monkeypatch.setattr(evidence.Inspection, "_compute_features", None)
    run("fit", f"--federation.run_dir={copy}")
    assert (copy / "report.html").is_file()


def test_the_report_s_masks_are_those_of_the_method_it_is_about(copy, run):
    run("fit", "--merge.method=ties", "--federation.unseen=sketch", f"--federation.run_dir={copy}")
    adapter = read_adapter(copy / "uploads" / "photo")
    pruning = TIES().prepare([adapter], [1.0])
    assert bytes_of_pruned(copy)["photo"] == str(sparse_upload(pruning.kept(adapter, TIES().sparsity)))
    assert (copy / "figures" / "share_kept_photo.svg").is_file()


def test_the_report_of_a_method_that_prunes_nothing_has_no_masks(copy, run):
    run("fit", "--merge.method=median", "--federation.unseen=sketch", f"--federation.run_dir={copy}")
    assert set(bytes_of_pruned(copy).values()) == {""}
    assert not list((copy / "figures").glob("share_kept*")) and (copy / "figures" / "caption_margin.svg").is_file()
