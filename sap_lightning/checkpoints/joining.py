"""What a method is that joins whole models into one of another form, and what models must have alike for it."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sap_lightning.checkpoints.checkpoint import PREPROCESSOR_FILE, Checkpoint
from sap_lightning.checkpoints.examples import Examples
from sap_lightning.checkpoints.layout import Layout
from sap_lightning.checkpoints.method import OfWholeModels, Seen
from sap_lightning.checkpoints.sources import Sources
from sap_lightning.errors import InputError, first_line, short
from sap_lightning.merging.on_top import OnTop

FREE = {
    "_name_or_path", "transformers_version", "dtype", "use_cache", "initializer_range", "bos_token_id", "eos_token_id",
    "pad_token_id", "problem_type", "output_attentions", "output_hidden_states", "return_dict", "pretraining_tp",
}  # fmt: skip
"""What configs say that decides nothing of what a model computes; dropout, of whatever name, is of that kind too."""
INPUT_FILES = ("tokenizer.json", PREPROCESSOR_FILE)
FREE_INPUTS = {
    "truncation", "padding", "version", "processor_class", "image_processor_type", "feature_extractor_type",
}  # fmt: skip
"""What these files say that decides nothing of what a model is given."""


class JoiningMethod(OfWholeModels, OnTop):
    """Joins whole models into one of another form.

    What all have alike is fused by the method under this one, and what is each one's own stands in the result as it is.
    The first model is the example for the rest: dtypes, tokenizer and the files beside its weights are its.
    """

    has_masks = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.inner, OfWholeModels) or self.inner.needs_anchors:
            raise InputError(
                f"fuse.method {self.name}: {self.inner.name} looks at models at work, and cannot be under it; name a"
                " method that looks at weights alone, such as --fuse.method.method ties"
            )

    @property
    def needs_anchors(self) -> bool:  # type: ignore[override]
        """Whether it has to look at data."""
        return False

    def check(self, models: Sequence[str], texts: Sequence[str], with_anchors: bool) -> None:
        """Raises InputError for settings of the command that the method has no use for, or lacks.

        Args:
            models: all that are given.
            texts: files of texts.
            with_anchors: whether there are image–caption pairs.
        """

    @abstractmethod
    def layout(self, sources: Sources) -> Layout:
        """What the result is like.

        Raises:
            InputError: when these models cannot be joined.
        """

    def look(self, sources: Sources, layout: Layout, examples: Sequence[Examples]) -> Seen:
        """Weights of the result, by key, that no model has."""
        return {}


def config_of(model: Checkpoint) -> dict[str, Any]:
    """What a model's config says, with the defaults of its kind.

    Raises:
        InputError: when transformers knows no such model.
    """
    from transformers import AutoConfig  # which takes seconds

    try:
        found: dict[str, Any] = AutoConfig.from_pretrained(model.folder, trust_remote_code=False).to_dict()
    except Exception as error:  # transformers raises whatever a faulty file leads it to
        raise InputError(
            f"{model.name}: its config.json is none that transformers knows ({first_line(error)})"
        ) from error
    return found


def check_configs(
    models: Sequence[Checkpoint], configs: Sequence[Mapping[str, Any]], free: Collection[str] = ()
) -> None:
    """Raises InputError, naming the setting, when two models compute something else, whatever their weights.

    Args:
        models: the models.
        configs: theirs.
        free: what may differ too.
    """
    first = configs[0]
    for model, config in zip(models[1:], configs[1:], strict=True):
        for name in sorted(first.keys() | config.keys(), key=lambda one: (one != "model_type", one)):
            if name in FREE or name in free or "dropout" in name or first.get(name) == config.get(name):
                continue
            raise InputError(
                f"{model.name}: {name} is {short(config.get(name))} in its config, and {short(first.get(name))} in"
                f" {models[0].name}'s; give models of one architecture"
            )


def check_inputs(models: Sequence[Checkpoint]) -> None:
    """Raises InputError when two models are given something else for the same text or image, as far as files say so."""
    for name in INPUT_FILES:
        said = {model.name: _said_in(model.folder / name) for model in models if (model.folder / name).is_file()}
        for model, own in said.items():
            other = next(iter(said))
            if own != said[other]:
                raise InputError(
                    f"{model}: its {name} says other than {other}'s; give models that are shown things in the same way"
                )


def _said_in(file: Path) -> Any:
    try:
        said = json.loads(file.read_bytes())
    except ValueError as error:
        raise InputError(f"{file}: is no JSON; save the model again") from error
    return {name: one for name, one in said.items() if name not in FREE_INPUTS} if isinstance(said, dict) else said


def check_weights_alike(sources: Sources, own: Collection[str] = ()) -> None:
    """Raises InputError, naming the weight, when models have other weights, or in other shapes.

    Args:
        sources: the models.
        own: the first model's keys of weights that may be of other shapes.
    """
    first = sources.first
    for model, keys in zip(sources.models, sources.keys, strict=True):
        for key in first.stated:
            shape = model.stated[keys[key]].shape if key in keys else None
            if shape is None or (shape != first.stated[key].shape and key not in own):
                has = "has none" if shape is None else f"has it in shape {shape}"
                raise InputError(
                    f"{model.name}: {key} of {first.name} has shape {first.stated[key].shape}, and this model {has};"
                    " give models of one body"
                )
        if more := sorted(model.stated.keys() - set(keys.values())):
            raise InputError(f"{model.name}: has {short(more[0])}, and {first.name} has not; give models of one body")
