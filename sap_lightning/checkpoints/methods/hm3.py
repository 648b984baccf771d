"""HM3: classifiers of several tasks as one, over the labels of all (Zhou et al. 2024, arXiv:2409.19173).

No code was found; heads that are expanded by rows of zeros and a softmax within each task's labels are the paper's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sap_lightning.checkpoints.checkpoint import Checkpoint
from sap_lightning.checkpoints.joining import JoiningMethod, check_configs, check_inputs, check_weights_alike, config_of
from sap_lightning.checkpoints.layout import Layout, Piece
from sap_lightning.checkpoints.sources import Sources
from sap_lightning.errors import InputError, short
from sap_lightning.io.weights import Stated
from sap_lightning.merging import MergeMethod

CLASSIFIERS = ("ForImageClassification", "ForSequenceClassification")
"""How classes of models end that are joined."""
LABELS = ("id2label", "label2id", "num_labels", "_num_labels")
"""What configs say of labels."""
GROUPS = "label_groups"
"""What the result's config calls the tasks' labels."""
_HEAD = re.compile(
    r"(.*\.)?(score|head|logits_proj|classifier|classifier\.1|(classifier|classification_head)\.out_proj)\.(weight|bias)"
)


@dataclass(frozen=True)
class HM3(JoiningMethod):
    """A classifier over the labels of all models, whose head has each model's rows and whose body is fused by another.

    In the paper the head of every model is expanded by rows of zeros for the others' labels, and merged as the body is.
    An average of K such heads has a K-th of each model's logits, from which the same label comes out at another
    confidence, and trimming and electing signs take zeros for votes. Here expanded heads are added up, so that each
    model's rows stand in the result as they are, one model's below the other's. A label is what the folder of its model
    is called and the model's own name for it, as two tasks may have a name in common. The probabilities of a task are
    the softmax over its labels alone.

    Models must have one body, by config and shapes: other pooling is another body. What is trained above the body but
    below the last layer, as RoBERTa's dense layer is, is fused as the body. The paper searches the methods' densities
    on labelled data; here settings are given.

    Args:
        method: fuses the body: a method that looks at weights alone, or the name of one.
    """

    name = "hm3"

    method: MergeMethod | str = "average"

    def layout(self, sources: Sources) -> Layout:
        models, first = sources.models, sources.first
        configs = [config_of(model) for model in models]
        for model, config in zip(models, configs, strict=True):
            _check_kind(model, config)
        check_configs(models, configs, LABELS)
        head = _head(sources, [len(config["id2label"]) for config in configs])
        check_weights_alike(sources, head)
        check_inputs(models)
        named, groups = _labels(sources.names, configs)
        stated = {key: _grown(one, len(named)) if key in head else one for key, one in first.stated.items()}
        joined = {key: [Piece(number, key) for number in range(len(models))] for key in head}
        said = {name: one for name, one in first.config.items() if name not in LABELS}
        said |= {"id2label": dict(enumerate(named)), "label2id": {name: number for number, name in enumerate(named)}}
        shards = {shard: first.keys_of(shard) for shard in first.shards}
        return Layout(shards, stated, joined, said | {GROUPS: groups}, {GROUPS: groups})


def _check_kind(model: Checkpoint, config: Mapping[str, Any]) -> None:
    """Raises InputError for a model that is no classifier with one label for an input."""
    kind = str((config.get("architectures") or ["of no class"])[0])
    if not kind.endswith(CLASSIFIERS):
        kinds = " or ".join(f"…{one}" for one in CLASSIFIERS)
        raise InputError(f"{model.name}: is {short(kind)} by its config; hm3 joins models {kinds}")
    if (problem := config.get("problem_type")) not in (None, "single_label_classification"):
        raise InputError(
            f"{model.name}: problem_type is {short(problem)}; hm3 joins models that give an input one label"
        )


def _head(sources: Sources, labels: Sequence[int]) -> list[str]:
    """The first model's keys of the last layer, which has a row for each of a model's labels."""
    found = [
        key
        for key in sources.first.stated
        if _HEAD.fullmatch(key)
        and all(
            key in keys and model.stated[keys[key]].shape[:1] == (count,)
            for model, keys, count in zip(sources.models, sources.keys, labels, strict=True)
        )
    ]
    layers = {key.rpartition(".")[0] for key in found}
    if len(layers) != 1:
        raise InputError(
            f"{sources.first.name}: has {len(layers)} layers such as classifier or score with as many rows as there"
            f" are labels ({', '.join(map(str, labels))}); give models with one"
        )
    return found


def _labels(tasks: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, list[int]]]:
    """All labels in order, and of each task the number of its first and of the one after its last."""
    named: list[str] = []
    groups: dict[str, list[int]] = {}
    for task, config in zip(tasks, configs, strict=True):
        own = [label for _, label in sorted(config["id2label"].items(), key=lambda one: int(one[0]))]
        groups[task] = [len(named), len(named) + len(own)]
        named += [f"{task}: {label}" for label in own]
    return named, groups


def _grown(stated: Stated, height: int) -> Stated:
    return stated._replace(shape=(height, *stated.shape[1:]))
