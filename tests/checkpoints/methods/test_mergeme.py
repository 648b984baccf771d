"""MergeME: mixtures of experts against their parts, mergekit-moe and the models themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from kills import killed
from llamas import TEXTS, ids_of, llama, saved, tokenizer, trained, weights_in
from references import contents
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from sap_lightning.checkpoints.fusion import Fusion
from sap_lightning.checkpoints.methods import MergeME
from sap_lightning.errors import InputError
from sap_lightning.fuse import fuse
from sap_lightning.merging import DARE, TIES

UNIFORM = MergeME(router="uniform")
ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"
PROJECTIONS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def joined(models: list[str], output: Path, method: MergeME = UNIFORM, **options) -> dict[str, Tensor]:
    Fusion(models, str(output), method=method, **options).run()
    return weights_in(output)


def logits_of(folder: Path | str) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        return torch.cat([model(ids_of(text)).logits[0] for text in TEXTS])


def of_each(folder: Path) -> list[str]:
    """A file of texts for each of two models."""
    files = [folder / "cats.txt", folder / "dogs.txt"]
    for file, texts in zip(files, (TEXTS[:1], TEXTS[1:]), strict=True):
        file.write_text("\n".join(texts))
    return list(map(str, files))


def test_experts_are_the_models_own_mlps_and_the_rest_is_averaged(trio, tmp_path) -> None:
    result = joined(trio[:2], tmp_path / "out")
    models = [weights_in(Path(folder)) for folder in trio[:2]]
    for key, weight in models[0].items():
        if ".mlp." not in key:
            assert_close(result.pop(key), (weight + models[1][key]) / 2, atol=1e-7, rtol=0)
            continue
        block, layer = key.removesuffix(".weight").split(".mlp.")
        for number, model in enumerate(models):
            own = f"{block}.block_sparse_moe.experts.{number}.{PROJECTIONS[layer]}.weight"
            assert torch.equal(result.pop(own), model[key])
    assert {key: weight.tolist() for key, weight in result.items()} == {
        ROUTER.format(block): [[0.0] * 32] * 2 for block in range(2)
    }


@pytest.mark.parametrize("method", [TIES(variant="mergekit"), DARE(sparsity=0.5)], ids=lambda one: one.name)
def test_what_is_shared_is_fused_as_the_method_under_it_does(method, trio, tmp_path) -> None:
    result = joined(trio[:2], tmp_path / "out", MergeME(method, router="uniform"), base=trio[2])
    Fusion(trio[:2], str(tmp_path / "plain"), trio[2], method).run()
    shared = {key: one for key, one in weights_in(tmp_path / "plain").items() if ".mlp." not in key}
    assert shared and all(torch.equal(result[key], weight) for key, weight in shared.items())


def test_one_threshold_goes_over_what_is_shared_alone(trio, tmp_path) -> None:
    """The authors' TIES of the mixture is that of models that have no other weights."""
    folders = []
    for folder in trio:
        model = AutoModelForCausalLM.from_pretrained(folder)
        without = {key: one for key, one in model.state_dict().items() if ".mlp." not in key}
        model.save_pretrained(tmp_path / Path(folder).name, state_dict=without)
        folders.append(str(tmp_path / Path(folder).name))
    Fusion(folders[:2], str(tmp_path / "plain"), folders[2], TIES()).run()
    result = joined(trio[:2], tmp_path / "out", MergeME("ties", router="uniform"), base=trio[2])
    assert all(torch.equal(result[key], weight) for key, weight in weights_in(tmp_path / "plain").items())


@pytest.mark.parametrize("experts", [1, 2])
def test_copies_of_a_model_with_any_router_are_that_model(experts, speaking, tmp_path) -> None:
    again = str(shutil.copytree(speaking[0], tmp_path / "again"))
    joined([speaking[0], again], tmp_path / "out", MergeME(experts=experts), texts=of_each(tmp_path))
    assert_close(logits_of(tmp_path / "out"), logits_of(speaking[0]), atol=1e-5, rtol=0)
    model = MixtralForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_experts_per_tok == experts and model.config.num_local_experts == 2


def test_position_and_tied_heads_are_as_in_the_models(tmp_path) -> None:
    rope = {"rope_type": "default", "rope_theta": 77.0}
    model = llama(tie_word_embeddings=True, rope_parameters=rope, head_dim=8, rms_norm_eps=1e-3)
    folders = [str(saved(trained(model, 0), tmp_path / name, torch.float16)) for name in "ab"]
    result = joined(folders, tmp_path / "out")
    assert "lm_head.weight" not in result and {one.dtype for one in result.values()} == {torch.float16}
    assert_close(logits_of(tmp_path / "out"), logits_of(folders[0]), atol=1e-2, rtol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 77.0 and config["rope_parameters"]["rope_theta"] == 77.0


def test_a_router_row_is_what_blocks_of_the_base_read_of_an_expert_s_texts(speaking, tmp_path) -> None:
    files = of_each(tmp_path)
    result = joined(speaking[:2], tmp_path / "out", MergeME(), texts=files, base=speaking[2])
    base = AutoModelForCausalLM.from_pretrained(speaking[2]).double()
    for number, texts in enumerate((TEXTS[:1], TEXTS[1:])):
        with torch.inference_mode():
            states = [base(ids_of(text), output_hidden_states=True).hidden_states for text in texts]
        for block in range(2):
            read = torch.stack([one[block][0].mean(0) for one in states]).mean(0)
            assert_close(result[ROUTER.format(block)][number].double(), normalize(read, dim=0), atol=1e-6, rtol=0)


def test_it_is_what_mergekit_makes_of_the_same_models(speaking, tmp_path) -> None:
    config_of = pytest.importorskip("mergekit.moe.config")
    mixtral, router = (pytest.importorskip(f"mergekit.moe.{name}") for name in ("mixtral", "router"))
    options = pytest.importorskip("mergekit.options")
    files = of_each(tmp_path)
    # Whose attention is A's own, as mergekit takes it over.
    other = AutoModelForCausalLM.from_pretrained(speaking[0])
    own = {key: 2 * one if ".mlp." in key else one for key, one in other.state_dict().items()}
    other.load_state_dict(own)
    other.save_pretrained(tmp_path / "b")
    models = [speaking[0], str(tmp_path / "b")]
    joined(models, tmp_path / "ours", MergeME(), texts=files)

    config = config_of.MoEMergeConfig(
        base_model=models[0],
        dtype="float32",
        experts=[{"source_model": model} for model in models],
    )
    base, words = AutoModelForCausalLM.from_pretrained(models[0]), tokenizer()
    words.pad_token = "[UNK]"
    read = []
    for file in files:
        # One by one, as mergekit takes what fills up shorter texts for a part of them.
        lines = Path(file).read_text().splitlines()
        states = [router.get_hidden_states(base, router.tokenize_prompts([line], words)) for line in lines]
        read.append(normalize(torch.stack(states).mean(0), dim=-1))
    gates = list(torch.stack(read, 1))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    mixtral.MixtralMoE().write_model(str(theirs), config, options.MergeOptions(), gates)

    one, two = (MixtralForCausalLM.from_pretrained(folder) for folder in (tmp_path / "ours", theirs))
    expected = two.state_dict()
    assert one.state_dict().keys() == expected.keys()
    for key, weight in one.state_dict().items():
        if key.endswith("mlp.gate.weight"):
            assert_close(weight, expected[key], atol=1e-6, rtol=0)
        else:
            assert torch.equal(weight, expected[key]), key
    same = [name for name in one.config.to_dict() if name not in ("_name_or_path", "transformers_version")]
    assert {name: one.config.to_dict()[name] for name in same} == {name: two.config.to_dict()[name] for name in same}


def test_its_files_are_those_that_transformers_writes(trio, tmp_path) -> None:
    result = joined(trio[:2], tmp_path / "out")
    MixtralForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    again = weights_in(tmp_path / "again")
    assert result.keys() == again.keys()
    assert all(torch.equal(weight, again[key]) for key, weight in result.items())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == result.keys()
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in result.values())


def test_the_command_joins_and_says_so(speaking, tmp_path) -> None:
    line = [f"--fuse.models=[{','.join(speaking[:2])}]", f"--fuse.base={speaking[2]}", "--fuse.method=mergeme"]
    files = ",".join(of_each(tmp_path))
    more = [f"--fuse.texts=[{files}]", "--fuse.method.method=ties", "--fuse.method.method.variant=mergekit"]
    fuse([*line, *more, f"--fuse.output={tmp_path / 'out'}"])
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["method"] == "mergeme" and record["settings"]["method"]["settings"]["variant"] == "mergekit"
    assert record["findings"]["experts"] == ["a", "b"] and record["findings"]["kept"] == {}
    assert "models merged by mergeme" in (tmp_path / "out" / "README.md").read_text()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "config.json", "generation_config.json"} <= names
    expected = joined(speaking[:2], tmp_path / "again", MergeME(TIES(variant="mergekit")), base=speaking[2],
                      texts=of_each(tmp_path))  # fmt: skip
    assert all(torch.equal(weight, expected[key]) for key, weight in weights_in(tmp_path / "out").items())


def test_a_killed_mixture_continues_to_the_same_bytes(speaking, tmp_path) -> None:
    files = of_each(tmp_path)
    place = tmp_path / "place"
    place.mkdir()
    method = MergeME("ties")
    play = Fusion(speaking[:2], str(place / "out"), speaking[2], method, texts=files).run
    play()
    whole = contents(place / "out")
    shutil.rmtree(place / "out")
    events = killed(place, play)
    for event in (4, events // 2, events - 4):
        shutil.rmtree(place / "out")
        killed(place, play, event)
        play()
        assert contents(place / "out") == whole, event
        assert [path.name for path in place.iterdir()] == ["out"]


# What is refused


def refused(models: list[Path | str], output: Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        joined(list(map(str, models)), output)
    assert not output.exists() and not list(output.parent.glob(".*"))


def test_models_that_are_not_as_llamas_are_refused(trio, clips, tmp_path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    qwen = Qwen2ForCausalLM(Qwen2Config(**sizes, intermediate_size=48, vocab_size=40))
    others = [str(saved(qwen, tmp_path / name)) for name in ("q", "r")]
    refused(others, tmp_path / "out", "q: is of type 'qwen2', which makes no expert of a Mixtral")
    biased = [str(saved(llama(mlp_bias=True), tmp_path / name)) for name in ("s", "t")]
    refused(biased, tmp_path / "out", r"s: has 'model.layers.0.mlp.\w+.bias', for which a Mixtral has no place")
    bare = saved(LlamaForCausalLM.from_pretrained(trio[0]).model, tmp_path / "bare")
    refused([bare, trio[1]], tmp_path / "out", "bare: has .*, for which a Mixtral has no place")


def test_models_that_are_not_of_one_kind_are_refused(trio, speaking, tmp_path) -> None:
    turned = saved(llama(rope_parameters={"rope_type": "default", "rope_theta": 5.0}), tmp_path / "turned")
    refused([trio[0], turned], tmp_path / "out", "turned: rope_parameters is .*'rope_theta': 5.0")
    larger = LlamaForCausalLM.from_pretrained(trio[1])
    larger.resize_token_embeddings(44, mean_resizing=False)
    refused([trio[0], saved(larger, tmp_path / "larger")], tmp_path / "out", "larger: vocab_size is 44")
    spoken = Path(shutil.copytree(speaking[1], tmp_path / "spoken"))
    words = tokenizer()
    words.add_tokens(["horse"])
    words.save_pretrained(spoken)
    refused([speaking[0], spoken], tmp_path / "out", "spoken: its tokenizer.json says other than .*a's")
    (spoken / "tokenizer.json").write_text("{")
    refused([speaking[0], spoken], tmp_path / "out", "tokenizer.json: is no JSON")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (MergeME(), {}, "mergeme knows an expert by its own texts; give a file for each of 2 models"),
        (MergeME(), {"texts": "t"}, r"fuse.texts \['t'\]: mergeme knows an expert by its own texts"),
        (MergeME(experts=3), {"texts": ["t", "u"]}, "fuse.method.experts 3: there are 2 models"),
        (MergeME(experts=1, router="uniform"), {}, "would ask the same of 2 about every token"),
        (UNIFORM, {"texts": "t"}, "fuse.texts t: mergeme looks at none here; leave it out"),
        (MergeME("ties", router="uniform"), {}, "fuse.base is not set: ties fuses what the models have changed"),
        (MergeME("krum", router="uniform"), {}, "fuse.method krum looks at all layers at once"),
        (UNIFORM, {"models": ["a"]}, "mergeme needs at least 2"),
        (TIES(), {"texts": ["t", "u"]}, "ties looks at none here"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(method, options, message) -> None:
    with pytest.raises(InputError, match=message):
        Fusion(**{"models": ["a", "b"], "output": "out", "method": method, **options})


@pytest.mark.parametrize("under", ["sap", MergeME(router="uniform")], ids=str)
def test_a_method_that_looks_at_models_cannot_be_under_it(under) -> None:
    with pytest.raises(InputError, match="looks at models at work, and cannot be under it"):
        MergeME(under)
