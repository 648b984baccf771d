"""Texts that language models are shown: which are read, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from llamas import TEXTS, ids_of
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from sap_lightning.checkpoints.fusion import Fusion
from sap_lightning.checkpoints.texts import MOST_TEXTS, Texts, read_texts
from sap_lightning.errors import InputError


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
