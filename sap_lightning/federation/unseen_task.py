"""One shot for a task that nobody trained on: the other tasks' clients are merged once, by any method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from sap_lightning.data.instructions import Encoder, batch_of, read_samples
from sap_lightning.errors import InputError
from sap_lightning.federation.systems import ALL, SYSTEMS, connectors_of
from sap_lightning.fingerprints import digest
from sap_lightning.io.instruction_upload import ReadUpload
from sap_lightning.merging import SAP
from sap_lightning.merging.method import MergeMethod, check_method
from sap_lightning.models.instruction_probe import Embedded, InstructionProbe
from sap_lightning.models.llava import embedded, load_language_base
from sap_lightning.models.patched import Patched
from sap_lightning.modules.vlm_lora import Start

ANCHORS = 32
"""Public conversations that are looked at, the first of their file."""
BATCH = 8


def check_methods(methods: Sequence[MergeMethod]) -> None:
    """Raises InputError for methods that cannot be asked here, or one that is named twice."""
    for method in methods:
        check_method(method)
        if method.needs_reach:
            raise InputError(
                f"federation.methods: {method.name} needs to know how far adapters reach, and clients that are tuned on"
                " instructions do not say; take another"
            )
        if method.needs_anchors and type(method) is not SAP:
            raise InputError(
                f"federation.methods: {method.name} looks at images and captions through CLIP; take sap, or a method"
                " that looks at nothing"
            )
    if len({method.name for method in methods}) < len(methods):
        raise InputError("federation.methods names a method twice")


def one_shot(
    base: str, task: str, uploads: Sequence[ReadUpload], tasks: Mapping[str, str], method: MergeMethod, seen: Any
) -> Start:
    """What a newcomer of a task begins with: the others' merged LoRA, and the mean of their connectors by samples.

    Args:
        base: of all.
        task: that is unseen.
        uploads: of all clients, after one turn with one connector for all.
        tasks: of all clients.
        method: merges their LoRA.
        seen: public conversations and their encoder, for methods that look at them; else None.
    """
    others = sorted((one for one in uploads if tasks[one.adapter.name] != task), key=lambda one: one.sha256)
    adapters = [one.adapter for one in others]
    start = Start(task=task, connectors=connectors_of(SYSTEMS["fedit"], others, tasks))
    probe = _probe(base, start, *seen) if method.needs_anchors else None
    return replace(start, update=method.merge(adapters, anchors=cast(Any, probe)))


def _probe(base: str, start: Start, anchors: Path, encoder: Encoder) -> InstructionProbe:
    """Public conversations, their images through the clients' mean connector."""
    samples = read_samples(anchors)[:ANCHORS]
    parts = load_language_base(base)
    language = parts.language.requires_grad_(False)
    connector = parts.connector
    if connector is not None:
        connector.load_state_dict(dict(start.connectors[ALL]))

    def batches() -> Iterable[Embedded]:
        for first in range(0, len(samples), BATCH):
            batch = batch_of(samples[first : first + BATCH], encoder)
            with torch.no_grad():
                inputs = language.get_input_embeddings()(batch.ids)
                if batch.images and connector is not None and parts.vision is not None:
                    images = connector(parts.vision(batch.images, inputs.device))
                    inputs = embedded(language, batch.ids, encoder.image_token or 0, images)
            yield Embedded(inputs, batch.attention, batch.labels)

    values = [value.double().sum().item() for value in (connector.state_dict() if connector else {}).values()]
    return InstructionProbe(Patched(language), batches, digest([sample.place for sample in samples], values))
