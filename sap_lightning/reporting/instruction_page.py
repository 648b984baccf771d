"""The report of federated instruction tuning: tables, scores and perplexities over turns, and answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from matplotlib.figure import Figure
from PIL import Image

from sap_lightning.data.images import decode, read_encoded
from sap_lightning.data.instructions import TEST, TRAIN, Sample
from sap_lightning.data.questions import IMAGE
from sap_lightning.federation.instruction import BASE, InstructionFederation
from sap_lightning.figures import turns_figure
from sap_lightning.instruction_results import InstructionResult
from sap_lightning.reporting.html import provenance_of, write_page
from sap_lightning.reporting.instruction_table import Cells, InstructionRow, last_turn
from sap_lightning.reporting.sentences import image_sentence, tuning_summary
from sap_lightning.reporting.table import bytes_text, interval_text

Measure = Callable[[Sequence[InstructionResult]], float]
"""What is drawn of a system's results after a turn."""
MOST_DRAWN = 12
"""Of more clients than that there are no figures of each; the tables have all."""
ANSWERS = 4
"""Conversations of each task in the report."""
LONGEST = 400
"""Letters of a question or an answer in the report."""


class Marked(NamedTuple):
    """A table of the page: each cell as text, and whether it is the best of its column."""

    header: Sequence[str]
    rows: Sequence[Sequence[tuple[str, bool]]]


class Answer(NamedTuple):
    """What some systems have said alike.

    Attributes:
        systems: their names.
        said: the answer.
        score: of it, in [0, 1].
    """

    systems: list[str]
    said: str
    score: float


class Asked(NamedTuple):
    """One test conversation.

    Attributes:
        client: whose it is.
        question: the last one of the conversation.
        picture: its image; None where it has none, or none that can be read.
        right: the right answer.
        answers: what was said.
    """

    client: str
    question: str
    picture: Image.Image | None
    right: str
    answers: list[Answer]


def write_instruction_report(
    federation: InstructionFederation, rows: Sequence[InstructionRow], tables: Sequence[Cells]
) -> Path:
    """Writes figures/ and report.html, see ``write_page``.

    Args:
        federation: that has measured.
        rows: of its first table.
        tables: its tables, see ``tables_of``.
    """
    data, results = federation.data, federation.results
    found = {row.system: results.of(row.system, last_turn(federation, row.system)) for row in rows}
    tasks = sorted(set(data.tasks.values()))
    sees = any(row.other_image is not None for row in rows)
    return write_page(
        federation.folder,
        "instruction.html.j2",
        figures_of(federation),
        federation.config,
        summary=tuning_summary(rows),
        base=federation.client.base,
        rounds=federation.rounds,
        share=federation.share,
        judged={task: data.score_of(task) for task in tasks},
        tuned=_tuned(tables[0], rows),
        once=[marked(table.header, table.rows, range(1, len(table.header))) for table in tables[1:]],
        clients=_clients(federation, found),
        of_images=_of_images(found) if sees else None,
        about_images=image_sentence(found) if sees else "",
        sent=_sent(rows),
        asked={task: list(asked_of(federation, task, found)) for task in tasks},
        provenance=provenance_of(one.provenance for of in found.values() for one in of),
        seeds=[data.seed],
    )


def marked(
    header: Sequence[str], rows: Sequence[Sequence[str]], most: Collection[int] = (), least: Collection[int] = ()
) -> Marked:
    """A table whose highest numbers are marked in some columns, and whose lowest in others, as they are printed."""
    best = {at: max(float(row[at]) for row in rows) for at in most}
    best |= {at: min(float(row[at]) for row in rows) for at in least}
    return Marked(
        header, [[(cell, at in best and float(cell) == best[at]) for at, cell in enumerate(row)] for row in rows]
    )


def _tuned(table: Cells, rows: Sequence[InstructionRow]) -> Marked:
    """The first table, with differences to the base and to FedIT, where they are known, after the means."""
    mean = table.header.index("perplexity")
    leads = {"over base": [row.over_base for row in rows], "over fedit": [row.over_fedit for row in rows]}
    shown = {name: of for name, of in leads.items() if any(of)}
    texts = [
        [*cells[:mean], *(interval_text(of[at]).replace("-", "−") for of in shown.values()), *cells[mean:]]
        for at, cells in enumerate(table.rows)
    ]
    header = [*table.header[:mean], *shown, *table.header[mean:]]
    return marked(header, texts, range(1, mean), [mean + len(shown)])


def _clients(federation: InstructionFederation, found: Mapping[str, Sequence[InstructionResult]]) -> Marked:
    """Each client's task, how many conversations it has, and its score by system."""
    data = federation.data
    rows = []
    for client, of in _by_client(found).items():
        numbers = [str(len(data.samples(client, file))) for file in (TRAIN, TEST)]
        rows.append([client, data.tasks[client], *numbers, *(f"{one.score:.3f}" for one in of)])
    return marked(["client", "task", "trained on", "judged by", *found], rows)


def _of_images(found: Mapping[str, Sequence[InstructionResult]]) -> Marked:
    """Each client's perplexity with the right image and with another one, by system; marked where it is lower."""
    rows = [
        [(client, False), *((_both(one), one.perplexity < (one.perplexity_other_image or 0.0)) for one in of)]
        for client, of in _by_client(found).items()
    ]
    return Marked(["client", *found], rows)


def _both(one: InstructionResult) -> str:
    other = one.perplexity_other_image
    return f"{one.perplexity:.3f} → {'–' if other is None else f'{other:.3f}'}"


def _by_client(found: Mapping[str, Sequence[InstructionResult]]) -> dict[str, tuple[InstructionResult, ...]]:
    """Of each client its result by every system."""
    return {of[0].client: of for of in zip(*found.values(), strict=True)}


def _sent(rows: Sequence[InstructionRow]) -> Marked:
    texts = [
        [row.system, str(len(row.sent)), bytes_text(round(fmean(row.sent))), bytes_text(sum(row.sent))]
        for row in rows
        if row.sent
    ]
    return marked(["system", "turns", "in a turn, all clients", "in all"], texts)


def figures_of(federation: InstructionFederation) -> dict[str, Figure]:
    """Scores and perplexities over turns: means, each task's score, and where they are few each client's perplexity."""
    data, results = federation.data, federation.results
    base = results.of(BASE, 0)
    measured = {
        system: [base, *(results.of(system, turn) for turn in range(1, 2 + federation.rounds))]
        for system in federation.systems
    }

    def curves(value: Measure) -> dict[str, list[float]]:
        return {system: [value(found) for found in turns] for system, turns in measured.items()}

    def score(task: str) -> Measure:
        return lambda found: fmean(one.score for one in found if one.task == task)

    def perplexity(client: str) -> Measure:
        return lambda found: next(one.perplexity for one in found if one.client == client)

    tasks = sorted(set(data.tasks.values()))
    drawn = data.clients if len(data.clients) <= MOST_DRAWN else ()
    scores = {"mean over tasks": curves(lambda found: fmean(score(task)(found) for task in tasks))}
    scores |= {task: curves(score(task)) for task in tasks}
    perplexities = {"mean over clients": curves(lambda found: fmean(one.perplexity for one in found))}
    perplexities |= {client: curves(perplexity(client)) for client in drawn}
    figures = {"score": turns_figure(scores, "score"), "perplexity": turns_figure(perplexities, "perplexity")}
    for figure in figures.values():  # laid out once, not anew for each of its formats
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figures


def asked_of(
    federation: InstructionFederation, task: str, found: Mapping[str, Sequence[InstructionResult]]
) -> Iterator[Asked]:
    """Test conversations of a task's clients in equal distances, and what each system's last model said.

    A conversation that is not the one any more that a system was asked is passed over.
    """
    clients = [client for client, of in federation.data.tasks.items() if of == task]
    shares = Counter(clients[at % len(clients)] for at in range(ANSWERS))
    said = {(system, one.client): one.said for system, of in found.items() for one in of}
    for client, share in shares.items():
        samples = federation.data.samples(client, TEST)
        for at in sorted({(2 * number + 1) * len(samples) // (2 * share) for number in range(share)}):
            sample, answers = samples[at], {system: said[system, client][at:][:1] for system in found}
            if all(one and one[0]["answer"] == sample.answer for one in answers.values()):
                yield _asked(federation, client, sample, {system: one["said"] for system, (one,) in answers.items()})


def _asked(federation: InstructionFederation, client: str, sample: Sample, said: Mapping[str, str]) -> Asked:
    alike: dict[str, list[str]] = {}
    for system, text in said.items():
        alike.setdefault(text, []).append(system)
    scores = federation.judged(sample.task, [{"said": text, "answer": sample.answer} for text in alike])
    return Asked(
        client,
        _cut(sample.turns[-1][0].replace(IMAGE, "").strip()),
        _picture(sample),
        _cut(sample.answer),
        [Answer(of, _cut(text), score) for (text, of), score in zip(alike.items(), scores, strict=True)],
    )


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _picture(sample: Sample) -> Image.Image | None:
    if sample.image is None:
        return None
    try:
        return decode(read_encoded(sample.image))
    except Exception:  # PIL's decoders share no base class; it may have gone since it was measured
        return None
