"""What stands in a run's table: its points, and beside them what was measured of the same clients before."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from sap_lightning.errors import InputError
from sap_lightning.federation.one_shot import OneShotFederation
from sap_lightning.federation.run_folder import RunFolder
from sap_lightning.io.adapter import Adapter
from sap_lightning.results import Result, Results

log = logging.getLogger(__name__)
Clients = Mapping[tuple[str, ...], Sequence[Adapter]]
"""Adapters by the unseen domain that they are for and their hashes."""


def comparable(federation: OneShotFederation) -> Results:
    """The points of a run and, to stand beside them, earlier merges of the same clients for the same domains.

    Clients that sent prompts count as the same as those that sent adapters, in a run that has both.

    Args:
        federation: one that has run.
    """
    points = [point for unseen in federation.unseen for point in federation.points_on(unseen)]
    wanted = [point.result for point in points]
    places = {result.place for result in wanted}
    own = {(of.unseen, *of.sources): adapters for of, adapters, *_ in points}
    clients = own | _of_the_other_kind(federation)
    earlier = [
        row
        for row in federation.results.rows
        if (row.seed, row.variant) == (federation.data.seed, federation.plan.variant)
        and row.place not in places
        and (row.unseen, *row.sources) in clients
        and federation.results.has(row)
    ]
    earlier = _measured_as_now(federation, earlier, clients)
    latest = {row.label: row.settings for row in earlier}
    return federation.results.only([*wanted, *(row for row in earlier if row.settings == latest[row.label])])


def _measured_as_now(federation: OneShotFederation, rows: Sequence[Result], clients: Clients) -> list[Result]:
    """Those of these rows that can be compared; of the others, as from before an image was added, the log says so."""
    now = federation.points_of(federation.sent)
    kept = [row for row in rows if now.stands(row, clients[row.unseen, *row.sources])]
    if gone := {row.label for row in rows} - {row.label for row in kept}:
        log.warning(
            "not in the table, as what it was measured on or the precision has changed since: %s; measure it again",
            ", ".join(sorted(gone)),
        )
    return kept


def _of_the_other_kind(federation: OneShotFederation) -> dict[tuple[str, ...], Sequence[Adapter]]:
    """What clients of the same domains sent of the other kind in this run: each one's, and all but an unseen one's."""
    other = RunFolder(federation.results.folder).of_kind("lora" if federation.client.kind == "prompt" else "prompt")
    found: dict[tuple[str, ...], Sequence[Adapter]] = {}
    for unseen in federation.unseen:
        folder = other.last_round(unseen)
        uploads = [folder.upload(domain) for domain in federation.clients if domain != unseen]
        try:
            sent = federation.merge.read_uploads([path for path in uploads if path.exists()])
        except InputError as error:
            log.warning("not beside these in the table: %s", error)
            return {}
        found |= {(unseen, *(one.sha256 for one in of)): of for of in [sent, *([one] for one in sent)]}
    return found
