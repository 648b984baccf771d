"""Fusions by methods that look at models at work, killed and run again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from kills import killed
from references import contents

from sap_lightning.checkpoints.fusion import Fusion
from sap_lightning.checkpoints.method import WholeMethod
from sap_lightning.checkpoints.methods import FAM, AdaMMS, SafeM, WholeStatsMerging
from sap_lightning.checkpoints.work import SEEN_FILE

METHODS = [FAM(), AdaMMS(steps=3), WholeStatsMerging(steps=3), SafeM()]


@pytest.mark.parametrize("method", METHODS, ids=lambda one: one.name)
def test_a_killed_fusion_continues_to_the_same_bytes(method: WholeMethod, speaking, texts, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    base = speaking[2] if method.needs_base else None
    play = Fusion(speaking[:2], str(place / "out"), base, method, texts=texts).run
    events = killed(place, play)
    whole = contents(place / "out")
    seen = place / ".out.fusing" / SEEN_FILE
    # Before it has looked at the models, amid the shards, and when all is written.
    for event in (4, events // 2, events - 6):
        shutil.rmtree(place / "out")
        killed(place, play, event)
        assert seen.exists() == (event != 4)
        if seen.exists():
            looked = seen.stat().st_mtime_ns
            killed(place, play, 4)
            assert seen.stat().st_mtime_ns == looked, "it looked again"
        killed(place, play)
        assert contents(place / "out") == whole, event
        assert [path.name for path in place.iterdir()] == ["out"]
