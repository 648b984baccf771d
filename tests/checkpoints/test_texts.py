"""Texts that language models are shown: which are read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from llamas import TEXTS, ids_of, saved, tokenizer
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from sap_lightning.checkpoints.fusion import Fusion
from sap_lightning.checkpoints.texts import ANSWER_TOKENS, MOST_TEXTS, Texts, read_texts
from sap_lightning.errors import InputError
from sap_lightning.io.weights import OpenFile


def test_losses_and_predictions_are_the_model_s_own(speaking, texts) -> None:
    examples, model = Texts(texts, Path(speaking[0])), AutoModelForCausalLM.from_pretrained(speaking[1])
    loaded = examples.load(Path(speaking[1]))
    assert not loaded.training
    expected = [model(ids_of(text), labels=ids_of(text)) for text in TEXTS]
    assert_close(list(examples.losses(loaded)), [one.loss for one in expected])
    for found, one in zip(examples.predictions(loaded), expected, strict=True):
        assert_close(found, one.logits[0].softmax(-1))


def test_the_first_lines_that_are_not_empty_are_read_and_tell_texts_apart(speaking, tmp_path) -> None:
    (tmp_path / "long.txt").write_text("".join(f"line {number}\n\n" for number in range(100)))
    assert read_texts(str(tmp_path / "long.txt")) == [f"line {number}" for number in range(MOST_TEXTS)]
    (tmp_path / "short.txt").write_text("line 0\n")
    one, other = (Texts(str(tmp_path / name), Path(speaking[0])) for name in ("long.txt", "short.txt"))
    assert one.fingerprint != other.fingerprint


def test_texts_that_are_none_or_ignored_are_refused(speaking, texts, tmp_path) -> None:
    *models, base = speaking
    with pytest.raises(InputError, match=r"ties looks at none here; leave it out"):
        Fusion(models, str(tmp_path / "out"), base, "ties", texts=texts)
    with pytest.raises(InputError, match=r"fuse.texts nowhere.txt: cannot be read"):
        Fusion(models, str(tmp_path / "out"), base, "ataf", texts="nowhere.txt").run()
    with pytest.raises(InputError, match=r"fuse.texts a\\x00b: cannot be read"):
        read_texts("a\0b")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(InputError, match="has no text; give one a line"):
        read_texts(str(tmp_path / "empty.txt"))
    with pytest.raises(InputError, match=r"b: has no tokenizer for fuse.texts"):
        Fusion(models[::-1], str(tmp_path / "out"), base, "ataf", texts=texts).run()
    (tmp_path / "word.txt").write_text("the\n")
    with pytest.raises(InputError, match=r"fuse.texts: no text has a second token"):
        Fusion(models, str(tmp_path / "out"), base, "sap", texts=str(tmp_path / "word.txt")).run()
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_kind_is_refused(texts, tmp_path) -> None:
    torch.save({}, tmp_path / "nothing")
    with pytest.raises(InputError, match=r"no causal language model could be loaded"):
        Texts(texts, tmp_path).load(tmp_path)


@pytest.mark.parametrize("method", ["sap", "ataf", "adamms", "safe_m", "stats_merging"])
def test_models_that_cannot_take_the_texts_are_refused_before_a_weight_is_read(
    method, texts, tmp_path, monkeypatch
) -> None:
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=40, n_positions=5)
    folders = [saved(GPT2LMHeadModel(config), tmp_path / name) for name in "ab"]
    tokenizer().save_pretrained(folders[0])
    monkeypatch.setattr(OpenFile, "_read", None)
    base = None if method == "adamms" else str(folders[1])
    fusion = Fusion([str(folders[0]), str(folders[1])], str(tmp_path / "out"), base, method, texts=texts)
    with pytest.raises(InputError, match=r"texts.txt: takes 6 positions, and .*a has 5; give texts of shorter lines"):
        fusion.run()
    few = json.loads((folders[1] / "config.json").read_text()) | {"vocab_size": 7, "n_positions": 64}
    (folders[0] / "config.json").write_text(json.dumps(few))
    with pytest.raises(InputError, match=r"makes token 10 of it, and .*a has a vocabulary of 7; give models of one"):
        fusion.run()


def test_an_answer_has_room_after_the_longest_text(texts, tmp_path) -> None:
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=40, n_positions=6 + ANSWER_TOKENS - 1)
    folder = saved(GPT2LMHeadModel(config), tmp_path / "a")
    tokenizer().save_pretrained(folder)
    examples = Texts(texts, folder)
    with pytest.raises(InputError, match=r"with an answer: takes 22 positions, and .*a has 21; give texts of shorter"):
        examples.answers(examples.load(folder))
