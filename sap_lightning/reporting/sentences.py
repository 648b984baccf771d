"""What a report says in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sap_lightning.functional.statistics import Interval
from sap_lightning.reporting.evidence import Client
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


def _lead(interval: Interval, reference: str) -> str:
    points, low, high = (100 * value for value in interval)
    signed, where = (
        text.replace("-", "−") for text in (f"{points:+.1f}", f"(95 % interval {low:+.1f} to {high:+.1f})")
    )
    if low > 0:
        return f"{points:.1f} points ahead of {reference} {where}"
    if high < 0:
        return f"{-points:.1f} points behind {reference} {where}"
    return f"level with {reference} as far as these images can tell, {signed} points {where}"


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
