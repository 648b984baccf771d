"""The report of what a merge kept, against dense float64 arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from places import SHAPES_CLIP
from rich.console import Console

from sap_lightning.functional.lora import LoRALayer, Update
from sap_lightning.io.adapter import Adapter, sha256_of, write_adapter
from sap_lightning.merging.clients import ClientLayers
from sap_lightning.merging.magnitude import Magnitude
from sap_lightning.merging.ties import TIES
from sap_lightning.models.clip import load_base
from sap_lightning.models.layers import layer_shapes
from sap_lightning.reporting.layers import LayerReport, layer_report, report_table

WEIGHTS = [0.5, 0.3, 0.2]


def random_layer(seed: int, rank: int = 3, shape: tuple[int, int] = (10, 7)) -> LoRALayer:
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator)
    return LoRALayer(A, B, 0.5)


def empty_rows(layer: LoRALayer) -> LoRALayer:
    """The layer without an update of its first rows."""
    return layer._replace(B=torch.cat([torch.zeros(4, layer.rank), layer.B[4:]]))


def adapter(name: str, layer: LoRALayer) -> Adapter:
    return Adapter(name, {"fc": layer}, sha256_of({"fc": layer}))


def reference(layers: list[LoRALayer], weights: list[float], merged: Update) -> LayerReport:
    deltas = [layer.scale * layer.B.double().numpy() @ layer.A.double().numpy() for layer in layers]
    after = (merged.delta() if isinstance(merged, LoRALayer) else merged).double().numpy()
    flat = [delta.ravel() for delta in deltas if delta.any()]
    pairs = [(a, b) for i, a in enumerate(flat) for b in flat[:i]]
    changed = np.sum([delta != 0 for delta in deltas], axis=0)
    agreement = np.abs(np.sum([np.sign(delta) for delta in deltas], axis=0))
    return LayerReport(
        energy_kept=(after**2).sum() / sum(w * (delta**2).sum() for w, delta in zip(weights, deltas, strict=True)),
        sign_agreement=(agreement[changed > 0] / changed[changed > 0]).mean(),
        cosine=np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]),
        share_kept=(after != 0).sum() / (changed > 0).sum(),
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_report_is_what_dense_arithmetic_says(seed):
    layers = [random_layer(seed), empty_rows(random_layer(seed + 10)), random_layer(seed + 20, rank=1)]
    merged = TIES(0.5).merge([adapter(str(i), layer) for i, layer in enumerate(layers)], WEIGHTS)["fc"]
    report = layer_report(layers, WEIGHTS, merged)
    assert report == pytest.approx(reference(layers, WEIGHTS, merged), rel=1e-5)
    assert 0 < report.share_kept < 1


def test_a_client_that_changes_nothing_counts_for_energy_only():
    layers = [random_layer(0), random_layer(1), LoRALayer(torch.zeros(0, 7), torch.zeros(10, 0))]
    merged = random_layer(2)
    assert layer_report(layers, WEIGHTS, merged) == pytest.approx(reference(layers, WEIGHTS, merged), rel=1e-5)


def test_identical_clients_keep_all_and_agree():
    layer = random_layer(0)
    assert layer_report([layer] * 3, WEIGHTS, layer) == pytest.approx((1, 1, 1, 1))


def test_opposite_clients_agree_in_nothing():
    layer = random_layer(0)
    report = layer_report([layer, layer._replace(scale=-layer.scale)], [0.5, 0.5], torch.zeros(10, 7))
    assert report == pytest.approx((0, 0, -1, 0))


def test_a_single_client_and_clients_without_an_update_have_no_cosine():
    layer = random_layer(0)
    assert layer_report([layer], [1.0], layer) == pytest.approx((1, 1, 0, 1))
    nothing = layer._replace(B=torch.zeros_like(layer.B))
    assert layer_report([nothing] * 2, [0.5, 0.5], nothing) == (0, 0, 0, 0)


def test_the_table_has_a_row_for_every_layer_under_what_their_names_share():
    layers = {f"vision.layers.{i}.q": random_layer(i) for i in (1, 10)}
    table = report_table([Adapter("one", layers, sha256_of(layers))], [1.0], layers)
    columns = [list(column.cells) for column in table.columns]
    assert str(table.columns[0].header) == "layer of vision.layers"
    assert [str(cell) for cell in columns[0]] == ["1.q", "10.q"]
    assert columns[1] == columns[2] == columns[4] == ["1.000", "1.000"]


def test_a_layer_that_one_client_lacks_is_reported():
    one, other = adapter("one", random_layer(0)), Adapter("other", {"q": random_layer(1)}, "0" * 64)
    merged = {"fc": random_layer(0), "q": random_layer(1)}
    table = report_table([one, other], [0.5, 0.5], merged)
    assert list(map(str, table.columns[0].cells)) == ["fc", "q"]
    report = layer_report(ClientLayers([one, other], "fc"), [0.5, 0.5], merged["fc"])
    assert report == pytest.approx((2, 1, 0, 1)), "energy is over the mean of both clients"


def test_a_layer_s_name_is_shown_as_it_is_written():
    layers = {"top.[red]q": random_layer(0), "top.\x1b[2J:dog:": random_layer(1)}
    console = Console(width=100, force_terminal=True)
    with console.capture() as shown:
        console.print(report_table([Adapter("one", layers, sha256_of(layers))], [1.0], layers))
    assert "│ [red]q " in shown.get() and r"│ \x1b[2J:dog: " in shown.get()


def test_the_command_prints_a_row_for_every_layer(run, tmp_path, capsys):
    shapes = layer_shapes(load_base(SHAPES_CLIP).tower)
    names = sorted(name for name in shapes if name.endswith("q_proj"))
    for k in range(2):
        layers = {name: random_layer(10 * k + i, shape=tuple(shapes[name])) for i, name in enumerate(names)}
        write_adapter(tmp_path / str(k), layers, SHAPES_CLIP)
    uploads = [str(tmp_path / str(k)) for k in range(2)]
    options = ["--merge.method=average", f"--merge.output={tmp_path / 'out'}", "--uploads", *uploads]
    run("merge", "--merge.report=true", *options)
    shown = capsys.readouterr().out
    for i in range(len(names)):
        assert f"{i}.self_attn.q_proj" in shown
    for column in ("energy kept", "sign agreement", "cosine", "share kept"):
        assert column in " ".join(shown.split())


def test_the_share_kept_is_what_the_sparsity_leaves():
    layer = random_layer(0, shape=(20, 10))
    report = layer_report([layer], [1.0], Magnitude(0.9).merge([adapter("one", layer)])["fc"])
    assert report.share_kept == pytest.approx(0.1)
    assert 0.1 < report.energy_kept < 1
