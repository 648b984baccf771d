"""SAP of whole models against its definition in float64, over one vector of all weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from kills import killed
from llamas import SIZES, TEXTS, ids_of, llama, saved, tokenizer, trained, weights_in
from places import SHAPES_CLIP
from references import contents
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPModel, MixtralConfig, MixtralForCausalLM

from sap_lightning import commands
from sap_lightning.checkpoints import fuser, work
from sap_lightning.checkpoints.checkpoint import WEIGHTS_FILE
from sap_lightning.checkpoints.fusion import Fusion
from sap_lightning.checkpoints.methods import WholeSAP
from sap_lightning.data.anchors import AnchorDataModule
from sap_lightning.errors import InputError

Call = Callable[..., object]


def gradients(model: nn.Module, losses: Callable[[Call], Iterable[Tensor]]) -> list[dict[str, Tensor]]:
    """Of every loss by all weights, which autograd sees as one vector, in float64."""
    weights = dict(model.double().named_parameters())
    vector = torch.cat([weight.detach().flatten() for weight in weights.values()]).requires_grad_()
    sizes = [weight.numel() for weight in weights.values()]

    def split(flat: Tensor) -> dict[str, Tensor]:
        pieces = zip(weights.items(), flat.split(sizes), strict=True)
        return {name: piece.view_as(weight) for (name, weight), piece in pieces}

    found = losses(lambda *args, **named: functional_call(model, split(vector), args, named))
    return [split(torch.autograd.grad(loss, vector)[0]) for loss in found]


def next_token_losses(call: Call) -> Iterable[Tensor]:
    for text in TEXTS:
        ids = ids_of(text)
        told = call(ids).logits[0, :-1].log_softmax(-1)
        yield -told.gather(1, ids[0, 1:, None]).mean()


def alignment_losses(anchors: AnchorDataModule) -> Callable[[Call], Iterable[Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(SHAPES_CLIP)

    def losses(call: Call) -> Iterable[Tensor]:
        for image, caption in zip(anchors.images().double(), anchors.captions, strict=True):
            seen = call(pixel_values=image[None], **tokenizer(caption, return_tensors="pt"))
            yield 1 - (seen.image_embeds * seen.text_embeds).sum()

    return losses


def expected(method: WholeSAP, base: Path, found: list[tuple[Path, list[dict[str, Tensor]]]]) -> dict[str, tuple]:
    """The fusion by key, and where it is sure: where no score is as good as a threshold."""
    start = {key: weight.double() for key, weight in weights_in(base).items()}
    total = {key: torch.zeros_like(weight) for key, weight in start.items()}
    sure = {key: torch.ones_like(weight, dtype=torch.bool) for key, weight in start.items()}
    for folder, by_example in found:
        delta = {key: weight.double() - start[key] for key, weight in weights_in(folder).items()}
        scores = {key: score(method, delta[key], [one[key] for one in by_example]) for key in delta}
        together = [list(scores)] if method.scope == "global" else [[key] for key in scores]
        for keys in together:
            every, order = torch.cat([scores[key].flatten() for key in keys]).sort(stable=True)
            number = round(method.sparsity * len(every))
            threshold, keep = every[number - 1], torch.ones(len(every), dtype=torch.bool)
            keep[order[:number]] = False  # of equal ones the first go
            for key, part in zip(keys, keep.split([scores[key].numel() for key in keys]), strict=True):
                pruned = delta[key] * part.view_as(delta[key])
                sure[key] &= (scores[key] - threshold).abs() > 1e-3 * threshold.abs()
                if method.scope == "layer" and key.endswith("k_proj.bias"):  # has no effect: its scores are noise
                    sure[key][:] = False
                if method.rescale == "l2" and pruned.any():
                    pruned *= delta[key].norm() / pruned.norm()
                if method.rescale == "inverse_keep":
                    pruned /= 1 - method.sparsity
                total[key] += method.scale * pruned / len(found)
    return {key: (start[key] + total[key], sure[key]) for key in start}


def score(method: WholeSAP, delta: Tensor, gradients: list[Tensor]) -> Tensor:
    if method.reduction == "abs_then_mean":
        return sum((delta * one).abs() for one in gradients) / len(gradients)
    effect = delta * sum(gradients) / len(gradients)
    return -effect if method.sign_aware else effect.abs()


def check(result: dict[str, Tensor], reference: dict[str, tuple], start: dict[str, Tensor]) -> None:
    surely = moved = elements = 0
    for key, weight in result.items():
        merged, sure = reference[key]
        assert_close(weight.double()[sure], merged[sure], atol=1e-6, rtol=1e-4)
        surely, moved, elements = surely + sure.sum(), moved + (weight != start[key]).sum(), elements + weight.numel()
    assert surely > 0.5 * elements and 0.05 * elements < moved < elements


@pytest.mark.parametrize(
    "method",
    [
        WholeSAP(), WholeSAP(scope="global"), WholeSAP(0.6, rescale="none", scale=1.5),
        WholeSAP(scope="global", rescale="none"),
        WholeSAP(0.5, scope="global", reduction="mean_then_abs", sign_aware=True, rescale="inverse_keep"),
    ],
    ids=lambda one: f"{one.scope} {one.rescale} {one.reduction}",
)  # fmt: skip
def test_language_models_keep_what_matters_to_their_texts(method, speaking, texts, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fuser, "BLOCK", 100)
    *models, base = map(Path, speaking)
    found = [(folder, gradients(AutoModelForCausalLM.from_pretrained(folder), next_token_losses)) for folder in models]
    Fusion([*map(str, models)], str(tmp_path / "out"), str(base), method, texts=texts).run()
    check(weights_in(tmp_path / "out"), expected(method, base, found), weights_in(base))


@pytest.mark.parametrize("method", ["sap", "ataf", "adamms", "stats_merging"])
def test_weights_of_which_transformers_makes_others_are_refused(method, texts, tmp_path) -> None:
    torch.manual_seed(0)
    mixture = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2))
    folders = [str(saved(trained(mixture, seed), tmp_path / str(seed))) for seed in range(3)]
    tokenizer().save_pretrained(folders[0])
    base = None if method == "adamms" else folders[2]
    fusion = Fusion(folders[:2], str(tmp_path / "out"), base, method, texts=texts)
    with pytest.raises(
        InputError, match=r"0: 'model.*' is no weight of the loaded model, whose .* transformers makes of"
    ):
        fusion.run()
    assert not (tmp_path / "out").exists()


def test_weights_that_the_model_does_not_use_have_no_scores(speaking, texts, tmp_path) -> None:
    folders = [str(shutil.copytree(folder, tmp_path / Path(folder).name)) for folder in speaking]
    for number, folder in enumerate(map(Path, folders)):
        save_file(
            weights_in(folder) | {"model.layers.0.own": torch.full((4,), number + 1.0)},
            folder / WEIGHTS_FILE,
            {"format": "pt"},
        )
    Fusion(folders[:2], str(tmp_path / "out"), folders[2], WholeSAP(0.5, rescale="none"), texts=texts).run()
    # All scores are 0: the first half goes, and of changes by -2 and -1 a half each stays.
    assert weights_in(tmp_path / "out")["model.layers.0.own"].tolist() == [3, 3, 1.5, 1.5]


def test_clip_models_keep_what_matters_to_the_anchors_in_both_towers(clips, world, tmp_path) -> None:
    *models, base = map(Path, clips)
    anchors = AnchorDataModule(str(world / "anchors"), 3, clips[0], cache=False)
    losses = alignment_losses(anchors)
    found = [(folder, gradients(CLIPModel.from_pretrained(folder), losses)) for folder in models]
    Fusion([*map(str, models)], str(tmp_path / "out"), str(base), "sap", anchors=anchors).run()
    check(weights_in(tmp_path / "out"), expected(WholeSAP(), base, found), weights_in(base))
    line = [f"--fuse.models=[{','.join(clips[:2])}]", f"--fuse.base={base}", f"--fuse.output={tmp_path / 'same'}"]
    commands.fuse([*line, "--fuse.method=sap", f"--anchors.root={world / 'anchors'}", "--anchors.num_pairs=3"])
    assert contents(tmp_path / "same") == contents(tmp_path / "out")


def test_at_sparsity_0_it_is_the_average_byte_for_byte(speaking, texts, tmp_path) -> None:
    *models, base = speaking
    Fusion(models, str(tmp_path / "average"), base).run()
    for scope in ("global", "layer"):
        method = WholeSAP(0.0, scope=scope, rescale="none")
        Fusion(models, str(tmp_path / scope), base, method, texts=texts).run()
        for shard in (tmp_path / "average").glob("*.safetensors"):
            assert (tmp_path / scope / shard.name).read_bytes() == shard.read_bytes()


def test_a_tied_head_has_the_gradient_of_both_its_uses(speaking, texts, tmp_path) -> None:
    tied = saved(trained(llama(tie_word_embeddings=True), 3), tmp_path / "tied")
    Fusion([speaking[0], str(tied)], str(tmp_path / "out"), speaking[2], WholeSAP(0.5), texts=texts).run()
    head = weights_in(tmp_path / "out")["lm_head.weight"]
    assert not torch.equal(head, weights_in(Path(speaking[2]))["lm_head.weight"])


def test_a_killed_fusion_continues_to_the_same_bytes_and_keeps_scores(speaking, texts, tmp_path, monkeypatch) -> None:
    *models, base = speaking
    play = Fusion(models, str(tmp_path / "out"), base, WholeSAP(), texts=texts).run
    events = killed(tmp_path, play)
    whole = contents(tmp_path / "out")
    for event in (8, 12, events // 2, events - 8):
        shutil.rmtree(tmp_path / "out")
        killed(tmp_path, play, event)
        killed(tmp_path, play)
        assert contents(tmp_path / "out") == whole, event
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts.txt"]
    shutil.rmtree(tmp_path / "out")
    killed(tmp_path, play, events - 8)
    monkeypatch.setattr(work, "write_scores", None)
    play()
    assert contents(tmp_path / "out") == whole


def test_the_command_takes_settings_of_sap_and_calls_them_its_own(speaking, texts, tmp_path, refusal) -> None:
    *models, base = speaking
    line = [f"--fuse.models=[{','.join(models)}]", f"--fuse.base={base}", f"--fuse.output={tmp_path / 'out'}"]
    commands.fuse([*line, "--fuse.method=sap", "--fuse.method.sparsity=0.5", f"--fuse.texts={texts}"])
    Fusion(models, str(tmp_path / "expected"), base, WholeSAP(0.5), texts=texts).run()
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    said = refusal("fuse", *line, "--fuse.method=sap", "--fuse.method.sparsity=2", f"--fuse.texts={texts}")
    assert said == "error: fuse.method.sparsity must lie in [0, 1], got 2.0"
