"""What a pruning method of one's own may rely on, and what the anchors are asked for it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar

import pytest
import torch
from adapters import exact_delta
from probes import FC2, PROJECTION, Q, probe, random_adapter, relative_gap

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer, dense
from sap_lightning.functional.spaces import Parameters, Space, magnitudes
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging import GRASP, METHODS, TIES, PrunerZero
from sap_lightning.merging.opnp import OPNP
from sap_lightning.merging.pruning import PruningMethod
from sap_lightning.models.probe import AnchorProbe, Answer


@dataclass(frozen=True)
class ByGradient(PruningMethod):
    """Keeps the factors' elements with the largest gradient on the anchors."""

    name: ClassVar[str] = "by gradient"
    needs_anchors: ClassVar[bool] = True
    space = "factor"

    sparsity: float = 0.5
    power: float = 1.0

    def examine(self, adapter: Adapter, anchors: AnchorProbe) -> Answer:
        return anchors.gradients(adapter.layers, self.spaces_on(anchors.device, adapter), "abs_then_mean")

    def scores(self, adapter: Adapter, spaces: Mapping[str, Space], answer: Answer) -> Mapping[str, Parameters]:
        return answer.of


class Unexamined(ByGradient):
    examine = PruningMethod.examine


class Magnitudes(PruningMethod):
    """Keeps what is largest, in factor space."""

    space = "factor"
    sparsity = 0.5

    def scores(self, adapter: Adapter, spaces: Mapping[str, Space], answer: Answer) -> Mapping[str, Parameters]:
        return magnitudes(spaces)


def clients() -> list[Adapter]:
    return [random_adapter(1), random_adapter(2)]


def test_a_pruning_method_needs_only_a_score():
    one = random_adapter(1)
    merged = Magnitudes().merge([one])
    for name, layer in one.layers.items():
        A, B = (factor.clone() for factor in (layer.A, layer.B))
        together = torch.cat([A.flatten(), B.flatten()]).abs()
        threshold = together.sort().values[round(0.5 * len(together))]
        A[A.abs() < threshold], B[B.abs() < threshold] = 0, 0
        torch.testing.assert_close(dense(merged[name]), layer.scale * B @ A, atol=1e-6, rtol=1e-5)


def test_clients_count_alike_if_there_are_no_weights():
    assert relative_gap(Magnitudes().merge(clients()), Magnitudes().merge(clients(), [0.5, 0.5])) == 0


def test_what_is_pruned_is_what_the_masks_keep_at_the_method_s_sparsity_or_another():
    one, other = clients()
    pruning = Magnitudes().prepare([one, other], [0.5, 0.5])
    for adapter in (one, other):
        for sparsity in (None, 0.5, 0.9):
            masks, pruned = pruning.kept(adapter, sparsity), pruning.pruned(adapter, sparsity)
            for name, (A, B, scale) in adapter.layers.items():
                keep_A, keep_B = masks[name]
                expected = scale * (B * keep_B).double() @ (A * keep_A).double()
                assert relative_gap({name: pruned[name]}, {name: expected}) < 1e-6
                share = 0.5 if sparsity is None else sparsity
                assert sum(int((~mask).sum()) for mask in masks[name]) == round(share * (A.numel() + B.numel()))


class OneThreshold(Magnitudes):
    scope = "global"


class Watched(Mapping[str, LoRALayer]):
    """Layers that note in which order they are read."""

    def __init__(self, layers: Mapping[str, LoRALayer]) -> None:
        self.layers = layers
        self.read: list[str] = []

    def __getitem__(self, name: str) -> LoRALayer:
        layer = self.layers[name]
        self.read.append(name)
        return layer

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def test_one_threshold_over_all_layers_is_found_in_three_looks_at_one_layer_after_another():
    signs = {name: LoRALayer(A.sign(), B.sign()) for name, (A, B, _) in random_adapter(2).layers.items()}
    pair = [random_adapter(1, (PROJECTION, Q)), replace(random_adapter(2), layers=signs)]  # all of the second are tied
    by_one_sort = [OneThreshold().prepare(pair, [0.25, 0.75]).pruned(adapter) for adapter in pair]
    watched = [replace(adapter, layers=Watched(adapter.layers)) for adapter in pair]
    merged = OneThreshold().prepare(watched, [0.25, 0.75]).apply()
    expected = {name: 0.75 * exact_delta(layer) for name, layer in by_one_sort[1].items()}
    for name, layer in by_one_sort[0].items():
        expected[name] = expected[name] + 0.25 * exact_delta(layer)
    assert relative_gap(merged, expected) < 1e-6
    for adapter in watched:
        assert [name for name, _ in groupby(adapter.layers.read)] == 3 * sorted(adapter.layers)


def test_thresholds_of_many_clients_are_found_in_the_memory_of_one() -> None:
    every = [random_adapter(seed) for seed in range(40)]
    tracemalloc.start()
    TIES().prepare(every, [1 / 40] * 40).apply()
    _, peak = tracemalloc.get_traced_memory()  # of NumPy's arrays, in which values are counted
    tracemalloc.stop()
    assert peak < 8 * 2**20


def test_some_layers_can_be_looked_at_alone():
    pruning = Magnitudes().prepare(clients(), [0.5, 0.5])
    one = pruning.adapters[0]
    assert list(pruning.spaces(one, [Q, "no such layer"])) == [Q] and list(pruning.spaces(one)) == list(one.layers)


def test_a_method_that_asks_no_anchors_has_no_answer():
    pruning = Magnitudes().prepare(clients(), [0.5, 0.5], probe())
    answer = pruning.answer(pruning.adapters[0])
    assert answer.of == {} and answer.loss != answer.loss
    assert pruning.answers == {}


def test_a_method_without_anchors_that_needs_them_says_so():
    with pytest.raises(InputError, match=r"merge\.method by gradient looks at anchors; give --anchors\.root"):
        ByGradient().merge([random_adapter(1)])
    with pytest.raises(NotImplementedError, match="Unexamined needs anchors"):
        Unexamined().merge([random_adapter(1)], anchors=probe())


# What the anchors are asked


def test_a_pruning_method_that_looks_at_anchors_does_so_once_for_each_client(asked):
    anchors = probe()
    both = ByGradient().prepare(clients(), [0.5, 0.5], anchors)
    assert len(both.answers) == len(asked) == 2
    again = ByGradient().prepare([random_adapter(2)], [1.0], anchors)
    assert len(asked) == 2, "the probe remembers"
    two = random_adapter(2)
    assert again.answer(two) is both.answer(two)
    kept = again.kept(two, 0.5)
    assert all(sum(int((~m).sum()) for m in kept[n]) == sum(m.numel() for m in kept[n]) // 2 for n in kept)
    ByGradient().prepare([two], [1.0], probe())
    assert len(asked) == 3, "another probe has another memory"


@pytest.mark.parametrize(
    "name", sorted(n for n, m in METHODS.items() if issubclass(m, PruningMethod) and m.needs_anchors)
)
def test_preparing_twice_asks_the_anchors_once_for_every_adapter(name, asked):
    anchors = probe()
    first = METHODS[name]().prepare(clients(), [0.5, 0.5], anchors)
    assert [update.keys() for update in asked] == [one.layers.keys() for one in clients()]
    second = METHODS[name]().prepare([*clients(), random_adapter(3)], [0.4, 0.3, 0.3], anchors)
    assert len(asked) == 3, "only the third client is new"
    other = METHODS[name](sparsity=0.25).prepare(clients(), [0.5, 0.5], anchors)
    assert len(asked) == 3, "the sparsity is nothing that the anchors are asked for"
    for one in clients():
        assert first.answer(one) is second.answer(one) is other.answer(one)
    for sparsity in (0.25, 0.9):
        fresh = METHODS[name](sparsity=sparsity).merge(clients(), [0.5, 0.5], probe())
        assert relative_gap(other.apply(sparsity), fresh) == 0


def test_methods_of_other_settings_or_classes_ask_for_themselves(asked):
    anchors = probe()
    for count, method in enumerate(
        (ByGradient(), ByGradient(power=2.0), PrunerZero(), GRASP(), GRASP(score="code")), 1
    ):
        method.prepare([random_adapter(1)], [1.0], anchors)
        assert len(asked) == count, method
    OPNP(0.5, 0.01, "layer").prepare([random_adapter(1)], [1.0], anchors)
    OPNP(0.7, 0.05, "global").prepare([random_adapter(1)], [1.0], anchors)
    assert len(asked) == 6, "what opnp drops does not change what it asks"


def test_two_kinds_of_anchors_in_one_memory_are_asked_apart(asked):
    anchors = probe()
    changed = replace(anchors, images="other images with the same captions")
    for one in (anchors, changed, anchors, changed):
        ByGradient().prepare([random_adapter(1)], [1.0], one)
    assert anchors.memory is changed.memory and len(anchors.memory) == len(asked) == 2


def test_an_answer_whose_question_fails_is_not_remembered():
    anchors = probe()
    with pytest.raises(NotImplementedError):
        Unexamined().prepare([random_adapter(1)], [1.0], anchors)
    assert anchors.memory == {}


def test_a_client_that_lacks_a_layer_is_merged_where_it_has_one():
    pair = [random_adapter(1, (Q, PROJECTION)), random_adapter(2, (FC2,))]
    merged = ByGradient(0.0).merge(pair, [0.25, 0.75], probe())
    expected = {name: 0.25 * exact_delta(layer) for name, layer in pair[0].layers.items()}
    expected |= {name: 0.75 * exact_delta(layer) for name, layer in pair[1].layers.items()}
    assert relative_gap(merged, {name: expected[name] for name in merged}) < 1e-6
    assert list(merged) == sorted([Q, FC2, PROJECTION])
