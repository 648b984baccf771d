"""A report of a small run: what it says, what it leaves out, and that it needs nothing but itself."""

from __future__ import annotations

import base64
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from places import REPOSITORY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from sap_lightning.federation.run_folder import config_file
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.adapter import Adapter, sha256_of
from sap_lightning.merging.magnitude import Magnitude
from sap_lightning.reporting.page import (
    NO_MASKS,
    Client,
    Evidence,
    Picture,
    Projection,
    accuracy_curves,
    anchor_sentences,
    bytes_text,
    evidence_of_masks,
    file_names,
    gallery,
    summary,
    write_report,
)
from sap_lightning.results import Predictions, Result, Results, markdown_table, tabulate

UNSEEN = ["photo", "sketch"]
HOSTILE = "<script>alert(1)</script>\" onerror='x'&"
VOID = {"meta", "img", "br", "link", "hr", "input"}
SETTINGS = {"prune": {"sparsity": 0.8}, "model": {"templates": ["a <b>photo</b>"]}}


def predictions(right: int, of: int = 20) -> Predictions:
    """Of two classes, the first `right` images classified right."""
    labels = torch.arange(of) % 2
    predicted = torch.where(torch.arange(of) < right, labels, 1 - labels)
    return Predictions(torch.nn.functional.one_hot(predicted, 2).float(), labels, torch.arange(of))


def add(results: Results, model: str, rights: dict[str, int], seed: int = 0, sparsity: float | None = None) -> None:
    for unseen, right in rights.items():
        measurement = f"{model}-{sparsity}-{unseen}-{seed}".replace(" ", "_")
        said = predictions(right)
        results.keep_predictions(measurement, said)
        metrics = {"accuracy": float(said.correct.float().mean()), "macro_accuracy": 0.5, "ece": 0.125}
        provenance = {"config": "c0ffee", "commit": "badcafe", "versions": "torch 2.13"}
        row = Result(model, unseen, measurement, sparsity, sparsity is not None, seed, metrics=metrics)
        results.add(Result(**(vars(row) | {"provenance": provenance})))


def measured(folder: Path, seeds: int = 1) -> Results:
    """Zero-shot at 0.5, the average at 0.85, sap at 0.85 and 0.95, and a client that has seen photo."""
    results = Results(folder)
    for seed in range(seeds):
        add(results, "zero-shot", {"photo": 10, "sketch": 10}, seed)
        add(results, "client photo", {"sketch": 12}, seed)
        add(results, "average", {"photo": 15, "sketch": 19}, seed)
        add(results, "sap", {"photo": 18, "sketch": 16 + seed}, seed, 0.5)
        add(results, "sap", {"photo": 19, "sketch": 19 - seed}, seed, 0.8)
    return results


def write(folder: Path, results: Results, unseen: list[str], *rest: Any) -> Path:
    return write_report(folder, results, tabulate(results, unseen), unseen, *rest)


def evidence(client: str = "sketch") -> Evidence:
    layers = {f"vision_model.encoder.layers.{i}.self_attn.{m}": 0.1 * i for i in range(3) for m in ("q", "v")}
    pixels = torch.full((3, 8, 8), 200, dtype=torch.uint8)
    return Evidence(
        merged="sap ρ=0.8",
        clients=[Client("photo", 1000, 400, 0.7, 0.1, ""), Client(client, 1000, 400, 0.9, 9.0, "labels flipped")],
        share_kept={"photo": layers, client: layers},
        overlap=torch.tensor([[1.0, 0.3], [0.3, 1.0]]),
        conflict=dict.fromkeys(layers, (0.4, 0.2)),
        projection=Projection(torch.rand(4, 2), torch.rand(4, 2), ["photo", client] * 2, ["dog", "cat"] * 2),
        unseen_in_projection="photo",
        confusion={"photo": (torch.eye(2), 2 * torch.eye(2))},
        class_names=["dog", "cat"],
        fixed=[Picture(pixels, "photo", "dog", "cat", "dog")],
        broken=[Picture(pixels, "photo", "cat", "cat", client)],
    )


class Page(HTMLParser):
    """Walks a page, whose elements must nest and end."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return write(folder, measured(folder, seeds=2), UNSEEN, evidence(HOSTILE), SETTINGS)


def test_the_page_needs_nothing_but_itself(written: Path) -> None:
    page = Page(written)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "base", "form"}
    for _, attributes in page.elements:
        for name in ("src", "srcset", "poster", "data", "background", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
        assert (attributes.get("href") or "#").startswith("#")
        assert "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)
    source = written.read_text(encoding="utf-8")
    assert "http://" not in source and "https://" not in source
    assert "url(" not in source and "@import" not in source


def test_the_pictures_in_the_page_need_nothing_either(written: Path) -> None:
    sources = [str(image["src"]) for image in Page(written).all("img")]
    decoded = [base64.b64decode(source.split(",", 1)[1]) for source in sources if "svg" in source]
    assert decoded
    for svg in decoded:
        assert not re.search(rb'(href|src)="(?!#|data:)', svg)
        assert b"<script" not in svg


def test_ids_are_unique_and_every_link_leads_somewhere(written: Path) -> None:
    page = Page(written)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    links = [str(link["href"]).removeprefix("#") for link in page.all("a")]
    assert len(ids) == len(set(ids))
    assert links == ids, "the contents name every section, in order"


def test_names_from_outside_are_text(written: Path) -> None:
    page = Page(written)
    assert HOSTILE in page.text
    assert any(HOSTILE in str(image["alt"]) for image in page.all("img"))
    assert "a <b>photo</b>" in page.text


def test_every_figure_has_an_alternative_and_most_a_caption(written: Path) -> None:
    page = Page(written)
    assert all(len(str(image["alt"])) > 10 for image in page.all("img"))
    assert len(page.all("figure")) == len(page.all("figcaption")) == 7


def test_the_figures_stand_in_the_folder_in_both_forms(written: Path) -> None:
    names = {file.stem for file in (written.parent / "figures").iterdir()}
    assert {"accuracy_by_sparsity", "anchor_loss", "share_kept_photo", "mask_overlap", "sign_conflict"} < names
    assert {"projection_before", "projection_after", "confusion_photo_before", "gallery_broken"} < names
    assert len(list((written.parent / "figures").iterdir())) == 2 * len(names)
    for name in names:
        assert min(Image.open(written.parent / "figures" / f"{name}.png").size) > 100
        assert "</svg>" in (written.parent / "figures" / f"{name}.svg").read_text(encoding="utf-8")


def test_the_table_is_there_with_spread_and_the_best_in_bold(written: Path) -> None:
    source = written.read_text(encoding="utf-8")
    (bold,) = re.findall(r"<tr class=\"marked\">.*?</tr>", source, re.DOTALL)
    cells = re.findall(r"<td( class=\"best\")?>([\d.]+) <span class=\"pm\">± ([\d.]+)</span>", bold)
    assert cells == [(' class="best"', "0.950", "0.000"), ("", "0.925", "0.035"), (' class="best"', "0.937", "0.018")]
    results = Results(written.parent)
    assert (written.parent / "table.md").read_text() == markdown_table(tabulate(results, UNSEEN), UNSEEN)


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    path = write(tmp_path, measured(tmp_path), UNSEEN, None, {})
    assert "±" not in path.read_text(encoding="utf-8")


def test_figures_of_an_earlier_report_go_and_what_is_not_a_figure_stays(tmp_path: Path) -> None:
    (tmp_path / "figures" / "mine").mkdir(parents=True)
    (tmp_path / "figures" / "projection_before.png").write_bytes(b"old")
    write(tmp_path, measured(tmp_path), UNSEEN, None, {})
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {
        "accuracy_by_sparsity.png",
        "accuracy_by_sparsity.svg",
        "mine",
    }


def test_without_evidence_there_are_the_tables_and_the_sparsities(tmp_path: Path) -> None:
    page = Page(write(tmp_path, measured(tmp_path), UNSEEN, None, SETTINGS))
    assert [section["id"] for section in page.all("section")] == ["results", "sparsity", "settings"]
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {
        "accuracy_by_sparsity.png",
        "accuracy_by_sparsity.svg",
    }
    assert "c0ffee" in page.text and "badcafe" in page.text and "torch 2.13" in page.text


def test_the_command_that_repeats_a_run_is_there_with_its_settings(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    assert "--federation.run_dir" not in Page(write(folder, measured(folder), UNSEEN, None, {})).text
    settings = folder / config_file({})
    settings.parent.mkdir()
    settings.write_text("{}")
    text = Page(write(folder, Results(folder), UNSEEN, None, {})).text
    assert f"fit --config '{settings}' --federation.run_dir '{folder}_again'" in text


def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    results = Results(tmp_path)
    add(results, "zero-shot", {"photo": 10})
    bare = Evidence("sap", [], *NO_MASKS, None, "", {}, [], [], [])
    page = Page(write(tmp_path, results, ["photo"], bare, {}))
    assert [section["id"] for section in page.all("section")] == ["results", "settings"]
    assert page.all("img") == []


def test_a_merge_that_prunes_nothing_has_no_masks_and_no_pruned_bytes(tmp_path: Path) -> None:
    clients = [Client(name, 1000, None, 0.5, 0.0, "") for name in ("photo", "sketch", "cartoon")]
    bare = Evidence("krum", clients, *NO_MASKS, None, "", {}, [], [], [])
    page = Page(write(tmp_path, measured(tmp_path), UNSEEN, bare, {}))
    assert [section["id"] for section in page.all("section")] == [
        "results",
        "sparsity",
        "clients",
        "poison",
        "settings",
    ]
    assert "pruned by the client" not in page.text and "could prune" not in page.text


def test_a_client_that_breaks_the_base_stands_out_in_the_report(tmp_path: Path) -> None:
    honest = [Client(name, 1000, 400, 0.5, 0.0, "") for name in ("photo", "sketch")]
    broken = Client("cartoon", 1000, None, math.nan, math.inf, "")
    page = Page(write(tmp_path, measured(tmp_path), UNSEEN, replace(evidence(), clients=[*honest, broken]), {}))
    assert "The anchors single out cartoon." in page.text
    (bars,) = [image["alt"] for image in page.all("img") if str(image["alt"]).startswith("Bar chart of anchor")]
    assert "cartoon nan (z = +inf, outlier)" in str(bars)


def test_clients_that_were_left_out_are_named(tmp_path: Path) -> None:
    results = measured(tmp_path)
    row = replace(results.rows[0], model="sap", condition="rejecting outliers", rejected=["cartoon"])
    results.rows += [row, replace(row, model="average")]
    page = Page(write(tmp_path, results, UNSEEN, None, {}))
    assert page.text.count("Left out of the merges for unseen photo, seed 0 (rejecting outliers): cartoon.") == 1


def write_seeded(folder: Path) -> Path:
    torch.manual_seed(0)
    return write(folder, measured(folder), UNSEEN, evidence(), SETTINGS)


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_same_run_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    write_seeded(folder)
    here = contents(folder)
    shutil.rmtree(folder / "figures")
    program = f"from test_report import *; write_seeded(Path({str(folder)!r}))"
    environment = os.environ | {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY / "tests", env=environment)
    assert len(here) > 30
    assert contents(folder) == here


def test_the_best_merge_is_named_with_its_leads(tmp_path: Path) -> None:
    results = measured(tmp_path)
    first, second, third = summary(results, tabulate(results, UNSEEN))
    assert first == "sap ρ=0.8 is the most accurate model over the 2 unseen domains: 0.950 top-1 accuracy on average."
    assert second.startswith("It is 10.0 points ahead of the plain average (95 % interval +")
    assert "45.0 points ahead of zero-shot" in second
    assert "2 merges" in third


def test_a_merge_that_loses_is_said_to_lose(tmp_path: Path) -> None:
    results = Results(tmp_path)
    add(results, "zero-shot", {"photo": 20, "sketch": 18})
    add(results, "client photo", {"sketch": 20})
    add(results, "average", {"photo": 12, "sketch": 12})
    add(results, "sap", {"photo": 12, "sketch": 12})
    first, second, third = summary(results, tabulate(results, UNSEEN))
    assert first.startswith("zero-shot is the most accurate model"), "the client has not been measured everywhere"
    assert second == "No merge does better; of them sap comes nearest with 0.600."
    assert "level with the plain average as far as these images can tell, +0.0 points" in third
    assert "35.0 points behind zero-shot (95 % interval −" in third


def test_curves_have_what_is_pruned_and_references_what_is_not(tmp_path: Path) -> None:
    results = measured(tmp_path)
    for unseen, sparsity in (("photo", 0.5), ("sketch", 0.9)):  # chosen anew for every domain
        add(results, "sap_auto", {unseen: 20}, sparsity=sparsity)
    results.rows = [Result(**(vars(row) | {"swept": row.model == "sap"})) for row in results.rows]
    curves, references = accuracy_curves(results, tabulate(results, UNSEEN))
    assert {name: [(rho, spread.mean) for rho, spread in curve] for name, curve in curves.items()} == {
        "sap": [(0.5, pytest.approx(0.85)), (0.8, pytest.approx(0.95))]
    }
    assert {name: spread.mean for name, spread in references.items()} == {
        "zero-shot": 0.5,
        "average": pytest.approx(0.85),
    }


def test_a_poisoned_client_is_found_or_missed() -> None:
    honest = [Client(name, 1, 1, 0.5, 0.0, "") for name in "ab"]
    assert anchor_sentences(honest) == ["Of fewer than three clients none can be called the odd one."]
    found = anchor_sentences([*honest, Client("c", 1, 1, 0.9, 9.0, "noise"), Client("d", 1, 1, 0.5, 0.1, "noise")])
    assert found == [
        "The anchors single out c.",
        "Poisoned on purpose: c, d; found: 1 of 2.",
        "Honest clients singled out wrongly: none.",
    ]


def test_the_gallery_holds_what_changed_surest_first_whatever_the_order() -> None:
    labels = torch.tensor([0, 0, 1, 1, 0])
    before = Predictions(torch.tensor([[0, 1], [0, 1], [0, 1], [0, 1], [1, 0]]).float(), labels, torch.arange(5) * 2)
    sure = torch.tensor([0.6, 0.9, 0.3, 0.8, 0.2])  # of class 0, after
    after = Predictions(torch.stack([sure, 1 - sure], 1), labels, before.images)
    shuffled = Predictions(*(tensor[[3, 0, 4, 2, 1]] for tensor in after))
    images = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 2, 2), dtype=np.uint8)
    fixed, broken = gallery(before, shuffled, images, ["dog", "cat"], "photo", 9)
    assert [int(picture.pixels[0, 0, 0]) for picture in fixed] == [2, 0]
    assert [int(picture.pixels[0, 0, 0]) for picture in broken] == [6, 8]
    assert fixed[0][1:] == ("photo", "dog", "cat", "dog")
    assert broken[0][1:] == ("photo", "cat", "cat", "dog")
    assert [len(of) for of in gallery(before, after, images, ["dog", "cat"], "photo", 1)] == [1, 1]
    with pytest.raises(ValueError, match="different images of photo: 5 and 4"):
        gallery(before, Predictions(*(tensor[:4] for tensor in after)), images, ["dog", "cat"], "photo", 9)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("space", ["delta", "factor"])
def test_evidence_of_masks_is_that_of_the_dense_updates(scope, space) -> None:
    generator = torch.Generator().manual_seed(0)

    def client(name: str, layers: list[str]) -> Adapter:
        of = {n: LoRALayer(*(torch.randn(s, generator=generator) for s in ((2, 6), (5, 2))), 0.5) for n in layers}
        return Adapter(name, of, sha256_of(of))

    adapters = [client("a", ["q", "v"]), client("b", ["q", "v"]), client("c", ["v"])]
    method = Magnitude(0.5, scope, space)
    method.prepare(adapters, [1 / 3] * 3)
    shares, matrix, conflict = evidence_of_masks(method, adapters, 0.5)
    assert {name: list(layers) for name, layers in shares.items()} == {"a": ["q", "v"], "b": ["q", "v"], "c": ["v"]}
    if scope == "layer":
        assert shares["a"] == pytest.approx({"q": 0.5, "v": 0.5})
    kept = [
        {
            (n, t, *map(int, i))
            for n, layer in method.kept(one, 0.5).items()
            for t, m in enumerate(layer)
            for i in m.nonzero()
        }
        for one in adapters
    ]
    np.testing.assert_allclose(matrix, [[len(p & q) / len(p | q) for q in kept] for p in kept])
    for name, (before, after) in conflict.items():
        own = [one for one in adapters if name in one.layers]
        whole = torch.stack([one.layers[name].delta().sign() for one in own])
        pruned = [method.pruned(one, 0.5)[name] for one in own]
        signs = torch.stack([(p.delta() if isinstance(p, LoRALayer) else p).sign() for p in pruned])
        for found, of in ((before, whole), (after, signs)):
            shared = of.abs().sum(0) > 1
            assert found == pytest.approx(float((of.sum(0).abs() < of.abs().sum(0))[shared].float().mean()))


def test_tensorboard_has_the_same_figures(tmp_path: Path) -> None:
    board = SummaryWriter(str(tmp_path / "board"))
    write(tmp_path, measured(tmp_path), UNSEEN, evidence(), {}, [board])
    board.close()
    tags = EventAccumulator(str(tmp_path / "board")).Reload().Tags()["images"]
    assert len(tags) == len(list((tmp_path / "figures").glob("*.png"))) == 12
    assert {"accuracy_by_sparsity", "share_kept/photo", "confusion/photo/after", "gallery/fixed"} < set(tags)


def test_file_names_are_plain_and_differ() -> None:
    names = ["share/a b", "share/a_b", "share/A_b", "../../x", "ρ=0.8", "<script>"]
    assert file_names(names) == ["share_a_b", "share_a_b_2", "share_a_b_3", "x", "ρ_0_8", "script"]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_184_000, "1.18 MB"), (94_400_000_000, "94.4 GB")]
)
def test_bytes_are_in_decimal_units(count: int, text: str) -> None:
    assert bytes_text(count) == text
