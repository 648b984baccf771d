"""An HTML page of its own: figures and pictures inside, nothing of the network, text from outside as text."""

from __future__ import annotations

import base64
import io
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from sap_lightning.federation.run_folder import config_file
from sap_lightning.files import as_json, write_bytes, write_text
from sap_lightning.reporting.table import bytes_text

REPORT_FILE = "report.html"
FIGURES_FOLDER = "figures"
BITMAPS = ("projection",)
"""Figures of so many marks that the report embeds them as PNG."""
_DPI = 200
_THUMBNAIL = 224
_LONGEST_NAME = 100


def write_page(
    folder: Path, template: str, figures: Mapping[str, Figure], settings: Mapping[str, Any], **shown: Any
) -> Path:
    """Writes figures/<name>.png and .svg and report.html, each whole or not at all.

    Holds no time of day: the same run gives the same bytes.

    Args:
        folder: of the run, which gives the page its title.
        template: in this folder, made on ``frame.html.j2``.
        figures: by name; a name with a / is one of several of a kind.
        settings: the run's.
        shown: what else the template names.

    Returns:
        The page's path.
    """
    embedded = _write_figures(folder / FIGURES_FOLDER, figures)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names come from outside
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["picture"] = thumbnail
    environment.filters["bytes"] = bytes_text
    page = environment.get_template(template).render(
        title=folder.name,
        figures=embedded,
        settings=yaml.safe_dump(as_json(dict(settings)), allow_unicode=True) if settings else "",
        command=_command(folder, settings),
        **shown,
    )
    path = folder / REPORT_FILE
    write_text(path, page)
    return path


class _Embedded(NamedTuple):
    """A figure in the page: its kind (the name before the first /), data URI and text alternative."""

    kind: str
    src: str
    alt: str


def _write_figures(folder: Path, figures: Mapping[str, Figure]) -> list[_Embedded]:
    for old in [*folder.glob("*.png"), *folder.glob("*.svg")]:
        old.unlink()  # of a run that had other clients or domains
    embedded = []
    for (name, figure), file_name in zip(figures.items(), file_names(figures), strict=True):
        # The salt makes the ids of an SVG the same in every process.
        with matplotlib.rc_context({"svg.hashsalt": "sap_lightning"}):
            svg, png = _saved(figure, "svg", {"Date": None}), _saved(figure, "png", {"Software": None})
        write_bytes(folder / f"{file_name}.svg", svg)
        write_bytes(folder / f"{file_name}.png", png)
        kind = name.split("/")[0]
        src = data_uri("image/png", png) if kind in BITMAPS else data_uri("image/svg+xml", svg)
        embedded.append(_Embedded(kind, src, str(figure.get_label())))
    return embedded


def _saved(figure: Figure, form: str, metadata: dict[str, Any]) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format=form, dpi=_DPI, metadata=metadata)
    return content.getvalue()


def file_names(names: Iterable[str]) -> list[str]:
    """A plain and different file name, without suffix, for each name, whatever characters it has."""
    taken: dict[str, None] = {}
    for name in names:
        plain = re.sub(r"[^\w-]+", "_", name).strip("_")[:_LONGEST_NAME]
        number, free = 1, plain
        while free.lower() in taken:
            number += 1
            free = f"{plain}_{number}"
        taken[free.lower()] = None
    return list(taken)


def data_uri(media_type: str, content: bytes) -> str:
    """A file as an address that holds it."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def thumbnail(picture: Tensor | Image.Image) -> str:
    """A picture, or its pixels (3, H, W) uint8, made small, as an address that holds it."""
    if isinstance(picture, Tensor):
        picture = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=85)
    return data_uri("image/jpeg", content.getvalue())


def _command(folder: Path, settings: Mapping[str, Any]) -> str:
    """What repeats the run; empty when the folder holds no settings, as one that Python code filled."""
    command, file = ("sweep", "sweep.yaml") if "sweep" in settings else ("fit", config_file(settings))
    if not (folder / file).is_file():
        return ""
    config, again = shlex.quote(str(folder / file)), shlex.quote(f"{folder}_again")
    return f"python -m sap_lightning {command} --config {config} --federation.run_dir {again}"


def provenance_of(rows: Iterable[Mapping[str, str]]) -> dict[str, list[str]]:
    """What results were made with; more than one value where they differ."""
    names = {"config": "settings, hash", "commit": "git commit", "versions": "packages"}
    found = list(rows)
    values = {label: {row.get(name, "") for row in found} - {""} for name, label in names.items()}
    return {label: sorted(of) for label, of in values.items() if of}
