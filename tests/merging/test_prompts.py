"""Merges of prompts: methods take a context for a layer, and merge it if they may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from places import SHAPES_CLIP
from references import randn
from torch import Tensor

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import dense
from sap_lightning.io.adapter import Adapter, sha256_of
from sap_lightning.io.context import as_layer, context_layer
from sap_lightning.io.manifest import Manifest
from sap_lightning.io.prompt import read_prompt, write_prompt
from sap_lightning.merging import METHODS, Average, Krum, Median, MergeMethod, TrimmedMean
from sap_lightning.merging.clients import client_weights
from sap_lightning.models.clip import load_base
from sap_lightning.modules import MergeModule

LAYER = context_layer("end")
CONTEXTS = [randn(seed, 3, 64) for seed in range(5)]
NUMBERS = [10, 20, 5, 40, 25]
CLASSES = [("dog", "cat"), ("house",), ("dog",), ("cat", "dog"), ("tree", "boat", "car")]


def upload(folder: Path, client: int, base: str = "ab" * 32, **said: Any) -> Path:
    layers = {LAYER: as_layer(CONTEXTS[client])}
    fields: dict[str, Any] = {
        "base": "base", "base_fingerprint": base, "domain": f"client {client}", "class_names": CLASSES[client],
        "num_samples": NUMBERS[client], "rank": 3, "alpha": 3, "targets": (LAYER,), "seed": 0, "packages": {},
        "tensors_sha256": sha256_of(layers), "format_version": 2, "kind": "prompt", "parts": ("context",),
        "layers": (LAYER,),
    }  # fmt: skip
    return write_prompt(folder / str(client), layers, Manifest(**fields | said))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> list[Adapter]:
    folder = tmp_path_factory.mktemp("prompts")
    return [read_prompt(upload(folder, client)) for client in range(5)]


@pytest.fixture(scope="module")
def uploads(tmp_path_factory) -> list[Path]:
    """The same of the shipped base."""
    folder, base = tmp_path_factory.mktemp("uploads"), load_base(SHAPES_CLIP)
    return [upload(folder, client, base.fingerprint([LAYER])) for client in range(3)]


def merged(method: MergeMethod, prompts: list[Adapter], weights: list[float] | None = None) -> Tensor:
    (update,) = method.merge(prompts, weights).values()
    return dense(update)


def test_the_average_by_images_is_the_weighted_mean_of_contexts_whatever_the_classes(prompts):
    expected = sum(n / 100 * context.double() for n, context in zip(NUMBERS, CONTEXTS, strict=True))
    found = merged(Average(), prompts, client_weights(prompts, "samples"))
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    for context in CONTEXTS:  # which the released PromptFL's is, of the last client, as it keeps references
        assert (found - context).abs().max() > 0.1


def test_clients_that_send_what_they_were_given_average_to_it(prompts):
    assert torch.equal(merged(Average(), [prompts[2]] * 4), CONTEXTS[2])


@pytest.mark.parametrize(
    ("method", "reference"),
    [
        (Median(), lambda stacked: np.median(stacked, axis=0)),
        (TrimmedMean(trim=0.2), lambda stacked: np.sort(stacked, axis=0)[1:-1].mean(0)),
    ],
)
def test_robust_means_are_numpy_s_of_the_contexts(prompts, method, reference):
    found = merged(method, prompts)
    np.testing.assert_allclose(found.numpy(), reference(torch.stack(CONTEXTS).numpy()), atol=1e-6)


def test_krum_is_the_context_nearest_to_its_neighbours(prompts):
    flat = torch.stack(CONTEXTS).flatten(1).double().numpy()
    squared = ((flat[:, None] - flat) ** 2).sum(-1)
    nearest = np.sort(squared, axis=1)[:, 1 : 5 - 1 - 1]
    assert torch.equal(merged(Krum(byzantine=1), prompts), CONTEXTS[int(nearest.sum(1).argmin())])


ABLE = [name for name, method in METHODS.items() if method.merges_prompts]


@pytest.mark.parametrize("name", ABLE)
def test_a_method_that_merges_prompts_moves_with_them(prompts, name):
    """Where 0 is must not matter to a context, as it does to a change of weights."""
    shift = randn(9, 3, 64)
    moved = [Adapter("", {LAYER: as_layer(context + shift)}, str(k)) for k, context in enumerate(CONTEXTS)]
    still = [Adapter("", {LAYER: as_layer(context)}, str(k)) for k, context in enumerate(CONTEXTS)]
    expected = merged(METHODS[name](), still) + shift
    torch.testing.assert_close(merged(METHODS[name](), moved), expected, atol=1e-5, rtol=0)


def test_which_methods_merge_prompts():
    assert ABLE == ["average", "median", "trimmed_mean", "krum"]


def test_a_merge_of_prompts_is_a_prompt_whatever_the_order_of_uploads(uploads, tmp_path):
    for name, order in {"one": uploads, "other": uploads[::-1]}.items():
        server = MergeModule(SHAPES_CLIP, method="average", weights="samples")
        server.use(server.read_uploads(order))
        server.merge()
        server.save(tmp_path / name)
    one, other = ({file.name: file.read_bytes() for file in (tmp_path / n).iterdir()} for n in ("one", "other"))
    assert one == other and one.keys() == {"prompt.safetensors", "merge.json", "README.md"}
    assert b"# 3 prompts merged by average" in one["README.md"]
    again = MergeModule(SHAPES_CLIP)
    (read,) = again.read_uploads([tmp_path / "one"])
    expected = sum(n / 35 * context.double() for n, context in zip(NUMBERS[:3], CONTEXTS[:3], strict=True))
    torch.testing.assert_close(read.layers[LAYER].delta().double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "ties"}, "ties does not merge prompts, only adapters; prompts have average, median, trimmed_mean"),
        ({"reject_outliers": True}, r"merge\.reject_outliers is for adapters"),
        ({"rank": 2}, r"merge\.format and merge\.rank are for adapters"),
        ({"format": "model"}, r"merge\.format and merge\.rank are for adapters"),
        ({"weights": [1.0, 1.0, 1.0]}, r"merge\.weights \[1\.0, 1\.0, 1\.0\]: those of prompts must add up to 1"),
    ],
)
def test_what_is_for_adapters_alone_is_refused(uploads, settings, reason):
    server = MergeModule(SHAPES_CLIP, **{"method": "average"} | settings)
    server.use(server.read_uploads(uploads))
    with pytest.raises(InputError, match=reason):
        server.merge()


def test_weights_that_add_up_to_1_are_taken(uploads):
    server = MergeModule(SHAPES_CLIP, method="average", weights=[0.5, 0.3, 0.2])
    server.use(server.read_uploads(uploads))
    (context,) = server.merge().update.values()
    expected = sum(w * v.double() for w, v in zip([0.5, 0.3, 0.2], CONTEXTS, strict=False))
    torch.testing.assert_close(dense(context).double(), expected, atol=1e-6, rtol=0)


def test_prompts_do_not_mix_with_adapters_nor_with_names_elsewhere(uploads, finished, tmp_path):
    front = context_layer("front")
    write_prompt(tmp_path / "front", {front: as_layer(CONTEXTS[0])})
    server = MergeModule(SHAPES_CLIP)
    for other in (finished / "uploads" / "photo", tmp_path / "front"):
        for order in ([*uploads, other], [other, *uploads]):
            with pytest.raises(InputError, match="merge adapters alone, or prompts with the class's name at one place"):
                server.read_uploads(order)


def test_prompts_of_other_lengths_do_not_mix(uploads, tmp_path):
    write_prompt(tmp_path / "short", {LAYER: as_layer(CONTEXTS[0][:2])})
    with pytest.raises(
        InputError, match=r"prompts of 3 tokens \('client 0'\) and of 2 \('short'\); merge prompts of one"
    ):
        MergeModule(SHAPES_CLIP).read_uploads([*uploads, tmp_path / "short"])


def test_a_prompt_of_another_base_or_beside_an_adapter_is_refused(uploads, finished, tmp_path):
    server = MergeModule(SHAPES_CLIP)
    with pytest.raises(InputError, match="base_fingerprint is abab"):
        server.read_uploads([upload(tmp_path, 0)])
    both = tmp_path / "both"
    both.mkdir()
    for folder in (finished / "uploads" / "photo", uploads[0]):
        for file in folder.iterdir():
            (both / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=r"holds prompt\.safetensors and adapter_model\.safetensors; send one upload"):
        server.read_uploads([both])


def test_prompts_of_other_seeds_are_doubted_aloud(uploads, tmp_path):
    base = load_base(SHAPES_CLIP).fingerprint([LAYER])
    server = MergeModule(SHAPES_CLIP, method="average")
    server.use(server.read_uploads([*uploads, upload(tmp_path, 3, base, seed=7)]))
    assert server.merge().doubts == [
        f"prompts say that they were trained from different seeds: '{server.adapters[0].name}' from 0, 'client 3' from"
        " 7; if their contexts started apart, an average of them mixes what does not belong together"
    ]
