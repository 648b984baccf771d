"""What a merge leaves behind: a PEFT adapter, a CLIPModel or a prompt; its record, a copy on the hub."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, ModelCard
from transformers import AutoImageProcessor, AutoTokenizer

from sap_lightning.console import track
from sap_lightning.errors import InputError, first_line
from sap_lightning.files import as_json, new_folder, sha256_of_file, write_files, write_json, write_text
from sap_lightning.fingerprints import sealed, unsealed
from sap_lightning.functional.lora import LoRALayer, Update, dense
from sap_lightning.functional.recompression import recompress
from sap_lightning.functional.rescaling import relative_error
from sap_lightning.io.adapter import Adapter, adapter_files
from sap_lightning.io.context import as_layer
from sap_lightning.io.manifest import Kind
from sap_lightning.io.peft_config import public_name
from sap_lightning.io.prompt import prompt_files
from sap_lightning.merging.card import CARD_FILE, RECORD_FILE, Words, model_card
from sap_lightning.merging.method import MergeMethod, Prepared
from sap_lightning.models.base import model_type
from sap_lightning.models.clip import load_clip
from sap_lightning.models.layers import linear_weight

log = logging.getLogger(__name__)
Format = Literal["auto", "adapter", "model"]
Form = Literal["adapter", "model", "prompt"]
LIBRARIES: dict[Form, str] = {"adapter": "peft", "model": "transformers", "prompt": "sap_lightning"}
"""What loads each form of a merge."""
EXACT = 1e-5
"""A relative error that is float32 rounding."""


@dataclass(frozen=True)
class Merged:
    """A merged update and where it comes from.

    Attributes:
        base: hub id or folder of the base.
        method: the merge method.
        adapters: what was merged.
        weights: each adapter's share of the whole.
        prepared: the merge, ready for other sparsities.
        update: ΔW by layer.
        sparsity: that the update was pruned to; None is the method's own.
        rejected: names of clients that were left out as outliers.
        doubts: what speaks against some of the adapters, in words.
    """

    base: str
    method: MergeMethod
    adapters: Sequence[Adapter]
    weights: Sequence[float]
    prepared: Prepared = field(repr=False)
    update: Mapping[str, Update] = field(repr=False)
    sparsity: float | None = None
    rejected: Sequence[str] = ()
    doubts: Sequence[str] = ()

    def at(self, sparsity: float | None) -> Merged:
        """The same merge at another sparsity, or at the method's own."""
        if sparsity == self.sparsity:
            return self
        return replace(self, update=self.prepared.apply(sparsity), sparsity=sparsity)

    @property
    def kind(self) -> Kind:
        """What was merged: LoRA adapters, or prompts."""
        return self.adapters[0].kind

    @cached_property
    def base_type(self) -> str:
        """What the base's config says it is: clip, bert, …"""
        return model_type(self.base)

    def save(
        self,
        folder: str | Path,
        metrics: Mapping[str, float] | None = None,
        format: Format = "auto",
        rank: int | None = None,
    ) -> Path:
        """Writes the model, ``merge.json`` and a model card, whole or not at all.

        Args:
            folder: must not exist.
            metrics: what was measured of it, by name.
            format: a PEFT adapter, a full CLIPModel, or (auto) an adapter when the update is of low rank or a rank is
                given; an adapter for a base other than CLIP.
            rank: recompress the adapter to this rank; without one it is exact, of full rank where it must.

        Raises:
            InputError: when the folder already exists, or a full model is asked for of a base other than CLIP.
        """
        if not all(dense(layer).isfinite().all() for layer in self.update.values()):
            raise InputError(f"the merge by {self.method.name} is not finite: {self.record()['settings']}; check these")
        form = self._form(format, rank)
        with new_folder(folder) as staging:
            error = self._save(form, staging, rank)
            card = self.card(LIBRARIES[form], metrics or {})
            write_text(staging / CARD_FILE, f"{card}\n")
            files = {"files": {file.name: sha256_of_file(file) for file in staging.iterdir()}}
            write_json(staging / RECORD_FILE, sealed(self.record() | self._outcome(error, metrics or {}) | files))
        log.info("merged %s written to %s", form, folder)
        return Path(folder)

    def stands_in(self, folder: Path) -> bool:
        """Whether a folder holds what ``save`` wrote of this very merge."""
        return self.record().items() <= _whole_record_in(folder).items()

    def record(self) -> dict[str, Any]:
        """What decides the outcome, as JSON knows it."""
        sources = [
            {
                "name": adapter.name,
                "sha256": adapter.sha256,
                "weight": weight,
                "base": adapter.base,
                "dropped": list(adapter.dropped),
            }
            for adapter, weight in zip(self.adapters, self.weights, strict=True)
        ]
        return as_json({"base": public_name(self.base), **self.method.record, "sources": sources})

    def _outcome(self, error: float, metrics: Mapping[str, float]) -> dict[str, Any]:
        return as_json(
            {
                "relative_error": error,
                "findings": dict(self.prepared.findings),
                "metrics": dict(metrics),
                "rejected": list(self.rejected),
                "doubts": list(self.doubts),
            }
        )

    def card(self, library: str, metrics: Mapping[str, float]) -> ModelCard:
        """A model card that the hub accepts."""
        return model_card(
            self.base,
            library,
            [self.kind, "sap_lightning", self.method.name],
            Words("LoRA adapters" if self.kind == "lora" else "prompts", "adapter", "layers"),
            self.record(),
            as_json(dict(self.prepared.findings)),
            metrics,
            self.doubts,
        )

    def _form(self, format: Format, rank: int | None) -> Form:
        if self.kind == "prompt":
            return "prompt"
        if self.base_type != "clip":
            if format == "model":
                raise InputError(
                    f"merge.format model: {self.base} is a {self.base_type} model; only a CLIPModel can be written"
                )
            return "adapter"
        exact = all(isinstance(layer, LoRALayer) for layer in self.update.values())
        return "adapter" if format == "adapter" or (format == "auto" and (exact or rank is not None)) else "model"

    def _save(self, form: Form, folder: Path, rank: int | None) -> float:
        """Writes the model, and returns its relative error."""
        if form == "prompt":
            return self._save_prompt(folder)
        return self._save_adapter(folder, rank) if form == "adapter" else self._save_model(folder)

    def _save_prompt(self, folder: Path) -> float:
        layers = {name: as_layer(dense(layer)) for name, layer in self.update.items()}
        write_files(folder, prompt_files(layers))
        return 0.0

    def _save_adapter(self, folder: Path, rank: int | None) -> float:
        names = track(list(self.update), "writing: layers")
        layers = {name: self._as_lora(self.update[name], rank) for name in names}
        write_files(folder, adapter_files(layers, self.base, peft=self._peft()))
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
        tokenizer = AutoTokenizer.from_pretrained(self.base, trust_remote_code=False)
        processor = AutoImageProcessor.from_pretrained(self.base, trust_remote_code=False)
        for part in (clip, tokenizer, processor):
            try:
                part.save_pretrained(folder)
            except Exception as error:  # their Rust parts raise kinds of their own
                raise OSError(first_line(error)) from error
        return 0.0


def holds(folder: Path, method: MergeMethod, sources: Collection[str]) -> bool:
    """Whether a folder holds what ``save`` wrote of a merge by this method, at its settings, of these adapters.

    Args:
        folder: may be missing.
        method: the method.
        sources: sha256 of the adapters, from which a merge may have left out outliers.
    """
    written = _whole_record_in(folder)
    try:
        merged = {source["sha256"] for source in written["sources"]}
        rejected = bool(written["rejected"])
    except (KeyError, TypeError):  # no record, or one of another hand
        return False
    return as_json(method.record).items() <= written.items() and (
        merged == set(sources) or (rejected and merged < set(sources))
    )


def record_in(folder: Path, files: str = "*") -> dict[str, Any]:
    """What ``save`` wrote into a folder's ``merge.json``; nothing where there is none.

    Args:
        folder: may be missing.
        files: pattern of the files that must be as ``save`` wrote them.

    Raises:
        InputError: naming the file of the folder that is not what ``save`` wrote.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        return {}
    try:
        record = unsealed(json.loads(file.read_bytes()))
        digests = dict(record.get("files", {}))
    except (ValueError, TypeError, RecursionError):
        raise InputError(f"{file}: has changed since it was written; merge again") from None
    for name, digest in digests.items():
        file = folder / name
        if file.match(files) and not (file.is_file() and sha256_of_file(file) == digest):
            raise InputError(f"{file}: is missing or has changed since it was written; merge again")
    return record


def _whole_record_in(folder: Path) -> dict[str, Any]:
    """The same, and nothing where a file has changed, which is said."""
    try:
        return record_in(folder)
    except InputError as error:
        log.warning("%s: done now", error)
        return {}


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
