"""Pretrain the shapes world's own small language model on what is asked and answered of scenes, in texts alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sap_lightning.console import run_as_command
from sap_lightning.data.questions import DESCRIBE, IMAGE, box_answer, count, place, presence
from sap_lightning.data.shapes.arrangement import MOST, Arrangement, Box, arranged, several_of, some_things
from sap_lightning.data.shapes.instructions import DECIMALS
from sap_lightning.data.shapes.world import CLASSES, COLOUR_TEMPLATES, COLOURS, STYLES, TEMPLATES, WALLS
from sap_lightning.errors import check_at_least
from sap_lightning.files import new_folder, refuse_existing

GRID = 8
"""Patches a side of the world's vision tower."""
STYLE_SHARE = 0.15
"""Share of the background's patches that say the style."""
CONVERSATIONS = 8192
EPOCHS = 3
BATCH = 32
LEARNING_RATE = 3e-3
VOCABULARY = 512
LEARNED_FROM = 2000
"""Conversations that the tokenizer is learned from."""
THREADS = 1
INITIAL = 0.08
"""Standard deviation of the initial weights: of 0.02 a small model learns much later what to attend to."""
PADDING, USER, ASSISTANT, END = SPECIAL = ("<pad>", "<user>", "<assistant>", "<end>")
TEMPLATE = (
    "{% for message in messages %}"
    f"{{% if message['role'] == 'user' %}}{USER}{{{{ message['content'] }}}}"
    f"{{% else %}}{ASSISTANT}{{{{ message['content'] }}}}{END}{{% endif %}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{ASSISTANT}{{% endif %}}"
)


class Conversation(NamedTuple):
    """A scene and what is asked of it.

    Attributes:
        scene: a word for each patch.
        turns: questions, each asked alone, and their answers.
    """

    scene: str
    turns: list[tuple[str, str]]


def pretrain(folder: str | Path, seed: int = 0) -> None:
    """Write a causal language model with tokenizer: the same bytes for the same seed and machine.

    Where an image would stand, a text has a word for each of its patches: the background's colour or the style, and
    on a thing its name or its colour. So the model knows how to answer from what is where before it sees any image.

    Args:
        folder: where to; must not exist yet.
        seed: of the texts, initialisation and the order of batches.

    Raises:
        InputError: the folder exists, or the seed is negative.
    """
    refuse_existing(folder)
    check_at_least("seed", seed, 0)
    torch.set_num_threads(THREADS)
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, CONVERSATIONS])
    conversations = [conversation(rng) for _ in range(CONVERSATIONS)]
    tokenizer = train_tokenizer(
        [text for scene, turns in conversations[:LEARNED_FROM] for text in (scene, *sum(turns, ()))]
    )
    model = LlamaForCausalLM(small_config(tokenizer))
    fit(model, Tokens.of(conversations, tokenizer), torch.Generator().manual_seed(seed))
    with new_folder(folder) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)


def conversation(rng: Generator) -> Conversation:
    """A scene in words, and what is asked of it, as the chat template puts each question alone."""
    some = some_things(rng)
    things = some if rng.random() < 0.5 else several_of(some[0], int(rng.integers(1, MOST + 1)), rng)
    scene = arranged(str(rng.choice(list(STYLES))), things, rng)
    boxes = scene.boxes(rng)
    turns = [
        (f"{question.removeprefix(IMAGE)}{ASSISTANT}", f"{answer}{END}")
        for question, answer in asked(scene, boxes, rng)
    ]
    return Conversation(f"{USER}{in_words(scene, boxes, rng)}", turns)


def asked(scene: Arrangement, boxes: Sequence[Box], rng: Generator) -> list[tuple[str, str]]:
    """Questions to a scene, and their answers: a caption, yes, no, how many and, of what is there once, a box."""
    things = [item.thing for item in scene.items]
    absent = [name for name in CLASSES if name not in things]
    counted = str(rng.choice(sorted(set(things))))
    turns = [
        (DESCRIBE, scene.caption(rng, TEMPLATES + COLOUR_TEMPLATES)),
        (presence(str(rng.choice(things))), "yes"),
        (presence(str(rng.choice(absent))), "no"),
        (count(counted), str(things.count(counted))),
    ]
    once = [at for at, name in enumerate(things) if things.count(name) == 1]
    if once:
        at = int(rng.choice(once))
        turns.append((place(things[at]), box_answer(boxes[at], DECIMALS)))
    return turns


def in_words(scene: Arrangement, boxes: Sequence[Sequence[float]], rng: Generator) -> str:
    """A word for each patch, row by row."""
    centres = (np.arange(GRID) + 0.5) / GRID
    words = np.where(rng.random((GRID, GRID)) < STYLE_SHARE, scene.style, scene.background).astype(object)
    for item, (x1, y1, x2, y2) in zip(scene.items, boxes, strict=True):
        rows, columns = (centres > y1) & (centres < y2), (centres > x1) & (centres < x2)
        named = np.where(rng.random((GRID, GRID)) < 0.5, item.thing, item.colour)
        inside = np.outer(rows, columns)
        words[inside] = named[inside]
    return "".join(f" {word}" for word in words.ravel())


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE, its merges learned from the texts; each word that a patch may have is one token."""
    words = [f" {word}" for word in (*STYLES, *CLASSES, *COLOURS, *WALLS)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([*texts, *words], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PADDING, eos_token=END, extra_special_tokens=[USER, ASSISTANT]
    )
    tokenizer.chat_template = TEMPLATE
    assert all(len(tokenizer(word).input_ids) == 1 for word in words)
    return tokenizer


def small_config(tokenizer: Any) -> LlamaConfig:
    """About 0.4 million parameters: 3 layers × 96."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,
        max_position_embeddings=256,
        initializer_range=INITIAL,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class Tokens(NamedTuple):
    """Conversations as tokens, filled up on the right, all of shape (n, length).

    Attributes:
        ids: int64.
        turns: int64, the number of the question that a token belongs to; 0 of the scene, −1 of what was filled up.
        places: int64, of a token among those that it sees.
        weights: what its loss counts, so that all answers count the same.
    """

    ids: Tensor
    turns: Tensor
    places: Tensor
    weights: Tensor

    @classmethod
    def of(cls, conversations: Sequence[Conversation], tokenizer: Any) -> Tokens:
        rows: list[list[tuple[int, int, int, float]]] = []
        for scene, turns in conversations:
            shown = tokenizer(scene).input_ids
            row = [(token, 0, place, 0.0) for place, token in enumerate(shown)]
            for number, (question, answer) in enumerate(turns, start=1):
                asked, said = tokenizer(question).input_ids, tokenizer(answer).input_ids
                weights = [0.0] * len(asked) + [1 / len(said)] * len(said)
                places = range(len(shown), len(shown) + len(weights))
                row += zip(asked + said, [number] * len(weights), places, weights, strict=True)
            rows.append(row)
        length = max(map(len, rows))
        filling = (tokenizer.pad_token_id, -1, 0, 0.0)
        filled = [[*row, *[filling] * (length - len(row))] for row in rows]
        ids, numbers, places_, weights_ = torch.tensor(filled, dtype=torch.float64).unbind(dim=2)
        return cls(ids.long(), numbers.long(), places_.long(), weights_.float())

    def at(self, rows: Tensor) -> Tokens:
        """Some of them."""
        return Tokens(*(one[rows] for one in self))

    @property
    def seen(self) -> Tensor:
        """What a token sees: what goes before it of the scene and of its own question; (n, 1, length, length)."""
        before = torch.ones(self.ids.shape[1], self.ids.shape[1], dtype=torch.bool).tril()
        own = (self.turns[:, None, :] == self.turns[:, :, None]) | (self.turns[:, None, :] == 0)
        return (before & own)[:, None]


def fit(model: LlamaForCausalLM, tokens: Tokens, generator: torch.Generator) -> None:
    """Learns the answers."""
    steps = EPOCHS * (CONVERSATIONS // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for epoch in range(EPOCHS):
        total, batches = 0.0, torch.randperm(CONVERSATIONS, generator=generator).split(BATCH)
        for chosen in batches:
            loss = answer_loss(model, tokens.at(chosen))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() / len(batches)
        print(f"epoch {epoch + 1}/{EPOCHS}: loss of answers {total:.3f}", flush=True)


def answer_loss(model: LlamaForCausalLM, tokens: Tokens) -> Tensor:
    """−log p of the answers, the mean over their tokens, then over answers."""
    hidden = model.model(tokens.ids, attention_mask=tokens.seen, position_ids=tokens.places).last_hidden_state
    weights = tokens.weights[:, 1:]
    learned = weights > 0
    losses = F.cross_entropy(model.lm_head(hidden[:, :-1][learned]), tokens.ids[:, 1:][learned], reduction="none")
    return (losses * weights[learned]).sum() / weights.sum()


if __name__ == "__main__":
    run_as_command(pretrain)
