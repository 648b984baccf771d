"""Models compressed: the invariants of GRASP, what stands on disk, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from kills import killed
from llamas import SIZES, llama, saved, tokenizer, weights_in
from places import SHAPES_CLIP
from references import contents
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from sap_lightning.compression import compression as asked
from sap_lightning.compression import loading
from sap_lightning.compression.compression import Compression
from sap_lightning.compression.loading import load_compressed
from sap_lightning.compression.low_rank import LowRank
from sap_lightning.errors import InputError

UNSHOWN = {"texts": None, "rows": None, "tokens": None}
UP = "model.layers.1.mlp.up_proj.weight"
TOKENS = torch.arange(20).view(2, 10) % 11


@pytest.fixture
def compressed(speaker, texts, tmp_path):
    """Compresses the tiny model as the settings say, and returns the folder."""

    def compress(name: str = "out", model: str = speaker, **settings) -> Path:
        shown = {"texts": texts, "rows": 6, "tokens": 16} | settings
        return Compression(model, str(tmp_path / name), **shown).run()

    return compress


def record_of(folder: Path) -> dict:
    return json.loads((folder / "compress.json").read_text())


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits


def plain(folder: Path | str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


# GRASP


def test_factors_and_their_product_are_one_model(compressed) -> None:
    factors, dense = compressed("factors", retain=0.25), compressed("dense", retain=0.25, format="dense")
    found = load_compressed(factors)
    assert_close(logits(found), logits(plain(dense)), atol=1e-5, rtol=1e-5)
    ranks = {name: module.rank for name, module in found.named_modules() if isinstance(module, LowRank)}
    assert ranks == json.loads((factors / "compression.json").read_text())["ranks"]
    assert set(ranks.values()) == {8, 4}  # a quarter of 32, and of the 16 that keys and values have
    (one, two) = (record_of(folder)["findings"] for folder in (factors, dense))
    assert one.pop("loss") == pytest.approx(two.pop("loss"), rel=1e-6) and one == two


def test_blocks_that_are_not_chosen_and_all_else_stay_bit_for_bit(compressed, speaker) -> None:
    before = weights_in(Path(speaker))
    for format in ("factors", "dense"):
        after = weights_in(compressed(format, layers=[1, 2], retain=0.25, format=format))
        for key, weight in before.items():
            if ".layers.1." in key or ".layers.2." in key:
                assert (key in after and torch.equal(after[key], weight)) == ("norm" in key)
            else:
                assert torch.equal(after[key], weight)


def test_the_most_redundant_blocks_are_chosen(compressed) -> None:
    findings = record_of(compressed(layers=0.5, score="sigma"))["findings"]
    ranking = sorted(range(4), key=lambda number: -findings["redundancy"][number])
    assert findings["blocks"] == sorted(ranking[:2])


def test_nothing_kept_leaves_the_residual_stream_as_dropped_blocks_do(compressed, tmp_path) -> None:
    nothing = record_of(compressed("nothing", layers=[1, 2], retain=0))["findings"]["loss"]
    dropped = record_of(compressed("dropped", layers=[1, 2], method="drop"))["findings"]["loss"]
    assert nothing == pytest.approx(dropped, rel=1e-6) and nothing[0] != nothing[1]
    assert_close(logits(load_compressed(tmp_path / "nothing")), logits(plain(tmp_path / "dropped")))


def test_all_kept_is_the_same_model_and_is_said_to_be_no_smaller(compressed, speaker) -> None:
    out = compressed(retain=1.0)
    assert {path.name for path in out.glob("*.safetensors")} == {"model.safetensors"}
    assert torch.equal(logits(plain(out)), logits(plain(speaker)))
    findings = record_of(out)["findings"]
    assert len(findings["no smaller in low rank"]) == 7 and findings["loss"][0] == findings["loss"][1]


def test_fresh_gradients_choose_otherwise_than_those_of_the_model_at_first(compressed) -> None:
    found = {
        refresh: weights_in(compressed(refresh, layers=[1, 2, 3], refresh=refresh))
        for refresh in ("half", "block", "once")
    }
    last = [key for key in found["half"] if ".layers.3.mlp." in key]
    assert all(torch.equal(found["half"][key], found["once"][key]) for key in last)  # nothing had changed yet
    for other in ("block", "once"):
        assert any(not torch.equal(found["half"][key], found[other][key]) for key in found["half"])


@pytest.mark.parametrize("score", ["code", "gradient", "sigma", "random"])
def test_every_score_keeps_as_many_parameters_and_other_triplets(compressed, score) -> None:
    paper, other = compressed("paper"), compressed(score, score=score)
    assert record_of(paper)["parameters"] == record_of(other)["parameters"]
    one, two = weights_in(paper), weights_in(other)
    assert one.keys() == two.keys() and any(not torch.equal(one[key], two[key]) for key in one)


def test_the_largest_singular_values_are_the_best_approximation(compressed, speaker) -> None:
    out = weights_in(compressed(layers=[0], score="sigma", retain=0.25, texts=None, rows=None, tokens=None))
    weight = weights_in(Path(speaker))["model.layers.0.mlp.up_proj.weight"].double()
    stem = "model.layers.0.mlp.up_proj"
    lost = (weight - out[f"{stem}.up"].double() @ out[f"{stem}.down"].double()).square().sum()
    assert_close(lost, torch.linalg.svdvals(weight)[8:].square().sum(), atol=1e-5, rtol=1e-5)


def test_a_share_of_the_parameters_goes(compressed) -> None:
    before, after = record_of(compressed(layers=[0], compression=0.5))["parameters"]
    linears = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32
    assert 0.45 * linears < before - after < 0.6 * linears


def test_a_weight_keeps_as_few_triplets_as_have_the_share_of_its_scores(compressed, speaker) -> None:
    options = {"layers": [0], "score": "sigma", "texts": None, "rows": None, "tokens": None}
    before, after = weights_in(Path(speaker)), weights_in(compressed(energy=0.3, **options))
    ranks = {key.removesuffix(".up"): after[key].shape[1] for key in after if key.endswith(".up")}
    assert len(ranks) == 7 and len(set(ranks.values())) > 1
    for layer, rank in ranks.items():
        sigma = torch.linalg.svdvals(before[f"{layer}.weight"].double())
        shares = [float(sigma[:kept].sum() / sigma.sum()) for kept in range(len(sigma) + 1)]
        assert shares[rank] >= 0.3 > shares[rank - 1]
    settings = record_of(compressed("scored", energy=0.3))["settings"]
    assert (settings["energy"], settings["retain"], settings["compression"]) == (0.3, None, None)


def test_a_run_of_blocks_is_chosen_by_the_angle_it_turns_the_last_token(compressed) -> None:
    for method in ("grasp", "drop"):
        findings = record_of(compressed(method, method=method, layers=0.5, angular=True))["findings"]
        distances = findings["angular distances"]
        start = min(range(3), key=distances.__getitem__)
        assert len(distances) == 3 and findings["blocks"] == [start, start + 1]


def test_what_is_said_of_size_is_what_is_on_disk(compressed, speaker) -> None:
    for out in (compressed(), compressed("dropped", method="drop")):
        for index, folder in enumerate((Path(speaker), out)):
            assert record_of(out)["parameters"][index] == sum(map(torch.Tensor.numel, weights_in(folder).values()))
            assert record_of(out)["bytes"][index] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert record_of(out)["parameters"][1] < record_of(out)["parameters"][0]


def test_factors_are_stored_in_the_weights_own_dtype(compressed, speaker, tmp_path) -> None:
    half = tmp_path / "half"
    shutil.copytree(speaker, half)
    for shard in half.glob("*.safetensors"):
        save_file({key: weight.bfloat16() for key, weight in load_file(shard).items()}, shard, {"format": "pt"})
    assert {weight.dtype for weight in weights_in(compressed(model=str(half))).values()} == {torch.bfloat16}


# Models of other kinds


def gpt2(folder: Path, **options) -> str:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 40, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**sizes | options))
    for layer in model.transformer.h:
        nn.init.normal_(layer.mlp.c_fc.bias)
    return str(saved(model, folder))


def test_conv1d_layers_and_their_biases_are_compressed_too(compressed, tmp_path) -> None:
    options = {**UNSHOWN, "layers": [1], "score": "sigma", "retain": 0.25}
    model = gpt2(tmp_path / "gpt2")
    factors, dense = (compressed(form, model, format=form, **options) for form in ("factors", "dense"))
    assert_close(logits(load_compressed(factors)), logits(plain(dense)), atol=1e-5, rtol=1e-5)
    weight = plain(model).transformer.h[1].mlp.c_fc.weight
    U, sigma, V = torch.linalg.svd(weight)
    assert_close(plain(dense).transformer.h[1].mlp.c_fc.weight, U[:, :4] * sigma[:4] @ V[:4], atol=1e-5, rtol=1e-4)
    bias = f"{load_compressed(factors).transformer.h[1].mlp.c_fc.bias.tolist()}"
    assert bias == f"{plain(model).transformer.h[1].mlp.c_fc.bias.tolist()}"


def test_experts_are_refused_by_name(compressed, tmp_path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    whole = MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()
    model = str(saved(whole, tmp_path / "mixtral"))
    options = {**UNSHOWN, "model": model, "layers": [0]}
    with pytest.raises(InputError, match=r"model.layers.0.mlp\S* \w+ with a weight of shape \S+ .* is no linear layer"):
        compressed(score="sigma", format="dense", **options)
    with pytest.raises(
        InputError, match=r"has no model.layers.0.mlp\S+, which transformers makes of .*compress.format dense"
    ):
        compressed(score="sigma", **options)
    assert not (tmp_path / "out").exists()
    found = plain(compressed(method="drop", **options))
    whole.model.layers = nn.ModuleList(whole.model.layers[1:])
    with torch.inference_mode():
        assert_close(logits(found), whole(TOKENS, use_cache=False).logits)


def test_buffers_of_old_versions_are_left_out(compressed, tmp_path) -> None:
    folder = Path(gpt2(tmp_path / "gpt2"))
    weights = weights_in(folder)
    old = {
        f"transformer.h.{block}.attn.{name}": torch.ones(4) for block in range(3) for name in ("bias", "masked_bias")
    }
    for file in folder.glob("model*"):
        file.unlink()
    save_file(weights | old, folder / "model.safetensors", {"format": "pt"})
    dropped = weights_in(compressed("dropped", str(folder), method="drop", layers=[0], **UNSHOWN))
    assert dropped.keys() == {key for key in weights if ".h.2." not in key}
    factors = compressed("factors", str(folder), layers=[0], score="sigma", **UNSHOWN)
    assert len(load_compressed(factors).transformer.h) == 3 and not old.keys() & weights_in(factors).keys()


def test_a_weight_of_another_name_on_disk_is_found_again(compressed, tmp_path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = str(saved(GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, vocab_size=40)), tmp_path / "neox"))
    assert "embed_out.weight" in weights_in(Path(model))
    options = {**UNSHOWN, "layers": [1], "score": "sigma", "retain": 0.25}
    factors, dense = (compressed(form, model, format=form, **options) for form in ("factors", "dense"))
    assert weights_in(dense).keys() == weights_in(Path(model)).keys()
    assert_close(logits(load_compressed(factors)), logits(plain(dense)), atol=1e-5, rtol=1e-5)


# Blocks dropped


def test_a_model_without_blocks_is_the_one_built_by_hand(compressed, speaker) -> None:
    out = compressed(method="drop", layers=[0, 2])
    whole = plain(speaker)
    whole.model.layers = nn.ModuleList([whole.model.layers[1], whole.model.layers[3]])
    model = plain(out)
    assert model.config.num_hidden_layers == len(model.model.layers) == 2
    with torch.inference_mode():
        assert torch.equal(model(TOKENS).logits, whole(TOKENS, use_cache=False).logits)
    assert weights_in(out).keys() == set(model.state_dict())


def test_what_a_config_says_of_each_block_goes_with_it(compressed, tmp_path) -> None:
    torch.manual_seed(0)
    whole = SmolLM3ForCausalLM(
        SmolLM3Config(**SIZES | {"num_hidden_layers": 4}, no_rope_layers=[1, 0, 1, 1], pad_token_id=0)
    )
    model = str(saved(whole.eval(), tmp_path / "smol"))
    found = plain(compressed(model=model, method="drop", layers=[0, 2], **UNSHOWN))
    assert found.config.no_rope_layers == [0, 1] and len(found.config.layer_types) == 2
    whole.model.layers = nn.ModuleList([whole.model.layers[1], whole.model.layers[3]])
    with torch.inference_mode():
        assert_close(logits(found), whole(TOKENS, use_cache=False).logits)


def test_blocks_that_do_another_thing_in_another_place_are_refused(compressed, tmp_path) -> None:
    model = gpt2(tmp_path / "gpt2", scale_attn_by_inverse_layer_idx=True, initializer_range=0.2)
    said = (
        r"gpt2: what drop leaves of GPT2LMHeadModel is another model where it is loaded, .* choose other compress.layer"
    )
    with pytest.raises(InputError, match=said):
        compressed(model=model, method="drop", layers=[0], **UNSHOWN)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    assert compressed(model=model, method="drop", layers=[2], **UNSHOWN).is_dir()


def test_what_would_not_load_without_a_block_is_refused(compressed, tmp_path) -> None:
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": 3, "intermediate_size_mlp": 48, "head_dim": 16, "num_local_experts": 2}
    whole = Llama4ForCausalLM(Llama4TextConfig(**sizes, moe_layers=[1], pad_token_id=0))
    model = str(saved(whole, tmp_path / "llama4"))
    said = r"llama4: drop makes what does not load: the result: no whole causal language model: \d+ weights are missing"
    with pytest.raises(InputError, match=said):
        compressed(model=model, method="drop", layers=[0], **UNSHOWN)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    assert compressed(model=model, method="drop", layers=[2], **UNSHOWN).is_dir()


# What stands on disk


def test_factors_are_not_taken_for_a_whole_model(compressed) -> None:
    with pytest.raises(OSError, match="no file named"):
        plain(compressed())


def damaged(folder: Path, change) -> None:
    tensors = load_file(folder / "compressed.safetensors")
    change(tensors)
    save_file(tensors, folder / "compressed.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight is not there"),
        (lambda tensors: tensors.update(more=torch.ones(1)), "more is no weight of the model"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}), r"has the shape \(3,\), expected"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(32).int()}), "is of torch.int32, no floating"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(compressed, change, said) -> None:
    out = compressed()
    damaged(out, change)
    with pytest.raises(InputError, match=said):
        load_compressed(out)


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ({"model.layers.0.nothing": 2}, "model.layers.0.nothing is no linear layer"),
        ({"model.layers.0.mlp": 2}, "model.layers.0.mlp is no linear layer"),
        ({"model.layers.0.mlp.up_proj": -1}, "the rank of model.layers.0.mlp.up_proj is -1"),
        ({"model.layers.0.mlp.up_proj": 33}, "up_proj is 33, expected an integer from 0 to 32"),
        ({"model.layers.0.mlp.up_proj": False}, "up_proj is False, expected an integer from 0 to 32"),
        ({"model.layers.0.mlp.up_proj": 0.0}, "up_proj is 0.0, expected an integer from 0 to 32"),
        ([], "ranks is .., expected ranks by layer"),
    ],
)
def test_ranks_that_are_none_are_refused(compressed, ranks, said) -> None:
    out = compressed()
    (out / "compression.json").write_text(json.dumps({"ranks": ranks}))
    with pytest.raises(InputError, match=said):
        load_compressed(out)


def test_what_is_no_compressed_model_is_refused(compressed, speaker) -> None:
    with pytest.raises(InputError, match=r"has no compression.json; what is dense loads with from_pretrained"):
        load_compressed(speaker)
    out = compressed()
    (out / "compressed.safetensors").write_bytes(b"not at all")
    with pytest.raises(InputError, match=r"compressed.safetensors: not safetensors"):
        load_compressed(out)


def test_killed_anywhere_and_run_again_it_ends_in_the_same_bytes(speaker, texts, tmp_path) -> None:
    play = Compression(speaker, str(tmp_path / "out"), layers=0.5, texts=texts, rows=4, tokens=8).run
    events = killed(tmp_path, play)
    whole = contents(tmp_path / "out")
    for event in (2, events // 2, events - 8, events):
        shutil.rmtree(tmp_path / "out")
        killed(tmp_path, play, event)
        killed(tmp_path, play)
        assert contents(tmp_path / "out") == whole, event
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_finished_blocks_are_kept_and_those_of_another_compression_are_not(speaker, texts, tmp_path) -> None:
    def play(**settings) -> Compression:
        return Compression(speaker, str(tmp_path / "out"), layers=[2, 3], texts=texts, rows=4, tokens=8, **settings)

    play().run()
    whole = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    block = tmp_path / ".out.compressing" / "block-3.safetensors"
    for event in range(4, 99):
        killed(tmp_path, play().run, event)
        if block.exists():
            break
    written = block.stat().st_mtime_ns
    killed(tmp_path, play().run, 5)
    assert block.stat().st_mtime_ns == written
    play(retain=0.2).run()
    assert contents(tmp_path / "out") != whole and not block.exists()
    shutil.rmtree(tmp_path / "out")
    play().run()
    assert contents(tmp_path / "out") == whole


# CLIP


@pytest.fixture
def clip(run, world, tmp_path):
    """Compresses the built-in CLIP by the command, and returns the folder."""

    def compress(name: str, *options: str) -> Path:
        run("compress", str(SHAPES_CLIP), f"--compress.output={tmp_path / name}", "--compress.layers=[0,1]", *options)
        return tmp_path / name

    return compress


def test_clip_is_compressed_by_its_anchors_and_tested_as_any_base(clip, run, capsys) -> None:
    out = clip("dense", "--compress.format=dense", "--compress.retain=0.2")
    assert f"Compressed by grasp: {out}" in capsys.readouterr().out
    before, after = weights_in(Path(SHAPES_CLIP)), weights_in(out)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.startswith("vision_model.encoder.layers.") for key in changed)
    loss = record_of(out)["findings"]["loss"]
    assert loss[0] < loss[1] < 1
    run("test", "--data.domain=photo", f"--model.base={out}")
    assert "accuracy" in capsys.readouterr().out


def test_clip_in_factors_loads_as_clip(clip) -> None:
    factors, dense = (
        clip("factors", "--compress.retain=0.2"),
        clip("dense", "--compress.format=dense", "--compress.retain=0.2"),
    )
    pixels = torch.randn(2, 3, *2 * [CLIPModel.from_pretrained(SHAPES_CLIP).config.vision_config.image_size])
    with torch.inference_mode():
        found, expected = (
            model.get_image_features(pixel_values=pixels).pooler_output
            for model in (load_compressed(factors), CLIPModel.from_pretrained(dense, dtype=torch.float32))
        )
    assert_close(found, expected, atol=1e-3, rtol=1e-3)


# Refusals


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"retain": 0.1, "compression": 0.2}, "compress.retain and compress.compression each say"),
        ({"compression": 0.1, "energy": 0.2}, "compress.compression and compress.energy each say how much is kept"),
        ({"energy": 1.5}, r"compress.energy must lie in \[0, 1\]"),
        ({"method": "drop", "energy": 0.5}, "compress.energy: drop would ignore it; it is for grasp"),
        ({"layers": [1], "angular": True}, r"compress.angular: chooses blocks, and compress.layers \[1\] names them"),
        (
            {"method": "gradpruner", "angular": True},
            "compress.angular: gradpruner would ignore it; it is for grasp, drop",
        ),
        ({"retain": 1.5}, r"compress.retain must lie in \[0, 1\]"),
        ({"layers": 30}, r"compress.layers must lie in \[0, 1\], got 30; 30 % is 0.3"),
        ({"method": "drop", "score": "code"}, "compress.score: drop would ignore it; it is for grasp"),
        ({"method": "drop", "format": "factors"}, "compress.format: drop would ignore it; it is for grasp"),
        ({"texts": None}, "compress.rows and compress.tokens are of compress.texts, which is not set"),
        (
            {"score": "sigma", "refresh": "once"},
            "compress.refresh once: is of gradients, at which compress.score sigma",
        ),
        ({"rows": 0}, "compress.rows must be at least 1"),
        ({"tokens": 1}, "compress.tokens must be at least 2"),
    ],
)
def test_settings_that_are_none_or_contradict_are_refused(compressed, settings, said, tmp_path) -> None:
    with pytest.raises(InputError, match=said):
        compressed(**settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layers": [4]}, r"compress.layers \[4\]: name some of the blocks 0 to 3, each once"),
        ({"layers": [1, 1]}, "each once"),
        ({"layers": []}, "name some of the blocks"),
        ({"layers": 0.01}, "compress.layers 0.01: is no whole block of 4; take more"),
        ({"rows": 100}, "has 400 tokens; 100 rows of 16 are 1600; give a longer text"),
        ({"texts": "nowhere.txt"}, "compress.texts nowhere.txt: cannot be read"),
    ],
)
def test_what_does_not_fit_the_model_or_the_text_is_refused(compressed, settings, said, tmp_path) -> None:
    with pytest.raises(InputError, match=said):
        compressed(**settings)
    assert not (tmp_path / "out").exists()


def test_texts_that_the_model_cannot_be_shown_are_refused_before_a_weight_is_read(
    compressed, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(loading, "load_language_model", None)
    short = gpt2(tmp_path / "short", n_positions=15)
    few = str(saved(llama(vocab_size=5), tmp_path / "few"))
    for model in (short, few):
        tokenizer().save_pretrained(model)
    with pytest.raises(InputError, match=r"takes 16 positions, and \S+short has 15; lower --compress.tokens"):
        compressed(model=short)
    with pytest.raises(InputError, match=r"the tokenizer makes token 10 of it, and \S+few has a vocabulary of 5"):
        compressed(model=few)
    assert not (tmp_path / "out").exists()


def test_without_texts_nothing_is_read(compressed, monkeypatch) -> None:
    monkeypatch.setattr(asked, "opened", None)
    for settings in ({}, {"method": "drop"}, {"score": "sigma"}, {"layers": [1]}):
        with pytest.raises(
            InputError, match=r"compress.texts is not set: \w+ looks at what .* makes of it; name a text"
        ):
            compressed(texts=None, rows=None, tokens=None, **settings)
    with pytest.raises(InputError, match=r"compress.texts: .* is CLIP, which is shown --anchors"):
        compressed(model=str(SHAPES_CLIP))


def test_anchors_that_nobody_is_shown_are_refused(run, speaker, texts, tmp_path) -> None:
    options = [f"--compress.output={tmp_path / 'out'}", "--anchors.num_pairs=4"]
    with pytest.raises(InputError, match=r"--anchors\.\w+: .* is shown no anchors by grasp; leave it out"):
        run("compress", speaker, f"--compress.texts={texts}", *options)
    with pytest.raises(InputError, match=r"is shown no anchors by drop; leave it out"):
        run("compress", SHAPES_CLIP, "--compress.method=drop", "--compress.layers=[0]", *options)


def test_quantised_weights_are_refused_by_name(compressed, speaker, tmp_path) -> None:
    folder = Path(shutil.copytree(speaker, tmp_path / "quantised"))
    (shard,) = (path for path in folder.glob("*.safetensors") if UP in load_file(path))
    tensors = load_file(shard)
    save_file({**tensors, UP: tensors[UP].to(torch.float8_e4m3fn)}, shard, {"format": "pt"})
    with pytest.raises(InputError, match=rf"quantised: {UP} is stored as F8_E4M3; save the model in float32"):
        compressed(model=str(folder), layers=[1, 2])
    assert not (tmp_path / "out").exists()


def with_weight(speaker: str, folder: Path, change, dtype=torch.float32) -> str:
    """A copy of a model, in a dtype, with one weight of block 1 changed."""
    shutil.copytree(speaker, folder)
    for shard in folder.glob("*.safetensors"):
        tensors = {key: tensor.to(dtype) for key, tensor in load_file(shard).items()}
        if UP in tensors:
            change(tensors[UP])
        save_file(tensors, shard, {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("number", [torch.nan, -torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(compressed, speaker, tmp_path, number) -> None:
    model = with_weight(speaker, tmp_path / "faulty", lambda weight: weight[0, 0].fill_(number))
    for options in ({"method": "drop"}, {"method": "gradpruner", "steps": 2}, {"score": "sigma", "layers": [1]}):
        with pytest.raises(InputError, match=rf"faulty: {UP} has numbers that are not finite, NaN or infinite"):
            compressed(model=model, **options)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_is_refused(compressed, speaker, tmp_path) -> None:
    model = with_weight(speaker, tmp_path / "huge", lambda weight: weight.fill_(3e38))
    with pytest.raises(InputError, match=r"LlamaForCausalLM: its loss on what it is shown is nan; look for weights"):
        compressed(model=model, method="drop")
    assert not (tmp_path / "out").exists()


def test_weights_that_their_dtype_cannot_hold_are_refused_by_name(compressed, speaker, tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)

    def change(weight: Tensor) -> None:
        weight.copy_(torch.randn(weight.shape, generator=generator).sign() * 60000)

    model = with_weight(speaker, tmp_path / "half", change, torch.float16)
    options = {**UNSHOWN, "model": model, "layers": [1], "score": "sigma", "retain": 0.2}
    with pytest.raises(InputError, match=rf"half: {UP} has numbers that float16 cannot hold once it is compressed"):
        compressed(format="dense", **options)
    assert not (tmp_path / "out").exists()


def test_models_in_float64_are_compressed(compressed, speaker, tmp_path) -> None:
    model = with_weight(speaker, tmp_path / "double", lambda weight: None, torch.float64)
    out = compressed(model=model, layers=[1], retain=0.25)
    assert {weight.dtype for weight in weights_in(out).values()} == {torch.float64}
    assert_close(logits(load_compressed(out)), logits(load_compressed(compressed("single", layers=[1], retain=0.25))))


def test_a_result_that_stands_is_not_overwritten(compressed) -> None:
    compressed()
    with pytest.raises(InputError, match="already exists and is not overwritten"):
        compressed()


@pytest.mark.parametrize("output", [".", "", ".."])
def test_a_folder_without_a_name_is_not_overwritten(speaker, tmp_path, monkeypatch, output) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "plan").write_bytes(b"\xff")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match=r"^\.+: already exists and is not overwritten"):
        Compression(speaker, output, layers=[1], score="sigma").run()
    assert [path.name for path in tmp_path.rglob("*")] == ["here", "plan"]


def test_a_model_without_blocks_or_tokenizer_is_refused(compressed, tmp_path) -> None:
    model = str(saved(llama(), tmp_path / "silent"))
    with pytest.raises(InputError, match=r"silent: has no tokenizer for compress.texts"):
        compressed(model=model)
