"""Every measured point of a run, on disk as soon as it is known."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from sap_lightning.errors import InputError
from sap_lightning.files import append_bytes, as_json, read_tensors, write_csv, write_tensors, write_text
from sap_lightning.fingerprints import sealed, unsealed

log = logging.getLogger(__name__)
Kind = Literal["zero-shot", "client", "merge"]
ZERO_SHOT = "zero-shot"
AVERAGE = "average"
PERSONAL = "personal_accuracy"
CSV_METRICS = ("accuracy", "macro_accuracy", "ece", PERSONAL)
ANOTHER_FOLDER = "use another --federation.run_dir (with a copy of its uploads in it, no client is trained again)"
EARLIER_FILE = "results.json"
"""Where versions before 0.2 kept their points."""


class Place(NamedTuple):
    """Row, column and seed of a point in the table."""

    kind: Kind
    model: str
    sparsity: float | None
    condition: str
    variant: str
    unseen: str
    seed: int


@dataclass(frozen=True)
class Result:
    """One model measured on one unseen domain.

    Attributes:
        kind: the base as it is (zero-shot), one client alone, or a merge.
        model: what it is called: zero-shot, client <domain>, or the name of the merge.
        unseen: the domain it was measured on.
        measurement: digest of all that the metrics depend on.
        sparsity: ρ; None where nothing is pruned.
        swept: whether the merge was measured at several sparsities, each a row of its own.
        seed: of the clients' training.
        condition: that the merge was done under, such as a poisoned client.
        variant: the settings that a sweep changed for this point, by name.
        metrics: accuracy, macro_accuracy, ece and accuracy/<class>, as shares of 1; of prompts personal_accuracy too,
            on what its clients held back of their own domains.
        settings: those of the merge.
        sources: hashes of the adapters it was made from.
        rejected: names of clients that the server left out.
        provenance: config hash, git commit and package versions.
        rounds: how often clients have trained and uploaded for it.
        bytes: what has crossed the wire for it, up and down; None in lines of before that was counted.
    """

    kind: Kind
    model: str
    unseen: str
    measurement: str
    sparsity: float | None = None
    swept: bool = False
    seed: int = 0
    condition: str = ""
    variant: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=dict)
    rounds: int = 1
    bytes: int | None = None

    @property
    def place(self) -> Place:
        """Where it stands in the table."""
        sparsity = self.sparsity if self.swept else None
        return Place(self.kind, self.model, sparsity, self.condition, _json(self.variant), self.unseen, self.seed)

    @property
    def key(self) -> tuple[Place, str]:
        """What no two results share: one place can have been measured with several settings."""
        return self.place, self.measurement

    @property
    def label(self) -> str:
        """What the table calls its row."""
        sparsity = f" ρ={self.sparsity:g}" if self.swept else ""
        condition = f", {self.condition}" if self.condition else ""
        return f"{self.model}{sparsity}{condition}{self.variant_label}"

    @property
    def variant_label(self) -> str:
        """What a sweep changed, as the end of a label."""
        return "".join(f", {name.rsplit('.', 1)[-1]}={_short(value)}" for name, value in self.variant.items())


class Predictions(NamedTuple):
    """What a model said of the images of a domain.

    Attributes:
        probabilities: of each class, shape (n, classes), float32.
        labels: the true classes, shape (n,).
        images: positions of the images in the domain, shape (n,).
    """

    probabilities: Tensor
    labels: Tensor
    images: Tensor

    @property
    def predicted(self) -> Tensor:
        """The class of highest probability, shape (n,)."""
        return self.probabilities.argmax(1)

    @property
    def correct(self) -> Tensor:
        """Whether each image was classified right, shape (n,), bool."""
        return self.predicted == self.labels


class Results:
    """The points of a run folder: results.jsonl, a line each as it comes; results.csv; and predictions/.

    A point that is measured anew has another line, and the last one counts.

    Args:
        folder: of the run; may be missing.

    Raises:
        InputError: when the folder holds results that this version cannot read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "results.jsonl"
        self.csv = folder / "results.csv"
        refuse_earlier(folder)
        written = self.file.read_bytes() if self.file.is_file() else b""
        lines, _, cut = written.rpartition(b"\n")
        self._known: dict[tuple[Place, str], Result] = {}
        read = list(_read(self.file, lines))
        for row in filter(None, read):
            self._take(row)
        self._is_whole = self.file.is_file() and not cut and None not in read
        self._correct: dict[str, Tensor] = {}

    @property
    def rows(self) -> list[Result]:
        """All points, in the order of measurement."""
        return list(self._known.values())

    def has(self, point: Result) -> bool:
        """Whether this very point is known."""
        return point.key in self._known and self._has_predictions(point.measurement)

    def measured(self, measurement: str) -> Result | None:
        """A result of the same model on the same images, whatever it was called there."""
        if not self._has_predictions(measurement):
            return None
        return next((row for row in self._known.values() if row.measurement == measurement), None)

    def only(self, points: Iterable[Result]) -> Results:
        """What is known of these points alone, in this order, to be tabulated; what is on disk stays as it is."""
        part = copy.copy(self)
        part._known = {point.key: self._known[point.key] for point in points}
        return part

    def add(self, result: Result) -> None:
        """Takes the place of an earlier result of the very point, and appends it to the file."""
        self._take(result)
        self._append(result)

    def _take(self, result: Result) -> None:
        self._known.pop(result.key, None)
        self._known[result.key] = result

    @rank_zero_only
    def _append(self, result: Result) -> None:
        if self._is_whole:
            append_bytes(self.file, _line(result).encode())
        else:  # a command was killed while it wrote its last line, or a line is damaged
            write_text(self.file, "".join(map(_line, self.rows)))
            self._is_whole = True

    @rank_zero_only
    def write_csv(self) -> None:
        """Writes results.csv in one step."""
        head = ["row", "model", "sparsity", "unseen", "seed", "condition", "variant", *CSV_METRICS]
        head += ["rounds", "bytes", "rejected"]
        made = ["settings", "sources", "measurement", "config", "commit", "versions"]
        write_csv(self.csv, [[*head, *made], *map(_csv_row, self.rows)])

    @property
    def labels(self) -> list[str]:
        """The table's rows: zero-shot, clients, then merges in the order of measurement."""
        clients = sorted((row for row in self.rows if row.kind == "client"), key=lambda row: row.model)
        first = [row for row in self.rows if row.kind == "zero-shot"] + clients
        return list(dict.fromkeys(row.label for row in [*first, *self.rows]))

    def of(self, label: str) -> list[Result]:
        """The results of a row of the table."""
        return [row for row in self.rows if row.label == label]

    def predictions(self, result: Result) -> Predictions:
        """What the measured model said of every image.

        Raises:
            InputError: when that is missing or damaged.
        """
        file = self._predictions_file(result.measurement)
        if (found := _predictions_in(file)) is None:
            raise InputError(f"{file}: is missing or damaged; the command that measured it measures it anew")
        return found

    def correct(self, result: Result) -> Tensor:
        """Whether the measured model classified each image right, shape (n,), bool; read from disk once."""
        if result.measurement not in self._correct:
            self._correct[result.measurement] = self.predictions(result).correct
        return self._correct[result.measurement]

    @rank_zero_only
    def keep_predictions(self, measurement: str, predictions: Predictions) -> None:
        """Stores what a model said of every image, before its result is added."""
        self._correct.pop(measurement, None)
        write_tensors(self._predictions_file(measurement), predictions._asdict())

    def _has_predictions(self, measurement: str) -> bool:
        """Whether it is known what a model said of every image."""
        if measurement not in self._correct and (found := _predictions_in(self._predictions_file(measurement))):
            self._correct[measurement] = found.correct
        return measurement in self._correct

    def _predictions_file(self, measurement: str) -> Path:
        return self.folder / "predictions" / f"{measurement}.safetensors"


def _predictions_in(file: Path) -> Predictions | None:
    """What a model said, from its file; None where that is missing, damaged or holds something else."""
    tensors = read_tensors(file)
    if (
        tensors is None
        or tensors.keys() != set(Predictions._fields)
        or len({one.shape[:1] for one in tensors.values()}) > 1
    ):
        return None
    return Predictions(**tensors)


def refuse_earlier(folder: Path) -> None:
    """Raises InputError when a run folder was written by a version before 0.2, whose settings and results differ."""
    if (folder / EARLIER_FILE).exists():
        raise earlier_version(folder)


def earlier_version(folder: Path) -> InputError:
    """The error for a run folder of a version before 0.2."""
    return InputError(
        f"{folder}: was written by a version before 0.2, whose settings and results are not read any more;"
        f" {ANOTHER_FOLDER}, or version 0.1"
    )


def _read(file: Path, lines: bytes) -> Iterable[Result | None]:
    """The results in a file's lines; None for one that is damaged, which is said."""
    for number, line in enumerate(lines.split(b"\n") if lines else (), start=1):
        try:
            result = Result(**unsealed(json.loads(line)))
            _require_types(result)
            yield result
        except (ValueError, RecursionError):
            log.warning("%s: line %d is damaged: what it says is measured anew", file, number)
            yield None
        except TypeError as error:
            raise InputError(
                f"{file}: line {number} is no result of this version ({error}); {ANOTHER_FOLDER}"
            ) from error


def _require_types(result: Result) -> None:
    """Raises ValueError for a result that nobody here has written, as a person may have changed it."""
    numbers = isinstance(result.metrics, dict) and all(type(one) in (int, float) for one in result.metrics.values())
    if not (numbers and "accuracy" in result.metrics and isinstance(result.variant, dict)):
        raise ValueError("metrics are not numbers by name, or the variant no settings by name")


def _line(row: Result) -> str:
    return json.dumps(sealed(as_json(asdict(row))), sort_keys=True, ensure_ascii=False) + "\n"


def _csv_row(row: Result) -> list[object]:
    metrics = [f"{row.metrics[name]:.6f}" if name in row.metrics else "" for name in CSV_METRICS]
    point = [row.label, row.model, "" if row.sparsity is None else row.sparsity, row.unseen, row.seed, row.condition]
    wire = [row.rounds, "" if row.bytes is None else row.bytes]
    made = [";".join(row.rejected), _json(row.settings), ";".join(row.sources), row.measurement]
    return [
        *point,
        _json(row.variant),
        *metrics,
        *wire,
        *made,
        *(row.provenance.get(name, "") for name in ("config", "commit", "versions")),
    ]


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, default=str) if values else ""


def _short(value: Any) -> str:
    """A setting in a label: lists without brackets, paths by their last part."""
    if isinstance(value, list):
        return "+".join(map(_short, value))
    if isinstance(value, str):
        return value.rstrip("/").rsplit("/", 1)[-1]
    return f"{value:g}" if isinstance(value, float) else str(value)
