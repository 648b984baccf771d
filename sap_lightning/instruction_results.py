"""Every measured model of federated instruction tuning, on disk as soon as it is known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from sap_lightning.errors import InputError
from sap_lightning.files import set_aside, write_csv, write_json
from sap_lightning.fingerprints import sealed, unsealed

CSV_FIELDS = (
    "system",
    "turn",
    "client",
    "task",
    "score",
    "perplexity",
    "perplexity_other_image",
    "bytes_sent",
)


@dataclass(frozen=True)
class InstructionResult:
    """One client's model after one turn, measured by the client's own test conversations.

    Attributes:
        system: the way that it was tuned.
        turn: how often the client has trained.
        client: its name.
        task: of the client.
        score: mean over its answers, in [0, 1], by what its task is judged by.
        perplexity: of the right answers.
        perplexity_other_image: the same where each conversation is shown the image of the next one that has another;
            None of text alone.
        bytes_sent: what all clients have sent in the turn.
        sources: digest of what the model was made of.
        said: each answer, and what the model said.
        provenance: config hash, git commit and package versions; empty in files of before that was written.
    """

    system: str
    turn: int
    client: str
    task: str
    score: float
    perplexity: float
    perplexity_other_image: float | None
    bytes_sent: int
    sources: str
    said: list[Mapping[str, str]] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=dict)


class InstructionResults:
    """The results of a run folder: answers/<system>/<turn>/<client>.json, and results.csv.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found: dict[tuple[str, int, str], InstructionResult] = {}
        for file in sorted(folder.glob("answers/*/*/*.json")):
            if (result := _read(file)) is not None:
                self._found[result.system, result.turn, result.client] = result

    @property
    def csv(self) -> Path:
        """All results as a table."""
        return self.folder / "results.csv"

    @property
    def all(self) -> list[InstructionResult]:
        """All results, by system, turn and client."""
        return [self._found[key] for key in sorted(self._found)]

    def has(self, system: str, turn: int, client: str, sources: str) -> bool:
        """Whether a model was measured that was made of the same."""
        found = self._found.get((system, turn, client))
        return found is not None and found.sources == sources

    def add(self, result: InstructionResult) -> None:
        """Takes in a result and writes it."""
        self._found[result.system, result.turn, result.client] = result
        self._write(result)

    @rank_zero_only
    def _write(self, result: InstructionResult) -> None:
        file = self.folder / "answers" / result.system / str(result.turn) / f"{result.client}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, sealed(asdict(result)))
        self.write_csv()

    @rank_zero_only
    def write_csv(self) -> None:
        """Writes the table."""
        write_csv(self.csv, [CSV_FIELDS, *([getattr(one, name) for name in CSV_FIELDS] for one in self.all)])

    def of(self, system: str, turn: int) -> list[InstructionResult]:
        """Those of a system after a turn, by client."""
        return [one for one in self.all if (one.system, one.turn) == (system, turn)]

    def by_task(self, system: str, turn: int) -> dict[str, float]:
        """The mean score over the clients of each task, sorted."""
        found = self.of(system, turn)
        return {
            task: fmean(one.score for one in found if one.task == task) for task in sorted({one.task for one in found})
        }

    def means(self, system: str, turn: int) -> dict[str, float]:
        """What TensorBoard shows after a turn: scores by client, by task and over tasks, and perplexities."""
        found, by_task = self.of(system, turn), self.by_task(system, turn)
        return {
            **{f"score/{task}": score for task, score in by_task.items()},
            **({"score/mean": fmean(by_task.values())} if by_task else {}),
            **{f"score_by_client/{one.client}": one.score for one in found},
            **{f"perplexity/{one.client}": one.perplexity for one in found},
        }


def _read(file: Path) -> InstructionResult | None:
    """A result that was written whole; one that was not is set aside, and measured anew."""
    try:
        content: Any = unsealed(json.loads(file.read_text(encoding="utf-8")))
        return InstructionResult(**content)
    except (InputError, ValueError, TypeError):
        set_aside(file)
        return None
