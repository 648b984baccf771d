"""MergeME: fine-tunes of one language model as the experts of a mixture (Zhou et al., NAACL 2025, arXiv:2502.00997).

No code was found; the layout is Mixtral's, as mergekit-moe writes it, and a router of hidden states is that program's.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sap_lightning.checkpoints.checkpoint import Checkpoint
from sap_lightning.checkpoints.examples import Examples
from sap_lightning.checkpoints.joining import JoiningMethod, check_configs, check_inputs, check_weights_alike, config_of
from sap_lightning.checkpoints.layout import Layout, Piece
from sap_lightning.checkpoints.method import Seen
from sap_lightning.checkpoints.sources import Sources
from sap_lightning.console import track
from sap_lightning.errors import InputError, check_at_least, short
from sap_lightning.io.weights import Stated
from sap_lightning.merging import MergeMethod
from sap_lightning.models.layers import hooked

KINDS = ("llama", "mistral")
"""Of models whose blocks are Mixtral's but for the experts."""
PROJECTIONS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
"""What layers of an MLP are called in an expert."""
ROUTER = ".block_sparse_moe.gate.weight"
NORM = ".input_layernorm"
"""What a block's router is called, and the layer that reads what the block reads."""
_MLP = re.compile(r"(?P<block>model\.layers\.\d+)\.mlp\.(?P<layer>gate_proj|down_proj|up_proj)\.weight")
_SHARED = re.compile(
    r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|input_layernorm|post_attention_layernorm)\.weight"
    r"|model\.(embed_tokens|norm)\.weight|lm_head\.weight"
)


@dataclass(frozen=True)
class MergeME(JoiningMethod):
    """A ``MixtralForCausalLM`` whose experts are the models' own MLPs, with all else fused by another method.

    Every block has the MLP of each model as an expert (w1 = gate, w2 = down, w3 = up); attention, norms and embeddings
    are fused by the method under this one, of which the paper has TIES and DARE. A token goes to the ``experts``
    experts with the largest logits, which Mixtral weighs by their softmax over these alone.

    The router is not trained. ``hidden`` gives an expert's row of it the direction of what the block of the base reads
    of the expert's own texts, the mean over texts of each one's mean over tokens, as mergekit-moe does
    (``hidden_avg``); without a base it is the first model. ``uniform`` has zeros, by which all experts count alike;
    then all must be asked, as of equal ones the same would be chosen every time. The paper's own routing by the
    perplexity of each model is none that a Mixtral can have.

    Args:
        method: fuses what is no expert: a method that looks at weights alone, or the name of one.
        experts: how many are asked about a token.
        router: by texts, one file of them for each model, or uniform.
    """

    name = "mergeme"

    method: MergeMethod | str = "average"
    experts: int = 2
    router: Literal["hidden", "uniform"] = "hidden"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("fuse.method.experts", self.experts, 1)

    @property
    def needs_anchors(self) -> bool:  # type: ignore[override]
        return self.router == "hidden"

    def check(self, models: Sequence[str], texts: Sequence[str], with_anchors: bool) -> None:
        if self.experts > len(models):
            raise InputError(f"fuse.method.experts {self.experts}: there are {len(models)} models, each an expert")
        if self.router == "uniform" and self.experts < len(models):
            raise InputError(
                f"fuse.method.experts {self.experts}: a uniform router would ask the same of {len(models)} about every"
                f" token; give --fuse.method.experts {len(models)}"
            )
        if self.router == "hidden" and (with_anchors or len(texts) != len(models)):
            raise InputError(
                f"fuse.texts {list(texts)}: mergeme knows an expert by its own texts; give a file for each of"
                f" {len(models)} models, --fuse.texts [A,B], or --fuse.method.router uniform"
            )

    def layout(self, sources: Sources) -> Layout:
        models, first = sources.models, sources.first
        configs = [config_of(model) for model in models]
        for model, config in zip(models, configs, strict=True):
            _check_kind(model, config)
        check_configs(models, configs)
        check_weights_alike(sources)
        check_inputs(models)
        files: list[list[str]] = []
        stated: dict[str, Stated] = {}
        joined: dict[str, Piece] = {}
        for shard in first.shards:
            of_shard, of_experts = _placed({key: first.stated[key] for key in first.keys_of(shard)}, len(models))
            experts: list[list[str]] = [[] for _ in models]
            for key, piece in of_experts.items():
                experts[piece.model].append(key)
                stated[key] = first.stated[piece.key]
            stated |= of_shard
            joined |= of_experts
            files += [keys for keys in (list(of_shard), *experts) if keys]
        shards = {f"model-{number:05}-of-{len(files):05}.safetensors": keys for number, keys in enumerate(files, 1)}
        config = _mixtral(configs[0], len(models), self.experts)
        return Layout(
            shards, stated, {key: [piece] for key, piece in joined.items()}, config, {"experts": sources.names}
        )

    def look(self, sources: Sources, layout: Layout, examples: Sequence[Examples]) -> Seen:
        shapes = {key: one.shape for key, one in layout.stated.items() if key.endswith(ROUTER)}
        if not examples:
            return {key: torch.zeros(shape) for key, shape in shapes.items()}
        model = examples[0].load(sources.base.folder)
        read = [_read(model, one) for one in track(examples, f"{self.name}: texts")]
        if any(key not in one or one[key].shape != (width,) for key, (_, width) in shapes.items() for one in read):
            raise InputError(f"{sources.base.name}: has other blocks than {sources.first.name}; give their own base")
        return {key: torch.stack([normalize(one[key], dim=-1) for one in read]) for key in shapes}


def _check_kind(model: Checkpoint, config: Mapping[str, Any]) -> None:
    """Raises InputError for a model that is not as Llama's."""
    if config["model_type"] not in KINDS:
        raise InputError(
            f"{model.name}: is of type {short(config['model_type'])}, which makes no expert of a Mixtral; give causal"
            f" language models of type {' or '.join(KINDS)}"
        )
    if unknown := [key for key in model.stated if not (_MLP.fullmatch(key) or _SHARED.fullmatch(key))]:
        raise InputError(
            f"{model.name}: has {short(unknown[0])}, for which a Mixtral has no place; give models as"
            " LlamaForCausalLM.save_pretrained writes them, without biases"
        )


def _placed(shard: Mapping[str, Stated], models: int) -> tuple[dict[str, Stated], dict[str, Piece]]:
    """What becomes of the weights of a shard: those that are shared, with routers, and those of the experts."""
    shared: dict[str, Stated] = {}
    experts: dict[str, Piece] = {}
    for key, one in shard.items():
        if not (part := _MLP.fullmatch(key)):
            shared[key] = one
            continue
        for number in range(models):
            layer = PROJECTIONS[part["layer"]]
            experts[f"{part['block']}.block_sparse_moe.experts.{number}.{layer}.weight"] = Piece(number, key)
        if part["layer"] == "gate_proj":
            shared[f"{part['block']}{ROUTER}"] = Stated(one.dtype, (models, one.shape[1]))
    return shared, experts


def _mixtral(config: Mapping[str, Any], models: int, experts: int) -> dict[str, Any]:
    """The config of a mixture of models with this config."""
    from transformers import MixtralConfig  # which takes seconds

    theirs = MixtralConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    fields = {name: config[name] for name in theirs & config.keys()}
    fields |= {"num_local_experts": models, "num_experts_per_tok": experts, "architectures": ["MixtralForCausalLM"]}
    said: dict[str, Any] = json.loads(MixtralConfig(**fields).to_json_string())
    # Before transformers 5 it stood here, and where it was not it was a million.
    return said | {"rope_theta": said["rope_parameters"]["rope_theta"]}


def _read(model: Any, texts: Examples) -> dict[str, Tensor]:
    """By the key of a block's router, the mean over texts of the mean of what the block reads."""
    found: dict[str, list[Tensor]] = defaultdict(list)

    def look(block: str, _: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        found[f"{block}{ROUTER}"].append(given[0][0].double().mean(0))

    norms = (
        (layer, partial(look, name.removesuffix(NORM))) for name, layer in model.named_modules() if name.endswith(NORM)
    )
    with hooked(norms):
        texts.show(model)
    return {key: torch.stack(means).mean(0).float() for key, means in found.items()}
