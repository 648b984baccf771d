"""The fusion of whole models in a folder of its own, shard after shard, which goes on where it was interrupted."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from sap_lightning.checkpoints.checkpoint import INDEX_FILE
from sap_lightning.checkpoints.consistency import divergences, most_consistent
from sap_lightning.checkpoints.examples import Examples
from sap_lightning.checkpoints.fuser import Fuser
from sap_lightning.checkpoints.joining import JoiningMethod
from sap_lightning.checkpoints.layout import Layout
from sap_lightning.checkpoints.method import Seen, WholeMethod
from sap_lightning.checkpoints.methods import WholeSAP
from sap_lightning.checkpoints.scores import Scores, write_scores
from sap_lightning.checkpoints.sources import Sources
from sap_lightning.console import track
from sap_lightning.errors import InputError
from sap_lightning.files import as_json, read_tensors, replacing, sha256_of_file, write_json, write_tensors, write_text
from sap_lightning.fingerprints import sealed, unsealed
from sap_lightning.io.peft_config import public_name
from sap_lightning.merging import ATAF, MergeMethod
from sap_lightning.merging.card import CARD_FILE, RECORD_FILE, Words, model_card

PLAN_FILE = "plan.json"
"""Stands in the result until all is done."""
ALPHAS_FILE = "alphas.json"
SCORES_FOLDER = "scores"
SEEN_FILE = "seen.safetensors"


@dataclass(frozen=True)
class Work:
    """The fusion of some models, and how far it is.

    Attributes:
        method: the merge method.
        shares: each model's share of the whole.
        sources: the models.
        workplace: the folder in which it is done, where finished shards stand.
        examples: what a method that asks data shows the models; of one that joins them, each model's own.
        joint: what the result is like where it is not as the first model.
    """

    method: MergeMethod
    shares: Sequence[float]
    sources: Sources
    workplace: Path
    examples: Sequence[Examples] = ()
    joint: Layout | None = None

    @property
    def folder(self) -> Path:
        """What becomes the result."""
        return self.workplace / "model"

    @cached_property
    def plan(self) -> dict[str, Any]:
        """What decides the result."""
        models = [{"name": one.name, "files": one.fingerprint} for one in (*self.sources.models, self.sources.base)]
        examples = [one.fingerprint for one in self.examples]
        shares = list(self.shares)
        return dict(as_json({**self.method.record, "models": models, "shares": shares, "examples": examples}))

    def is_planned_in(self, folder: Path) -> bool:
        """Whether a folder is, or becomes, the result of this very fusion."""
        return _read(folder / PLAN_FILE) == self.plan

    def finish(self, output: Path) -> None:
        """Leaves nothing but the result, which stands in its place."""
        shutil.rmtree(self.workplace, ignore_errors=True)
        (output / PLAN_FILE).unlink(missing_ok=True)

    def run(self) -> None:
        """Does what is not done yet.

        Raises:
            InputError: when the result is not finite, or cannot be written.
        """
        if not self.is_planned_in(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.rmtree(self.workplace / SCORES_FOLDER, ignore_errors=True)
            for name in (ALPHAS_FILE, SEEN_FILE):
                (self.workplace / name).unlink(missing_ok=True)
            write_json(self.folder / PLAN_FILE, sealed(self.plan))
        fuser = Fuser(self._decided(), self.shares, self.sources, self._scores(), self._seen(), self.joint)
        shards: dict[str, dict[str, Any]] = {}
        for shard in track(list(fuser.layout.shards), f"{self.method.name}: shards"):
            record = _record_of(self.folder / shard, self.workplace / f"{shard}.json")
            shards[shard] = record or self._write(shard, fuser, shards)
        self._complete(shards, fuser)

    def _decided(self) -> MergeMethod:
        """The method with all that it needs to know, if need be by a look at the examples."""
        method, file = self.method, self.workplace / ALPHAS_FILE
        if isinstance(method, JoiningMethod):
            return method.inner
        if not (isinstance(method, ATAF) and self.examples):
            return method
        if (found := _read(file)) is None:
            looked = divergences(method, self.shares, self.sources, self.examples[0])
            found = {str(alpha): one for alpha, one in looked.items()}
            write_json(file, sealed(found))
        alpha = most_consistent({float(alpha): one for alpha, one in found.items()})
        return replace(method, alpha=alpha, steps=ATAF.steps)  # the steps are done

    def _seen(self) -> Seen:
        """What a method of whole models alone sees of them; nothing where it is another."""
        method, file = self.method, self.workplace / SEEN_FILE
        if (seen := read_tensors(file)) is not None:
            return seen
        if isinstance(method, JoiningMethod):
            assert self.joint
            seen = dict(method.look(self.sources, self.joint, self.examples))
        elif isinstance(method, WholeMethod) and self.examples:
            seen = dict(method.look(self.sources, self.examples[0]))
        else:
            return {}
        write_tensors(file, seen)
        return read_tensors(file) or {}  # in the order of the file, as a run that goes on has them: sums depend on it

    def _scores(self) -> list[Scores]:
        """Each model's scores where the method asks for any; those that were written before are kept."""
        method, folder = self.method, self.workplace / SCORES_FOLDER
        if not (isinstance(method, WholeSAP) and self.examples):
            return []
        folder.mkdir(exist_ok=True)
        files = [folder / f"{index}.safetensors" for index in range(len(self.sources.models))]
        for index, path in enumerate(track(files, f"{method.name}: models")):
            record = path.with_suffix(".json")
            if _record_of(path, record) is None:
                with replacing(path) as file:
                    write_scores(file, method, self.sources, index, self.examples[0])
                write_json(record, sealed({"digest": sha256_of_file(path)}))
        return list(map(Scores, files))

    def _write(self, shard: str, fuser: Fuser, before: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        if before:
            fuser.go_on_from([*before.values()][-1]["equal_that_go"])
        with replacing(self.folder / shard) as file:
            tally = fuser.write(shard, file)
        digest = sha256_of_file(self.folder / shard)
        record = {"digest": digest, **tally.record(), "equal_that_go": fuser.equal_that_go}
        write_json(self.workplace / f"{shard}.json", sealed(record))
        return record

    def _complete(self, shards: Mapping[str, Mapping[str, Any]], fuser: Fuser) -> None:
        """Puts beside the weights what makes them a model, the record and the card."""
        for name, path in self.sources.first.beside().items():
            if not (self.joint and name == INDEX_FILE):
                with replacing(self.folder / name) as file, path.open("rb") as content:
                    shutil.copyfileobj(content, file)
        for name, said in self.joint.beside.items() if self.joint else ():
            write_json(self.folder / name, said)
        record, findings = self._record([*shards.values()]), self._findings([*shards.values()], fuser)
        card = model_card(
            self.sources.base.name,
            "transformers",
            ["sap_lightning", self.method.name],
            Words("models", "model", "weights"),
            record,
            {**findings, "kept": {why: len(keys) for why, keys in findings["kept"].items()}},
            {},
        )
        write_text(self.folder / CARD_FILE, f"{card}\n")
        digests = {name: one["digest"] for name, one in shards.items()}
        others = [path for path in self.folder.iterdir() if path.name not in (*digests, RECORD_FILE, PLAN_FILE)]
        files = digests | {path.name: sha256_of_file(path) for path in others}
        write_json(self.folder / RECORD_FILE, sealed({**record, "findings": findings, "files": files}))

    def _record(self, shards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What decided the result."""
        digests = [
            sha256("".join(digests).encode()) for digests in zip(*(one["digests"] for one in shards), strict=True)
        ]
        sources = [
            {"name": public_name(model.name), "weight": share, "sha256": digest.hexdigest()}
            for model, share, digest in zip(self.sources.models, self.shares, digests, strict=True)
        ]
        return dict(as_json({"base": public_name(self.sources.base.name), **self.method.record, "sources": sources}))

    def _findings(self, shards: Sequence[Mapping[str, Any]], fuser: Fuser) -> dict[str, Any]:
        """What was found out on the way: weights that stayed, were called otherwise, or have no place in the result."""
        kept = defaultdict(list)
        for key, why in fuser.kept.items():
            kept[why].append(key)
        elements = sum(one["elements"] for one in shards)
        return {
            "kept": dict(kept),
            "renamed": self.sources.renamed,
            "unused": self.sources.unused,
            **({"alpha": fuser.method.alpha} if isinstance(fuser.method, ATAF) else {}),
            **(fuser.method.findings(fuser.seen) if isinstance(fuser.method, WholeMethod) else {}),
            **(self.joint.findings if self.joint else {}),
            "unchanged": sum(one["unchanged"] for one in shards) / elements if elements else 1.0,
        }


def _record_of(file: Path, record: Path) -> dict[str, Any] | None:
    """What was said of a file when it was finished; None where it is not as it was then."""
    said = _read(record)
    whole = said and file.is_file() and sha256_of_file(file) == said["digest"]
    return said if whole else None


def _read(file: Path) -> dict[str, Any] | None:
    """What was written there and sealed; None where there is none, or it has changed since."""
    try:
        return unsealed(json.loads(file.read_bytes()))
    except (OSError, ValueError, InputError):
        return None
