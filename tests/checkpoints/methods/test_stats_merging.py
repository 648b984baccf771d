"""StatsMerging: gradients of coefficients against autograd's, and what it makes of equal and of several models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from llamas import TEXTS, ids_of, llama, saved, trained, weights_in
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from sap_lightning.checkpoints.checkpoint import Checkpoint
from sap_lightning.checkpoints.fusion import Fusion
from sap_lightning.checkpoints.methods import WholeStatsMerging
from sap_lightning.checkpoints.methods.stats_merging import ALPHAS, Mixture
from sap_lightning.checkpoints.sources import Sources
from sap_lightning.checkpoints.texts import Texts
from sap_lightning.errors import InputError
from sap_lightning.fuse import fuse


def opened(folders: list[str]) -> Sources:
    *models, base = (Checkpoint(folder) for folder in folders)
    return Sources.of(models, base)


def test_gradients_of_coefficients_are_autograd_s(speaking) -> None:
    sources, ids = opened(speaking), ids_of(TEXTS[0])
    keys = list(sources.first.stated)
    parts = {key: sources.whole(key) for key in keys}
    alphas = torch.rand(len(keys), 2, generator=torch.Generator().manual_seed(0))
    mixture = Mixture(AutoModelForCausalLM.from_pretrained(speaking[0]), parts)
    mixture.take_on(alphas)
    found = mixture.gradients(cross_entropy(mixture.model(ids).logits[0, :-1], ids[0, 1:]))

    a, b, c = (weights_in(Path(folder)) for folder in speaking)
    leaf = alphas.double().requires_grad_()
    weights = {
        key: c[key].double() + row[0] * (a[key].double() - c[key]) + row[1] * (b[key].double() - c[key])
        for key, row in zip(keys, leaf, strict=True)
    }
    logits = functional_call(llama().double(), weights, (ids,)).logits
    (expected,) = torch.autograd.grad(cross_entropy(logits[0, :-1], ids[0, 1:]), leaf)
    assert_close(found.double(), expected, atol=1e-5, rtol=1e-3)


def test_it_learns_to_say_what_the_models_say(speaking, texts, tmp_path) -> None:
    """One of two models is as far off as to agree with nobody: the other's share grows, and the loss falls."""
    far = saved(trained(llama(), 5, 0.5), tmp_path / "far")
    near = speaking[0]
    sources = opened([near, str(far), speaking[2]])
    seen = WholeStatsMerging(steps=60, rate=0.02).look(sources, Texts(texts, Path(near)))
    losses = seen["losses"]
    assert losses[-3:].sum() < losses[:3].sum()
    alphas = torch.stack([alpha for name, alpha in seen.items() if name.startswith(ALPHAS)])
    assert_close(alphas.sum(1), torch.ones(len(alphas)))
    assert alphas.std() > 0.01


def by_definition(key: str, seen: dict[str, Tensor], folders: list[str]) -> Tensor:
    *models, base = (weights_in(Path(folder))[key].double() for folder in folders)
    shares = seen[f"{ALPHAS}{key}"].tolist()
    return base + sum(share * (model - base) for share, model in zip(shares, models, strict=True))


def test_the_command_fuses_three_models_by_what_it_has_learned(speaking, texts, tmp_path) -> None:
    third = str(saved(trained(llama(), 7), tmp_path / "third"))
    folders = [*speaking[:2], third, speaking[2]]
    line = [f"--fuse.models=[{','.join(folders[:3])}]", f"--fuse.base={folders[3]}", f"--fuse.texts={texts}"]
    fuse([*line, "--fuse.method=stats_merging", "--fuse.method.steps=3", f"--fuse.output={tmp_path / 'out'}"])
    seen = WholeStatsMerging(steps=3).look(opened(folders), Texts(texts, Path(folders[0])))
    for key, weight in weights_in(tmp_path / "out").items():
        assert_close(weight.double(), by_definition(key, seen, folders), atol=1e-6, rtol=0)
    findings = json.loads((tmp_path / "out" / "merge.json").read_text())["findings"]
    assert len(findings["losses"]) == 3 and sum(findings["mean_alphas"]) == pytest.approx(1, abs=1e-5)
    assert findings["kept"] == {}


def test_equal_models_stay_as_they_are(speaking, texts, tmp_path) -> None:
    same = str(shutil.copytree(speaking[0], tmp_path / "same"))
    method = WholeStatsMerging(steps=1)
    out = Fusion([speaking[0], same], str(tmp_path / "out"), speaking[2], method, texts=texts).run()
    own = weights_in(Path(speaking[0]))
    assert all(torch.allclose(weight, own[key], atol=1e-7, rtol=0) for key, weight in weights_in(out).items())


def test_clip_models_learn_from_captions(clips, world, tmp_path) -> None:
    line = [f"--fuse.models=[{','.join(clips[:2])}]", f"--fuse.base={clips[2]}", "--fuse.method=stats_merging"]
    anchors = [f"--anchors.root={world / 'anchors'}", "--anchors.num_pairs=4"]
    fuse([*line, *anchors, "--fuse.method.steps=2", f"--fuse.output={tmp_path / 'out'}"])
    findings = json.loads((tmp_path / "out" / "merge.json").read_text())["findings"]
    assert len(findings["losses"]) == 2 and 0 < findings["unchanged"] < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "fuse.method stats_merging looks at data: give --fuse.texts"),
        (
            {"texts": "t", "base": None},
            "fuse.base is not set: stats_merging needs the model that all were trained from",
        ),
        ({"texts": "t", "models": ["a"]}, "stats_merging needs at least 2"),
    ],
)
def test_what_it_lacks_is_said_before_a_weight_is_read(options, message) -> None:
    with pytest.raises(InputError, match=message):
        Fusion(**{"models": ["a", "b"], "output": "out", "base": "c", "method": "stats_merging", **options})
