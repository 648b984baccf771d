"""What probes are asked, counted for the tests of what they remember."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from sap_lightning.functional.lora import Update
from sap_lightning.models.probe import AnchorProbe


@pytest.fixture
def asked(monkeypatch) -> list[Mapping[str, Update]]:
    """The updates at which any probe was asked for gradients, one call after another."""
    updates: list[Mapping[str, Update]] = []
    gradients = AnchorProbe.gradients

    def counted(probe: AnchorProbe, update: Mapping[str, Update], *given: Any, **named: Any) -> Any:
        updates.append(update)
        return gradients(probe, update, *given, **named)

    monkeypatch.setattr(AnchorProbe, "gradients", counted)
    return updates
