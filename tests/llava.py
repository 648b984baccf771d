"""A LLaVA of a few thousand parameters, its conversations, and the same forward pass written out."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

CLIENTS = {"vqa_a": "vqa", "vqa_b": "vqa", "caption_a": "caption"}
"""The task of each client."""
TRAINER = partial(L.Trainer, accelerator="cpu", devices=1, enable_model_summary=False, log_every_n_steps=1)
WORDS = ["red", "green", "blue", "yes", "no", "what", "colour", "is", "it", "?", "a", "picture", "of", "where", "."]
SIDE, PATCH = 16, 8
FEATURES = (SIDE // PATCH) ** 2
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[ask] {{ message['content'] }} "
    "{% else %}[say] {{ message['content'] }} [end]{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[say] {% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    special = ["[pad]", "[end]", "[ask]", "[say]", "<image>", "[unk]"]
    digits = [*"0123456789", "[", "]", ","]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS, *digits])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[pad]", eos_token="[end]", unk_token="[unk]",
        additional_special_tokens=["[ask]", "[say]", "<image>"],
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    return fast


def text_config(tokenizer: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        tie_word_embeddings=True,
    )  # fmt: skip


def tiny_llava(folder: Path, seed: int = 0) -> Path:
    """A LLaVA checkpoint with random weights."""
    tokenizer = tiny_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH, projection_dim=8,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text_config(tokenizer),
            image_token_index=4,
            tie_word_embeddings=True,
            image_token_id=4,
            image_seq_length=FEATURES,
        )
    )
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(folder)
    return folder


def tiny_language_model(folder: Path, seed: int = 0) -> Path:
    """A causal language model alone."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    LlamaForCausalLM(text_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}


def conversations(root: Path, clients: dict[str, str], count: int = 6, images: bool = True) -> Path:
    """Clients by name and task, each with images of one colour and a question for it."""
    for position, (client, task) in enumerate(clients.items()):
        folder = root / client
        (folder / "images").mkdir(parents=True)
        lines = []
        for number in range(count):
            colour = list(COLOURS)[(number + position) % 3]
            shade = tuple(min(255, value + 5 * number + position) for value in COLOURS[colour])
            Image.new("RGB", (SIDE, SIDE), shade).save(folder / "images" / f"{number}.png")
            question, answer = {
                "vqa": ("what colour is it ?", colour),
                "caption": ("a picture of ?", f"a {colour} picture ."),
                "grounding": ("where is it ?", f"[ 0 , 0 , {number % 3} , 1 ]"),
            }[task]
            sample = {
                "task": task,
                "conversations": [
                    {"from": "human", "value": f"<image>\n{question}" if images else f"{colour} {question}"},
                    {"from": "gpt", "value": answer},
                ],
            }
            lines.append(json.dumps({"image": f"images/{number}.png", **sample} if images else sample))
        for file in ("train.jsonl", "test.jsonl"):
            (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root
