"""SAP of whole models: what it is by its name."""

from __future__ import annotations

from pathlib import Path

from llamas import weights_in

from sap_lightning.checkpoints.fusion import Fusion
from sap_lightning.checkpoints.methods import FUSE_METHODS, WholeSAP


def test_by_its_name_every_weight_keeps_its_share_of_what_a_model_changed(speaking, texts, tmp_path) -> None:
    assert FUSE_METHODS["sap"]() == WholeSAP(scope="layer")
    first, _, base = speaking
    Fusion([first], str(tmp_path / "out"), base, "sap", texts=texts).run()
    start, trained = weights_in(Path(base)), weights_in(Path(first))
    for key, weight in weights_in(tmp_path / "out").items():
        moved, changed = (weight != start[key]).sum(), (trained[key] != start[key]).sum()
        assert abs(float(moved / weight.numel()) - 0.2) <= max(0.01, 1 / weight.numel()), key
        assert changed > 0.9 * weight.numel()
