"""The model card that stands beside what a merge leaves behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData

from sap_lightning.escapes import for_markdown
from sap_lightning.io.hub import is_hub_id
from sap_lightning.io.peft_config import public_name

RECORD_FILE = "merge.json"
CARD_FILE = "README.md"


class Words(NamedTuple):
    """What was merged, in words for the card: all of them, one of them, and what of it the digest is of."""

    all: str
    one: str
    parts: str


def model_card(
    base: str,
    library: str,
    tags: Sequence[str],
    words: Words,
    record: Mapping[str, Any],
    findings: Mapping[str, Any],
    metrics: Mapping[str, float],
    doubts: Sequence[str] = (),
) -> ModelCard:
    """A model card that the hub accepts."""
    data = ModelCardData(
        base_model=base if is_hub_id(base) else None,
        library_name=library,
        tags=["merge", *tags],
    )
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card.md.j2")),
        words=words,
        base=public_name(base),
        record=record,
        doubts=doubts,
        for_markdown=for_markdown,
        findings=findings,
        metrics=metrics,
    )
