"""Image features of a domain by a frozen tower: computed once, and kept where decoded images are."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from sap_lightning.data.domains import DomainDataModule
from sap_lightning.errors import InputError
from sap_lightning.files import cache_folder, read_tensors, write_tensors
from sap_lightning.fingerprints import digest
from sap_lightning.modules.client import ClientModule

log = logging.getLogger(__name__)
FORMAT = 1
"""Part of every file's name: raise it when the same images are to give other features."""
_AT_ONCE = 64
"""Images in a batch, whatever the settings say, as the last bits of a feature depend on it."""


def domain_features(module: ClientModule, data: DomainDataModule) -> Tensor:
    """Normalised features, shape (n, d), float32, of all images of a domain as they are, on the module's device.

    Args:
        module: whose tower is the base's own.
        data: the domain, set up; where it keeps no decoded images, no features are kept.
    """
    domain, device = data.require_domain(), module.device
    made_by = [module.base_fingerprint, str(module.dtype), device.type, data.preprocessing]
    file = cache_folder() / "features" / f"{digest(FORMAT, data.fingerprint(domain), made_by)}.safetensors"
    kept = read_tensors(file) if data.cache else None
    if kept is None:
        kept = {"features": _computed(module, data)}
        if data.cache:
            _keep(file, kept)
    return kept["features"].to(device)


@torch.inference_mode(False)
@torch.no_grad()
def _computed(module: ClientModule, data: DomainDataModule) -> Tensor:
    # Mixed precision trains on them, but does not make them: what is kept serves any.
    with torch.autocast(module.device.type, enabled=False):
        parts = [module.image_features(images) for images in data.inputs(_AT_ONCE, module.device)]
        return torch.cat(parts).float()


def _keep(file: Path, features: dict[str, Tensor]) -> None:
    try:
        write_tensors(file, features)
    except InputError as error:
        log.warning("features are not kept: %s", error)
