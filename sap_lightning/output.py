"""What a merge leaves behind: a PEFT adapter or a CLIPModel folder, its record, its model card, a copy on the hub."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, ModelCard, ModelCardData
from transformers import AutoImageProcessor, AutoTokenizer

from sap_lightning.adapter import Adapter, adapter_files
from sap_lightning.base import linear_weight, load_clip, model_type
from sap_lightning.errors import InputError, first_line
from sap_lightning.files import as_json, new_folder, write_json, write_text
from sap_lightning.functional.lora import LoRALayer, Update, dense, recompress
from sap_lightning.functional.rescaling import relative_error
from sap_lightning.merging.method import MergeMethod
from sap_lightning.terminal import track
from sap_lightning.uploads import HUB_ID

log = logging.getLogger(__name__)
RECORD_FILE = "merge.json"
CARD_FILE = "README.md"
EXACT = 1e-5
"""A relative error that is float32 rounding."""


@dataclass
class Merged:
    """A merged update and where it comes from.

    Attributes:
        base: hub id or folder of the base.
        method: the merge method.
        adapters: what was merged.
        weights: each adapter's share of the whole.
        update: ΔW by layer.
        metrics: what was measured of it, by name.
        rejected: names of clients that were left out as outliers.
    """

    base: str
    method: MergeMethod
    adapters: Sequence[Adapter]
    weights: Sequence[float]
    update: Mapping[str, Update]
    metrics: Mapping[str, float] = field(default_factory=dict)
    rejected: Sequence[str] = ()

    @cached_property
    def base_type(self) -> str:
        """What the base's config says it is: clip, bert, …"""
        return model_type(self.base)

    def save(
        self, folder: str | Path, format: Literal["auto", "adapter", "model"] = "auto", rank: int | None = None
    ) -> Path:
        """Writes the model, ``merge.json`` and a model card, whole or not at all.

        Args:
            folder: must not exist.
            format: a PEFT adapter, a full CLIPModel, or (auto) an adapter when the update is of low rank or a rank is
                given; an adapter for a base other than CLIP.
            rank: recompress the adapter to this rank; without one it is exact, of full rank where it must.

        Raises:
            InputError: when the folder already exists, or a full model is asked for of a base other than CLIP.
        """
        if not all(dense(layer).isfinite().all() for layer in self.update.values()):
            raise InputError(f"the merge by {self.method.name} is not finite: {self.record()['settings']}; check these")
        as_adapter = self._writes_adapter(format, rank)
        with new_folder(folder) as staging:
            error = self._save_adapter(staging, rank) if as_adapter else self._save_model(staging)
            write_json(staging / RECORD_FILE, self.record() | self._outcome(error))
            write_text(staging / CARD_FILE, str(self.card("peft" if as_adapter else "transformers")))
        log.info("merged %s written to %s", "adapter" if as_adapter else "model", folder)
        return Path(folder)

    def stands_in(self, folder: Path) -> bool:
        """Whether a folder holds what ``save`` wrote of this very merge."""
        file = folder / RECORD_FILE
        if not file.is_file():
            return False
        written, record = json.loads(file.read_text(encoding="utf-8")), self.record()
        return {name: written.get(name) for name in record} == record

    def record(self) -> dict[str, Any]:
        """What decides the outcome, as JSON knows it."""
        sources = [
            {"name": adapter.name, "sha256": adapter.sha256, "weight": weight}
            for adapter, weight in zip(self.adapters, self.weights, strict=True)
        ]
        return as_json({"base": self.base, **of_method(self.method), "sources": sources})

    def _outcome(self, error: float) -> dict[str, Any]:
        return as_json(
            {
                "relative_error": error,
                "findings": self.method.findings,
                "metrics": dict(self.metrics),
                "rejected": list(self.rejected),
            }
        )

    def card(self, library: str) -> ModelCard:
        """A model card that the hub accepts."""
        data = ModelCardData(
            base_model=self.base if HUB_ID.fullmatch(self.base) and not Path(self.base).exists() else None,
            library_name=library,
            tags=["merge", "lora", "sap_lightning", self.method.name],
        )
        record = self.record()
        sources = "\n".join(f"| {s['name']} | {s['weight']:.4g} | `{s['sha256']}` |" for s in record["sources"])
        settings = "\n".join(f"- {name}: `{json.dumps(value)}`" for name, value in record["settings"].items())
        findings = f"```json\n{json.dumps(as_json(self.method.findings), indent=2)}\n```"
        metrics = "\n".join(f"- {name}: {value:.4f}" for name, value in self.metrics.items())
        text = (
            f"---\n{data.to_yaml()}\n---\n\n# {len(self.adapters)} LoRA adapters merged by {self.method.name}\n\n"
            f"Base: `{self.base}`\n\n## Settings\n\n{settings or 'none'}\n\n"
            f"## Sources\n\n| adapter | weight | sha256 of its layers |\n|---|---|---|\n{sources}\n\n"
            f"## Findings\n\n{findings if self.method.findings else 'none'}\n\n## Evaluation\n\n{metrics or 'none'}\n"
        )
        return ModelCard(text)

    def _writes_adapter(self, format: str, rank: int | None) -> bool:
        if self.base_type != "clip":
            if format == "model":
                raise InputError(
                    f"merge.format model: {self.base} is a {self.base_type} model; only a CLIPModel can be written"
                )
            return True
        exact = all(isinstance(layer, LoRALayer) for layer in self.update.values())
        return format == "adapter" or (format == "auto" and (exact or rank is not None))

    def _save_adapter(self, folder: Path, rank: int | None) -> float:
        names = track(list(self.update), "writing: layers")
        layers = {name: self._as_lora(self.update[name], rank) for name in names}
        for name, content in adapter_files(layers, self.base, peft=self._peft()).items():
            (folder / name).write_bytes(content)
        error = relative_error(self.update, layers)
        if error > EXACT:
            log.info("recompressed with a relative error of %.2e (Frobenius norm)", error)
        return error

    def _peft(self) -> dict[str, Any] | None:
        """What all adapters say of the model; for CLIP it is known."""
        if self.base_type == "clip":
            return None
        first, *others = (adapter.peft for adapter in self.adapters)
        return {name: value if all(one.get(name) == value for one in others) else None for name, value in first.items()}

    def _as_lora(self, layer: Update, rank: int | None) -> LoRALayer:
        if isinstance(layer, LoRALayer) and (rank is None or rank >= layer.rank):
            return layer
        return recompress(layer, rank or min(layer.shape))

    def _save_model(self, folder: Path) -> float:
        clip = load_clip(self.base)
        for name, layer in self.update.items():
            linear_weight(clip, name).add_(dense(layer))
        clip.save_pretrained(folder)
        AutoTokenizer.from_pretrained(self.base).save_pretrained(folder)
        AutoImageProcessor.from_pretrained(self.base).save_pretrained(folder)
        return 0.0


def of_method(method: MergeMethod) -> dict[str, Any]:
    """What of a method decides a merge."""
    return {"method": method.name, "code": method.code, "settings": method.settings}


def holds(folder: Path, method: MergeMethod, sources: Collection[str]) -> bool:
    """Whether a folder holds what ``save`` wrote of a merge by this method, at its settings, of these adapters.

    Args:
        folder: may be missing.
        method: the method.
        sources: sha256 of the adapters, from which a merge may have left out outliers.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        return False
    written = json.loads(file.read_text(encoding="utf-8"))
    merged = {source["sha256"] for source in written["sources"]}
    return as_json(of_method(method)).items() <= written.items() and (
        merged == set(sources) or (bool(written["rejected"]) and merged < set(sources))
    )


def push_to_hub(folder: str | Path, repository: str) -> str:
    """Uploads a merge's folder to a repository on the Hugging Face hub, made if it is not there, and returns its URL.

    Raises:
        InputError: when the hub refuses it or cannot be reached.
    """
    api = HfApi()
    try:
        url = api.create_repo(repository, exist_ok=True)
        api.upload_folder(folder_path=str(folder), repo_id=repository, commit_message="Merge by sap_lightning")
    except Exception as error:  # the hub's client raises many kinds
        raise InputError(
            f"merge.push_to_hub {repository}: {first_line(error)}; the merge itself stands in {folder}"
        ) from error
    return str(url)
