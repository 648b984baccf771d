"""ATAF's share of the others, found by what language models predict on texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from llamas import TEXTS, WORDS, weights_in
from torch.nn.functional import kl_div
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from sap_lightning.checkpoints.checkpoint import Checkpoint
from sap_lightning.checkpoints.consistency import divergences, most_consistent
from sap_lightning.checkpoints.fusion import Fusion
from sap_lightning.checkpoints.sources import Sources
from sap_lightning.checkpoints.texts import read_texts
from sap_lightning.errors import InputError
from sap_lightning.functional.agreement import divergence
from sap_lightning.merging import ATAF


def jensen_shannon(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """By torch's own Kullback-Leibler divergence."""
    middle = ((p + q) / 2).log()
    return (kl_div(middle, p, reduction="none") + kl_div(middle, q, reduction="none")).sum(-1) / 2


def test_the_divergence_of_each_alpha_is_that_of_the_model_fused_at_it(speakers, texts, tmp_path) -> None:
    *models, base = speakers
    sources = Sources.of([Checkpoint(model) for model in models], Checkpoint(base))
    found = divergences(ATAF(steps=3), [0.5, 0.5], sources, read_texts(texts))
    assert list(found) == [0.0, 0.5, 1.0]

    @torch.inference_mode()
    def predictions(folder: str | Path) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder)
        ids = [torch.tensor([[WORDS.index(word) for word in text.split()]]) for text in TEXTS]
        return torch.cat([model(one).logits[0].softmax(-1) for one in ids])

    for alpha, value in found.items():
        fused = Fusion(models, str(tmp_path / str(alpha)), base, ATAF(alpha=alpha)).run()
        expected = [jensen_shannon(predictions(fused), predictions(model)).mean() for model in models]
        assert_close(torch.tensor(value), sum(expected) / 2, atol=1e-6, rtol=1e-3)


def test_the_fusion_takes_the_most_consistent_alpha_and_says_so(speakers, texts, tmp_path) -> None:
    *models, base = speakers
    Fusion(models, str(tmp_path / "out"), base, "ataf", texts=texts).run()
    alpha = json.loads((tmp_path / "out" / "merge.json").read_text())["findings"]["alpha"]
    sources = Sources.of([Checkpoint(model) for model in models], Checkpoint(base))
    assert alpha == most_consistent(divergences(ATAF(), [0.5, 0.5], sources, read_texts(texts)))
    Fusion(models, str(tmp_path / "fixed"), base, ATAF(alpha=alpha)).run()
    fixed = weights_in(tmp_path / "fixed")
    assert all(torch.equal(weight, fixed[key]) for key, weight in weights_in(tmp_path / "out").items())


def test_of_equal_divergences_the_smallest_alpha_wins() -> None:
    assert most_consistent({0.0: 2.0, 0.5: 1.0, 1.0: 1.0}) == 0.5


def test_divergence_is_symmetric_and_as_by_kullback_leibler() -> None:
    p, q = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert_close(divergence(p, q), jensen_shannon(p, q))
    assert_close(divergence(p, q), divergence(q, p))


def test_texts_that_are_none_or_ignored_are_refused(speakers, texts, tmp_path) -> None:
    *models, base = speakers
    with pytest.raises(InputError, match=r"fuse.method ataf: give --fuse.texts, by which it finds alpha, or --fuse"):
        Fusion(models, str(tmp_path / "out"), base, "ataf")
    with pytest.raises(InputError, match=r"ties looks at none here; leave it out"):
        Fusion(models, str(tmp_path / "out"), base, "ties", texts=texts)
    with pytest.raises(InputError, match=r"fuse.texts nowhere.txt: cannot be read"):
        Fusion(models, str(tmp_path / "out"), base, "ataf", texts="nowhere.txt").run()
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(InputError, match="has no text; give one a line"):
        read_texts(str(tmp_path / "empty.txt"))
    with pytest.raises(InputError, match=r"b: has no tokenizer for fuse.texts"):
        Fusion(models[::-1], str(tmp_path / "out"), base, "ataf", texts=texts).run()
