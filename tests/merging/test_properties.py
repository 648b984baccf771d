"""What holds for every merge method, on random and on degenerate adapters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from adapters import SHAPES, adapter_of, assert_same, random_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from references import reproducibly

from sap_lightning.functional.lora import LoRALayer, dense
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.average import Average
from sap_lightning.merging.breadcrumbs import Breadcrumbs
from sap_lightning.merging.cart import CART
from sap_lightning.merging.consensus import Consensus
from sap_lightning.merging.core_space import CoreSpace
from sap_lightning.merging.dare import DARE
from sap_lightning.merging.dc_merge import DCMerge
from sap_lightning.merging.della import DELLA
from sap_lightning.merging.fedavg import FedAvg
from sap_lightning.merging.iso_c import IsoC
from sap_lightning.merging.iso_cts import IsoCTS
from sap_lightning.merging.knots import KnOTS
from sap_lightning.merging.krum import Krum
from sap_lightning.merging.lines import LiNeS
from sap_lightning.merging.lora_lego import LoRALEGO
from sap_lightning.merging.magnitude import Magnitude
from sap_lightning.merging.median import Median
from sap_lightning.merging.method import MergeMethod
from sap_lightning.merging.pcb import PCB
from sap_lightning.merging.random_pruning import RandomPruning
from sap_lightning.merging.robustmerge import RobustMerge
from sap_lightning.merging.sce import SCE
from sap_lightning.merging.task_arithmetic import TaskArithmetic
from sap_lightning.merging.ties import TIES
from sap_lightning.merging.trimmed_mean import TrimmedMean
from sap_lightning.merging.tsv_m import TSVM
from sap_lightning.merging.wise_ft import WiSEFT
from sap_lightning.merging.wudi import WUDI

few_examples = settings(reproducibly, max_examples=20)

SUBSPACE = [TSVM(), IsoC(), IsoCTS(), CART(), WUDI(), WUDI(None), DCMerge()]
UNPRUNED = [
    Average(),
    FedAvg(),
    TaskArithmetic(),
    Median(),
    TrimmedMean(0.25),
    Krum(),
    Consensus(),
    WiSEFT(),
    LiNeS("median"),
    CoreSpace("ties"),
    CoreSpace("median"),
    LoRALEGO(),
    *SUBSPACE,
]
PRUNED = [
    Magnitude(0.6),
    Magnitude(0.6, scope="global", space="factor"),
    Magnitude(0.6, scope="global", space="singular"),
    Magnitude(0.6, scope="tensor", space="factor"),
    RandomPruning(0.6),
    RandomPruning(0.6, "factor", "tensor", mean_of="factors"),
    DARE(0.6),
    DARE(0.6, election=True),
    DARE(0.6, rescale="l1"),
    TIES(0.6),
    TIES(0.6, variant="peft", majority="frequency"),
    TIES(0.6, variant="mergekit"),
    KnOTS(0.6),
    RobustMerge(0.6),
    Breadcrumbs(0.6, 0.05),
    Breadcrumbs(0.6, 0.05, scope="row"),
    DELLA(0.6),
    DELLA(0.6, rescale="l1"),
    SCE(0.6),
    SCE(0.6, variant="authors"),
    PCB(0.6),
]
FAITHFUL = [
    Average(),
    FedAvg(),
    TaskArithmetic(scale=1),
    Median(),
    TrimmedMean(),
    Magnitude(0),
    Magnitude(0, space="factor"),
    Magnitude(0, space="singular"),
    RandomPruning(0),
    RandomPruning(0, "factor", mean_of="factors"),
    DARE(0),
    DARE(0, election=True),
    DARE(0, rescale="l1"),
    TIES(0),
    TIES(0, variant="peft"),
    TIES(0, variant="mergekit", majority="frequency"),
    KnOTS(0),
    RobustMerge(0, scale=1),
    TSVM(),
    CART(),
    WUDI(),
    WUDI(None),
    Consensus(scale=1),
    Breadcrumbs(0, largest=0, scale=1),
    DELLA(0, scale=1),
    DELLA(0, scale=1, rescale="l1"),
    SCE(),
    SCE(variant="authors"),
    WiSEFT(1),
    LiNeS(),
    CoreSpace("median"),
    LoRALEGO(),
]


def title(method: MergeMethod) -> str:
    return "-".join([method.name, *map(str, method.settings.values())])


each_method = pytest.mark.parametrize("method", UNPRUNED + PRUNED, ids=title)
each_pruning_method = pytest.mark.parametrize("method", PRUNED, ids=title)


@st.composite
def random_clients(draw: st.DrawFn, at_least: int = 1) -> list[Adapter]:
    """One to five adapters of other ranks and scales, one of them at times without a layer."""
    seeds = draw(st.lists(st.integers(0, 1000), min_size=at_least, max_size=5, unique=True))
    ranks = st.integers(1, 4)
    scales = st.sampled_from([0.5, 1.0, 2.0])
    adapters = [random_adapter(seed, draw(ranks), draw(scales)) for seed in seeds]
    if len(adapters) > 1 and draw(st.booleans()):
        adapters[0] = adapter_of({"q": adapters[0].layers["q"]})
    return adapters


def shares(adapters: list[Adapter]) -> list[float]:
    parts = range(1, len(adapters) + 1)
    return [part / sum(parts) for part in parts]


@each_method
@few_examples
@given(data=st.data())
def test_the_order_of_the_clients_does_not_matter(method: MergeMethod, data: st.DataObject) -> None:
    adapters = data.draw(random_clients(method.least_clients))
    weights = shares(adapters)
    order = data.draw(st.permutations(range(len(adapters))))
    shuffled = method.merge([adapters[k] for k in order], [weights[k] for k in order])
    assert_same(shuffled, method.merge(adapters, weights), 1e-5)


@pytest.mark.parametrize("method", FAITHFUL, ids=title)
@few_examples
@given(seed=st.integers(0, 1000), rank=st.integers(1, 4), scale=st.sampled_from([0.5, 2.0]))
def test_one_adapter_stays_as_it_is(method: MergeMethod, seed: int, rank: int, scale: float) -> None:
    adapter = random_adapter(seed, rank, scale)
    assert_same(method.merge([adapter]), adapter.layers, 1e-5)


@few_examples
@given(seed=st.integers(0, 1000), clients=st.integers(3, 5))
def test_krum_of_equal_adapters_is_that_adapter(seed: int, clients: int) -> None:
    adapter = random_adapter(seed)
    assert_same(Krum().merge([adapter] * clients), adapter.layers)


# PCB's tanh knows the size of updates.
@pytest.mark.parametrize("method", [m for m in UNPRUNED + PRUNED if not isinstance(m, PCB)], ids=title)
@few_examples
@given(data=st.data())
def test_updates_times_c_merge_to_c_times_the_merge(method: MergeMethod, data: st.DataObject) -> None:
    adapters = data.draw(random_clients(method.least_clients))
    c = data.draw(st.sampled_from([0.25, 3.0]))
    larger = [
        # The same hash, as DARE and DELLA draw by it.
        Adapter(a.name, {name: x._replace(scale=c * x.scale) for name, x in a.layers.items()}, a.sha256, None)
        for a in adapters
    ]
    expected = {name: c * dense(update) for name, update in method.merge(adapters, shares(adapters)).items()}
    assert_same(method.merge(larger, shares(adapters)), expected, 1e-5)


EXACT = Magnitude | RandomPruning | TIES | Breadcrumbs


@pytest.mark.parametrize("method", [m for m in PRUNED if isinstance(m, EXACT)], ids=title)
@few_examples
@given(seed=st.integers(0, 1000), rank=st.integers(1, 4), sparsity=st.floats(0, 1))
def test_exactly_the_share_is_pruned(method, seed: int, rank: int, sparsity: float) -> None:
    adapter = random_adapter(seed, rank)
    kept = method.prepare([adapter], [1.0]).kept(adapter, sparsity)
    masks = [torch.cat([mask.flatten() for mask in layer]) for layer in kept.values()]
    if method.scope == "row":
        masks = [row for layer in kept.values() for row in layer[0]]
    if method.scope == "tensor":
        masks = [mask.flatten() for layer in kept.values() for mask in layer]
    for mask in [torch.cat(masks)] if method.scope == "global" else masks:
        assert int((~mask).sum()) == round(sparsity * len(mask))


@each_pruning_method
@few_examples
@given(data=st.data())
def test_a_sparsity_can_be_applied_after_another_was_prepared(method: MergeMethod, data: st.DataObject) -> None:
    adapters = data.draw(random_clients())
    prepared = method.prepare(adapters, shares(adapters))
    other = replace(method, sparsity=0.3)
    assert_same(prepared.apply(0.3), other.merge(adapters, shares(adapters)), 0)


@each_pruning_method
@pytest.mark.parametrize("sparsity", [0.0, 0.99, 1.0])
def test_extreme_sparsities_give_finite_updates(method: MergeMethod, sparsity: float) -> None:
    prepared = method.prepare([random_adapter(seed, rank=2) for seed in range(3)], [1 / 3] * 3)
    assert all(dense(update).isfinite().all() for update in prepared.apply(sparsity).values())


def zero(seed: int) -> Adapter:
    return adapter_of({n: x._replace(B=torch.zeros_like(x.B)) for n, x in random_adapter(seed).layers.items()})


def all_zero(seed: int) -> Adapter:
    return adapter_of({n: LoRALayer(0 * x.A, 0 * x.B) for n, x in random_adapter(seed).layers.items()})


def rank_one(seed: int) -> Adapter:
    """Four ranks that are all the first."""
    return adapter_of(
        {n: LoRALayer(x.A[:1].repeat(4, 1), x.B[:, :1].repeat(1, 4)) for n, x in random_adapter(seed).layers.items()}
    )


def identical(seed: int) -> Adapter:
    return random_adapter(0)


def opposite(seed: int) -> Adapter:
    return random_adapter(0, scale=(-1.0) ** seed)


@each_method
@pytest.mark.parametrize("make", [zero, all_zero, rank_one, identical, opposite])
@pytest.mark.parametrize("clients", [1, 2, 3, 4, 5])
def test_degenerate_adapters_give_finite_updates(method: MergeMethod, make, clients: int) -> None:
    merged = method.merge([make(seed) for seed in range(max(clients, method.least_clients))])
    assert {name: tuple(dense(update).shape) for name, update in merged.items()} == SHAPES
    assert all(dense(update).isfinite().all() for update in merged.values())
    if make in (zero, all_zero):
        assert not any(dense(update).any() for update in merged.values())


@pytest.mark.parametrize("method", [one for one in UNPRUNED + PRUNED if one != WUDI(None)], ids=title)
def test_weights_have_a_say_unless_the_method_says_that_they_have_none(method: MergeMethod) -> None:
    """But for the exact optimum of WUDI, which meets all clients here whatever their weights."""
    clients = [random_adapter(seed) for seed in range(3)]
    one, other = (method.merge(clients, weights) for weights in ([0.6, 0.3, 0.1], [0.5, 0.2, 0.3]))
    same = all(torch.allclose(dense(one[name]), dense(other[name]), rtol=1e-4, atol=1e-5) for name in one)
    assert same != method.uses_weights
