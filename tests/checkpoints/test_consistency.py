"""ATAF's share of the others, found by what models predict on texts or anchors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from llamas import TEXTS, ids_of, weights_in
from torch.nn.functional import kl_div
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPModel

from sap_lightning.checkpoints.checkpoint import Checkpoint
from sap_lightning.checkpoints.consistency import divergences, most_consistent
from sap_lightning.checkpoints.fusion import Fusion
from sap_lightning.checkpoints.pairs import Pairs
from sap_lightning.checkpoints.sources import Sources
from sap_lightning.checkpoints.texts import Texts
from sap_lightning.data.anchors import AnchorDataModule
from sap_lightning.functional.agreement import divergence
from sap_lightning.merging import ATAF


def jensen_shannon(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """By torch's own Kullback-Leibler divergence."""
    middle = ((p + q) / 2).log()
    return (kl_div(middle, p, reduction="none") + kl_div(middle, q, reduction="none")).sum(-1) / 2


def test_the_divergence_of_each_alpha_is_that_of_the_model_fused_at_it(speaking, texts, tmp_path) -> None:
    *models, base = speaking
    sources = Sources.of([Checkpoint(model) for model in models], Checkpoint(base))
    found = divergences(ATAF(steps=3), [0.5, 0.5], sources, Texts(texts, Path(models[0])))
    assert list(found) == [0.0, 0.5, 1.0]

    @torch.inference_mode()
    def predictions(folder: str | Path) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder)
        return torch.cat([model(ids_of(text)).logits[0].softmax(-1) for text in TEXTS])

    for alpha, value in found.items():
        fused = Fusion(models, str(tmp_path / str(alpha)), base, ATAF(alpha=alpha)).run()
        expected = [jensen_shannon(predictions(fused), predictions(model)).mean() for model in models]
        assert_close(torch.tensor(value), sum(expected) / 2, atol=1e-6, rtol=1e-3)


def test_the_fusion_takes_the_most_consistent_alpha_and_says_so(speaking, texts, tmp_path) -> None:
    *models, base = speaking
    Fusion(models, str(tmp_path / "out"), base, "ataf", texts=texts).run()
    alpha = json.loads((tmp_path / "out" / "merge.json").read_text())["findings"]["alpha"]
    sources = Sources.of([Checkpoint(model) for model in models], Checkpoint(base))
    assert alpha == most_consistent(divergences(ATAF(), [0.5, 0.5], sources, Texts(texts, Path(models[0]))))
    Fusion(models, str(tmp_path / "fixed"), base, ATAF(alpha=alpha)).run()
    fixed = weights_in(tmp_path / "fixed")
    assert all(torch.equal(weight, fixed[key]) for key, weight in weights_in(tmp_path / "out").items())


def test_of_equal_divergences_the_smallest_alpha_wins() -> None:
    assert most_consistent({0.0: 2.0, 0.5: 1.0, 1.0: 1.0}) == 0.5


def test_divergence_is_symmetric_and_as_by_kullback_leibler() -> None:
    p, q = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert_close(divergence(p, q), jensen_shannon(p, q))
    assert_close(divergence(p, q), divergence(q, p))


def test_clip_models_are_consistent_in_what_they_say_of_anchors(clips, world, tmp_path) -> None:
    *models, base = clips
    anchors = AnchorDataModule(str(world / "anchors"), 3, models[0], cache=False)
    sources = Sources.of([Checkpoint(model) for model in models], Checkpoint(base))
    found = divergences(ATAF(steps=3), [0.5, 0.5], sources, Pairs(anchors, Path(models[0])))
    tokens = AutoTokenizer.from_pretrained(base)(anchors.captions, padding=True, return_tensors="pt")

    @torch.inference_mode()
    def predictions(folder: str | Path) -> torch.Tensor:
        model = CLIPModel.from_pretrained(folder)
        return model(pixel_values=anchors.images(), **tokens).logits_per_image.softmax(-1)

    for alpha, value in found.items():
        fused = Fusion(models, str(tmp_path / str(alpha)), base, ATAF(alpha=alpha)).run()
        expected = [jensen_shannon(predictions(fused), predictions(model)).mean() for model in models]
        assert_close(torch.tensor(value), sum(expected) / 2, atol=1e-6, rtol=1e-3)
    Fusion(models, str(tmp_path / "out"), base, ATAF(steps=3), anchors=anchors).run()
    chosen = json.loads((tmp_path / "out" / "merge.json").read_text())["findings"]["alpha"]
    assert chosen == most_consistent(found)
