"""A client that does harm: it trains on wrong labels, or spoils its adapter before it sends it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sap_lightning.data.domains import DomainDataModule
from sap_lightning.errors import InputError, check_share
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.adapter import read_adapter, sha256_of, write_adapter

PoisonKind = Literal["label_flip", "label_shuffle", "noise", "scale"]
SCALE = 10.0
"""Factor of a scaled update: the boosting of model replacement (Bagdasaryan et al. 2020, arXiv:1807.00459)."""


@dataclass(frozen=True)
class Poison:
    """One poisoned client, to see which merge methods withstand it and whether the anchors expose it.

    Args:
        domain: domain of the client that is poisoned; nobody's if not given.
        kind: it trains on wrong classes (label_flip), on labels permuted among its images (label_shuffle), or sends
            an adapter of Gaussian noise (noise) or of 10 times the update (scale).
        fraction: share of its training images, or of its adapter's layers, that this is done to.

    Raises:
        InputError: when the fraction is outside [0, 1], or there is a kind of poison and no domain.
    """

    domain: str | None = None
    kind: PoisonKind = "label_flip"
    fraction: float = 1.0

    def __post_init__(self) -> None:
        check_share("federation.poison.fraction", self.fraction)
        if self.domain is None and (self.kind, self.fraction) != (Poison.kind, Poison.fraction):
            raise InputError(
                f"federation.poison {self.kind} to {self.fraction:g}: of which client? name federation.poison.domain,"
                " or leave it out"
            )

    @property
    def name(self) -> str:
        """Names a file of what this poison led to."""
        return f"{self.domain}-{self.kind}-{self.fraction:g}"

    @property
    def label(self) -> str:
        """Names a row of what this poison led to."""
        return f"{self.domain} {self.kind}" + ("" if self.fraction == 1 else f" {self.fraction:g}")

    @property
    def poisons_labels(self) -> bool:
        """Whether it is the training labels that are spoilt, rather than the trained adapter."""
        return self.kind in ("label_flip", "label_shuffle")

    def relabelled(self, data: DomainDataModule) -> DomainDataModule:
        """The same domain with wrong labels for a share of its training images, chosen by the data's seed.

        Validation and test labels stay right.
        """
        assert self.poisons_labels and data.domain is not None
        relabel = wrong_classes if self.kind == "label_flip" else shuffled
        return data.for_domain(data.domain, relabel=partial(relabel, fraction=self.fraction, seed=data.seed))

    def layers(self, layers: Mapping[str, LoRALayer], seed: int) -> dict[str, LoRALayer]:
        """An adapter with a share of its layers spoilt; which ones, and the noise, follow the seed alone."""
        assert not self.poisons_labels
        generator = torch.Generator().manual_seed(seed)
        names = sorted(layers)
        chosen = {names[place] for place in _some(len(names), self.fraction, generator).tolist()}
        poisoned = dict(layers)
        for name in sorted(chosen):
            poisoned[name] = noisy(layers[name], generator) if self.kind == "noise" else boosted(layers[name])
        return poisoned

    def rewrite(self, upload: Path, folder: Path) -> Path:
        """Writes an honest upload as its poisoned client would send it, with a manifest that the server accepts.

        Args:
            upload: the honest upload; its manifest's seed decides what is random.
            folder: the poisoned upload; must not exist.

        Returns:
            The folder.

        Raises:
            InputError: the upload is faulty or has no manifest, or the folder exists or cannot be written.
        """
        adapter = read_adapter(upload)
        if adapter.manifest is None:
            raise InputError(f"{upload}: no manifest.json to go by; write the upload again")
        layers = self.layers(adapter.layers, adapter.manifest.seed)
        manifest = replace(adapter.manifest, tensors_sha256=sha256_of(layers))
        return write_adapter(folder, layers, manifest.base, manifest, adapter.peft)


HONEST = Poison()
"""Nobody is poisoned."""


def wrong_classes(labels: Tensor, num_classes: int, fraction: float, seed: int) -> Tensor:
    """Labels (n,) with round(fraction·n) of them y → C − 1 − y, or y + 1 where that is y itself; C ≥ 2 classes.

    So every label that is chosen is wrong: the label flipping of Fang et al. 2020, arXiv:1911.11815, but for the
    middle class of an odd number, which would flip to itself.
    """
    chosen = _some(len(labels), fraction, torch.Generator().manual_seed(seed))
    right = labels[chosen]
    mirrored = num_classes - 1 - right
    flipped = labels.clone()
    flipped[chosen] = torch.where(mirrored == right, (right + 1) % num_classes, mirrored)
    return flipped


def shuffled(labels: Tensor, num_classes: int, fraction: float, seed: int) -> Tensor:
    """Labels (n,) with round(fraction·n) of them permuted among themselves: as many of each class as before."""
    generator = torch.Generator().manual_seed(seed)
    chosen = _some(len(labels), fraction, generator)
    permuted = labels.clone()
    permuted[chosen] = labels[chosen[torch.randperm(len(chosen), generator=generator)]]
    return permuted


def noisy(layer: LoRALayer, generator: torch.Generator) -> LoRALayer:
    """A layer whose factors are Gaussian noise of each one's own standard deviation, so of about its norm."""
    A, B = (
        torch.randn(factor.shape, generator=generator, dtype=factor.dtype) * factor.std(correction=0)
        for factor in (layer.A, layer.B)
    )
    return layer._replace(A=A, B=B)


def boosted(layer: LoRALayer) -> LoRALayer:
    """10·ΔW; in B, since the scale is what the manifest states as alpha."""
    return layer._replace(B=SCALE * layer.B)


def _some(n: int, fraction: float, generator: torch.Generator) -> Tensor:
    """round(fraction·n) of n positions in random order; those of a smaller fraction are among those of a larger."""
    return torch.randperm(n, generator=generator)[: round(fraction * n)]
