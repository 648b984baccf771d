"""PEFT's ``adapter_config.json``: what of it ΔW = s·B·A depends on, and what may stand there."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.hub import is_hub_id
from sap_lightning.io.rules import NUMBER, OBJECT, RANK, TEXT, TEXT_BY_NAME, Rule, matches, require, short

CONFIG_FILE = "adapter_config.json"
MAX_PATTERNS = 4096
_MAX_TO_MATCH = 64
_MAX_STEPS = 2 * 10**7
_NAME = re.compile(r"[\w.-]{1,256}", re.ASCII)
_TEXT_TOWER = re.compile(r"(?:^|\.)text_(?:model|projection)(?:\.|$)")

# What describes, selects or trains the layers, but leaves ΔW = s·B·A as it is.
_HARMLESS_FIELDS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "target_modules",
        "task_type",
    }
)
_HEADS = "modules_to_save"
_CHECKED_FIELDS = frozenset(
    {
        "alpha_pattern",
        "bias",
        "init_lora_weights",
        "lora_alpha",
        _HEADS,
        "peft_type",
        "r",
        "rank_pattern",
        "use_rslora",
    }
)
# The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) move a part of the base's weights into the factors.
_INITS_KEEPING_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")


def _is_pattern(value: str) -> bool:
    # Neither groups nor many repeats: a hostile pattern with them takes years to match.
    if not matches(r"[\w.^$\\\[\]*+-]{1,256}")(value) or _repeats(value) > 2:
        return False
    try:
        return bool(re.compile(value))
    except re.error:
        return False


def _repeats(pattern: str) -> int:
    return sum(map(pattern.count, "*+"))


def _ends(layer: str) -> Iterator[str]:
    """A layer's name, and what is left of it after each of its dots."""
    parts = layer.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


_FLAG = Rule(lambda value: isinstance(value, bool), "true or false")
_LORA = Rule(lambda value: value == "LORA", "'LORA', the only kind that can be merged")
_NO_BIAS = Rule(lambda value: value == "none", "'none', as biases cannot be merged")
_PATTERN = Rule(
    _is_pattern,
    "a layer's name or a pattern with at most two repeats and no groups; write out the layers' names, a key for each",
)
_TRANSFORMERS_CLASS = Rule(
    lambda value: (
        TEXT_BY_NAME.holds(value)
        and value.keys() == {"base_model_class", "parent_library"}
        and matches(r"transformers(\.\w+)*")(value["parent_library"])
    ),
    "a class of transformers",
)
_INIT = Rule(
    lambda value: value is None or isinstance(value, bool) or value in _INITS_KEEPING_THE_BASE,
    "one that keeps the base's weights; save the adapter with path_initial_model_for_weight_conversion",
)
_MODEL_FIELDS = {"auto_mapping": _TRANSFORMERS_CLASS, "task_type": TEXT, "fan_in_fan_out": _FLAG}


class ByLayer:
    """A value for each layer by PEFT's rule: that of the first key that is the end of its name, or matches it.

    Dots in a key without other signs are dots, where PEFT takes any character for them.

    Args:
        values: by key; a key is a name or a pattern.
        default: where no key fits.
    """

    def __init__(self, values: Mapping[str, Any], default: Any) -> None:
        self.values = [*values.values(), default]
        self.names = {key: place for place, key in enumerate(values) if _NAME.fullmatch(key)}
        patterns = [(place, key) for place, key in enumerate(values) if key not in self.names]
        self.patterns = [(place, re.compile(rf"(.*\.)?({key})$")) for place, key in patterns]
        self.repeats = [_repeats(key) for _, key in patterns]

    def of(self, layer: str) -> Any:
        """The value for a layer by PEFT's name for it."""
        places = [self.names[end] for end in _ends(layer) if end in self.names]
        places += [place for place, pattern in self.patterns if pattern.match(layer)]
        return self.values[min(places, default=-1)]

    def steps(self, layer: str) -> int:
        """At most so many steps its patterns take for a layer's name."""
        starts = layer.count(".") + 1
        return sum(starts * len(layer) ** repeats for repeats in self.repeats)


@dataclass(frozen=True)
class Scaling:
    """Rank and scale of each layer, by PEFT's own rules.

    Where a key of ``rank_pattern`` is more than a name or a plain pattern, the ranks are what the tensors have, which
    PEFT would compare with it.
    """

    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    use_rslora: bool

    def __post_init__(self) -> None:
        require("r", self.rank, RANK)
        require("lora_alpha", self.alpha, NUMBER)
        require("use_rslora", self.use_rslora, _FLAG)
        _require_values("rank_pattern", self.rank_pattern, RANK)
        _require_values("alpha_pattern", self.alpha_pattern, NUMBER)
        for key in self.alpha_pattern:
            require("key of alpha_pattern", key, _PATTERN)

    def ranks_and_scales(self, ranks: Mapping[str, int]) -> dict[str, tuple[int, float]]:
        """r and s of each layer by PEFT's name for it.

        Args:
            ranks: that its tensors have.

        Raises:
            InputError: when the patterns would take too long for so many layers.
        """
        known = all(map(_is_pattern, self.rank_pattern))
        rank_of = ByLayer(self.rank_pattern if known else {}, self.rank)
        alpha_of = ByLayer(self.alpha_pattern, self.alpha)
        if sum(rank_of.steps(layer) + alpha_of.steps(layer) for layer in ranks) > _MAX_STEPS:
            raise InputError(
                f"rank_pattern and alpha_pattern take too long to match for {len(ranks)} layers; write out the layers'"
                " names, a key for each"
            )
        of = {}
        for layer, stated in ranks.items():
            allowed = {rank_of.of(layer)} if known else {self.rank, *self.rank_pattern.values()}
            rank = stated if stated in allowed else max(allowed)
            alpha = alpha_of.of(layer)
            of[layer] = rank, alpha / math.sqrt(rank) if self.use_rslora else alpha / rank
        return of


def in_text_tower(name: str) -> bool:
    """Whether a layer of CLIP, or a tensor of it, belongs to the text tower."""
    return _TEXT_TOWER.search(name) is not None


def clip_fields(layers: Iterable[str]) -> dict[str, Any]:
    """What the config of an adapter of these layers of CLIP says of its model: the vision tower, or both."""
    both = any(map(in_text_tower, layers))
    return {
        "auto_mapping": {
            "base_model_class": "CLIPModel" if both else "CLIPVisionModelWithProjection",
            "parent_library": "transformers.models.clip.modeling_clip",
        }
    }


def model_fields(config: dict[str, Any]) -> dict[str, Any]:
    """What the config says of its model; PEFT imports the library it names, so nothing but transformers may stand."""
    return {name: config[name] if rule.holds(config.get(name)) else None for name, rule in _MODEL_FIELDS.items()}


def scaling_from(config: dict[str, Any], most_patterns: int = MAX_PATTERNS) -> Scaling:
    """Rank and scale of each layer from the config.

    Args:
        config: the object in adapter_config.json.
        most_patterns: how many layers may be of another rank or α than the rest.

    Raises:
        InputError: naming a field that is missing or wrong.
    """
    if missing := sorted({"r", "lora_alpha"} - config.keys()):
        raise InputError(f"{missing[0]} is missing; save the adapter with PEFT's save_pretrained")
    scaling = Scaling(
        rank=config["r"],
        alpha=config["lora_alpha"],
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        use_rslora=config.get("use_rslora", False),
    )
    if max(len(scaling.rank_pattern), len(scaling.alpha_pattern)) > most_patterns:
        raise InputError(f"more rank or alpha patterns than the base's {most_patterns} linear layers")
    return scaling


def require_plain_lora(config: dict[str, Any], heads: bool = False) -> None:
    """Raises InputError when the config is of anything but ΔW = s·B·A on the base's own weights, and allowed heads."""
    require("peft_type", config.get("peft_type"), _LORA)
    require("bias", config.get("bias", "none"), _NO_BIAS)
    require("init_lora_weights", config.get("init_lora_weights", True), _INIT)
    if config.get(_HEADS) and not heads:
        raise InputError(
            f"{_HEADS} is {short(config[_HEADS])}, layers trained whole such as a classifier's head, which cannot be"
            " merged; --merge.drop_heads true merges the rest without them"
        )
    for name in sorted(config.keys() - _HARMLESS_FIELDS - _CHECKED_FIELDS):
        if config[name]:
            raise InputError(
                f"{short(name)} is {short(config[name])}, but only plain LoRA, ΔW = s·B·A, can be merged; "
                "train the adapter without it"
            )


def base_name(config: Mapping[str, Any]) -> str:
    """What the config calls its base, as far as it may be told; empty where it calls it nothing."""
    name = config.get("base_model_name_or_path")
    return public_name(name) if isinstance(name, str) and TEXT.holds(name) else ""


def public_name(base: str) -> str:
    """A hub id as it is, of a folder its own name: its path is nobody else's business."""
    return base if is_hub_id(base) else Path(base).name


def require_targets(config: Mapping[str, Any], layers: Iterable[str]) -> list[str]:
    """Compares the layers that an adapter has with those that its config names.

    Args:
        config: the object in adapter_config.json.
        layers: names of those it has.

    Returns:
        Names of which it has no layer. PEFT allows them: one list of names serves several kinds of models.

    Raises:
        InputError: when it has a layer that is not among those named, and which PEFT would not load.
    """
    layers = list(layers)
    for layer in layers:
        _require_kept(config, layer)
    targets = config.get("target_modules")
    if not isinstance(targets, list):  # a pattern, or all linear layers
        return []
    named, found = set(filter(TEXT.holds, targets)), set()
    for layer in layers:
        ends = named.intersection(_ends(layer))
        if not ends:
            raise InputError(f"target_modules do not name {layer}, of which there are weights; save the adapter again")
        found |= ends
    return sorted(named - found)


def _require_kept(config: Mapping[str, Any], layer: str) -> None:
    """Raises InputError for a layer that the config leaves out by a list; patterns of a stranger are not tried."""
    excluded, blocks = config.get("exclude_modules"), config.get("layers_to_transform")
    block = [part for part in layer.split(".") if part.isdecimal()][-1:]
    blocks = [blocks] if isinstance(blocks, int) else blocks
    for name, leaves_out in {
        "exclude_modules": isinstance(excluded, list) and any(end in excluded for end in _ends(layer)),
        "layers_to_transform": isinstance(blocks, list) and bool(blocks) and not set(block) & set(map(str, blocks)),
    }.items():
        if leaves_out:
            raise InputError(f"{name} leaves out {layer}, of which there are weights; save the adapter again")


def _require_values(name: str, pattern: Any, rule: Rule) -> None:
    require(name, pattern, OBJECT)
    if sum(not _NAME.fullmatch(key) for key in pattern) > _MAX_TO_MATCH:
        raise InputError(f"{name} has more than {_MAX_TO_MATCH} patterns; write out the layers' names, a key for each")
    for key, value in pattern.items():
        require(f"{name}[{short(key)}]", value, rule)


def alpha_of(layer: LoRALayer) -> float:
    """α of a layer, s·r: what a file states."""
    return float(layer.scale * layer.rank)


def peft_config(layers: Mapping[str, LoRALayer], base: str) -> dict[str, Any]:
    """The config of an adapter with these layers, but for what it says of the model."""
    from peft import LoraConfig  # which takes seconds, and is only for who writes one

    ranks = {name: layer.rank for name, layer in sorted(layers.items())}
    alphas = {name: _whole(alpha_of(layer)) for name, layer in sorted(layers.items())}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    config = LoraConfig(
        base_model_name_or_path=public_name(base),
        inference_mode=True,
        r=rank,
        lora_alpha=alpha,
        rank_pattern={name: value for name, value in ranks.items() if value != rank},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
    )
    # Full names, so that PEFT refuses a model without these layers instead of leaving it as it was.
    return config.to_dict() | {"target_modules": sorted(layers)}


def _whole(value: float) -> int | float:
    """16 for 16.0, as PEFT writes it."""
    return int(value) if value.is_integer() else value


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]
