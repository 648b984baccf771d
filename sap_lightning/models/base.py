"""A base, whatever model it is: the whole of it, or its type, the shapes of its linear layers, a weight of one."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

from sap_lightning.errors import InputError, first_line
from sap_lightning.io.rules import NOT_FINITE
from sap_lightning.io.weights import is_finite


def load_whole(model_class: Any, base: str | Path, where: str, kind: str, **options: Any) -> Any:
    """A model with all its weights, in float32 on the CPU, in evaluation mode.

    Args:
        model_class: the class in transformers.
        base: hub id or folder.
        where: what names it, for the error.
        kind: what it should be, for the error, as "CLIP checkpoint".
        options: of ``from_pretrained``.

    Raises:
        InputError: when it is not there, is of another kind, lacks weights, or one of them is not finite.
    """
    try:
        # On the CPU, also where Lightning builds models on the device. Weights of another shape are reported like
        # missing ones, not logged in a table.
        with torch.device("cpu"):
            model, report = model_class.from_pretrained(
                base,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    except Exception as error:  # transformers raises whatever a faulty file leads it to
        raise InputError(f"{where}: no {kind} could be loaded: {first_line(error)}") from error
    if faulty := sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}):
        raise InputError(
            f"{where}: no whole {kind}: {len(faulty)} weights are missing or of another shape than config.json says,"
            f" the first is {faulty[0]}"
        )
    if broken := next((name for name, weight in model.named_parameters() if not is_finite(weight)), None):
        raise InputError(f"{where}: {broken} {NOT_FINITE}")
    return model.eval()


@lru_cache(maxsize=1)
def _whole_model(base: str) -> nn.Module | None:
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    model_class = getattr(transformers, (config.architectures or [""])[0], None)
    return None if model_class is None else model_class.from_pretrained(base, dtype="auto", trust_remote_code=False)


def base_weight(base: str, layer: str) -> Tensor | None:
    """The weight of a checkpoint's layer by its name in the whole model; None where it cannot be had."""
    try:
        model = _whole_model(base)
    except (OSError, ValueError):  # no weights there
        return None
    module = dict(model.named_modules()).get(layer) if model else None
    weight = getattr(module, "weight", None)
    return weight.data if isinstance(weight, Tensor) else None


def model_type(base: str) -> str:
    """What a checkpoint's config says it is: clip, bert, …

    Raises:
        InputError: when there is no config.
    """
    try:
        return str(AutoConfig.from_pretrained(base, trust_remote_code=False).model_type)
    except Exception as error:  # transformers raises whatever a faulty file leads it to
        raise InputError(f"model.base {base!r}: no checkpoint could be loaded: {first_line(error)}") from error


def linear_shapes(base: str) -> dict[str, tuple[int, int]]:
    """Shape (d_out, d_in) of every linear layer of any checkpoint's base model by name, from its config alone.

    Empty for a model of which transformers has no base model.
    """
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(AutoConfig.from_pretrained(base, trust_remote_code=False))
    except ValueError:
        return {}
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            shapes[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            shapes[name] = (module.nf, module.nx)
    return shapes
