from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from PIL import Image

from sap_lightning.figures import (
    conflict_figure,
    confusion_figure,
    drift_figure,
    gallery_figure,
    margin_figure,
    overlap_figure,
    projection_figure,
    rounds_figure,
    share_kept_figure,
    shares_figures,
    sparsity_figure,
    turns_figure,
)
from sap_lightning.functional.statistics import Spread

ATTENTION = "vision_model.encoder.layers.{}.self_attn.{}"
SHARES = {
    "visual_projection": 0.5,
    ATTENTION.format(10, "q_proj"): 0.4,
    ATTENTION.format(2, "q_proj"): 0.1,
    ATTENTION.format(2, "v_proj"): 0.2,
}
CURVES = {
    "sap": [(0.9, Spread(0.8, 0.01, 3)), (0.0, Spread(0.7, 0.02, 3)), (0.99, Spread(0.75, 0.0, 3))],
    "ties": [(0.0, Spread(0.7, 0.02, 3)), (0.9, Spread(0.6, 0.01, 3))],
}
REFERENCES = {"zero-shot": Spread(0.5, 0.0, 1), "average": Spread(0.72, 0.01, 3)}


def drawn(figure: Figure) -> Image.Image:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return Image.open(image)


def texts_of(figure: Figure) -> dict[tuple[float, float], str]:
    return {text.get_position(): text.get_text() for text in figure.axes[0].texts}


def test_the_heat_map_has_a_row_for_each_layer_in_order_and_a_column_for_each_module() -> None:
    axes = share_kept_figure(SHARES, "photo").axes[0]
    columns = [label.get_text() for label in axes.get_xticklabels()]
    rows = [label.get_text() for label in axes.get_yticklabels()]
    grid = axes.images[0].get_array().filled(np.nan)
    assert "photo" in axes.get_title()
    assert columns == ["q_proj", "v_proj", "visual_projection"]
    assert rows == ["2", "10", "–"], "by number, and last what is in no layer"
    none = np.nan
    np.testing.assert_array_equal(grid, [[0.1, 0.2, none], [0.4, none, none], [none, none, 0.5]])


def test_every_cell_of_the_heat_map_says_its_share() -> None:
    figure = share_kept_figure(SHARES, "photo")
    assert texts_of(figure) == {(0, 0): "10.0%", (1, 0): "20.0%", (0, 1): "40.0%", (2, 2): "50.0%"}


def test_even_an_adapter_of_which_nothing_is_left_draws() -> None:
    assert drawn(share_kept_figure(dict.fromkeys(SHARES, 0.0), "photo")).size > (100, 100)


def test_clients_are_compared_on_one_colour_scale() -> None:
    figures = shares_figures({"photo": SHARES, "sketch": {"visual_projection": 0.05}})
    assert list(figures) == ["photo", "sketch"]
    assert [figure.axes[0].images[0].get_clim() for figure in figures.values()] == [(0, 0.5), (0, 0.5)]


def test_a_line_for_each_method_in_the_order_of_sparsity_with_bars_over_seeds() -> None:
    axes = sparsity_figure(CURVES, REFERENCES).axes[0]
    sap, ties = axes.containers
    assert sap.lines[0].get_ydata().tolist() == [0.7, 0.8, 0.75]
    assert ties.lines[0].get_ydata().tolist() == [0.7, 0.6]
    x = sap.lines[0].get_xdata()
    assert x[2] - x[1] == pytest.approx(x[1] - x[0]), "0.9 lies midway between 0 and 0.99"
    (bars,) = sap.lines[2]
    heights = [float(np.ptp(segment[:, 1])) for segment in bars.get_segments()]
    assert heights == pytest.approx([0.04, 0.02, 0.0])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "0.9", "0.99"]


def test_lines_are_told_apart_without_colour() -> None:
    curves = {f"method {i}": CURVES["sap"] for i in range(8)}
    figure = sparsity_figure(curves, REFERENCES)
    methods = [container.lines[0] for container in figure.axes[0].containers]
    assert len({(line.get_marker(), str(line.get_linestyle())) for line in methods}) == 8
    references = [line for line in figure.axes[0].lines if line.get_label() in ("zero-shot (0.500)", "average (0.720)")]
    assert [set(line.get_ydata()) for line in references] == [{0.5}, {0.72}]
    assert len({line.get_linestyle() for line in references}) == 2
    assert len(figure.legends[0].get_texts()) == 10


def test_one_seed_has_no_bars_and_everything_pruned_has_a_place() -> None:
    figure = sparsity_figure({"sap": [(s, Spread(0.5, 0.0, 1)) for s in (0.0, 0.5, 1.0)]}, {})
    (sap,) = figure.axes[0].containers
    assert not sap.has_yerr
    assert np.isfinite(np.array(sap.lines[0].get_xdata(), dtype=float)).all()
    assert drawn(figure).size > (100, 100)


ROUNDS = {
    "average": [(10, 10, Spread(0.8, 0.01, 2)), (1, 1, Spread(0.7, 0.02, 2)), (2, 2, Spread(0.75, 0.0, 2))],
    "sap": [(1, 1, Spread(0.8, 0.0, 2))],
}


def test_accuracy_is_drawn_against_rounds_or_what_they_take() -> None:
    figure = rounds_figure(ROUNDS, {"zero-shot": Spread(0.5, 0.0, 1)}, "rounds")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "10"]
    assert axes.get_xlabel() == "rounds" and axes.get_xscale() == "log"
    assert "average 0.700 ± 0.020 after 1 rounds, 0.750 ± 0.000 after 2 rounds" in figure.get_label()
    sent = {"sap": [(1_184_000, 1, Spread(0.8, 0.0, 1)), (94_400, 2, Spread(0.7, 0.0, 1))]}
    figure = rounds_figure(sent, {}, "B")
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["94k", "1M"]
    assert figure.axes[0].get_xlabel() == "bytes on the wire, both ways"
    drawn(figure)


def test_only_outliers_are_hatched() -> None:
    figure = margin_figure({"photo": 0.1, "sketch": 0.45}, {"sketch"})
    assert [bool(bar.get_hatch()) for bar in figure.axes[0].patches] == [False, True]
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.100", "0.450, outlier"]


def test_the_overlap_of_a_client_with_itself_is_left_empty() -> None:
    figure = overlap_figure(["photo", "sketch"], torch.tensor([[1.0, 0.25], [0.125, 1.0]]))
    assert texts_of(figure) == {(1, 0): "0.250", (0, 1): "0.125"}
    assert figure.axes[0].images[0].get_clim() == (0, 0.25)


def test_drift_has_a_line_for_each_tower_and_says_where_it_ends() -> None:
    figure = drift_figure({"vision": [(1, 0.9), (2, 0.5)], "text": [(1, 0.95), (2, 0.93)]})
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.get_lines()] == ["vision tower", "text tower"]
    assert axes.get_lines()[0].get_ydata().tolist() == [0.9, 0.5]
    assert "vision from 0.900 to 0.500; text from 0.950 to 0.930" in figure.get_label()


def test_layers_of_the_text_tower_have_columns_of_their_own() -> None:
    shares = {f"{tower}_model.encoder.layers.0.self_attn.q_proj": 0.5 for tower in ("vision", "text")}
    ticks = share_kept_figure(shares, "photo").axes[0].get_xticklabels()
    assert [tick.get_text() for tick in ticks] == ["q_proj", "text q_proj"]


def test_sign_conflict_has_a_panel_for_each_module() -> None:
    figure = conflict_figure({name: (share, share / 2) for name, share in SHARES.items()})
    panels = {axes.get_title(): [line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes}
    assert panels["q_proj"] == [[[0, 0.1], [1, 0.4]], [[0, 0.05], [1, 0.2]]]
    assert panels["visual_projection"] == [[[2, 0.5]], [[2, 0.25]]]
    assert "before pruning and" in figure.get_label()


def test_the_unseen_domain_is_drawn_last_and_largest() -> None:
    points = torch.arange(10.0).view(5, 2)
    domains, classes = ["photo", "sketch", "photo", "art", "sketch"], ["dog", "dog", "cat", "dog", "cat"]
    figure = projection_figure(points, domains, classes, "photo", "before")
    marks = [mark for mark in figure.axes[0].collections if isinstance(mark, PathCollection)]
    assert [mark.get_offsets().tolist() for mark in marks] == [[[2, 3], [8, 9]], [[6, 7]], [[0, 1], [4, 5]]]
    assert marks[-1].get_sizes() > marks[0].get_sizes()
    colours = [mark.get_facecolors()[:, :3].tolist() for mark in marks]
    dog, cat = colours[-1]
    assert dog != cat
    assert colours[0] == [dog, cat]
    assert "photo (unseen)" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_confusion_colours_shares_of_a_true_class_and_says_images() -> None:
    figure = confusion_figure(torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]]), ["a", "b", "c"], "photo")
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]])
    assert texts_of(figure) == {(0, 0): "3", (1, 0): "1", (1, 1): "2"}
    assert "a 75%; b 100%; c 0%" in figure.get_label()


def test_many_classes_and_clients_have_no_numbers_and_still_draw() -> None:
    names = [f"class {i}" for i in range(65)]
    confusion = confusion_figure(torch.eye(65).long(), names, "photo")
    clients = overlap_figure(names[:20], torch.eye(20))
    plane = projection_figure(torch.rand(65, 2), ["photo"] * 65, names, "photo", "before")
    for figure in (confusion, clients, plane):
        assert texts_of(figure) == {}
        assert drawn(figure).size > (100, 100)


def test_names_are_no_formulas() -> None:
    name = r"$\frac$ <b>"
    pictures = [(torch.zeros(3, 8, 8, dtype=torch.uint8), name)]
    for figure in (
        sparsity_figure({name: CURVES["sap"]}, {name: Spread(0.5, 0.0, 1)}),
        margin_figure({name: 0.5}, ()),
        share_kept_figure({f"a.{name}": 0.5}, name),
        overlap_figure([name, "photo"], torch.eye(2)),
        conflict_figure({f"a.{name}": (0.5, 0.1)}),
        projection_figure(torch.rand(1, 2), [name], [name], name, name),
        confusion_figure(torch.eye(2), [name, "b"], name),
        gallery_figure(pictures, name),
    ):
        assert drawn(figure).size > (100, 100)
        assert figure.get_label()


def test_turns_have_a_panel_each_of_whom_they_are_and_a_line_a_system() -> None:
    panels = {
        name: {"fedit": [0.1, 0.2, 0.3], "$pilot": [0.1, 0.4, number]} for number, name in enumerate(("a", "b", "c"))
    }
    figure = turns_figure(panels, "score")
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == ["a", "b", "c"]
    assert [list(line.get_ydata()) for line in shown[2].lines] == [[0.1, 0.2, 0.3], [0.1, 0.4, 2]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["fedit", r"\$pilot"]
    assert figure.get_label().endswith(
        "a: fedit 0.300, $pilot 0.000; b: fedit 0.300, $pilot 1.000; c: fedit 0.300, $pilot 2.000."
    )
    assert min(drawn(figure).size) > 100
    assert len([axes for axes in turns_figure({"a": panels["a"]}, "score").axes]) == 1
