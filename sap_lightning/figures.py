"""The figures of a run: data in, a matplotlib Figure out.

Every figure's label, ``figure.get_label()``, is a text alternative to it. Figures are small, so that their letters can
be read on a phone, and tell things apart by marker, dash or number as well as by colour.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator
from torch import Tensor

from sap_lightning.functional.statistics import Spread

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
"""Colours that the colour-blind tell apart (Okabe & Ito 2008, Color Universal Design), darkest first."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[str | tuple[int, tuple[int, ...]], ...] = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
GREY = "#5f5f5f"
MOST_CELLS_WITH_NUMBERS = 12
MOST_NAMED_CLASSES = 40
MOST_VECTOR_POINTS = 4000


def sparsity_figure(curves: Mapping[str, Sequence[tuple[float, Spread]]], references: Mapping[str, Spread]) -> Figure:
    """Mean accuracy over the unseen domains against ρ, a line a method; bars are ± one std over seeds.

    Args:
        curves: by method, pairs of ρ and accuracy.
        references: accuracies that have no ρ, drawn as horizontal lines.
    """
    figure, axes = _accuracy_axes(len(curves), references)
    sparsities = sorted({sparsity for curve in curves.values() for sparsity, _ in curve})
    places = _sparsity_scale(sparsities)
    for index, (name, curve) in enumerate(curves.items()):
        points = sorted(curve)
        aside = 0.012 * (index - (len(curves) - 1) / 2)  # so that the bars of two methods do not hide each other
        along = [places[sparsity] + aside for sparsity, _ in points]
        _accuracy_curve(axes, index, name, along, [spread for _, spread in points])
    axes.set_xticks(*_apart(sparsities, places))
    axes.set_xlabel("sparsity ρ (log scale of the share kept)")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    said = [f"{name} {spread}" for name, spread in references.items()]
    for name, curve in curves.items():
        best = max(curve, key=lambda point: point[1].mean)
        said.append(f"{name} at best {best[1]} at ρ={best[0]:g}")
    figure.set_label(f"Line chart of accuracy against sparsity: {'; '.join(said)}.")
    return figure


def _accuracy_axes(curves: int, references: Mapping[str, Spread]) -> tuple[Figure, Axes]:
    """A figure with room for so many curves of accuracy, and horizontal lines for what it is compared with."""
    figure = Figure(figsize=(4.8, 3.2 + 0.22 * math.ceil((curves + len(references)) / 2)), layout="constrained")
    axes = _plain_axes(figure)
    axes.set_ylabel("mean accuracy, unseen domains")
    for index, (name, spread) in enumerate(references.items()):
        dash = DASHES[1:][index % (len(DASHES) - 1)]
        label = f"{_plain(name)} ({spread.mean:.3f})"
        axes.axhline(spread.mean, color=GREY, linestyle=dash, linewidth=1.3, label=label)
    return figure, axes


def _accuracy_curve(axes: Axes, index: int, name: str, places: Sequence[float], spreads: Sequence[Spread]) -> None:
    """A method's accuracies, with bars where there are several seeds."""
    axes.errorbar(
        places,
        [spread.mean for spread in spreads],
        yerr=[spread.std for spread in spreads] if any(spread.seeds > 1 for spread in spreads) else None,
        **_line(index),
        markersize=5.5,
        elinewidth=1,
        capsize=2.5,
        label=_plain(name),
    )


def _sparsity_scale(sparsities: Sequence[float]) -> dict[float, float]:
    """−log₁₀(1 − ρ), on which 0.9 is as far from 0.99 as 0 from 0.9; ρ = 1 stands a little further than the others."""
    least = min((1 - sparsity for sparsity in sparsities if sparsity < 1), default=1.0)
    return {sparsity: -math.log10(max(1 - sparsity, least / 2)) for sparsity in sparsities}


def _apart(sparsities: Sequence[float], places: Mapping[float, float]) -> tuple[list[float], list[str]]:
    """The ticks that have room for their label."""
    room = 0.08 * (places[sparsities[-1]] - places[sparsities[0]])
    chosen: list[float] = []
    for sparsity in sparsities:
        if not chosen or places[sparsity] - places[chosen[-1]] >= room:
            chosen.append(sparsity)
    return [places[sparsity] for sparsity in chosen], [f"{sparsity:g}" for sparsity in chosen]


def margin_figure(margins: Mapping[str, float], outliers: Collection[str]) -> Figure:
    """A bar for each client's caption margin on the anchors; outliers are hatched and say so.

    A margin that is no finite number has a bar as long as the longest of the others.
    """
    figure = Figure(figsize=(5.0, 0.9 + 0.34 * len(margins)), layout="constrained")
    axes = _plain_axes(figure)
    colours = [OKABE_ITO[1] if name in outliers else OKABE_ITO[5] for name in margins]
    longest = max((margin for margin in margins.values() if math.isfinite(margin)), default=1.0)
    lengths = [margin if math.isfinite(margin) else longest for margin in margins.values()]
    bars = axes.barh(range(len(margins)), lengths, color=colours, edgecolor="black", linewidth=0.6)
    texts = []
    for (name, margin), bar in zip(margins.items(), bars, strict=True):
        bar.set_hatch("///" if name in outliers else "")
        texts.append(f"{margin:.3f}{', outlier' if name in outliers else ''}")
    axes.bar_label(bars, texts, padding=4)
    axes.margins(x=0.3)
    axes.set_yticks(range(len(margins)), [_plain(name) for name in margins])
    axes.invert_yaxis()
    axes.set_xlabel("caption margin on the anchors, the client alone")
    said = [f"{name} {text}" for name, text in zip(margins, texts, strict=True)]
    figure.set_label(f"Bar chart of caption margins on the anchors: {'; '.join(said)}.")
    return figure


def shares_figures(shares: Mapping[str, Mapping[str, float]]) -> dict[str, Figure]:
    """A heat map of the share kept for each client, all on one colour scale."""
    most = max((share for layers in shares.values() for share in layers.values()), default=None)
    return {client: share_kept_figure(layers, client, most) for client, layers in shares.items()}


def share_kept_figure(shares: Mapping[str, float], title: str, most: float | None = None) -> Figure:
    """Heat map of the share kept: a row for each transformer layer, a column for each module.

    Args:
        shares: of each layer, by its name.
        title: whose they are.
        most: the share at the colour scale's upper end; the largest if not given.
    """
    cells = {_row_and_column(name): share for name, share in shares.items()}
    rows = sorted({row for row, _ in cells})
    columns = sorted({column for _, column in cells})
    grid = np.array([[cells.get((row, column), np.nan) for column in columns] for row in rows])
    figure = Figure(figsize=(0.9 + 0.8 * max(len(columns), 2), 1.2 + 0.27 * len(rows)), layout="constrained")
    axes = figure.subplots()
    _heat_map(axes, grid, "viridis", np.nanmax(grid) if most is None else most, "{:.1%}")
    _columns(axes, columns, 9)
    axes.set_yticks(range(len(rows)), [f"{row:g}" if row < math.inf else "–" for row in rows])
    axes.set_ylabel("layer")
    axes.set_title(f"share kept: {_plain(title)}", fontsize=11)
    low, high = (choose(shares.items(), key=lambda item: item[1]) for choose in (min, max))
    figure.set_label(
        f"Heat map of the share of parameters that {title} keeps in each layer and module, from {low[1]:.1%} in"
        f" {low[0]} to {high[1]:.1%} in {high[0]}."
    )
    return figure


def overlap_figure(clients: Sequence[str], matrix: Tensor) -> Figure:
    """Heat map (K, K) of the Jaccard index of two clients' masks; the diagonal, always 1, is left empty."""
    grid = matrix.double().numpy().copy()
    np.fill_diagonal(grid, np.nan)
    size = 1.4 + max(0.62, 2.2 / max(len(clients), 1)) * min(len(clients), 16)
    figure = Figure(figsize=(size + 0.4, size), layout="constrained")
    axes = figure.subplots()
    _heat_map(axes, grid, "viridis", _largest(grid), "{:.3f}")
    _columns(axes, clients, 8)
    axes.set_yticks(range(len(clients)), [_plain(name) for name in clients])
    pairs = [(a, b, grid[i, j]) for i, a in enumerate(clients) for j, b in enumerate(clients) if i < j]
    said = "; ".join(f"{a} and {b} {value:.3f}" for a, b, value in pairs[:66])
    figure.set_label(f"Heat map of the overlap of the clients' masks: {said}.")
    return figure


def drift_figure(drift: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """How alike the clients are after every epoch, a line a tower.

    Args:
        drift: by tower, pairs of epoch and mean cosine.
    """
    figure = Figure(figsize=(4.8, 3.2), layout="constrained")
    axes = _plain_axes(figure)
    for index, (tower, points) in enumerate(drift.items()):
        epochs, cosines = zip(*points, strict=True)
        axes.plot(epochs, cosines, **_line(index), label=f"{tower} tower")
    axes.set_xlabel("epoch")
    axes.set_ylabel("mean cosine of two clients")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    said = [f"{tower} from {points[0][1]:.3f} to {points[-1][1]:.3f}" for tower, points in drift.items()]
    figure.set_label(f"Line chart of the clients' mean cosine by epoch: {'; '.join(said)}.")
    return figure


def rounds_figure(
    curves: Mapping[str, Sequence[tuple[float, int, Spread]]], references: Mapping[str, Spread], unit: str
) -> Figure:
    """Mean accuracy over the unseen domains against rounds, or what they take, a line a method.

    Args:
        curves: by method, what rounds are counted in, their number and accuracy.
        references: accuracies that take no rounds, drawn as horizontal lines.
        unit: what rounds are counted in: rounds, or B for bytes on the wire.
    """
    figure, axes = _accuracy_axes(len(curves), references)
    said = [f"{name} {spread}" for name, spread in references.items()]
    for index, (name, curve) in enumerate(curves.items()):
        points = sorted(curve)
        _accuracy_curve(axes, index, name, [place for place, *_ in points], [spread for *_, spread in points])
        said.append(f"{name} " + ", ".join(f"{spread} after {rounds} rounds" for _, rounds, spread in points))
    axes.set_xscale("log")
    places = sorted({place for curve in curves.values() for place, _, _ in curve})
    axes.set_xticks(
        places, [EngFormatter(sep="", places=0)(place) for place in places], rotation=45 if unit == "B" else 0
    )
    axes.minorticks_off()
    axes.set_xlabel("bytes on the wire, both ways" if unit == "B" else "rounds")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.set_label(f"Line chart of accuracy against {'bytes' if unit == 'B' else 'rounds'}: {'; '.join(said)}.")
    return figure


def turns_figure(panels: Mapping[str, Mapping[str, Sequence[float]]], measure: str) -> Figure:
    """A measure after each turn, from before the first one (0) on: a panel for each of whom it is, a line a system.

    Args:
        panels: by panel and system, the measure after 0, 1, … turns; all panels have the same systems.
        measure: what the axes say.
    """
    across = min(2, len(panels))
    down = math.ceil(len(panels) / across)
    systems = list(next(iter(panels.values())))
    figure = Figure(figsize=(4.8, 0.7 + 1.8 * down + 0.22 * math.ceil(len(systems) / 2)), layout="constrained")
    all_axes = list(figure.subplots(down, across, sharex=True, squeeze=False).flat)
    for (title, curves), axes in zip(panels.items(), all_axes, strict=False):
        for index, values in enumerate(curves.values()):
            axes.plot(range(len(values)), values, **_line(index), markersize=4)
        axes.set_title(_plain(title), fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in all_axes[len(panels) - across : len(panels)]:
        axes.tick_params(labelbottom=True)
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("times that clients have trained", fontsize=10)
    figure.supylabel(measure, fontsize=10)
    figure.legend(
        all_axes[0].lines, [_plain(name) for name in systems], loc="outside upper center", ncols=2, frameon=False
    )
    last = {title: ", ".join(f"{name} {of[-1]:.3f}" for name, of in curves.items()) for title, curves in panels.items()}
    said = "; ".join(f"{title}: {values}" for title, values in last.items())
    figure.set_label(f"Line charts of {measure} after each turn. After the last one, {said}.")
    return figure


def conflict_figure(conflict: Mapping[str, tuple[float, float]]) -> Figure:
    """Sign conflict by layer before (hollow) and after pruning (filled), a panel for each module.

    Args:
        conflict: layer → shares before and after.
    """
    cells = {_row_and_column(name): shares for name, shares in conflict.items()}
    rows = sorted({row for row, _ in cells})
    modules = sorted({module for _, module in cells})
    across = min(2, len(modules))
    down = math.ceil(len(modules) / across)
    figure = Figure(figsize=(4.8, 0.8 + 1.6 * down), layout="constrained")
    panels = list(figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat)
    hollow = {"color": GREY, "marker": "o", "markerfacecolor": "white", "linestyle": "--"}
    filled = {"color": OKABE_ITO[0], "marker": "o", "linestyle": "-"}
    for module, axes in zip(modules, panels, strict=False):
        places = [place for place, row in enumerate(rows) if (row, module) in cells]
        before, after = zip(*(cells[rows[place], module] for place in places), strict=True)
        axes.plot(places, before, **hollow, markersize=5, label="before pruning")
        axes.plot(places, after, **filled, markersize=5, label="after pruning")
        axes.set_title(_plain(module), fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        step = math.ceil(len(rows) / 8)
        ticks = range(0, len(rows), step)
        axes.set_xticks(ticks, [f"{rows[tick]:g}" if rows[tick] < math.inf else "–" for tick in ticks])
        axes.set_ylim(0, 1)
    for axes in panels[len(modules) :]:
        axes.set_visible(False)
    figure.supxlabel("layer", fontsize=10)
    figure.supylabel("sign conflict", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    means = [sum(shares) / len(shares) for shares in zip(*conflict.values(), strict=True)]
    figure.set_label(
        f"Line chart of sign conflict by layer and module: on average over layers {means[0]:.1%} before pruning and"
        f" {means[1]:.1%} after."
    )
    return figure


def projection_figure(
    points: Tensor, domains: Sequence[str], classes: Sequence[str], unseen: str, title: str
) -> Figure:
    """Image features in a plane: colour by class, marker by domain, the unseen domain large and outlined.

    Args:
        points: shape (n, 2).
        domains: of each of the n images.
        classes: of each of the n images.
        unseen: the domain in front.
        title: whose features they are.
    """
    figure = Figure(figsize=(4.8, 5.2), layout="constrained")
    axes = figure.subplots()
    class_names, domain_names = sorted(set(classes)), sorted(set(domains), key=lambda name: (name != unseen, name))
    colours = _class_colours(class_names)
    markers = {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(domain_names)}
    all_domains, of_each = np.array(domains), np.array([colours[name] for name in classes])
    for name in reversed(domain_names):  # the unseen domain last, on top
        own = np.flatnonzero(all_domains == name)
        axes.scatter(
            points[own, 0].numpy(),
            points[own, 1].numpy(),
            c=of_each[own],
            marker=markers[name],
            s=44 if name == unseen else 14,
            alpha=1.0 if name == unseen else 0.55,
            edgecolors="black",
            linewidths=0.8 if name == unseen else 0.0,
            rasterized=len(points) > MOST_VECTOR_POINTS,
        )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel("first principal component")
    axes.set_ylabel("second")
    axes.set_title(_plain(title), fontsize=11)
    shapes = [
        _key(markers[name], "white", f"{_plain(name)} (unseen)" if name == unseen else _plain(name))
        for name in domain_names
    ]
    shown = class_names if len(class_names) <= MOST_CELLS_WITH_NUMBERS else []
    figure.legend(
        handles=[*shapes, *(_key("o", colours[name], _plain(name)) for name in shown)],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
        handletextpad=0.3,
        columnspacing=1.2,
    )
    figure.set_label(
        f"Scatter plot of {len(points)} images' features, {title}, on two principal components: {len(class_names)}"
        f" classes by colour, {len(domain_names)} domains by marker, the unseen domain {unseen} outlined."
    )
    return figure


def _class_colours(names: Sequence[str]) -> dict[str, str]:
    if len(names) <= len(OKABE_ITO):
        return dict(zip(names, OKABE_ITO, strict=False))
    return {name: to_hex(colormaps["viridis"](index / (len(names) - 1))) for index, name in enumerate(names)}


def _key(marker: str, colour: str, label: str) -> Line2D:
    key = Line2D([], [], linestyle="", marker=marker, markersize=7, markerfacecolor=colour, label=label)
    key.set_markeredgecolor("black")
    key.set_markeredgewidth(0.7)
    return key


def confusion_figure(counts: Tensor, class_names: Sequence[str], title: str) -> Figure:
    """Confusion matrix: rows are true classes, columns predicted ones, colours shares of a row, numbers images.

    Args:
        counts: images, shape (C, C).
        class_names: of the C classes.
        title: which model on which domain.
    """
    grid = counts.double().numpy()
    totals = grid.sum(1, keepdims=True)
    shares = np.divide(grid, totals, out=np.zeros_like(grid), where=totals > 0)
    number = len(class_names)
    side = 1.4 + 0.42 * min(max(number, 5), 14)
    figure = Figure(figsize=(side + 0.1, side), layout="constrained")
    axes = figure.subplots()
    _heat_map(axes, shares, "cividis", 1.0, "{:g}", np.where(grid > 0, grid, np.nan))
    names = [_plain(name) for name in class_names] if number <= MOST_NAMED_CLASSES else []
    size = 10 if number <= MOST_CELLS_WITH_NUMBERS else 6
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(_plain(title), fontsize=11)
    recall = shares.diagonal()
    said = "; ".join(f"{name} {share:.0%}" for name, share in list(zip(class_names, recall, strict=True))[:20])
    figure.set_label(f"Confusion matrix, {title}. Classified right: {said}.")
    return figure


def gallery_figure(pictures: Sequence[tuple[Tensor, str]], title: str) -> Figure:
    """Images (3, H, W) uint8 four to a row, each over its text."""
    down = math.ceil(len(pictures) / 4)
    figure = Figure(figsize=(5.6, 0.4 + 2.0 * down), layout="constrained")
    panels = list(figure.subplots(down, 4, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    for axes, (pixels, text) in zip(panels, pictures, strict=False):
        axes.imshow(pixels.permute(1, 2, 0).numpy())
        axes.set_title(_plain(text), fontsize=8, y=-0.02, va="top")
    figure.suptitle(_plain(title), fontsize=11)
    figure.set_label(f"{title}: {'; '.join(text.replace(chr(10), ', ') for _, text in pictures)}.")
    return figure


def _heat_map(
    axes: Axes, grid: np.ndarray, colours: str, most: float, form: str, numbers: np.ndarray | None = None
) -> None:
    """Colours from 0 to `most` with the values, or other numbers, in the cells when there are few; NaN stays empty."""
    axes.imshow(grid, cmap=colours, vmin=0, vmax=most or 1, aspect="auto", interpolation="none")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if grid.shape[1] > MOST_CELLS_WITH_NUMBERS:
        return
    numbers = grid if numbers is None else numbers
    for (row, column), value in np.ndenumerate(numbers):
        if not np.isnan(value):
            ink = "white" if grid[row, column] <= 0.6 * most else "black"
            axes.text(column, row, form.format(value), ha="center", va="center", color=ink, fontsize=9)


def _columns(axes: Axes, names: Sequence[str], room: int) -> None:
    """Names of columns, slanted where one is longer than the letters that there is room for."""
    axes.set_xticks(range(len(names)), [_plain(name) for name in names])
    if max(map(len, names)) > room:
        for label in axes.get_xticklabels():
            label.set(rotation=35, ha="right", rotation_mode="anchor")


def _largest(grid: np.ndarray) -> float:
    return 1.0 if np.isnan(grid).all() else float(np.nanmax(grid))


def _plain_axes(figure: Figure) -> Axes:
    axes: Axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _line(index: int) -> dict[str, Any]:
    """What tells a line from the others, in colour and in print."""
    return {
        "color": OKABE_ITO[index % 7],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
        "linewidth": 1.6,
    }


def _plain(text: str) -> str:
    """Text that matplotlib does not read as mathematics."""
    return text.replace("$", r"\$")


def _row_and_column(layer: str) -> tuple[float, str]:
    # The projection is in no transformer layer; it comes after them all.
    number = re.search(r"\.layers\.(\d+)\.", layer)
    module = layer.rsplit(".", 1)[-1]
    if layer.startswith("text_model."):
        module = f"text {module}"
    return int(number.group(1)) if number else math.inf, module
