"""Whole models fused: against the same in memory, and what becomes of models that differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from kills import killed
from llamas import changes, llama, saved, trained, weights_in
from references import contents
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaModel

from sap_lightning import commands
from sap_lightning.checkpoints import fuser
from sap_lightning.checkpoints.fusion import Fusion
from sap_lightning.checkpoints.methods import AdaMMS, SafeM, WholeSAP, WholeStatsMerging
from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer, dense
from sap_lightning.functional.procrustes import aligned
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging import (
    ATAF,
    CART,
    DARE,
    METHODS,
    SAP,
    SCE,
    TIES,
    TSVM,
    WUDI,
    Breadcrumbs,
    Consensus,
    IsoC,
    Magnitude,
    Median,
    MergeMethod,
    RandomPruning,
    TaskArithmetic,
    WiSEFT,
)


def fused(folders: list[str], output: Path, method: MergeMethod | str = "average", **options) -> dict[str, Tensor]:
    """The weights of A and B fused on C."""
    *models, base = folders
    Fusion(models, str(output), base, method, **options).run()
    return weights_in(output)


def record_of(output: Path) -> dict:
    return json.loads((output / "merge.json").read_text())


def in_memory(method: MergeMethod, folders: list[str]) -> dict[str, Tensor]:
    """The same merge of the changes as adapters of full rank, all at once."""
    *models, base = folders
    adapters = []
    for index, change in enumerate(changes(models, Path(base))):
        layers = {}
        for key, delta in change.items():
            matrix = delta.float().reshape(-1, delta.shape[-1])
            layers[key] = LoRALayer(matrix, torch.eye(len(matrix)))
        adapters.append(Adapter(str(index), layers, str(index)))
    merged = method.merge(adapters)
    return {key: own + dense(merged[key]).view(own.shape) for key, own in weights_in(Path(base)).items()}


@pytest.mark.parametrize(
    "method",
    [
        TaskArithmetic(), WiSEFT(), Median(), Consensus(), SCE(), TIES(), TIES(variant="mergekit"), Magnitude(),
        Magnitude(scope="global"), Breadcrumbs(), Breadcrumbs(scope="row"),
    ],
    ids=lambda method: f"{method.name} {method.settings}",
)  # fmt: skip
def test_a_weight_after_the_other_gives_what_all_at_once_do(method, trio, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fuser, "BLOCK", 100)
    expected = in_memory(method, trio)
    for key, weight in fused(trio, tmp_path / "out", method).items():
        assert_close(weight, expected[key], atol=1e-7, rtol=0)


@pytest.mark.parametrize("method", [TSVM(), IsoC(), CART(), WUDI(), Magnitude(space="singular")], ids=repr)
def test_methods_of_singular_triplets_fuse_matrices_and_average_vectors(method, trio, tmp_path) -> None:
    expected, average = in_memory(method, trio), in_memory(METHODS["average"](), trio)
    for key, weight in fused(trio, tmp_path / "out", method).items():
        assert_close(weight, expected[key] if weight.ndim > 1 else average[key], atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", [DARE(sparsity=0.5), RandomPruning(scope="global")], ids=lambda one: one.name)
def test_random_drops_depend_on_the_seed_and_the_weights_alone(method, trio, tmp_path) -> None:
    one = fused(trio, tmp_path / "one", method)
    renamed = [shutil.copytree(folder, tmp_path / f"again_{Path(folder).name}") for folder in trio]
    other = fused([str(folder) for folder in renamed], tmp_path / "other", method)
    assert all(torch.equal(one[key], other[key]) for key in one)
    base = weights_in(Path(trio[2]))
    unmoved = sum(int((one[key] == base[key]).sum()) for key in one) / sum(weight.numel() for weight in one.values())
    assert unmoved == pytest.approx(method.sparsity**2, abs=0.02)


def test_the_average_is_a_model_in_the_shards_of_the_first(trio, tmp_path) -> None:
    a, b = (AutoModelForCausalLM.from_pretrained(folder) for folder in trio[:2])
    fused(trio, tmp_path / "out")
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for key, weight in result.state_dict().items():
        assert_close(weight, (a.state_dict()[key] + b.state_dict()[key]) / 2, atol=1e-7, rtol=0)
    names = {path.name for path in Path(trio[0]).iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"README.md", "merge.json"}
    for shard in Path(trio[0]).glob("*.safetensors"):
        assert load_file(tmp_path / "out" / shard.name).keys() == load_file(shard).keys()
    assert not list(tmp_path.glob(".*"))


def test_without_a_base_the_models_themselves_are_averaged(trio, tmp_path) -> None:
    Fusion(trio[:2], str(tmp_path / "soup"), weights=[0.25, 0.75]).run()
    a, b = (weights_in(Path(folder)) for folder in trio[:2])
    for key, weight in weights_in(tmp_path / "soup").items():
        assert_close(weight, 0.25 * a[key] + 0.75 * b[key], atol=3e-7, rtol=0)


def test_weights_multiply_changes(trio, tmp_path) -> None:
    result = fused(trio, tmp_path / "out", weights=[2.0, -1.0])
    a, b, c = (weights_in(Path(folder)) for folder in trio)
    for key, weight in result.items():
        assert_close(weight, c[key] + 2 * (a[key] - c[key]) - (b[key] - c[key]), atol=1e-6, rtol=0)


def test_the_first_model_s_dtype_is_kept_and_float32_is_what_is_counted_in(tmp_path) -> None:
    base = llama()
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    folders = [str(saved(trained(base, seed), tmp_path / str(dtype), dtype)) for seed, dtype in enumerate(dtypes)]
    result = fused(folders, tmp_path / "out")
    a, b = (weights_in(Path(folder)) for folder in folders[:2])
    for key, weight in result.items():
        assert weight.dtype == torch.bfloat16
        assert_close(weight, ((a[key].double() + b[key].double()) / 2).to(torch.bfloat16), atol=0, rtol=2**-7)
    assert 0 < record_of(tmp_path / "out")["findings"]["unchanged"] < 1


def test_models_in_float64_are_fused_to_the_precision_of_float32(tmp_path) -> None:
    base = llama()
    folders = [str(saved(trained(base, seed), tmp_path / str(seed), torch.float64)) for seed in range(3)]
    result = fused(folders, tmp_path / "out")
    a, b = (weights_in(Path(folder)) for folder in folders[:2])
    for key, weight in result.items():
        assert weight.dtype == torch.float64
        assert_close(weight, (a[key] + b[key]) / 2, atol=1e-7, rtol=0)


# ATAF


def test_ataf_aligns_matrices_of_blocks_and_leaves_the_rest(trio, tmp_path) -> None:
    result = fused(trio, tmp_path / "out", ATAF(alpha=0.3))
    a, b, c = (weights_in(Path(folder)) for folder in trio)
    for key, weight in result.items():
        if ".layers." in key and weight.ndim == 2:
            tau = [(one[key] - c[key]).double() for one in (a, b)]
            expected = c[key] + 0.7 * tau[0] + 0.3 * aligned(tau[1].float(), tau[0].float())
            assert_close(weight, expected.float(), atol=1e-6, rtol=0)
        else:
            assert torch.equal(weight, a[key])
    assert "model.norm.weight" in record_of(tmp_path / "out")["findings"]["kept"]["ataf leaves it"]


def test_ataf_at_alpha_0_is_the_first_model_byte_for_byte(trio, tmp_path) -> None:
    fused(trio, tmp_path / "out", ATAF(alpha=0))
    for shard in Path(trio[0]).glob("*.safetensors"):
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()


def test_ataf_of_equal_models_is_that_model(trio, tmp_path) -> None:
    same = str(shutil.copytree(trio[0], tmp_path / "same"))
    result = fused([trio[0], same, trio[2]], tmp_path / "out", ATAF(alpha=0.7))
    for key, weight in weights_in(Path(trio[0])).items():
        assert_close(result[key], weight, atol=1e-6, rtol=0)


# Models that differ


def test_a_base_that_calls_its_weights_otherwise_is_understood(trio, tmp_path) -> None:
    bare = LlamaModel.from_pretrained(trio[2])
    folder = saved(bare, tmp_path / "bare")
    result = fused([*trio[:2], str(folder)], tmp_path / "out", TaskArithmetic())
    expected = fused(trio, tmp_path / "expected", TaskArithmetic())
    a = weights_in(Path(trio[0]))
    assert all(torch.equal(result[key], expected[key]) for key in result if key != "lm_head.weight")
    assert torch.equal(result["lm_head.weight"], a["lm_head.weight"])
    findings = record_of(tmp_path / "out")["findings"]
    assert findings["kept"] == {"not in bare": ["lm_head.weight"]}
    assert findings["renamed"]["bare"]["model.norm.weight"] == "norm.weight"


def test_extra_vocabulary_stays_as_the_first_model_has_it_and_is_listed(trio, tmp_path) -> None:
    larger = AutoModelForCausalLM.from_pretrained(trio[0])
    larger.resize_token_embeddings(44, mean_resizing=False)
    folder = saved(larger, tmp_path / "larger")
    result = fused([str(folder), *trio[1:]], tmp_path / "out")
    a = weights_in(folder)
    assert torch.equal(result["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert not torch.equal(result["model.norm.weight"], a["model.norm.weight"])
    kept = record_of(tmp_path / "out")["findings"]["kept"]
    assert kept == {"of shape (40, 32) in b": ["lm_head.weight", "model.embed_tokens.weight"]}


def test_a_tied_head_is_the_embedding(trio, tmp_path) -> None:
    tied = saved(trained(llama(tie_word_embeddings=True), 3), tmp_path / "tied")
    assert "lm_head.weight" not in weights_in(tied)
    head = fused([trio[0], str(tied), trio[2]], tmp_path / "out")["lm_head.weight"]
    own = weights_in(Path(trio[0]))["lm_head.weight"]
    assert_close(head, (own + weights_in(tied)["model.embed_tokens.weight"]) / 2, atol=1e-6, rtol=0)
    fused([str(tied), *trio[1:]], tmp_path / "other")
    assert record_of(tmp_path / "other")["findings"]["unused"]["b"] == ["lm_head.weight"]


def test_integers_are_copied(tmp_path) -> None:
    folders = []
    for seed in range(3):
        (tmp_path / str(seed)).mkdir()
        tensors = {"h.0.weight": torch.randn(3, 2), "positions": torch.arange(seed, seed + 4), "scale": torch.rand(())}
        save_file(tensors, tmp_path / str(seed) / "model.safetensors")
        folders.append(str(tmp_path / str(seed)))
    result = fused(folders, tmp_path / "out")
    assert torch.equal(result["positions"], torch.arange(4))
    kept = record_of(tmp_path / "out")["findings"]["kept"]
    assert kept == {"not of floating point numbers in 0": ["positions"]}


# What is refused


@pytest.mark.parametrize("method", ["sap", "ataf"])
def test_a_method_that_looks_at_data_and_gets_none_says_so_before_a_weight_is_read(method) -> None:
    with pytest.raises(
        InputError, match=rf"^fuse.method {method} looks at data: give --fuse.texts for language models"
    ):
        Fusion(["nowhere", "there"], "out", "base", method)


@pytest.mark.parametrize(
    "setting",
    [{"space": "singular"}, {"rescale_scope": "global"}, {"loss": "contrastive"}],
    ids=lambda one: next(iter(one)),
)
def test_settings_of_sap_that_whole_models_have_not_are_refused(setting) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(InputError, match=rf"^fuse.method.{name} {value}: sap looks at whole models with \w+ alone"):
        Fusion(["nowhere", "there"], "out", "base", WholeSAP(**setting), texts="texts.txt")


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("fisher", "anchors"), ("regmean", "anchors"), ("fedavg", "factors A and B"),
        ("robustmerge", "factors"), ("ata", "say of their training"), ("at_reach", "say of their training"),
        ("krum", "all layers at once"), ("pcb", "all layers at once"), ("lines", "all layers at once"),
        (SAP(), "ask for it by its name"),
        ("random", "no such method"), (Magnitude(space="factor"), "factors"),
    ],
)  # fmt: skip
def test_methods_that_need_more_than_weights_say_so_before_one_is_read(method, why) -> None:
    with pytest.raises(InputError, match=rf"^fuse.method .*{why}"):
        Fusion(["nowhere", "there"], "out", "base", method)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ties"}, "fuse.base is not set: ties"),
        ({"models": ["a"], "method": ATAF(alpha=0.5)}, "ataf needs at least 2"),
        ({"models": ["a", "a"]}, "a is given twice"),
        ({"output": "."}, "fuse.output '.': is no name of a new folder"),
        ({"weights": [1.0]}, r"fuse.weights \[1.0\]: 1 for 2 models"),
        ({"weights": [0.0, 0.0]}, "fuse.weights .*not all of them 0"),
        ({"weights": [1e300, 1e300]}, "fuse.weights .*must be finite numbers up to 1e\\+30"),
        ({"weights": [2.0, 1.0]}, "fuse.base is not set"),
        ({"weights": [0.5, 0.5], "method": "median", "base": "c"}, "clients count alike in median"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options, message) -> None:
    with pytest.raises(InputError, match=message):
        Fusion(**{"models": ["a", "b"], "output": "out", **options})


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (SafeM, {"a": torch.nan}, "fuse.method.a must be at least 0, got nan"),
        (SafeM, {"a": -10}, "fuse.method.a must be at least 0, got -10"),
        (WholeStatsMerging, {"seed": 10**23}, "method.seed: 1.* lies outside"),
        (ATAF, {"alpha": 0.5, "steps": 5}, "method.steps 5: ataf ignores it where alpha is given; leave one out"),
        (AdaMMS, {"alpha": 0.5, "smooth": 1}, "fuse.method.smooth 1: adamms ignores it where alpha is given"),
    ],
)
def test_settings_of_methods_that_are_none_or_ignored_are_refused(method, settings, message) -> None:
    with pytest.raises(InputError, match=message):
        method(**settings)


def test_ataf_has_to_have_others_to_mix_in(trio, tmp_path) -> None:
    with pytest.raises(
        InputError, match=r"weights \[1.0, 0.0\]: ataf mixes the others into number 1, and they weigh 0"
    ):
        fused(trio, tmp_path / "out", ATAF(alpha=0.5), weights=[1.0, 0.0])


def test_a_model_is_given_once_however_it_is_called(trio, tmp_path) -> None:
    (tmp_path / "link").symlink_to(trio[0])
    for again in (str(tmp_path / "link"), f"{trio[1]}/../a"):
        with pytest.raises(InputError, match=f"^fuse.models: {again} is given twice; give each model once"):
            fused([trio[0], again, trio[2]], tmp_path / "out")


def test_a_pickle_is_never_read(trio, tmp_path) -> None:
    (tmp_path / "old").mkdir()
    torch.save(nn.Linear(1, 1).state_dict(), tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model.bin is a pickle, never read; save the model as safetensors"):
        fused([trio[0], str(tmp_path / "old"), trio[2]], tmp_path / "out")


def test_faulty_folders_are_refused_with_the_file(trio, tmp_path) -> None:
    def refused(folder: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            fused([trio[0], folder, trio[2]], tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused(str(tmp_path / "nowhere"), "no such folder; expected a model as save_pretrained writes it")
    broken = Path(shutil.copytree(trio[1], tmp_path / "broken"))
    shard = sorted(broken.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(str(broken), f"{shard.name}: not safetensors")
    shard.unlink()
    refused(str(broken), f"{shard.name}: no such file; put it there")
    (broken / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
    refused(str(broken), "weight_map does not name safetensors files of this folder")
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    save_file({"x": torch.ones(2)}, stranger / "model.safetensors")
    refused(str(stranger), "has none of the weights of .*; fuse models of one architecture")
    whole = tmp_path / "whole"
    whole.mkdir()
    save_file({key: tensor.int() for key, tensor in weights_in(Path(trio[1])).items()}, whole / "model.safetensors")
    refused(
        str(whole), r"a: none of its weights can be fused; the first, .*, is not of floating point numbers in whole"
    )


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("method", ["average", "iso_c", "tsv_m", "dc_merge", "sce", "breadcrumbs", "magnitude", "cart"])
def test_an_input_that_is_not_finite_is_refused_with_its_file(number, method, trio, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fuser, "BLOCK", 100)
    broken = AutoModelForCausalLM.from_pretrained(trio[1])
    broken.model.layers[1].mlp.up_proj.weight.data[-1, -1] = number
    folder = saved(broken, tmp_path / "broken")
    message = r"broken/model-0000\d-of-0000\d.safetensors: 'model.layers.1.mlp.up_proj.weight' has numbers that are not"
    for index in (1, 2):
        folders = [*trio[:index], str(folder), *trio[index + 1 :]]
        with pytest.raises(InputError, match=message):
            fused(folders, tmp_path / "out", method)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["sap", "ataf", "safe_m", "fam", "adamms", "stats_merging"])
def test_a_model_that_is_not_finite_is_not_shown_anything(method, speaking, texts, tmp_path) -> None:
    broken = AutoModelForCausalLM.from_pretrained(speaking[1])
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    folders, base = [speaking[0], str(saved(broken, tmp_path / "broken"))], speaking[2]
    fusion = Fusion(folders, str(tmp_path / "out"), None if method in ("fam", "adamms") else base, method, texts=texts)
    with pytest.raises(
        InputError, match=r"broken.*: '?model.layers.0.mlp.up_proj.weight'? has numbers that are not fi"
    ):
        fusion.run()


def test_a_result_that_is_not_finite_is_refused_and_nothing_is_left(trio, tmp_path) -> None:
    halves = [
        str(saved(AutoModelForCausalLM.from_pretrained(folder), tmp_path / Path(folder).name, torch.float16))
        for folder in trio
    ]
    with pytest.raises(InputError, match=r"what average makes of it is not finite in torch.float16; check the models"):
        fused(halves, tmp_path / "out", weights=[1e8, 1.0])
    assert not (tmp_path / "out").exists()


def test_an_output_that_stands_is_not_overwritten(trio, tmp_path) -> None:
    fused(trio, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(InputError, match="already exists and is not overwritten"):
        fused(trio, tmp_path / "out", "median")
    assert contents(tmp_path / "out") == before


# The command


def test_the_command_fuses(trio, tmp_path, capsys) -> None:
    *models, base = trio
    line = [f"--fuse.models=[{','.join(models)}]", f"--fuse.base={base}", f"--fuse.output={tmp_path / 'out'}"]
    commands.fuse([*line, "--fuse.method=ties", "--fuse.method.sparsity=0.5"])
    assert "Fused 2 models by ties" in capsys.readouterr().out
    expected = fused(trio, tmp_path / "expected", TIES(sparsity=0.5))
    assert all(torch.equal(weight, expected[key]) for key, weight in weights_in(tmp_path / "out").items())


def test_a_faulty_setting_is_called_as_the_command_calls_it(trio, tmp_path) -> None:
    line = [f"--fuse.models=[{','.join(trio[:2])}]", f"--fuse.base={trio[2]}", f"--fuse.output={tmp_path / 'out'}"]
    with pytest.raises(InputError, match=r"^fuse.method.sparsity must lie in \[0, 1\], got 2"):
        commands.fuse([*line, "--fuse.method=ties", "--fuse.method.sparsity=2"])


# Interruptions


def test_a_killed_fusion_continues_to_the_same_bytes(trio, tmp_path) -> None:
    *models, base = trio
    play = Fusion(models, str(tmp_path / "out"), base, TIES()).run
    events = killed(tmp_path, play)
    whole = contents(tmp_path / "out")
    for event in (2, events // 2, events - 8, events):
        shutil.rmtree(tmp_path / "out")
        killed(tmp_path, play, event)
        killed(tmp_path, play)
        assert contents(tmp_path / "out") == whole, event
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_finished_shards_are_kept_and_damaged_ones_are_not(trio, tmp_path, monkeypatch) -> None:
    *models, base = trio
    play = Fusion(models, str(tmp_path / "out"), base, TIES()).run
    play()
    whole = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    events = killed(tmp_path, play) - 12
    shutil.rmtree(tmp_path / "out")
    killed(tmp_path, play, events)
    shards = sorted((tmp_path / ".out.fusing" / "model").glob("*.safetensors"))
    shards[0].write_bytes(b"damaged")
    times = [shard.stat().st_mtime_ns for shard in shards]
    play()
    assert contents(tmp_path / "out") == whole
    after = [(tmp_path / "out" / shard.name).stat().st_mtime_ns for shard in shards]
    assert after[0] != times[0] and after[1:] == times[1:] and len(shards) > 2


def test_another_fusion_starts_anew(trio, tmp_path) -> None:
    *models, base = trio
    play = Fusion(models, str(tmp_path / "out"), base).run
    killed(tmp_path, play, 20)
    other = fused(trio, tmp_path / "out", "median")
    expected = fused(trio, tmp_path / "expected", "median")
    assert all(torch.equal(weight, expected[key]) for key, weight in other.items())
