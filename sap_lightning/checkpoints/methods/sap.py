"""SAP of whole models."""

from __future__ import annotations

from dataclasses import dataclass

from sap_lightning.errors import InputError
from sap_lightning.functional.masking import Scope
from sap_lightning.merging.sap import SAP

ALONE = {"space": "delta", "rescale_scope": "layer", "loss": "cosine"}
"""Settings of `merging.SAP` of which whole models have one value: their own loss, and no layers that are together."""


@dataclass(frozen=True)
class WholeSAP(SAP):
    """`merging.SAP` with a threshold for each weight, at whole models.

    The weights of a model are of more kinds than the layers of an adapter: one threshold over all of them leaves some
    with next to nothing, and what is left there is made as long again as all of it was. With a threshold for each, a
    weight at ρ = 0.8 is made at most a few times as large.

    Args:
        scope: one threshold for each weight (layer) or for the whole model (global).

    Raises:
        InputError: as `merging.SAP` does, and for a setting that whole models have not.
    """

    name = "sap"

    scope: Scope = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in ALONE.items():
            if (given := getattr(self, name)) != value:
                raise InputError(
                    f"fuse.method.{name} {given}: sap looks at whole models with {value} alone; leave it out"
                )
