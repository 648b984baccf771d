"""LoRA on a model by PEFT: put there, and read off it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from sap_lightning.errors import InputError, check_at_least, check_share
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.io.rules import MAX_RANK

PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's layers."""


def check_rank(name: str, rank: int) -> None:
    """Raises InputError that names the setting of a rank of which no adapter could be trained, or sent."""
    check_at_least(name, rank, 1)
    if rank > MAX_RANK:
        raise InputError(f"{name} {rank}: the server takes adapters of rank {MAX_RANK} at most")


def check_lora(rank: int, dropout: float, targets: Sequence[str]) -> None:
    """Raises InputError that names the setting of a client with which no adapter could be trained, or sent."""
    check_rank("model.rank", rank)
    check_share("model.dropout", dropout)
    if dropout == 1:
        raise InputError("model.dropout is 1, at which nothing is trained; set it below")
    if isinstance(targets, str):
        raise InputError(f"model.targets {targets!r}: is one name; give a list of them")
    if not targets:
        raise InputError("model.targets is empty; name the linear layers that get an adapter")


def layers_named_by(targets: Sequence[str], linear: Sequence[str], where: str) -> list[str]:
    """The linear layers that targets name by the ends of their names.

    Args:
        targets: of a client.
        linear: names of all linear layers that there are.
        where: what they are of, in words.

    Raises:
        InputError: a target names none of them.
    """
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            names = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
            raise InputError(f"model.targets: {where} has no linear layer {target!r}; it has {names}")
    return [name for name in linear if any(f".{name}".endswith(f".{target}") for target in targets)]


def with_lora(
    model: nn.Module,
    layers: Sequence[str],
    rank: int,
    alpha: float,
    dropout: float,
    seed: int,
    start: Mapping[str, LoRALayer] | None = None,
) -> nn.Module:
    """A model with LoRA on some of its linear layers, the rest of it frozen.

    Args:
        model: changed in place.
        layers: by name.
        rank: r.
        alpha: α.
        dropout: before A.
        seed: of A; the same on every device.
        start: factors that layers have in place of those that are drawn.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=dropout,
        target_modules=list(layers),
    )
    # On the CPU, so that the initial adapter is the same whatever device trains it.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    for name, layer in (start or {}).items():
        _set_values(adapted.get_submodule(f"{PREFIX}{name}"), layer)
    return adapted


def adapted_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The layers of a model that have LoRA, by their name without it."""
    return {
        name.removeprefix(PREFIX): module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The LoRA of a model by layer, float32 on the CPU."""
    return {
        name: LoRALayer(_values(module.lora_A["default"]), _values(module.lora_B["default"]), module.scaling["default"])
        for name, module in adapted_layers(model).items()
    }


def _set_values(module: nn.Module, layer: LoRALayer) -> None:
    """Gives a layer these factors; rows of A beyond theirs stay as they were drawn, of which B makes nothing."""
    assert isinstance(module, LoraLayer)
    A, B = (_linear(factor["default"]).weight.data for factor in (module.lora_A, module.lora_B))
    rank = min(len(A), layer.rank)
    A[:rank] = layer.A[:rank]
    B.zero_()
    B[:, :rank] = layer.B[:, :rank] * (layer.scale / module.scaling["default"])


def _values(linear: nn.Module) -> Tensor:
    return _linear(linear).weight.detach().float().cpu()


def _linear(module: nn.Module) -> nn.Linear:
    assert isinstance(module, nn.Linear)
    return module
