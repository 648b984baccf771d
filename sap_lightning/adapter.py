"""LoRA adapters in and out of PEFT's format: what a client uploads, and what the server dares to merge.

An upload is a folder with `adapter_model.safetensors`, `adapter_config.json` and an optional `manifest.json`.
PEFT loads it as it is, and any LoRA folder that PEFT saved for the same base is an upload.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from reprlib import Repr
from typing import Any, NamedTuple

import safetensors.torch
import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sap_lightning.errors import InputError
from sap_lightning.files import new_folder
from sap_lightning.functional.lora import LoRALayer

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
MANIFEST_FILE = "manifest.json"

_MAX_JSON_BYTES = 2**20
_MAX_RANK = 4096
_MAX_FLOAT32 = torch.finfo(torch.float32).max
_MAX_PATTERNS = 4096
_CLIP = {
    "auto_mapping": {
        "base_model_class": "CLIPVisionModelWithProjection",
        "parent_library": "transformers.models.clip.modeling_clip",
    }
}
_FLOAT_DTYPES = ("F32", "F16", "BF16")
_FACTOR_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight")

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
_CHECKED_FIELDS = frozenset(
    {
        "alpha_pattern",
        "bias",
        "init_lora_weights",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "use_rslora",
    }
)
# The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) move a part of the base's weights into the factors.
_INITS_KEEPING_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")


class _Rule(NamedTuple):
    """What a value from outside must be, as a test and in words."""

    holds: Callable[[Any], bool]
    words: str


def _matches(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value, re.ASCII) is not None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_integer(value: Any, least: int, most: int = 2**63 - 1) -> bool:
    return type(value) is int and least <= value <= most


def _is_plain_pattern(value: str) -> bool:
    # Neither groups nor many repeats: a hostile pattern with them takes years to match.
    if not _matches(r"[\w.^$\\\[\]*+-]{1,256}")(value) or sum(map(value.count, "*+")) > 2:
        return False
    try:
        return bool(re.compile(value))
    except re.error:
        return False


_TEXT = _Rule(_is_text, "one line of text")
_TEXTS = _Rule(lambda value: isinstance(value, tuple) and all(map(_is_text, value)), "a list of texts")
_TEXT_BY_NAME = _Rule(
    lambda value: isinstance(value, dict) and all(map(_is_text, (*value, *value.values()))), "texts by name"
)
_NAME = _Rule(
    _matches(r"[A-Za-z0-9_-][A-Za-z0-9 _.-]{0,63}"),
    "at most 64 letters, digits, spaces and _ - . (not first)",
)
_SHA256 = _Rule(_matches(r"[0-9a-f]{64}"), "a sha256 in hex")
_NUMBER = _Rule(lambda value: type(value) in (int, float) and abs(value) < _MAX_FLOAT32, "a finite number")
_COUNT = _Rule(lambda value: _is_integer(value, 1), "a positive integer")
_SEED = _Rule(lambda value: _is_integer(value, 0), "an integer from 0")
_RANK = _Rule(lambda value: _is_integer(value, 1, _MAX_RANK), f"an integer from 1 to {_MAX_RANK}")
_VERSION = _Rule(lambda value: _is_integer(value, 1, 1), "1, the only version known here")
_FLAG = _Rule(lambda value: isinstance(value, bool), "true or false")
_OBJECT = _Rule(lambda value: isinstance(value, dict), "an object")
_LORA = _Rule(lambda value: value == "LORA", "'LORA', the only kind that can be merged")
_NO_BIAS = _Rule(lambda value: value == "none", "'none', as biases cannot be merged")
_PATTERN = _Rule(_is_plain_pattern, "a layer's name or a pattern with at most two repeats and no groups")
_TRANSFORMERS_CLASS = _Rule(
    lambda value: (
        _TEXT_BY_NAME.holds(value)
        and value.keys() == {"base_model_class", "parent_library"}
        and _matches(r"transformers(\.\w+)*")(value["parent_library"])
    ),
    "a class of transformers",
)
_INIT = _Rule(
    lambda value: value is None or isinstance(value, bool) or value in _INITS_KEEPING_THE_BASE,
    "one that keeps the base's weights; save the adapter with path_initial_model_for_weight_conversion",
)

_MODEL_FIELDS = {"auto_mapping": _TRANSFORMERS_CLASS, "task_type": _TEXT, "fan_in_fan_out": _FLAG}
_MANIFEST_RULES = {
    "format_version": _VERSION,
    "base": _TEXT,
    "base_fingerprint": _SHA256,
    "domain": _NAME,
    "class_names": _TEXTS,
    "num_samples": _COUNT,
    "rank": _COUNT,
    "alpha": _NUMBER,
    "targets": _TEXTS,
    "seed": _SEED,
    "packages": _TEXT_BY_NAME,
    "tensors_sha256": _SHA256,
}


@dataclass(frozen=True)
class Manifest:
    """What a client says about its adapter; nothing in it depends on when or where it was written.

    Attributes:
        base: name or path of the base checkpoint.
        base_fingerprint: `fingerprint` of the base's vision tower.
        domain: the client's domain; a plain name, as it may name a folder.
        class_names: the classes it was trained on, in order.
        num_samples: number of training images.
        rank: r of the adapter.
        alpha: α of the adapter.
        targets: names of the adapted modules.
        seed: seed of the training.
        packages: versions of the packages that trained it.
        tensors_sha256: `sha256_of` the adapter's layers.
        format_version: version of the manifest's format.

    Raises:
        InputError: a value of the wrong type or out of range.
    """

    base: str
    base_fingerprint: str
    domain: str
    class_names: tuple[str, ...]
    num_samples: int
    rank: int
    alpha: float
    targets: tuple[str, ...]
    seed: int
    packages: dict[str, str]
    tensors_sha256: str
    format_version: int = 1

    def __post_init__(self) -> None:
        for name, rule in _MANIFEST_RULES.items():
            _require(name, getattr(self, name), rule)


@dataclass(frozen=True)
class Adapter:
    """One client's LoRA, checked against the base. Two adapters are equal when their sha256 are.

    Attributes:
        name: the manifest's domain, else the folder's name.
        layers: float32 factors and scale by layer name, sorted by name; what comes from disk is read again whenever
            it is looked at, so that a thousand adapters take the memory of one layer.
        sha256: `sha256_of` the layers: the same for the same update, however its files are laid out.
        manifest: None for a plain PEFT folder.
        peft: what PEFT's config says of the model that the layers belong to.
    """

    name: str = field(compare=False)
    layers: Mapping[str, LoRALayer] = field(compare=False, repr=False)
    sha256: str
    manifest: Manifest | None = field(default=None, compare=False)
    peft: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_samples(self) -> int | None:
        """Number of training images, None if the upload does not say."""
        return self.manifest.num_samples if self.manifest else None


def fingerprint(tower: nn.Module) -> str:
    """sha256 over the sorted names, shapes and float32 values of a module's state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        _hash_tensor(digest, name, tensor)
    return digest.hexdigest()


def layer_shapes(tower: nn.Module) -> dict[str, torch.Size]:
    """Weight shape (d_out, d_in) of every linear layer of a module, by name."""
    return {name: layer.weight.shape for name, layer in tower.named_modules() if isinstance(layer, nn.Linear)}


def sha256_of(layers: Mapping[str, LoRALayer]) -> str:
    """sha256 over the sorted names, scales and float32 factors of an adapter."""
    digest = hashlib.sha256()
    for name, layer in sorted(layers.items()):
        # A file states α, not s, and α / r may differ from s in the last bit.
        digest.update(f"{name}\0{(_alpha(layer) / layer.rank).hex()}\0".encode())
        _hash_tensor(digest, "A", layer.A)
        _hash_tensor(digest, "B", layer.B)
    return digest.hexdigest()


def check_domain(name: str) -> None:
    """Raises InputError when an upload cannot name its domain so."""
    if not _NAME.holds(name):
        raise InputError(f"domain {name!r}: its name must be {_NAME.words}; rename the folder, or the dataset's value")


def read_adapter(
    folder: str | os.PathLike[str],
    shapes: Mapping[str, torch.Size] | None = None,
    base_fingerprint: str | None = None,
) -> Adapter:
    """Read an upload, whole or not at all. Nothing is unpickled.

    Args:
        folder: the upload.
        shapes: `layer_shapes` of the base's vision tower; if not given, the adapter may be of any model, and its
            layers keep the names that PEFT gave them.
        base_fingerprint: `fingerprint` of that tower; compared with the manifest's, if there is one.

    Raises:
        InputError: a file is missing, malformed or outside the folder; the adapter is for another base or of
            a kind other than ΔW = s·B·A; a tensor is unknown, missing, not finite or of a wrong shape or
            dtype; the manifest's hash is not that of the tensors.
    """
    folder = Path(folder)
    try:
        manifest = _read_manifest(folder, base_fingerprint)
        config = _read_config(folder)
        scaling = _read_scaling(folder, config, _MAX_PATTERNS if shapes is None else len(shapes))
        layers = StoredLayers(_regular_file(folder, WEIGHTS_FILE), scaling, shapes)
        sha256 = sha256_of(dict(layers))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); check the files") from None
    if manifest and manifest.tensors_sha256 != sha256:
        raise InputError(
            f"{folder / MANIFEST_FILE}: tensors_sha256 is {manifest.tensors_sha256}, the tensors and scales "
            f"give {sha256}; the files have changed since they were written, upload them again"
        )
    name = manifest.domain if manifest else folder.absolute().name
    return Adapter(name, layers, sha256, manifest, _model_fields(config))


def write_adapter(
    folder: str | os.PathLike[str],
    layers: Mapping[str, LoRALayer],
    base: str,
    manifest: Manifest | None = None,
    peft: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter that `PeftModel.from_pretrained(CLIPVisionModelWithProjection, folder)` loads.

    Equal adapters give equal bytes. Factors become float32; ranks and scales may differ between layers.

    Args:
        folder: must not exist; it appears complete or not at all.
        layers: factors by the layer's name in `CLIPVisionModelWithProjection`.
        base: name or path of the base checkpoint, for PEFT's `base_model_name_or_path`.
        manifest: makes the folder an upload.
        peft: what PEFT's config is to say of the model; a `CLIPVisionModelWithProjection` if not given.

    Returns:
        The folder.

    Raises:
        InputError: the folder exists or cannot be written, the adapter is empty or not finite, or the
            manifest is for other layers.
    """
    folder = Path(folder)
    with new_folder(folder) as staging, _errors_in(folder):
        for name, content in adapter_files(layers, base, manifest, peft).items():
            (staging / name).write_bytes(content)
    return folder


def adapter_files(
    layers: Mapping[str, LoRALayer],
    base: str,
    manifest: Manifest | None = None,
    peft: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """The files of an adapter folder by name, see `write_adapter`.

    Raises:
        InputError: the adapter is empty or not finite, or the manifest is for other layers.
    """
    if not layers:
        raise InputError("the adapter has no layers; nothing to write")
    for name, layer in layers.items():
        _require(f"rank of {name}", layer.rank, _RANK)
        _require_finite(name, layer)
    if manifest and manifest.tensors_sha256 != sha256_of(layers):
        raise InputError("the manifest's tensors_sha256 is for other layers; use sha256_of(layers)")
    files = {
        WEIGHTS_FILE: _weights_bytes(layers),
        CONFIG_FILE: _json_bytes(_peft_config(layers, base) | dict(_CLIP if peft is None else peft)),
    }
    if manifest:
        files[MANIFEST_FILE] = _json_bytes(asdict(manifest))
    return files


@dataclass(frozen=True)
class _Scaling:
    """Rank and scale of each layer, by PEFT's own rules."""

    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    use_rslora: bool

    def __post_init__(self) -> None:
        _require("r", self.rank, _RANK)
        _require("lora_alpha", self.alpha, _NUMBER)
        _require("use_rslora", self.use_rslora, _FLAG)
        _require_pattern("rank_pattern", self.rank_pattern, _RANK)
        _require_pattern("alpha_pattern", self.alpha_pattern, _NUMBER)

    def rank_of(self, layer: str) -> int:
        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), layer), self.rank)

    def scale_of(self, layer: str) -> float:
        alpha = self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), layer), self.alpha)
        rank = self.rank_of(layer)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _read_manifest(folder: Path, base_fingerprint: str | None) -> Manifest | None:
    if not os.path.lexists(folder / MANIFEST_FILE):
        return None
    path = _regular_file(folder, MANIFEST_FILE)
    with _errors_in(path):
        manifest = _manifest_from(_read_json(path))
        if base_fingerprint not in (None, manifest.base_fingerprint):
            raise InputError(
                f"base_fingerprint is {manifest.base_fingerprint}, this base's is {base_fingerprint}; "
                f"merge it into the base it was trained on, {_short(manifest.base)}"
            )
    return manifest


def _manifest_from(content: dict[str, Any]) -> Manifest:
    _require("format_version", content.get("format_version"), _VERSION)
    if missing := sorted(_MANIFEST_RULES.keys() - content.keys()):
        raise InputError(f"{missing[0]} is missing; write the upload again")
    if unknown := sorted(content.keys() - _MANIFEST_RULES.keys()):
        raise InputError(f"unknown field {_short(unknown[0])}; write the upload again")
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in content.items()}
    return Manifest(**values)


def _read_config(folder: Path) -> dict[str, Any]:
    path = _regular_file(folder, CONFIG_FILE)
    with _errors_in(path):
        config = _read_json(path)
        _require_plain_lora(config)
    return config


def _model_fields(config: dict[str, Any]) -> dict[str, Any]:
    """What the config says of its model; PEFT imports the library it names, so nothing but transformers may stand."""
    return {name: config[name] if rule.holds(config.get(name)) else None for name, rule in _MODEL_FIELDS.items()}


def _read_scaling(folder: Path, config: dict[str, Any], max_patterns: int) -> _Scaling:
    with _errors_in(folder / CONFIG_FILE):
        scaling = _scaling_from(config)
        if max(len(scaling.rank_pattern), len(scaling.alpha_pattern)) > max_patterns:
            raise InputError(f"more rank or alpha patterns than the base's {max_patterns} linear layers")
    return scaling


def _scaling_from(config: dict[str, Any]) -> _Scaling:
    if missing := sorted({"r", "lora_alpha"} - config.keys()):
        raise InputError(f"{missing[0]} is missing; save the adapter with PEFT's save_pretrained")
    return _Scaling(
        rank=config["r"],
        alpha=config["lora_alpha"],
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        use_rslora=config.get("use_rslora", False),
    )


def _require_plain_lora(config: dict[str, Any]) -> None:
    _require("peft_type", config.get("peft_type"), _LORA)
    _require("bias", config.get("bias", "none"), _NO_BIAS)
    _require("init_lora_weights", config.get("init_lora_weights", True), _INIT)
    for name in sorted(config.keys() - _HARMLESS_FIELDS - _CHECKED_FIELDS):
        if config[name]:
            raise InputError(
                f"{_short(name)} is {_short(config[name])}, but only plain LoRA, ΔW = s·B·A, can be merged; "
                "train the adapter without it"
            )


def _require_pattern(name: str, pattern: Any, rule: _Rule) -> None:
    _require(name, pattern, _OBJECT)
    for key, value in pattern.items():
        _require(f"key of {name}", key, _PATTERN)
        _require(f"{name}[{key!r}]", value, rule)


class StoredLayers(Mapping[str, LoRALayer]):
    """The layers of an adapter's weights file by name, each read and checked when it is looked at."""

    def __init__(self, path: Path, scaling: _Scaling, shapes: Mapping[str, torch.Size] | None) -> None:
        self._path = path
        self._scaling = scaling
        self._shapes = shapes
        with self._open() as file:
            keys = _factor_keys(file.keys(), shapes)
        self._keys = dict(sorted(keys.items()))

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    def __getitem__(self, name: str) -> LoRALayer:
        keys = self._keys[name]
        with self._open() as file:
            return _read_layer(file, name, keys, self._scaling, None if self._shapes is None else self._shapes[name])

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with _errors_in(self._path), safe_open(self._path, framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise InputError(f"{self._path}: not safetensors, {_short(str(error))}; save the adapter again") from None
        except OSError as error:
            raise InputError(f"{self._path}: cannot be read ({error.strerror}); check the file") from None


def _factor_keys(file_keys: Iterable[str], shapes: Mapping[str, torch.Size] | None) -> dict[str, dict[str, str]]:
    """File keys by our name of the layer, then by factor, A and B."""
    keys: dict[str, dict[str, str]] = {}
    for key in sorted(file_keys):
        name, factor = _parse_key(key, shapes)
        if factor in keys.setdefault(name, {}):
            raise InputError(f"{key} and {keys[name][factor]} are one and the same factor; keep one of them")
        keys[name][factor] = key
    if not keys:
        raise InputError("no tensors; train the adapter first")
    for name, factors in keys.items():
        if missing := {"A", "B"} - factors.keys():
            raise InputError(f"{name} has no lora_{missing.pop()}; save the adapter again")
    return keys


def _parse_key(key: str, shapes: Mapping[str, torch.Size] | None) -> tuple[str, str]:
    """The layer, under our name for it, and the factor that a file's key stands for."""
    if shapes is not None and ("text_model" in key or "text_projection" in key):
        raise InputError(f"{_short(key)} changes the text tower, only the vision tower can be merged")
    match = _FACTOR_KEY.fullmatch(key)
    if not match:
        raise InputError(f"{_short(key)} is no LoRA factor; expected base_model.model.*.lora_A.weight or _B")
    if shapes is None:
        return match["layer"], match["factor"]
    for name in (match["layer"], f"vision_model.{match['layer']}"):
        if name in shapes:
            return name, match["factor"]
    raise InputError(f"{_short(key)}: the base has no such linear layer; train the adapter on this base")


def _read_layer(
    file: safe_open, name: str, keys: dict[str, str], scaling: _Scaling, weight_shape: torch.Size | None
) -> LoRALayer:
    d_out, d_in = weight_shape or _stated_shape(file, keys)
    peft_name = keys["A"].removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    rank = scaling.rank_of(peft_name)
    layer = LoRALayer(
        A=_read_factor(file, keys["A"], (rank, d_in)),
        B=_read_factor(file, keys["B"], (d_out, rank)),
        scale=scaling.scale_of(peft_name),
    )
    _require_finite(name, layer)
    return layer


def _stated_shape(file: safe_open, keys: dict[str, str]) -> tuple[int, int]:
    A, B = (tuple(file.get_slice(keys[factor]).get_shape()) for factor in "AB")
    if len(A) != 2 or len(B) != 2:
        raise InputError(f"{keys['A']} has shape {A}, expected (r, d_in); only linear layers can be merged")
    return B[0], A[1]


def _read_factor(file: safe_open, key: str, shape: tuple[int, int]) -> Tensor:
    header = file.get_slice(key)
    if header.get_dtype() not in _FLOAT_DTYPES:
        raise InputError(f"{key} has dtype {header.get_dtype()}, expected one of {', '.join(_FLOAT_DTYPES)}")
    if tuple(header.get_shape()) != shape:
        raise InputError(
            f"{key} has shape {tuple(header.get_shape())}, expected {shape} by the base and the rank in "
            f"{CONFIG_FILE}; train the adapter on this base"
        )
    # A copy, since what is read keeps the whole file mapped for as long as it lives.
    return file.get_tensor(key).to(torch.float32, copy=True)


def _regular_file(folder: Path, name: str) -> Path:
    path = folder / name
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one with {WEIGHTS_FILE} and {CONFIG_FILE}")
    if not os.path.lexists(path):
        if name == WEIGHTS_FILE and os.path.lexists(folder / "adapter_model.bin"):
            raise InputError(f"{folder}: adapter_model.bin is a pickle, never read; save as {WEIGHTS_FILE}")
        raise InputError(f"{path}: no such file; save the adapter with PEFT's save_pretrained")
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise InputError(f"{path}: leads outside the folder; put the file itself there")
    if not path.is_file():
        raise InputError(f"{path}: not a regular file; put the file itself there")
    return path


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise InputError(f"larger than {_MAX_JSON_BYTES} bytes; save the adapter again")
    try:
        value = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON, {_short(str(error))}; save the adapter again") from None
    _require("the file", value, _OBJECT)
    return value


@contextmanager
def _errors_in(path: Path) -> Iterator[None]:
    """Put the path before what is wrong there."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _alpha(layer: LoRALayer) -> float:
    return float(layer.scale * layer.rank)


def _peft_config(layers: Mapping[str, LoRALayer], base: str) -> dict[str, Any]:
    ranks = {name: layer.rank for name, layer in sorted(layers.items())}
    alphas = {name: _whole(_alpha(layer)) for name, layer in sorted(layers.items())}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    config = LoraConfig(
        base_model_name_or_path=base,
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


def _weights_bytes(layers: Mapping[str, LoRALayer]) -> bytes:
    tensors = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = _own_copy(layer.A)
        tensors[f"base_model.model.{name}.lora_B.weight"] = _own_copy(layer.B)
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


def _own_copy(tensor: Tensor) -> Tensor:
    # safetensors refuses tensors that share memory, as slices of one stack do.
    return tensor.detach().cpu().float().clone(memory_format=torch.contiguous_format)


def _json_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _hash_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name}\0{tuple(tensor.shape)}\0".encode())
    digest.update(tensor.detach().cpu().float().numpy().tobytes())


def _require(name: str, value: Any, rule: _Rule) -> None:
    if not rule.holds(value):
        raise InputError(f"{name} is {_short(value)}, expected {rule.words}")


def _require_finite(where: str, layer: LoRALayer) -> None:
    for factor, tensor in (("A", layer.A), ("B", layer.B)):
        if not tensor.isfinite().all():
            raise InputError(f"{where}: lora_{factor} has NaN or Inf; train with a lower learning rate")
    largest = abs(layer.scale) * layer.A.double().norm() * layer.B.double().norm()
    if not largest < _MAX_FLOAT32:
        raise InputError(f"{where}: ΔW overflows float32 (scale {layer.scale:g}); check lora_alpha")


def _short(value: object) -> str:
    """A value from outside, escaped and cut to fit into one line."""
    printer = Repr()
    printer.maxstring = 120
    return printer.repr(value)
