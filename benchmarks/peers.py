"""Other libraries' merges of the same adapters, each timed in a process of its own (merge.py).

PEFT merges adapters. The others merge full models' weights, and get what the adapters change of them ready-made, which
no time includes: mergekit and merge-and-rebase layer after layer, fusion_bench all layers of all clients at once.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from costs import Cost, peak_mib, warm_up
from peft import PeftModel
from random_adapters import vision_tower
from torch import Tensor

from sap_lightning.console import quieten
from sap_lightning.io.uploads import read_uploads

KEPT = 0.2


def run_peft(folders: Sequence[Path], combination: str, rank: int) -> Cost:
    """``add_weighted_adapter`` by its name of a combination."""
    quieten()
    tower = vision_tower()
    memory = peak_mib()
    model = PeftModel.from_pretrained(tower, folders[0], adapter_name="0")
    for index, folder in enumerate(folders[1:], start=1):
        model.load_adapter(folder, adapter_name=str(index))
    names = [str(index) for index in range(len(folders))]
    weights = [1 / len(names)] * len(names)
    options: dict[str, float] = {} if combination in ("cat", "linear") else {"svd_rank": rank}
    if combination not in ("cat", "linear", "svd"):
        options["density"] = KEPT
    warm_up()
    started = time.process_time()
    model.add_weighted_adapter(names, weights, "merged", combination, **options)
    return Cost(time.process_time() - started, peak_mib() - memory)


def run_mergekit(folders: Sequence[Path], method: str) -> Cost:
    """A registered method of mergekit, of which merge.py has ties."""
    from mergekit.merge_methods.base import TensorGroup
    from mergekit.merge_methods.registry import get

    clients = range(len(folders))
    shared = {"int8_mask": False, "normalize": True, "rescale": False, "lambda": 1.0}
    each = {"weight": dict.fromkeys(clients, 1 / len(folders)), "density": dict.fromkeys(clients, KEPT)}

    def prepared(deltas: list[Tensor]) -> TensorGroup:
        ids = [*clients, "base"]
        return TensorGroup.from_tensors([*deltas, torch.zeros_like(deltas[0])], ids=ids, base_index=len(clients))

    return layer_by_layer(folders, lambda group: get(method).merge_group(group, **shared, **each), prepared)


def run_merge_and_rebase(folders: Sequence[Path], method: str, clone: Path) -> Cost:
    """A functional method of merge-and-rebase by its name, at its defaults but for the 20 % that TIES and DARE keep."""
    sys.path.insert(0, str(clone / "src"))
    from merge_and_rebase.merge.methods.functional import merge_functional

    options = {"ties_merge": {"topk": KEPT}, "dare_merge": {"drop_rate": 1 - KEPT}}.get(method, {})
    weights = [1 / len(folders)] * len(folders)
    return layer_by_layer(folders, lambda deltas: merge_functional(method, matrices=deltas, weights=weights, **options))


def layer_by_layer(
    folders: Sequence[Path],
    merge: Callable[[Any], Tensor],
    prepared: Callable[[list[Tensor]], Any] = lambda deltas: deltas,
) -> Cost:
    adapters = read_uploads(folders)
    warm_up()
    memory, seconds = peak_mib(), 0.0
    merged = []
    for name in adapters[0].layers:
        group = prepared([adapter.layers[name].delta() for adapter in adapters])
        started = time.process_time()
        merged.append(merge(group))
        seconds += time.process_time() - started
    return Cost(seconds, peak_mib() - memory)


def run_fusion_bench(folders: Sequence[Path], method: str) -> Cost:
    """What the algorithm of that name in fusion_bench does with task vectors."""
    from fusion_bench.method.dare.utils import module_random_drop_
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c
    from fusion_bench.method.simple_average import simple_average
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
    from fusion_bench.method.ties_merging.ties_merging_utils import state_dict_to_vector, ties_merging

    Vectors = list[Mapping[str, Tensor]]

    def ties(vectors: Vectors) -> Tensor:
        flat = torch.vstack([state_dict_to_vector(vector) for vector in vectors])
        return ties_merging(flat, reset_thresh=KEPT, merge_func="mean")

    def dare(vectors: Vectors) -> Mapping[str, Tensor]:
        for vector in vectors:
            module_random_drop_(vector, 1 - KEPT, rescale=True)
        return simple_average(vectors)

    merges = {
        "simple_average": simple_average,
        "ties_merging": ties,
        "dare": dare,
        "iso_c": lambda vectors: iso_c(vectors, accelerator="cpu"),
        "TSVM": lambda vectors: compute_and_sum_svd_mem_reduction(vectors, accelerator="cpu"),
    }
    adapters = read_uploads(folders)
    warm_up()
    memory = peak_mib()
    vectors = [{name: layer.delta() for name, layer in adapter.layers.items()} for adapter in adapters]
    with contextlib.redirect_stdout(io.StringIO()):  # it says what it does
        started = time.process_time()
        merges[method](vectors)
        return Cost(time.process_time() - started, peak_mib() - memory)
