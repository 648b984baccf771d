"""A whole model made smaller: what is asked for, and whether it can be done."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from sap_lightning.checkpoints.checkpoint import Checkpoint
from sap_lightning.compression.blocks import Blocks
from sap_lightning.compression.calibration import Calibration
from sap_lightning.compression.gradpruner import GradPruner
from sap_lightning.compression.grasp import Grasp, Refresh, Score
from sap_lightning.compression.loading import Data, is_clip, opened, reopened, sample
from sap_lightning.compression.output import Format, Stored, settle, write_beside, write_record, write_weights
from sap_lightning.compression.recovery import recover
from sap_lightning.compression.work import Layers, Work
from sap_lightning.data.anchors import AnchorDataModule
from sap_lightning.data.texts import TokenRows
from sap_lightning.errors import InputError, check_at_least, check_share
from sap_lightning.files import (
    clear_unfinished_at,
    locked,
    new_folder,
    refuse_existing,
    write_text,
    writing,
)
from sap_lightning.fingerprints import digest

Method = Literal["grasp", "gradpruner", "drop"]
TAKEN_BY: dict[str, tuple[Method, ...]] = {
    "angular": ("grasp", "drop"),
    "retain": ("grasp",),
    "compression": ("grasp",),
    "energy": ("grasp",),
    "score": ("grasp", "gradpruner"),
    "refresh": ("grasp",),
    "format": ("grasp",),
    "density": ("gradpruner",),
    "steps": ("gradpruner",),
    "recovery_epochs": ("grasp", "gradpruner"),
}
"""Which methods take a setting; others take all."""
PLAN_FILE = "plan"
"""Holds a digest of all that decides the result, in the workplace, and in the result until all is done."""
ROUNDING = 1e-4
"""By what share of their norm the answers of one model may differ."""


class Compression:
    """Compresses the blocks of a causal language model, or of the vision tower of a CLIPModel.

    Args:
        model: folder or hub id of the model, in safetensors.
        output: new folder for the result.
        method: grasp (in the chosen blocks, weights keep the singular triplets that matter), gradpruner (the chosen
            blocks go, and what matters most of them is added to those before) or drop (they go).
        layers: share of the blocks that is chosen, those that change least of what comes in, of gradpruner those that
            LoRA pulls at least; or their numbers, from 0.
        angular: of grasp and drop: layers is a share, and the blocks follow each other: those that together turn the
            last token least, CLIP's class token.
        retain: of grasp: share of each weight's triplets that is kept; 0.1 if no other share is given.
        compression: of grasp: share of each weight's parameters that goes, in place of retain.
        energy: of grasp: share of the sum of each weight's scores that stays, with as few triplets as have it, in place
            of retain.
        score: of grasp: how a triplet matters, by the paper (if not given), by its code or by its gradient; or, as
            controls, by its singular value (sigma) or at random. Of gradpruner: how a block does, by paper or code.
        refresh: of grasp: gradients are of the model before each half of a block (if not given), before each block, or
            once, at first.
        density: of gradpruner: share of a weight that may be added where signs are equal; 0.2 if not given.
        steps: of gradpruner: how many steps of LoRA are looked at; 40 if not given.
        recovery_epochs: how often the changed blocks are trained on what the model was shown, once all are compressed;
            not at all if not given.
        texts: text file that a language model is shown; CLIP is shown the anchors.
        rows: how many rows of the texts it is shown; 32 if not given.
        tokens: how many tokens a row has; 128 if not given.
        format: of grasp: two factors for each weight (if not given), which load_compressed reads, or their product,
            dense, which any loader reads and is no smaller.
        seed: of a random choice.

    Raises:
        InputError: when a setting is none, or would be ignored.
    """

    def __init__(
        self,
        model: str,
        output: str,
        method: Method = "grasp",
        layers: Layers = 0.25,
        angular: bool = False,
        retain: float | None = None,
        compression: float | None = None,
        energy: float | None = None,
        score: Score | None = None,
        refresh: Refresh | None = None,
        density: float | None = None,
        steps: int | None = None,
        recovery_epochs: int | None = None,
        texts: str | None = None,
        rows: int | None = None,
        tokens: int | None = None,
        format: Format | None = None,
        seed: int = 0,
    ) -> None:
        given = {
            "angular": angular or None,
            "retain": retain,
            "compression": compression,
            "energy": energy,
            "score": score,
            "refresh": refresh,
            "format": format,
            "density": density,
            "steps": steps,
            "recovery_epochs": recovery_epochs,
        }
        _check_taken(method, given)
        _check_blocks(layers, angular)
        _check_shown(texts, rows, tokens)
        if method == "gradpruner" and score not in (None, "paper", "code"):
            raise InputError(f"compress.score {score}: is for grasp; gradpruner has paper and code")
        self.model = model
        self.output = output
        self.method = method
        self.layers = layers
        self.angular = angular
        self.grasp = Grasp(retain, compression, energy, score or "paper", refresh or "half", seed)
        if refresh and not self.grasp.needs_gradients:
            raise InputError(
                f"compress.refresh {refresh}: is of gradients, at which compress.score {score} does not look; leave"
                " it out"
            )
        self.pruner = GradPruner(
            score="code" if score == "code" else "paper",
            density=0.2 if density is None else density,
            steps=40 if steps is None else steps,
            seed=seed,
        )
        self.texts = texts
        self.rows = 32 if rows is None else rows
        self.tokens = 128 if tokens is None else tokens
        self.seed = seed
        self.recovery_epochs = 0 if recovery_epochs is None else recovery_epochs
        check_at_least("compress.recovery_epochs", self.recovery_epochs, 0)
        self.format: Format = format or "factors" if method == "grasp" else "dense"

    @property
    def needs_data(self) -> bool:
        """Whether the model has to be shown anything."""
        if self.method == "gradpruner" or self.recovery_epochs or not isinstance(self.layers, list):
            return True
        return self.method == "grasp" and self.grasp.needs_gradients

    @property
    def looks_at_anchors(self) -> bool:
        """Whether the model is CLIP that is shown anchors."""
        return self.needs_data and is_clip(Checkpoint(self.model))

    @property
    def record(self) -> dict[str, Any]:
        """What decides the result beside the model and what it is shown."""
        settings = {"grasp": self.grasp.settings, "gradpruner": self.pruner.settings, "drop": {}}[self.method]
        every = {"layers": self.layers, "angular": self.angular, "recovery_epochs": self.recovery_epochs, **settings}
        return {"method": self.method, "format": self.format, "settings": every}

    def run(self, anchors: AnchorDataModule | None = None) -> Path:
        """Writes the compressed model; blocks that an interrupted run has finished are kept.

        Args:
            anchors: what a CLIPModel is shown.

        Raises:
            InputError: when the model is faulty or none that can be compressed, it needs to be shown what is not given,
                or something of the output's name already stands.
        """
        checkpoint, output = Checkpoint(self.model), Path(self.output)
        data = self._data(checkpoint, anchors)
        workplace = output.parent / f".{output.name}.compressing"
        plan = digest(self.record, checkpoint.fingerprint, _shown(data))
        if _plan_in(output) != plan:
            refuse_existing(output)
            with locked(workplace), writing(workplace):
                _begin(workplace, plan)
                clear_unfinished_at(output)
                with new_folder(output) as folder:
                    written = self._fill(folder, checkpoint, data, workplace)
                    try:
                        self._check(folder, *written)
                    except InputError:  # which it would raise again
                        shutil.rmtree(workplace)
                        raise
                    write_text(folder / PLAN_FILE, plan)
        shutil.rmtree(workplace, ignore_errors=True)
        (output / PLAN_FILE).unlink(missing_ok=True)
        return output

    def _data(self, checkpoint: Checkpoint, anchors: AnchorDataModule | None) -> Data | None:
        """What the model is shown."""
        if is_clip(checkpoint):
            if self.texts:
                raise InputError(f"compress.texts: {self.model} is CLIP, which is shown --anchors.*; leave it out")
            if self.needs_data and anchors is None:
                raise InputError(f"{self.method} shows a CLIPModel anchors, and none are given")
            return anchors if self.needs_data else None
        if self.needs_data and self.texts is None:
            raise InputError(
                f"compress.texts is not set: {self.method} looks at what {self.model} makes of it; name a text file"
            )
        return TokenRows.of(self.texts, self.rows, self.tokens, "compress.texts") if self.texts else None

    def _fill(
        self, folder: Path, checkpoint: Checkpoint, data: Data | None, workplace: Path
    ) -> tuple[Calibration, Tensor]:
        """Writes all, and returns something to show what is written, and what that has to answer."""
        tower, shown = opened(checkpoint, data)
        blocks = Blocks(tower)
        stored = Stored.of(checkpoint, blocks)
        if self.format == "factors" and stored.made:
            raise InputError(
                f"{self.model}: has no {stored.made[0]}, which transformers makes of other weights, and"
                " load_compressed does not; take --compress.format dense"
            )
        first, redundancy = (shown.loss(), shown.redundancy(blocks)) if shown else (0.0, [])
        changed, findings = self._compress(Work(blocks, stored, shown, workplace), redundancy)
        if shown and self.recovery_epochs:
            if not changed:
                raise InputError(
                    f"compress.recovery_epochs: {self.method} has changed no block that is left, so that none could be"
                    " trained; leave it out"
                )
            findings["loss before recovery"] = shown.loss()
            recover(shown, [blocks[number] for number in changed], self.recovery_epochs, self.seed)
        settle(stored, blocks, changed, self.format)
        if shown:
            findings |= {"loss": [first, shown.loss()], "redundancy": redundancy}
        write_weights(folder, stored, blocks, changed)
        write_beside(folder, checkpoint, blocks)
        write_record(folder, checkpoint, {**self.record, "shown": _shown(data)}, findings)
        shown = shown or sample(tower)
        return replace(shown, tower=nn.Identity()), shown.answers()  # so that no two models are in memory

    def _check(self, folder: Path, shown: Calibration, expected: Tensor) -> None:
        """Loads what was written, whose blocks may depend on their place.

        Raises:
            InputError: when that is another model, or none.
        """
        try:
            loaded = reopened(folder)
        except InputError as error:
            said = str(error).replace(str(folder), "the result")
            raise InputError(f"{self.model}: {self.method} makes what does not load: {said}") from error
        difference, size = (replace(shown, tower=loaded).answers() - expected).norm(), expected.norm()
        if not difference <= ROUNDING * size:
            raise InputError(
                f"{self.model}: what {self.method} leaves of {type(loaded).__name__} is another model where it is"
                " loaded, as what its blocks do depends on their place: answers differ by"
                f" {difference / size:.2g} of their norm; choose other compress.layers or another method"
            )

    def _compress(self, work: Work, redundancy: Sequence[float]) -> tuple[list[int], dict[str, Any]]:
        """Compresses the model in place, and returns which blocks are left but not as they were, and what was found."""
        if self.method == "gradpruner":
            chosen, changed, findings = work.gradpruner(self.pruner, self.layers)
            return changed, {"blocks": chosen, **findings}
        findings = {}
        if self.angular and not isinstance(self.layers, list):
            chosen, findings["angular distances"] = work.run(self.layers)
        else:
            chosen = work.chosen(self.layers, redundancy)
        findings["blocks"] = chosen
        if self.method == "drop":
            work.drop(chosen)
            return [], findings
        return chosen, findings | work.grasp(self.grasp, chosen)


def _shown(data: Data | None) -> dict[str, Any]:
    """What tells one look at data from another."""
    if data is None:
        return {}
    if isinstance(data, TokenRows):
        return {"texts": digest(data.text), "rows": data.rows, "tokens": data.tokens}
    return {"anchors": data.fingerprint, "num_pairs": data.num_pairs}


def _plan_in(folder: Path) -> str | None:
    file = folder / PLAN_FILE
    return file.read_text(errors="replace") if file.is_file() else None


def _begin(workplace: Path, plan: str) -> None:
    """Leaves nothing of another compression in the workplace."""
    if _plan_in(workplace) != plan:
        for path in workplace.glob("*.safetensors*"):
            path.unlink()
        write_text(workplace / PLAN_FILE, plan)


def _check_taken(method: Method, given: Mapping[str, object]) -> None:
    """Raises InputError for a setting that is given, and that the method would ignore."""
    for name, value in given.items():
        if value is not None and method not in TAKEN_BY[name]:
            raise InputError(f"compress.{name}: {method} would ignore it; it is for {', '.join(TAKEN_BY[name])}")


def _check_blocks(layers: Layers, angular: bool) -> None:
    if not isinstance(layers, list):
        check_share("compress.layers", layers)
    elif angular:
        raise InputError(f"compress.angular: chooses blocks, and compress.layers {layers} names them; leave one out")


def _check_shown(texts: str | None, rows: int | None, tokens: int | None) -> None:
    if texts is None and (rows, tokens) != (None, None):
        raise InputError("compress.rows and compress.tokens are of compress.texts, which is not set; leave them out")
    for name, value, least in (("rows", rows, 1), ("tokens", tokens, 2)):
        if value is not None:
            check_at_least(f"compress.{name}", value, least)
