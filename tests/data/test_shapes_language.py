"""The shapes world's own small language model, before it sees any image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from references import contents
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from sap_lightning.data.shapes import pretrain_language
from sap_lightning.data.shapes.arrangement import Arrangement, Item
from sap_lightning.data.shapes.pretrain_language import (
    GRID,
    STYLE_SHARE,
    Tokens,
    answer_loss,
    asked,
    conversation,
    in_words,
    pretrain,
    small_config,
    train_tokenizer,
)
from sap_lightning.errors import InputError

SCENE = Arrangement("photo", "white", (Item("boat", "red", 0), Item("cup", "blue", 3), Item("cup", "teal", 2)))
BOXES = [(0.0, 0.0, 0.5, 0.25), (0.5, 0.75, 1.0, 1.0), (0.0, 0.5, 0.25, 1.0)]


def conversations(number: int) -> list[pretrain_language.Conversation]:
    rng = np.random.default_rng(0)
    return [conversation(rng) for _ in range(number)]


def tokenizer_for(said: list[pretrain_language.Conversation]):
    return train_tokenizer([text for scene, turns in said for text in (scene, *sum(turns, ()))])


def test_a_scene_in_words_has_one_for_each_patch():
    drawn = [in_words(SCENE, BOXES, np.random.default_rng(seed)).split() for seed in range(100)]
    grids = np.array(drawn).reshape(-1, GRID, GRID)
    assert set(grids[:, 0:2, 0:4].ravel()) == {"boat", "red"}
    assert set(grids[:, 6:8, 4:8].ravel()) == {"cup", "blue"}
    assert set(grids[:, 4:8, 0:2].ravel()) == {"cup", "teal"}
    empty = grids[:, 0:4, 4:8]
    assert set(empty.ravel()) == {"white", "photo"} and abs((empty == "photo").mean() - STYLE_SHARE) < 0.05


def test_what_is_asked_is_answered_by_the_scene():
    for seed in range(20):
        caption, yes, no, often, where = asked(SCENE, BOXES, np.random.default_rng(seed))
        assert "boat" in caption[1] and "cup" in caption[1]
        assert yes[1] == "yes" and any(f"a {thing} in" in yes[0] for thing in ("boat", "cup"))
        assert no[1] == "no" and not any(f" {thing} in" in no[0] for thing in ("boat", "cup"))
        assert often[1] == ("2" if "cups" in often[0] else "1")
        assert where == ("<image>\nWhere is the boat?", "[0.0, 0.0, 0.5, 0.2]")


def test_a_loss_of_many_questions_is_that_of_each_asked_alone():
    said = conversations(6)
    tokenizer = tokenizer_for(said)
    torch.manual_seed(0)
    model = LlamaForCausalLM(small_config(tokenizer)).eval()
    alone = []
    for scene, turns in said:
        for question, answer in turns:
            before, after = tokenizer(scene + question).input_ids, tokenizer(answer).input_ids
            logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
            alone.append(cross_entropy(logits, torch.tensor(after)))
    torch.testing.assert_close(answer_loss(model, Tokens.of(said, tokenizer)), torch.stack(alone).mean())


def test_a_tokenizer_is_the_same_whenever_it_is_learned_and_its_template_is_what_was_learned():
    said = conversations(200)
    first, second = tokenizer_for(said), tokenizer_for(said)
    assert first.get_vocab() == second.get_vocab()
    (question, answer) = said[0].turns[0]
    turns = [{"role": "user", "content": "…\nDescribe the image."}, {"role": "assistant", "content": "a cup."}]
    assert question == "\nDescribe the image.<assistant>" and answer.endswith("<end>")
    assert first.apply_chat_template(turns, tokenize=False) == "<user>…\nDescribe the image.<assistant>a cup.<end>"
    assert first.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True).endswith(
        "image.<assistant>"
    )
    text = "zebras & jinxed quay: [0.3, 1.0]"
    assert first.decode(first(text).input_ids) == text


def test_same_seed_gives_same_files_and_the_model_loads(tmp_path, monkeypatch, capsys):
    for name, value in {"CONVERSATIONS": 64, "EPOCHS": 2, "BATCH": 16}.items():
        monkeypatch.setattr(pretrain_language, name, value)
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        pretrain(tmp_path / name, seed)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert contents(tmp_path / "first") != contents(tmp_path / "other")
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[:2]]
    assert losses[1] < losses[0]
    model, tokenizer = (kind.from_pretrained(tmp_path / "first") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.vocab_size == len(tokenizer) and tokenizer.eos_token == "<end>"


def test_bad_input_is_refused_before_anything_is_learned(tmp_path):
    with pytest.raises(InputError, match="already exists"):
        pretrain(tmp_path)
    with pytest.raises(InputError, match="seed"):
        pretrain(tmp_path / "model", seed=-1)
