"""Class prompts with a learnable context, against a text tower that is written out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from places import SHAPES_CLIP
from references import TINY_VISION, randn
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, normalize
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

from sap_lightning.errors import InputError
from sap_lightning.io.context import ClassPosition
from sap_lightning.models.clip import TextEncoder, load_base
from sap_lightning.models.prompt import ClassPrompts

CLASSES = ["star", "red star", "bus"]
VOCABULARY, WIDTH, HEADS, READS = 653, 24, 3, 16


@pytest.fixture(scope="module", params=["EOS is named", "EOS is the highest id"])
def tiny(request, tmp_path_factory) -> tuple[CLIPModel, TextEncoder]:
    """A random CLIP for the shipped tokens; in the second their ids end, as OpenAI's do, with start and end."""
    last = request.param == "EOS is the highest id"
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copy(Path(SHAPES_CLIP) / "tokenizer_config.json", folder)
    content = json.loads((Path(SHAPES_CLIP) / "tokenizer.json").read_text())
    moved = (lambda token: (token - 2) % VOCABULARY) if last else (lambda token: token)
    content["model"]["vocab"] = {text: moved(token) for text, token in content["model"]["vocab"].items()}
    for added in content["added_tokens"]:
        added["id"] = moved(added["id"])
    for part in ("cls", "sep"):
        content["post_processor"][part][1] = moved(content["post_processor"][part][1])
    (folder / "tokenizer.json").write_text(json.dumps(content))
    text = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=READS,
        projection_dim=16,
        hidden_act="gelu",
        bos_token_id=moved(0),
        eos_token_id=2 if last else 1,  # configs of that time say 2, which stands for the highest id
        pad_token_id=moved(1),
    )
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=TINY_VISION.to_dict(), projection_dim=16))
    for parameter in clip.parameters():  # as drawn, attention would change next to nothing
        parameter.data += 0.2 * torch.randn_like(parameter)
    clip.eval().requires_grad_(False)
    return clip, TextEncoder(clip, str(folder))


def written_out(clip: CLIPModel, prompt: Tensor) -> Tensor:
    """The normalised feature of a prompt of embeddings (length, width), whose last is that of EOS, in float64."""
    weights = {name: tensor.double() for name, tensor in clip.text_model.state_dict().items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = prompt.double() + weights["embeddings.position_embedding.weight"][: len(prompt)]
    later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    for layer in ("encoder.layers.0", "encoder.layers.1"):
        y = norm(x, f"{layer}.layer_norm1")
        q, k, v = (linear(y, f"{layer}.self_attn.{part}_proj").chunk(HEADS, -1) for part in "qkv")
        heads = [
            (q_h @ k_h.T * (WIDTH // HEADS) ** -0.5).masked_fill(later, -torch.inf).softmax(-1) @ v_h
            for q_h, k_h, v_h in zip(q, k, v, strict=True)
        ]
        x = x + linear(torch.cat(heads, -1), f"{layer}.self_attn.out_proj")
        x = x + linear(gelu(linear(norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")), f"{layer}.mlp.fc2")
    return normalize(clip.text_projection.weight.double() @ norm(x[-1], "final_layer_norm"), dim=-1)


@pytest.mark.parametrize("length", [4, 5])
@pytest.mark.parametrize("position", ["front", "middle", "end"])
def test_each_position_is_that_of_a_tower_written_out(tiny, position: ClassPosition, length: int) -> None:
    clip, texts = tiny
    context = randn(1, length, WIDTH)
    embedding, tokenizer = texts.token_embedding.weight, texts.tokenizer
    start, dot, end = (embedding[i] for i in ([tokenizer.bos_token_id], texts.tokens("."), [tokenizer.eos_token_id]))
    expected = []
    for name in CLASSES:
        words, half = embedding[texts.tokens(name)], length // 2
        middle = {
            "front": [words, context],
            "middle": [context[:half], words, context[half:]],
            "end": [context, words],
        }[position]
        expected.append(written_out(clip, torch.cat([start, *middle, dot, end])))
    found = ClassPrompts(texts, CLASSES, length, position).features(context)
    torch.testing.assert_close(found.double(), torch.stack(expected), atol=1e-5, rtol=0)


def test_the_embeddings_of_words_are_those_words(tiny) -> None:
    _, texts = tiny
    words = texts.token_embedding.weight[texts.tokens("a photo")]
    found = ClassPrompts(texts, CLASSES, len(words), "end").features(words)
    torch.testing.assert_close(found, texts.class_features(CLASSES, ["a photo {}."]), atol=1e-5, rtol=0)


def test_the_context_alone_gets_a_gradient_and_the_towers_stay_as_they_are() -> None:
    base = load_base(SHAPES_CLIP)
    before = base.fingerprint(["text_model"])
    context = (0.02 * randn(2, 16, 64)).requires_grad_()
    ClassPrompts(base.texts, CLASSES, 16, "middle").features(context).sum().backward()
    assert context.grad is not None and context.grad.ne(0).all()
    assert all(parameter.grad is None for parameter in base.clip.parameters())
    assert base.fingerprint(["text_model"]) == before
    torch.testing.assert_close(base.texts(CLASSES), load_base(SHAPES_CLIP).texts(CLASSES), atol=0, rtol=0)


def test_the_width_is_that_of_the_checkpoint_s_text_tower(tiny) -> None:
    _, texts = tiny
    assert texts.token_embedding.embedding_dim == WIDTH


def test_a_name_for_which_there_is_no_room_is_refused_with_both_lengths(tiny) -> None:
    _, texts = tiny
    taken = len(texts.tokens("red star."))
    longest = READS - 2 - taken
    ClassPrompts(texts, CLASSES, longest, "end")
    with pytest.raises(InputError, match=rf"class 'red star': its prompt is 17 tokens .* a context of {longest + 1}"):
        ClassPrompts(texts, CLASSES, longest + 1, "end")
