from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import FrozenInstanceError, replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from probes import LOGIT_SCALE, probe, tower
from references import REDUCTIONS, randn
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cosine_similarity, normalize
from torch.testing import assert_close
from transformers import CLIPVisionModelWithProjection

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer, dense
from sap_lightning.functional.saliency import AnchorLoss, Reduction, saliency
from sap_lightning.functional.spaces import SPACES, Parameters, Space, SpaceName
from sap_lightning.models.layers import layer_shapes
from sap_lightning.models.probe import AnchorProbe

ANCHORS = 6
IMAGES, CAPTIONS = randn(0, ANCHORS, 3, 16, 16), normalize(randn(1, ANCHORS, 16), dim=1)
EACH_SPACE = pytest.mark.parametrize("space", list(SPACES))
EACH_REDUCTION = pytest.mark.parametrize("reduction", list(REDUCTIONS))
Tower = CLIPVisionModelWithProjection
Layers = dict[str, LoRALayer]


@pytest.fixture(scope="module")
def base() -> Tower:
    return tower()


@pytest.fixture(scope="module")
def layers() -> Layers:
    """An adapter on every linear layer: q, k, v, out, fc1, fc2 and the projection."""
    return {
        name: LoRALayer(0.1 * randn(200 + i, 4, d_in), 0.1 * randn(300 + i, d_out, 4), 2.0)
        for i, (name, (d_out, d_in)) in enumerate(layer_shapes(tower()).items())
    }


def batches(sizes: Sequence[int] = (ANCHORS,)) -> list[tuple[Tensor, Tensor]]:
    return list(zip(IMAGES.split(sizes), torch.arange(ANCHORS).split(sizes), strict=True))


def probe_of(sizes: Sequence[int] = (ANCHORS,), **parts: Any) -> AnchorProbe:
    return probe(**{"batches": lambda: batches(sizes), "captions": CAPTIONS} | parts)


class Scores(NamedTuple):
    saliency: dict[str, Parameters]
    loss: float


def scored(probe: AnchorProbe, layers: Layers, space: SpaceName, reduction: Reduction) -> Scores:
    spaces = {name: SPACES[space](layer) for name, layer in layers.items()}
    of, loss = probe.gradients(layers, spaces, reduction)
    return Scores({name: saliency(spaces[name].parameters, of[name], reduction) for name in of}, loss)


def double(layer: LoRALayer) -> LoRALayer:
    return layer._replace(A=layer.A.double(), B=layer.B.double())


def cosine(features: Tensor, index: int) -> Tensor:
    return 1 - cosine_similarity(features, CAPTIONS.double()[[index]]).sum()


def contrastive(features: Tensor, index: int) -> Tensor:
    logits = LOGIT_SCALE * CAPTIONS.double() @ (features[0] / features[0].norm())
    return logits.exp().sum().log() - logits[index]


def entropy(features: Tensor, index: int) -> Tensor:
    p = (LOGIT_SCALE * CAPTIONS.double() @ (features[0] / features[0].norm())).softmax(0)
    return -(p * p.log()).sum()


LOSSES: dict[AnchorLoss, Callable[[Tensor, int], Tensor]] = {
    "cosine": cosine,
    "contrastive": contrastive,
    "entropy": entropy,
}
"""Loss of an anchor from its image's features, shape (1, d), by definition."""


def reference_gradients(
    base: Tower, layers: Layers, space: SpaceName, loss: AnchorLoss = "cosine"
) -> tuple[dict[str, Parameters], Tensor]:
    """∂Lᵢ/∂θ, shape (ANCHORS, *θ), and Lᵢ, by autograd in float64, one anchor after another."""
    spaces: dict[str, Space] = {name: SPACES[space](double(layer)) for name, layer in layers.items()}
    theta = {name: tuple(p.clone().requires_grad_() for p in layer.parameters) for name, layer in spaces.items()}
    leaves = [parameter for layer in theta.values() for parameter in layer]
    precise = deepcopy(base).double()
    weights = {
        f"{name}.weight": precise.get_submodule(name).weight + dense(spaces[name].update(theta[name])) for name in theta
    }
    gradients, losses = [], []
    for index, image in enumerate(IMAGES.double()):
        losses.append(LOSSES[loss](functional_call(precise, weights, (image[None],)).image_embeds, index))
        gradients.append(torch.autograd.grad(losses[-1], leaves, retain_graph=True))
    stacked = iter([torch.stack(anchors) for anchors in zip(*gradients, strict=True)])
    return {name: tuple(next(stacked) for _ in layer) for name, layer in theta.items()}, torch.stack(losses).detach()


def reference(base: Tower, layers: Layers, space: SpaceName) -> tuple[dict[str, Parameters], Tensor]:
    """θ·∂Lᵢ/∂θ, shape (ANCHORS, *θ), and Lᵢ."""
    gradients, losses = reference_gradients(base, layers, space)
    theta = {name: SPACES[space](double(layer)).parameters for name, layer in layers.items()}
    terms = {name: tuple(p * g for p, g in zip(theta[name], of, strict=True)) for name, of in gradients.items()}
    return terms, losses


def assert_scores_close(actual: dict[str, Parameters], expected: dict[str, Parameters], rtol: float) -> None:
    assert actual.keys() == expected.keys()
    for name, parameters in expected.items():
        for got, want in zip(actual[name], parameters, strict=True):
            assert got.shape == want.shape
            assert torch.linalg.vector_norm(got - want) <= rtol * torch.linalg.vector_norm(want), name


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


@EACH_SPACE
@EACH_REDUCTION
def test_scores_are_autograds_on_a_real_tower(
    base: Tower, layers: Layers, space: SpaceName, reduction: Reduction
) -> None:
    taylor, _ = reference(base, layers, space)
    expected = {name: tuple(map(REDUCTIONS[reduction], terms)) for name, terms in taylor.items()}
    assert_scores_close(scored(probe_of(), layers, space, reduction).saliency, expected, rtol=1e-5)


@pytest.mark.parametrize("loss", list(LOSSES))
@EACH_REDUCTION
def test_gradients_are_autograds_of_every_anchor_s_own_loss(
    base: Tower, layers: Layers, loss: AnchorLoss, reduction: Reduction
) -> None:
    gradients, losses = reference_gradients(base, layers, "delta", loss)
    reduce = {"mean_then_abs": lambda g: g.mean(0)}.get(reduction, REDUCTIONS[reduction])
    spaces = {name: SPACES["delta"](layer) for name, layer in layers.items()}
    of, mean = probe_of((4, 2)).gradients(layers, spaces, reduction, loss)
    assert_scores_close(of, {name: tuple(map(reduce, parameters)) for name, parameters in gradients.items()}, rtol=1e-4)
    assert mean == pytest.approx(float(losses.mean()), rel=1e-5)


def test_gradients_are_at_the_update_that_is_worn_not_at_the_one_that_is_scored(base: Tower, layers: Layers) -> None:
    spaces = {name: SPACES["delta"](layer) for name, layer in layers.items()}
    nothing = {name: layer._replace(B=torch.zeros_like(layer.B)) for name, layer in layers.items()}
    at_base, losses = reference_gradients(base, nothing, "delta")
    of, mean = probe_of().gradients({}, spaces, "mean_then_abs")
    assert_scores_close(of, {name: (terms.mean(0),) for name, (terms,) in at_base.items()}, rtol=1e-4)
    assert mean == pytest.approx(float(losses.mean()), rel=1e-5)


def test_loss_of_the_gradients_is_the_mean_over_all_anchors(base: Tower, layers: Layers) -> None:
    _, losses = reference(base, layers, "delta")
    for sizes in [(ANCHORS,), (5, 1)]:
        loss = scored(probe_of(sizes), layers, "delta", "square").loss
        assert loss == pytest.approx(float(losses.mean()), rel=1e-6)


@EACH_SPACE
@EACH_REDUCTION
def test_scores_do_not_depend_on_how_the_anchors_are_batched(
    layers: Layers, space: SpaceName, reduction: Reduction
) -> None:
    whole = scored(probe_of(), layers, space, reduction).saliency
    for sizes in [(1,) * ANCHORS, (4, 2)]:
        assert_scores_close(scored(probe_of(sizes), layers, space, reduction).saliency, whole, rtol=1e-5)


def two_processes(ask: Callable[[AnchorProbe], Any]) -> Any:
    """The second one's answer, where each has a share of the anchors and what both have is added up."""
    sent: list[Tensor] = []

    def send(tensor: Tensor) -> Tensor:
        sent.append(tensor.clone())
        return tensor

    first, second = batches((4, 2))
    ask(probe_of(batches=lambda: [first], sum_over_processes=send))
    return ask(probe_of(batches=lambda: [second], sum_over_processes=lambda tensor: tensor + sent.pop(0)))


@EACH_REDUCTION
def test_scores_of_two_processes_that_share_the_anchors_are_those_of_one(layers: Layers, reduction: Reduction) -> None:
    together = two_processes(lambda probe: scored(probe, layers, "factor", reduction))
    alone = scored(probe_of(), layers, "factor", reduction)
    assert_scores_close(together.saliency, alone.saliency, rtol=1e-5)
    assert together.loss == pytest.approx(alone.loss, rel=1e-6)


def test_what_two_processes_see_is_what_one_does(layers: Layers) -> None:
    alone = probe_of()
    assert_close(two_processes(lambda probe: probe.grams(layers)), alone.grams(layers))
    assert_close(two_processes(lambda probe: probe.features(layers)), alone.features(layers))
    assert two_processes(lambda probe: probe.loss(layers)) == pytest.approx(alone.loss(layers), rel=1e-6)


def test_the_same_anchors_give_the_same_bits(layers: Layers) -> None:
    first, second = (scored(probe_of(), layers, "delta", "abs_then_mean") for _ in range(2))
    assert_close(first.saliency, second.saliency, atol=0, rtol=0)


QUESTIONS: list[Callable[[AnchorProbe, Layers], Any]] = [
    lambda probe, layers: scored(probe, layers, "delta", "square"),
    lambda probe, layers: probe.grams(layers),
    lambda probe, layers: probe.features(layers),
]
EACH_QUESTION = pytest.mark.parametrize("ask", QUESTIONS, ids=["gradients", "grams", "features"])


@EACH_QUESTION
def test_a_question_leaves_no_hooks_and_no_gradients(
    base: Tower, layers: Layers, ask: Callable[[AnchorProbe, Layers], Any]
) -> None:
    images, indices = IMAGES.clone(), torch.arange(ANCHORS)
    probe = probe_of(batches=lambda: [(images, indices)])
    ask(probe, layers)
    worn_by = probe.patched.model
    assert not any(module._forward_hooks for module in worn_by.modules())
    assert all(weight.grad is None for weight in worn_by.parameters())
    assert images.grad is None and not images.requires_grad
    for name, weight in worn_by.state_dict().items():
        layer = layers.get(name.removesuffix(".weight"))
        worn = base.state_dict()[name] + (0 if layer is None else layer.delta())
        assert_close(weight, worn, atol=0, rtol=0)


@EACH_QUESTION
def test_hooks_go_even_when_an_anchor_cannot_be_read(layers: Layers, ask: Callable[[AnchorProbe, Layers], Any]) -> None:
    def anchors() -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches()
        raise OSError("unreadable image")

    probe = probe_of(batches=anchors)
    with pytest.raises(OSError, match="unreadable"):
        ask(probe, layers)
    assert not any(module._forward_hooks for module in probe.patched.model.modules())


@EACH_QUESTION
def test_a_question_may_be_asked_in_inference_mode_as_in_a_trainer_s_validation(
    layers: Layers, ask: Callable[[AnchorProbe, Layers], Any]
) -> None:
    probe = probe_of()
    with torch.inference_mode():
        answer = ask(probe, layers)
    assert_close(answer, ask(probe_of(), layers))


@EACH_SPACE
@EACH_REDUCTION
def test_scores_in_bfloat16_rank_parameters_as_float32_does(
    layers: Layers, space: SpaceName, reduction: Reduction
) -> None:
    exact = scored(probe_of(), layers, space, reduction)
    in_bfloat16 = partial(torch.autocast, "cpu", torch.bfloat16)
    rough = scored(probe_of(precision=in_bfloat16), layers, space, reduction)
    assert rough.loss == pytest.approx(exact.loss, rel=0.02)
    flat = [torch.cat([s.flatten() for p in scores.saliency.values() for s in p]) for scores in (rough, exact)]
    assert all(tensor.dtype == torch.float32 for tensor in flat)
    assert torch.corrcoef(torch.stack([ranks(values) for values in flat]))[0, 1] > 0.95


@torch.no_grad()
def adapted(base: Tower, layers: Layers) -> Tower:
    """The base with the adapter added to its weights, in float64."""
    tower = deepcopy(base).double()
    for name, layer in layers.items():
        tower.get_submodule(name).weight.add_(double(layer).delta())
    return tower


@torch.no_grad()
def reference_features(base: Tower, layers: Layers) -> Tensor:
    features = adapted(base, layers)(IMAGES.double()).image_embeds
    return features / features.norm(dim=1, keepdim=True)


@torch.no_grad()
def reference_grams(base: Tower, layers: Layers, chosen: Sequence[int] = range(ANCHORS)) -> dict[str, Tensor]:
    """XᵀX / tokens from the inputs that every layer is called with."""
    tower, inputs = adapted(base, layers), {}
    for name in layers:
        layer = tower.get_submodule(name)
        layer.forward = partial(keep_and_call, inputs, name, layer.forward)
    tower(IMAGES[list(chosen)].double())
    return {name: sum(torch.outer(x, x) for x in rows) / len(rows) for name, rows in inputs.items()}


def keep_and_call(inputs: dict[str, Tensor], name: str, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    inputs[name] = x.reshape(-1, x.shape[-1])
    return forward(x)


def test_grams_are_the_mean_outer_products_of_every_layer_s_inputs(base: Tower, layers: Layers) -> None:
    expected = reference_grams(base, layers)
    for sizes in [(ANCHORS,), (4, 2), (1,) * ANCHORS]:
        grams = probe_of(sizes).grams(layers)
        assert_scores_close({name: (gram,) for name, gram in grams.items()},
                            {name: (gram,) for name, gram in expected.items()}, rtol=1e-5)  # fmt: skip


def test_grams_are_of_the_layers_that_the_update_changes_with_the_update_worn(base: Tower, layers: Layers) -> None:
    last = list(layers)[-2:]
    some = {name: layers[name] for name in last}
    grams, of_all = probe_of().grams(some), probe_of().grams(layers)
    assert list(grams) == last
    assert_close(
        grams, {name: gram.float() for name, gram in reference_grams(base, some).items()}, rtol=1e-4, atol=1e-4
    )
    assert any((grams[name] - of_all[name]).abs().max() > 1e-2 for name in last), "earlier layers were not adapted"


def test_features_are_normalised_and_in_the_order_of_the_pairs(base: Tower, layers: Layers) -> None:
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = list(zip(IMAGES[order].split((4, 2)), order.split((4, 2)), strict=True))
    for one in (probe_of(), probe_of(batches=lambda: shuffled)):
        assert_close(one.features(layers), reference_features(base, layers).float(), atol=1e-5, rtol=0)
        assert_close(one.features({}), reference_features(base, {}).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("loss", list(LOSSES))
def test_the_loss_is_its_definition(base: Tower, layers: Layers, loss: AnchorLoss) -> None:
    for update in (layers, {}):
        features = reference_features(base, update)
        expected = sum(float(LOSSES[loss](features[[i]], i)) for i in range(ANCHORS)) / ANCHORS
        assert probe_of().loss(update, loss) == pytest.approx(expected, rel=1e-5)
        assert probe_of((4, 2)).loss(update, loss) == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_batches_is_that_of_their_gradients_and_needs_them_whole(layers: Layers) -> None:
    spaces = {name: SPACES["delta"](layer) for name, layer in layers.items()}
    for sizes in [(ANCHORS,), (4, 2)]:
        one = probe_of(sizes)
        loss = one.gradients(layers, spaces, "mean_then_abs", "contrastive_symmetric").loss
        assert one.loss(layers, "contrastive_symmetric") == pytest.approx(loss, rel=1e-6)
    shared = probe_of(sum_over_processes=lambda tensor: 2 * tensor)
    for ask in (
        lambda: shared.loss(layers, "contrastive_symmetric"),
        lambda: shared.gradients(layers, spaces, "mean_then_abs", "contrastive_symmetric"),
    ):
        with pytest.raises(InputError, match=r"whole of a batch in one process; use --trainer\.devices 1"):
            ask()


def test_the_loss_is_cosine_unless_it_is_said(layers: Layers) -> None:
    assert probe_of().loss(layers) == probe_of().loss(layers, "cosine") != probe_of().loss({}, "cosine")


CHOSEN = [1, 4, 5]


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("sizes", [(ANCHORS,), (1, 3, 2), (1,) * ANCHORS])
def test_only_the_chosen_pairs_are_looked_at(
    base: Tower, layers: Layers, loss: AnchorLoss, sizes: Sequence[int]
) -> None:
    probe = probe_of(sizes, chosen=CHOSEN)
    gradients, losses = reference_gradients(base, layers, "delta", loss)
    spaces = {name: SPACES["delta"](layer) for name, layer in layers.items()}
    of, mean = probe.gradients(layers, spaces, "abs_then_mean", loss)
    expected = {name: (terms[CHOSEN].abs().mean(0),) for name, (terms,) in gradients.items()}
    assert_scores_close(of, expected, rtol=1e-4)
    assert mean == pytest.approx(float(losses[CHOSEN].mean()), rel=1e-5)
    assert probe.loss(layers, loss) == pytest.approx(mean, rel=1e-5)
    assert_close(probe.features(layers), reference_features(base, layers)[CHOSEN].float(), atol=1e-5, rtol=0)
    grams = {name: gram.float() for name, gram in reference_grams(base, layers, CHOSEN).items()}
    assert_close(probe.grams(layers), grams, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("anchors", [2, 7, 8])
def test_halves_of_any_number_of_pairs_have_none_in_common(anchors: int) -> None:
    one, other = probe(anchors).halves()
    assert sorted([*one.pairs, *other.pairs]) == list(range(anchors))


def test_halves_are_disjoint_and_together_all(layers: Layers) -> None:
    whole = probe_of((4, 2))
    for chosen in (None, CHOSEN):
        one, other = probe_of(chosen=chosen).halves()
        assert not set(one.pairs) & set(other.pairs)
        assert sorted([*one.pairs, *other.pairs]) == (chosen or list(range(ANCHORS)))
        assert abs(len(one.pairs) - len(other.pairs)) <= 1
    one, other = whole.halves()
    assert one.patched is other.patched is whole.patched
    assert (one.loss(layers) + other.loss(layers)) / 2 == pytest.approx(whole.loss(layers), rel=1e-6)
    assert one.loss(layers) != other.loss(layers)


def test_halves_have_all_captions_as_negatives_and_add_up_over_processes(layers: Layers) -> None:
    one, other = probe_of().halves()
    whole = probe_of().loss(layers, "contrastive")
    assert (one.loss(layers, "contrastive") + other.loss(layers, "contrastive")) / 2 == pytest.approx(whole, rel=1e-5)
    together = two_processes(lambda probe: probe.halves()[0].loss(layers))
    assert together == pytest.approx(one.loss(layers), rel=1e-6)


def test_the_weight_of_a_layer_is_the_one_that_is_worn(base: Tower, layers: Layers) -> None:
    probe, name = probe_of(), next(iter(layers))
    assert_close(probe.weight(name), base.get_submodule(name).weight, atol=0, rtol=0)
    probe.patched.set_update(layers)
    assert_close(probe.weight(name), base.get_submodule(name).weight + layers[name].delta(), atol=0, rtol=0)
    assert not probe.weight(name).requires_grad


def test_a_probe_looks_where_its_captions_are() -> None:
    assert probe_of().device == CAPTIONS.device
    assert probe_of(captions=CAPTIONS.to("meta")).device == torch.device("meta")


# What is remembered


def test_an_answer_is_remembered_by_question_and_adapter() -> None:
    probe, count = probe_of(), Counter[str]()

    def ask(question: str, adapter: str) -> str:
        def answer() -> str:
            count[question + adapter] += 1
            return f"{question} of {adapter}"

        return probe.recall(question, adapter, answer)

    for _ in range(2):
        for question, adapter in product(("loss", "saliency"), ("a", "b")):
            assert ask(question, adapter) == f"{question} of {adapter}"
    assert set(count.values()) == {1} and len(count) == 4


def test_a_probe_is_frozen_and_goes_on_with_the_memory_it_is_given() -> None:
    first = probe_of()
    first.recall("loss", "a", lambda: 1.0)
    again = probe_of(memory=first.memory)
    assert again.recall("loss", "a", lambda: 2.0) == 1.0
    assert probe_of().recall("loss", "a", lambda: 2.0) == 2.0, "a probe of its own starts with nothing"
    with pytest.raises(FrozenInstanceError):
        first.memory = {}  # type: ignore[misc]


OTHERS: dict[str, dict[str, Any]] = {
    "captions": {"captions": CAPTIONS.flip(0)},
    "images": {"images": "a digest of other images"},
    "pairs": {"chosen": [0, 2]},
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_anchors_are_told_apart_though_they_share_a_memory(other: str) -> None:
    first = probe_of()
    second = replace(first, **OTHERS[other])
    assert first.fingerprint != second.fingerprint and second.memory is first.memory
    assert first.recall("loss", "a", lambda: 1.0) != second.recall("loss", "a", lambda: 2.0)
    assert probe_of().fingerprint == first.fingerprint, "the same anchors are the same"
    assert probe_of(chosen=range(ANCHORS)).fingerprint == first.fingerprint, "all pairs are all pairs"


def test_halves_share_the_memory_but_not_the_answers() -> None:
    whole = probe_of()
    one, other = whole.halves()
    assert one.memory is other.memory is whole.memory
    for number, half in enumerate((one, other, whole)):
        half.recall("loss", "a", partial(float, number))
    assert [half.recall("loss", "a", lambda: -1.0) for half in (*whole.halves(), whole)] == [0.0, 1.0, 2.0]
