"""What conversations say of a language model's update, against autograd on its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from llava import conversations, tiny_llava

from sap_lightning.data.instructions import IGNORED, batch_of, read_samples
from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer
from sap_lightning.functional.spaces import DeltaSpace, FactorSpace
from sap_lightning.models.instruction_probe import Embedded, InstructionProbe
from sap_lightning.models.llava import embedded, encoder_of, load_language_base
from sap_lightning.models.patched import Patched

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Embedded], dict[str, LoRALayer]]:
    base = str(tiny_llava(tmp_path_factory.mktemp("llava") / "base"))
    root = conversations(tmp_path_factory.mktemp("conversations"), {"caption_a": "caption", "vqa_a": "vqa"}, count=3)
    loaded, encoder = load_language_base(base), encoder_of(base, 64)
    batches = []
    for client in ("caption_a", "vqa_a"):
        batch = batch_of(read_samples(Path(root) / client / "train.jsonl"), encoder)
        with torch.no_grad():
            images = loaded.connector(loaded.vision(batch.images, torch.device("cpu")))
            inputs = embedded(loaded.language, batch.ids, 4, images)
        batches.append(Embedded(inputs, batch.attention, batch.labels))
    draw = torch.Generator().manual_seed(0)
    update = {}
    for name in NAMES:
        rows, columns = loaded.language.get_submodule(name).weight.shape
        A, B = torch.randn(2, columns, generator=draw), torch.randn(rows, 2, generator=draw)
        update[name] = LoRALayer(0.1 * A, 0.1 * B, 1.5)
    return base, batches, update


def by_autograd(base: str, batches: list[Embedded], update: dict[str, LoRALayer]) -> list[dict[str, torch.Tensor]]:
    """∂L/∂W of every conversation at base + update, one after another."""
    language = load_language_base(base).language
    weights = {name: language.get_submodule(name).weight for name in update}
    with torch.no_grad():
        for name, layer in update.items():
            weights[name] += layer.delta()
    found = []
    for inputs, attention, labels in batches:
        for i in range(len(inputs)):
            length = int(attention[i].sum())
            logits = language(inputs_embeds=inputs[i : i + 1, :length]).logits[0, :-1]
            kept = labels[i, 1:length] != IGNORED
            loss = -logits.log_softmax(-1)[kept].gather(1, labels[i, 1:length][kept][:, None]).mean()
            found.append(dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)))
    return found


@pytest.mark.parametrize("reduction", ["abs_then_mean", "mean_then_abs"])
def test_gradients_of_the_update_are_autograd_s(parts, reduction):
    base, batches, update = parts
    probe = InstructionProbe(Patched(load_language_base(base).language.requires_grad_(False)), lambda: batches, "")
    spaces = {name: DeltaSpace(layer) for name, layer in update.items()}
    answer = probe.gradients(update, spaces, reduction)
    of_each = by_autograd(base, batches, update)
    for name in update:
        stacked = torch.stack([one[name] for one in of_each])
        expected = stacked.abs().mean(0) if reduction == "abs_then_mean" else stacked.mean(0)
        assert torch.allclose(answer.of[name][0], expected, atol=1e-6, rtol=1e-4)


def test_gradients_of_factors_follow(parts):
    base, batches, update = parts
    probe = InstructionProbe(Patched(load_language_base(base).language.requires_grad_(False)), lambda: batches, "")
    answer = probe.gradients(update, {name: FactorSpace(layer) for name, layer in update.items()}, "mean_then_abs")
    of_each = by_autograd(base, batches, update)
    for name, layer in update.items():
        gradient = torch.stack([one[name] for one in of_each]).mean(0)
        A, B = answer.of[name]
        assert torch.allclose(A, layer.scale * layer.B.T @ gradient, atol=1e-6, rtol=1e-4)
        assert torch.allclose(B, layer.scale * gradient @ layer.A.T, atol=1e-6, rtol=1e-4)


def test_it_remembers_by_adapter(parts):
    base, batches, _ = parts
    probe = InstructionProbe(Patched(load_language_base(base).language), lambda: batches, "these")
    assert probe.recall("loss", "a", lambda: 1) == 1
    assert probe.recall("loss", "a", lambda: pytest.fail("asked again")) == 1


def test_losses_of_images_and_captions_are_refused(parts):
    base, batches, update = parts
    probe = InstructionProbe(Patched(load_language_base(base).language), lambda: batches, "")
    with pytest.raises(InputError, match=r"prune.loss contrastive is of images and captions"):
        probe.gradients(update, {}, "mean_then_abs", "contrastive")
