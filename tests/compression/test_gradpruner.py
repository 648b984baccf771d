"""GradPruner: the gradients of LoRA's steps, and models whose blocks were dropped and merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from llamas import weights_in
from references import randn
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from sap_lightning.checkpoints.checkpoint import Checkpoint
from sap_lightning.compression.blocks import Blocks
from sap_lightning.compression.compression import Compression
from sap_lightning.compression.gradpruner import RANK, GradPruner
from sap_lightning.compression.loading import opened
from sap_lightning.data.texts import TokenRows
from sap_lightning.errors import InputError
from sap_lightning.functional.igia import igia_matrix, merged_weight
from sap_lightning.functional.lora import LoRALayer


@pytest.fixture
def pruned(speaker, texts, tmp_path):
    def prune(name: str = "out", **settings) -> Path:
        shown = {"texts": texts, "rows": 6, "tokens": 16, "steps": 3, "method": "gradpruner"} | settings
        return Compression(speaker, str(tmp_path / name), **shown).run()

    return prune


def findings_in(folder: Path) -> dict:
    return json.loads((folder / "compress.json").read_text())["findings"]


def shown_to(speaker: str, texts: str):
    tower, shown = opened(Checkpoint(speaker), TokenRows.of(texts, 6, 16, "texts"))
    assert shown is not None
    return Blocks(tower), shown


def test_the_gradients_of_lora_are_those_of_autograd_on_factors_by_hand(speaker, texts) -> None:
    blocks, shown = shown_to(speaker, texts)
    before = {name: weight.clone() for name, weight in shown.tower.state_dict().items()}
    found = GradPruner(steps=2).first_steps(blocks, shown)
    after = shown.tower.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], weight) for name, weight in before.items())
    assert not any(weight.requires_grad for weight in shown.tower.parameters())

    for layers in found.values():
        for first, second in layers.values():
            assert not first.A.any() and first.B.any()  # B is 0 at first, and A learns nothing from it
            assert second.A.any() and first.rank == RANK
    # B's first gradient is (α/r)·G·Aᵀ with G the weight's own, so that its columns are sums of columns of G.
    (tokens,) = shown.batches[0]
    model = AutoModelForCausalLM.from_pretrained(speaker)
    model(tokens, labels=tokens).loss.backward()
    G, B = model.model.layers[3].mlp.up_proj.weight.grad, found[3]["mlp.up_proj"][0].B
    assert len(G) > G.shape[1]
    assert_close(G @ torch.linalg.lstsq(G, B).solution, B, atol=1e-4 * float(B.norm()), rtol=0)


def test_two_looks_are_one(speaker, texts) -> None:
    one, other = (GradPruner(steps=3).first_steps(*shown_to(speaker, texts)) for _ in range(2))
    assert torch.equal(one[2]["mlp.up_proj"][2].A, other[2]["mlp.up_proj"][2].A)
    assert len(GradPruner().importance(one)) == 4


def test_without_density_it_is_the_model_without_these_blocks(pruned, speaker) -> None:
    out = pruned(density=0.0, layers=0.5)
    chosen = findings_in(out)["blocks"]
    importance = findings_in(out)["importance"]
    assert chosen == sorted(sorted(range(4), key=importance.__getitem__)[:2])
    whole = AutoModelForCausalLM.from_pretrained(speaker)
    whole.model.layers = nn.ModuleList(layer for number, layer in enumerate(whole.model.layers) if number not in chosen)
    model = AutoModelForCausalLM.from_pretrained(out)
    tokens = torch.arange(20).view(2, 10) % 11
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, whole(tokens, use_cache=False).logits)
    loss = findings_in(out)["loss without merging"]
    assert findings_in(out)["loss"][1] == loss


def test_a_dropped_block_is_merged_into_the_one_before(pruned, speaker, texts) -> None:
    before, after = weights_in(Path(speaker)), weights_in(pruned(layers=[2]))
    steps = GradPruner(steps=3).first_steps(*shown_to(speaker, texts))[2]
    for name in ("mlp.up_proj", "self_attn.k_proj"):
        own, other = (before[f"model.layers.{number}.{name}.weight"] for number in (1, 2))
        expected = merged_weight(own, other, igia_matrix(steps[name]), 0.2)
        assert torch.equal(after[f"model.layers.1.{name}.weight"], expected) and not torch.equal(own, expected)
    for number, place in ((0, 0), (3, 2)):
        for key in (key for key in before if f"layers.{number}." in key):
            assert torch.equal(after[key.replace(f".{number}.", f".{place}.")], before[key])
    norm = "model.layers.1.input_layernorm.weight"
    assert torch.equal(after[norm], before[norm])


def test_what_no_kept_block_is_before_is_not_merged(pruned, speaker) -> None:
    before, after = weights_in(Path(speaker)), weights_in(pruned(layers=[0]))
    key = "model.layers.{}.mlp.up_proj.weight"
    assert all(torch.equal(after[key.format(number)], before[key.format(number + 1)]) for number in range(3))


def test_the_scores_of_paper_and_code_are_both_there(pruned) -> None:
    paper, code = (findings_in(pruned(score, score=score))["importance"] for score in ("paper", "code"))
    assert paper != code and len(paper) == len(code) == 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"texts": None, "rows": None, "tokens": None}, "compress.texts is not set: gradpruner looks at"),
        ({"score": "sigma"}, "compress.score sigma: is for grasp; gradpruner has paper and code"),
        ({"retain": 0.1}, "compress.retain: gradpruner would ignore it; it is for grasp"),
        ({"density": 2.0}, r"compress.density must lie in \[0, 1\]"),
        ({"steps": 1}, "compress.steps must be at least 2"),
        ({"method": "grasp"}, "compress.steps: grasp would ignore it; it is for gradpruner"),
        ({"layers": 1.0}, "compress.layers: all 4 blocks would go; leave one at least"),
    ],
)
def test_what_it_cannot_do_is_refused(pruned, settings, said, tmp_path) -> None:
    with pytest.raises(InputError, match=said):
        pruned(**settings)
    assert not (tmp_path / "out").exists()


def test_only_what_matters_and_has_one_sign_is_added() -> None:
    kept, dropped = nn.ModuleDict({"up": nn.Linear(5, 6)}), nn.ModuleDict({"up": nn.Linear(5, 6)})
    steps = {"up": [LoRALayer(randn(0, 2, 5), randn(1, 6, 2))]}
    expected = merged_weight(kept["up"].weight.data.clone(), dropped["up"].weight.data, igia_matrix(steps["up"]), 0.2)
    GradPruner().merge(kept, dropped, steps)
    assert torch.equal(kept["up"].weight.data, expected)
