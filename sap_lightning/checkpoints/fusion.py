"""Whole models fused into one by a merge method: what is asked for, and whether it can be done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from sap_lightning.checkpoints.checkpoint import Checkpoint
from sap_lightning.checkpoints.examples import Anchors, Examples
from sap_lightning.checkpoints.joining import JoiningMethod
from sap_lightning.checkpoints.method import OfWholeModels, WholeMethod
from sap_lightning.checkpoints.methods import FUSE_METHODS, WholeSAP
from sap_lightning.checkpoints.sources import Sources
from sap_lightning.checkpoints.work import Work
from sap_lightning.errors import InputError
from sap_lightning.files import folder_named, locked, put_in_place, refuse_existing, writing
from sap_lightning.merging import ATAF, SAP, MergeMethod
from sap_lightning.merging.method import check_weights
from sap_lightning.merging.registry import method_of


class Fusion:
    """Fuses whole models of one architecture into another, which is written as the first of them is.

    Args:
        models: folders or hub ids of the models. The first says what the result is like: keys, shapes, dtypes, shards,
            config and tokenizer are its, and so is what cannot be fused, which the record lists.
        output: new folder for the result.
        base: the model that they were trained from; median, trimmed_mean and average need none.
        method: how the models' changes of the base become one: a method, or the name of one at its own settings.
        weights: a number for each model, by which its change is multiplied; they count alike if not given.
        texts: file of unlabelled texts, one a line, that language models are shown: ataf finds its α by them, sap what
            matters, and methods of whole models alone look at models at work. For mergeme a file for each model.
        anchors: image–caption pairs, by which they do so for CLIP models.

    Raises:
        InputError: when a method cannot fuse whole models, or the settings contradict each other.
    """

    def __init__(
        self,
        models: list[str],
        output: str,
        base: str | None = None,
        method: MergeMethod | str = "average",
        weights: list[float] | None = None,
        texts: list[str] | str | None = None,
        anchors: Anchors | None = None,
    ) -> None:
        self.models = models
        self.output = output
        self.base = base
        self.method = method_of(method, "fuse.method", FUSE_METHODS)
        self.weights = weights
        self.texts = [texts] if isinstance(texts, str) else texts or []
        self.anchors = anchors
        check_method(self.method)
        if isinstance(self.method, JoiningMethod):
            check_method(self.method.inner)
        self._check_settings()

    def _check_settings(self) -> None:
        method, least = self.method, max(1, self.method.least_clients)
        folder_named("fuse.output", self.output)
        if len(self.models) < least:
            raise InputError(f"fuse.models {self.models}: {method.name} needs at least {least}")
        self._check_apart(self.models)
        if isinstance(method, JoiningMethod):
            method.check(self.models, self.texts, self.anchors is not None)
        if isinstance(method, WholeMethod):
            method.check(self.models, self.base, self.weights)
        elif self.weights is not None:
            check_weights(method, self.weights, "fuse.weights")
            if len(self.weights) != len(self.models):
                raise InputError(f"fuse.weights {self.weights}: {len(self.weights)} for {len(self.models)} models")
        self._check_data()
        fuses = method.inner if isinstance(method, JoiningMethod) else method
        needs_base = not isinstance(method, WholeMethod)
        if needs_base and self.base is None and not (fuses.merges_prompts and math.isclose(sum(self.shares), 1)):
            raise InputError(
                f"fuse.base is not set: {fuses.name} fuses what the models have changed of a base; name the model that"
                " they were trained from"
            )

    def _check_apart(self, places: Sequence[object]) -> None:
        """Raises InputError when two models are in the same place, however they are called."""
        if twice := [model for model, place in zip(self.models, places, strict=True) if places.count(place) > 1]:
            raise InputError(f"fuse.models: {twice[-1]} is given twice; give each model once")

    def _check_data(self) -> None:
        """Data for a method that looks at any, of one kind; anchors of a config file may be there for others."""
        method, texts = self.method, ", ".join(self.texts)
        if texts and not method.needs_anchors:
            raise InputError(f"fuse.texts {texts}: {method.name} looks at none here; leave it out")
        if len(self.texts) > 1 and not isinstance(method, JoiningMethod):
            raise InputError(f"fuse.texts {texts}: {method.name} looks at one file; give one")
        if texts and self.anchors is not None:
            raise InputError(
                f"fuse.texts {texts}: is for language models, anchors.root for CLIP models; leave one of them out"
            )
        if method.needs_anchors and not texts and self.anchors is None:
            alone = ", or --fuse.method.alpha" if hasattr(method, "alpha") else ""
            raise InputError(
                f"fuse.method {method.name} looks at data: give --fuse.texts for language models, or --anchors.root for"
                f" CLIP models{alone}"
            )

    @property
    def shares(self) -> list[float]:
        """Each model's share of the whole."""
        return self.weights or [1 / len(self.models)] * len(self.models)

    def run(self) -> Path:
        """Writes the fused model; what an interrupted run has finished is kept.

        Raises:
            InputError: when a model is faulty, nothing in it fits, or something of the output's name already stands.
        """
        models = [Checkpoint(model) for model in self.models]
        self._check_apart([model.folder.resolve() for model in models])
        base = models[0] if self.base is None else Checkpoint(self.base)
        sources = Sources.of(models, base, isinstance(self.method, WholeMethod) and self.method.takes_unlike)
        output = Path(self.output)
        workplace = output.with_name(f".{output.name}.fusing")
        joint = self.method.layout(sources) if isinstance(self.method, JoiningMethod) else None
        work = Work(self.method, self.shares, sources, workplace, self._examples(models[0].folder), joint)
        if not work.is_planned_in(output):
            refuse_existing(output)
            self._check_shown(work)
            with locked(workplace), writing(workplace):
                work.run()
                put_in_place(work.folder, output)
        work.finish(output)
        return output

    def _check_shown(self, work: Work) -> None:
        """Raises InputError for models that cannot be shown the examples, before a weight of any is read."""
        for examples, model in product(work.examples, work.sources.models):
            examples.check(model.folder)

    def _examples(self, first: Path) -> list[Examples]:
        """What the models are shown, in tokens of the first model's."""
        if not self.method.needs_anchors:
            return []
        # Here, as models take seconds to import, which a method that looks at none should not cost.
        if self.texts:
            from sap_lightning.checkpoints.texts import Texts

            return [Texts(file, first) for file in self.texts]
        from sap_lightning.checkpoints.pairs import Pairs

        assert self.anchors is not None
        return [Pairs(self.anchors, first)]


def check_method(method: MergeMethod) -> None:
    """Raises InputError when a method cannot fuse whole models, and says why."""
    able = ", ".join(name for name, one in FUSE_METHODS.items() if _obstacle(one()) is None)
    if (why := _obstacle(method)) is not None:
        raise InputError(f"fuse.method {method.name} {why}; whole models are fused by {able}")


def _obstacle(method: MergeMethod) -> str | None:
    if method.needs_manifests:
        return "looks at what clients say of their training, which whole models do not"
    if method.needs_factors:
        return "looks at the factors A and B of LoRA, which whole models have not"
    if isinstance(method, OfWholeModels | WholeSAP):
        return None
    if isinstance(method, SAP):
        return "by its class path has one threshold for all layers of an adapter; ask for it by its name"
    if method.needs_anchors and not isinstance(method, ATAF):
        return "looks at anchors through CLIP with an adapter on it, and not at whole models"
    if not method.merges_weights:
        return "looks at all layers at once, which are not in memory together"
    return None
