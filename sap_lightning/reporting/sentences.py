"""What a report says in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sap_lightning.federation.instruction import BASE
from sap_lightning.functional.statistics import Interval
from sap_lightning.instruction_results import InstructionResult
from sap_lightning.reporting.evidence import Client
from sap_lightning.reporting.instruction_table import FEDIT, InstructionRow
from sap_lightning.reporting.table import TableRow
from sap_lightning.results import AVERAGE, ZERO_SHOT


def summary(rows: Sequence[TableRow]) -> list[str]:
    """What the table says, in sentences: which model is best, and how sure its lead is.

    Only models that were measured on every unseen domain count, so no single client does.
    """
    whole = [row for row in rows if None not in row.cells and row.kind != "client"]
    merges = [row for row in whole if row.kind == "merge" and row.model != AVERAGE]
    if not whole:
        return []
    best = max(whole, key=lambda row: row.mean.mean)
    domains = len(best.cells)
    over = f"over the {domains} unseen domains" if domains > 1 else "on the unseen domain"
    said = [
        f"{best.label} is the most accurate model {over}: {best.mean} top-1 accuracy{' on average' * (domains > 1)}."
    ]
    candidate = best if best in merges or not merges else max(merges, key=lambda row: row.mean.mean)
    if candidate is not best:
        said.append(f"No merge does better; of them {candidate.label} comes nearest with {candidate.mean}.")
    leads = [
        _lead(interval, reference)
        for interval, reference in (
            (candidate.over_average, "the plain average"),
            (candidate.over_zero_shot, ZERO_SHOT),
        )
        if interval is not None
    ]
    if leads:
        said.append(f"{'It' if candidate is best else candidate.label} is {' and '.join(leads)}.")
    if candidate in merges and len(merges) > 1:
        said.append(
            f"It was picked from {len(merges)} merges by its accuracy on these very images, which flatters it a little."
        )
    return [sentence.replace(" ± ", "\u00a0±\u00a0") for sentence in said]


def _lead(interval: Interval, reference: str, what: str = "images") -> str:
    points, low, high = (100 * value for value in interval)
    signed, where = (
        text.replace("-", "−") for text in (f"{points:+.1f}", f"(95 % interval {low:+.1f} to {high:+.1f})")
    )
    if low > 0:
        return f"{points:.1f} points ahead of {reference} {where}"
    if high < 0:
        return f"{-points:.1f} points behind {reference} {where}"
    return f"level with {reference} as far as these {what} can tell, {signed} points {where}"


def tuning_summary(rows: Sequence[InstructionRow]) -> list[str]:
    """What the table of ways to tune together says: which is ahead by score, how surely, and which by perplexity."""
    ways = [row for row in rows if row.system != BASE]
    best, candidate = (max(some, key=lambda row: row.mean) for some in (rows, ways))
    over = f"over the {len(best.scores)} tasks" if len(best.scores) > 1 else "on the one task"
    said = [f"{best.system} has the highest mean score {over}: {best.mean:.3f}."]
    if candidate is not best:
        said.append(
            f"No way of tuning does better; of them {candidate.system} comes nearest with {candidate.mean:.3f}."
        )
    if leads := _leads(candidate):
        said.append(f"{'It' if candidate is best else candidate.system} is {leads}.")
    if len(ways) > 1:
        said.append(
            f"It was picked from {len(ways)} ways by its score on these very conversations, which flatters it a little."
        )
    others = [row for row in ways if row.system == "pilot" and row is not candidate]
    said += [f"{row.system} is {leads}." for row in others if (leads := _leads(row))]
    least = min(round(row.perplexity, 2) for row in rows)
    first = _listed(row.system for row in rows if round(row.perplexity, 2) == least)
    said.append(f"The perplexity of the right answers is lowest by {first}: {least:.2f}.")
    return said


def _leads(row: InstructionRow) -> str:
    leads = [(row.over_base, "the base"), (row.over_fedit, FEDIT)]
    return " and ".join(_lead(of, reference, "conversations") for of, reference in leads if of is not None)


def image_sentence(found: Mapping[str, Sequence[InstructionResult]]) -> str:
    """For how many clients the right image makes the right answers likelier than another one, by system."""
    lower = {
        system: sum(one.perplexity < one.perplexity_other_image for one in of if one.perplexity_other_image is not None)
        for system, of in found.items()
    }
    clients = len(next(iter(found.values())))
    said = ", ".join(f"{system} {number}" for system, number in lower.items())
    return f"Of {clients} clients, perplexity is lower with the right image than with another one for so many: {said}."


def anchor_sentences(clients: Sequence[Client]) -> list[str]:
    """Which clients the anchors single out, and whether those are the poisoned ones."""
    if len(clients) < 3:
        return ["Of fewer than three clients none can be called the odd one."]
    flagged = {client.name for client in clients if client.stands_out}
    poisoned = {client.name for client in clients if client.poison}
    said = [f"The anchors single out {_listed(flagged)}." if flagged else "The anchors single out no client."]
    if poisoned:
        found, blamed = poisoned & flagged, flagged - poisoned
        said.append(f"Poisoned on purpose: {_listed(poisoned)}; found: {len(found)} of {len(poisoned)}.")
        said.append(f"Honest clients singled out wrongly: {_listed(blamed) if blamed else 'none'}.")
    elif flagged:
        said.append("No client was poisoned on purpose, so a false alarm or a domain that is unlike the others.")
    return said


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
