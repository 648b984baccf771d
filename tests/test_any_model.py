"""LoRA adapters of models other than CLIP, made by PEFT, merged by the command and loaded by PEFT again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
)

from sap_lightning import commands
from sap_lightning.errors import InputError

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: BertModel(BertConfig(**SIZES, vocab_size=40)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=40, n_positions=16)),
    "vit": lambda: ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=40)),
}
CLIENTS: dict[str, list[dict[str, Any]]] = {
    "bert": [
        {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]},
        {"r": 3, "lora_alpha": 5, "target_modules": ["query", "intermediate.dense"], "use_rslora": True},
        {
            "r": 2,
            "lora_alpha": 8,
            "target_modules": ["query", "key"],
            "rank_pattern": {"layer.0.attention.self.query": 4},
            "alpha_pattern": {"key": 3},
        },
    ],
    "gpt2": [
        {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        {"r": 4, "lora_alpha": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ],
    "vit": [
        {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
        {"r": 1, "lora_alpha": 16, "target_modules": "all-linear", "init_lora_weights": "gaussian"},
    ],
    "llama": [
        {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"},
        {"r": 5, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
    ],
}


@pytest.fixture(scope="module", params=MODELS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(kind, tmp_path_factory) -> Path:
    return saved_base(kind, tmp_path_factory.mktemp(kind) / "base")


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return saved_base("bert", tmp_path_factory.mktemp("plain_bert") / "base")


@pytest.fixture(scope="module")
def uploads(kind, base, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp(f"{kind}_uploads")
    return [upload(kind, base, folder / str(seed), seed, **client) for seed, client in enumerate(CLIENTS[kind])]


def saved_base(kind: str, folder: Path) -> Path:
    torch.manual_seed(0)
    MODELS[kind]().save_pretrained(folder)
    return folder


def fresh(kind: str, base: Path) -> nn.Module:
    return type(MODELS[kind]()).from_pretrained(base)


def upload(kind: str, base: Path, folder: Path, seed: int, **config: Any) -> Path:
    model = get_peft_model(fresh(kind, base), LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def merge(base: Path, output: Path, uploads: Sequence[Path], *options: str) -> None:
    commands.merge([f"--model.base={base}", f"--merge.output={output}", *options, "--uploads", *map(str, uploads)])


def change(kind: str, base: Path, adapter: Path) -> dict[str, Tensor]:
    """What PEFT, having merged an adapter into the base, made of the base's weights, in float64."""
    before = fresh(kind, base).double()
    after = PeftModel.from_pretrained(fresh(kind, base).double(), adapter).double().merge_and_unload().state_dict()
    moved = {name: after[name] - weight for name, weight in before.state_dict().items()}
    return {name: delta for name, delta in moved.items() if delta.any()}


def mean(changes: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = {name for one in changes for name in one}
    return {name: sum(one[name] for one in changes if name in one) / len(changes) for name in names}


def relative_gap(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert actual.keys() == expected.keys()
    gaps = sum(float((actual[name] - expected[name]).square().sum()) for name in expected)
    return (gaps / sum(float(delta.square().sum()) for delta in expected.values())) ** 0.5


def test_peft_loads_the_average_as_the_dense_mean_of_the_clients(kind, base, uploads, tmp_path):
    merge(base, tmp_path / "out", uploads, "--merge.method", "average")
    expected = mean([change(kind, base, one) for one in uploads])
    assert relative_gap(change(kind, base, tmp_path / "out"), expected) < 1e-6
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["relative_error"] < 1e-6


def test_a_dense_merge_is_written_exactly_at_the_rank_that_takes(kind, base, uploads, tmp_path):
    merge(base, tmp_path / "out", uploads, "--merge.method", "ties", "--merge.method.sparsity", "0.5")
    assert relative_gap(change(kind, base, tmp_path / "out"), ties(kind, base, uploads)) < 1e-5


def test_a_dense_merge_of_a_given_rank_is_off_by_the_error_it_states(kind, base, uploads, tmp_path):
    options = ["--merge.method", "ties", "--merge.method.sparsity", "0.5", "--merge.rank", "4"]
    merge(base, tmp_path / "out", uploads, *options)
    loaded = change(kind, base, tmp_path / "out")
    stated = json.loads((tmp_path / "out" / "merge.json").read_text())["relative_error"]
    assert relative_gap(loaded, ties(kind, base, uploads)) == pytest.approx(stated, abs=1e-5)
    assert stated > 0.01


def test_adapters_of_another_base_are_refused_by_a_layer_s_name(bert, tmp_path):
    gpt2 = saved_base("gpt2", tmp_path / "gpt2")
    one = upload("gpt2", gpt2, tmp_path / "one", 0, r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(
        InputError, match=r"'one': the base has no layer transformer\.h\.0\.attn\.c_attn.*--model\.base"
    ):
        merge(bert, tmp_path / "out", [one], "--merge.method", "average")


def test_adapters_of_a_wider_base_are_refused_by_shape(bert, tmp_path):
    wide = tmp_path / "wide"
    BertModel(BertConfig(**SIZES | {"hidden_size": 64}, vocab_size=40)).save_pretrained(wide)
    one = upload("bert", wide, tmp_path / "one", 0, r=2, target_modules=["query"])
    with pytest.raises(InputError, match=r"'one': .*query is for .* \(64, 64\), the base has \(32, 32\)"):
        merge(bert, tmp_path / "out", [one], "--merge.method", "average")


def test_one_layer_under_two_names_is_refused(bert, tmp_path):
    one = upload("bert", bert, tmp_path / "one", 0, r=2, target_modules=["query"])
    other = upload("bert", bert, tmp_path / "other", 1, r=2, target_modules=["query"])
    weights = load_file(other / "adapter_model.safetensors")
    renamed = {key.replace("model.encoder", "model.bert.encoder"): tensor for key, tensor in weights.items()}
    save_file(renamed, other / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"call one layer encoder\.layer\.0.* and bert\.encoder\.layer\.0"):
        merge(bert, tmp_path / "out", [one, other], "--merge.method", "average")


def ties(kind: str, base: Path, uploads: Sequence[Path]) -> dict[str, Tensor]:
    """TIES at half sparsity over whole adapters, in float64."""
    clients = [change(kind, base, one) for one in uploads]
    for client in clients:
        # The clients are compared by ΔW of shape (d_out, d_in), which GPT2 stores transposed: no matter to a threshold.
        sizes = torch.cat([delta.abs().flatten() for delta in client.values()]).sort().values
        threshold = sizes[round(0.5 * len(sizes))]
        for delta in client.values():
            delta[delta.abs() < threshold] = 0
    merged = {}
    for name in {name for client in clients for name in client}:
        stacked = torch.stack([client[name] for client in clients if name in client])
        agree = stacked.sign() == torch.where(stacked.sum(0) >= 0, 1, -1)
        merged[name] = (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)
    return merged


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-6), (torch.float16, 1e-6)])
def test_half_precision_files_are_merged_in_float32(bert, tmp_path, dtype, tolerance):
    uploads = [upload("bert", bert, tmp_path / str(i), i, r=2, target_modules=["query"]) for i in range(2)]
    for one in uploads:
        file = one / "adapter_model.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    merge(bert, tmp_path / "out", uploads, "--merge.method=average")
    expected = mean([change("bert", bert, one) for one in uploads])
    assert relative_gap(change("bert", bert, tmp_path / "out"), expected) < tolerance
    assert {t.dtype for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {torch.float32}


def test_what_the_clients_say_of_the_model_stays_and_nothing_of_clip_is_said(tmp_path):
    base = saved_base("llama", tmp_path / "base")
    options = {"r": 2, "target_modules": ["q_proj"]}
    a, b = (upload("llama", base, tmp_path / n, s, **options, task_type="CAUSAL_LM") for s, n in enumerate("ab"))
    c = upload("llama", base, tmp_path / "c", 2, **options)
    merge(base, tmp_path / "same", [a, b], "--merge.method=average")
    merge(base, tmp_path / "mixed", [a, c], "--merge.method=average")
    same, mixed = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("same", "mixed"))
    assert same["task_type"] == "CAUSAL_LM"
    assert mixed["task_type"] is None
    assert "CLIP" not in json.dumps([same, mixed])


def test_a_rank_recompresses_and_states_the_error(bert, tmp_path):
    uploads = [upload("bert", bert, tmp_path / str(i), i, r=3, target_modules=["query"]) for i in range(2)]
    merge(bert, tmp_path / "out", uploads, "--merge.method=average", "--merge.rank=2")
    expected = mean([change("bert", bert, one) for one in uploads])
    stated = json.loads((tmp_path / "out" / "merge.json").read_text())["relative_error"]
    assert relative_gap(change("bert", bert, tmp_path / "out"), expected) == pytest.approx(stated, rel=1e-4)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["pooler"]}, "modules_to_save"),
        ({"target_modules": ["word_embeddings"]}, "lora_embedding_A"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(bert, tmp_path, config, named):
    faulty = upload("bert", bert, tmp_path / "faulty", 0, **{"r": 2, "target_modules": ["query"]} | config)
    with pytest.raises(InputError, match=named) as error:
        merge(bert, tmp_path / "out", [faulty], "--merge.method=average")
    assert_one_line(error)
    assert not (tmp_path / "out").exists()


def test_heads_that_were_trained_whole_are_left_out_when_asked(bert, tmp_path):
    """A classifier's adapter, to which PEFT adds its head by itself; an older file has the head's tensors alone."""
    uploads = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = get_peft_model(
            BertForSequenceClassification.from_pretrained(bert),
            LoraConfig(r=2, lora_alpha=4, target_modules=["query"], task_type="SEQ_CLS"),
        )
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data = 0.2 * torch.randn(weight.shape)
        model.save_pretrained(tmp_path / str(seed))
        uploads.append(tmp_path / str(seed))
    with pytest.raises(
        InputError, match=r"modules_to_save is \['classifier', 'score'\].*--merge\.drop_heads true"
    ) as error:
        merge(bert, tmp_path / "out", uploads, "--merge.method=average")
    assert_one_line(error)
    older = json.loads((uploads[1] / "adapter_config.json").read_text()) | {"modules_to_save": None}
    (uploads[1] / "adapter_config.json").write_text(json.dumps(older))
    with pytest.raises(InputError, match=r"'classifier' was trained whole.*--merge\.drop_heads true"):
        merge(bert, tmp_path / "out", uploads[1:], "--merge.method=average")
    merge(bert, tmp_path / "out", uploads, "--merge.method=average", "--merge.drop_heads=true")
    merged = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(".attention.self.query.lora_" in key for key in merged)
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert [source["dropped"] for source in record["sources"]] == [["classifier"]] * 2
    expected = {}
    for path in uploads:
        for key, A in load_file(path / "adapter_model.safetensors").items():
            if key.endswith("lora_A.weight"):
                B = load_file(path / "adapter_model.safetensors")[key.replace("lora_A", "lora_B")]
                expected[key] = expected.get(key, 0) + B.double() @ A.double()  # s = 2, and the mean of two
    for key, delta in expected.items():
        found = merged[key.replace("lora_A", "lora_B")].double() @ merged[key].double()
        assert torch.allclose(scale_of(tmp_path / "out", merged[key].shape[0]) * found, delta, rtol=1e-5, atol=1e-6)


def scale_of(adapter: Path, rank: int) -> float:
    config = json.loads((adapter / "adapter_config.json").read_text())
    return config["lora_alpha"] / rank


def test_a_copy_of_the_base_s_weight_is_left_out_if_it_is_one(tmp_path):
    """PEFT saves the unchanged head beside its factors."""
    base = saved_base("llama", tmp_path / "base")
    uploads = [
        upload("llama", base, tmp_path / str(seed), seed, r=2, target_modules=["q_proj", "lm_head"])
        for seed in range(2)
    ]
    tensors = load_file(uploads[0] / "adapter_model.safetensors")
    copy = "base_model.model.lm_head.base_layer.weight"
    assert copy in tensors
    merge(base, tmp_path / "out", uploads, "--merge.method=average")
    merged = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert copy not in merged and "base_model.model.lm_head.lora_A.weight" in merged
    save_file(tensors | {copy: tensors[copy] + 1e-3}, uploads[0] / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"lm_head\.base_layer\.weight' is not the base's own weight") as error:
        merge(base, tmp_path / "again", uploads, "--merge.method=average")
    assert_one_line(error)
    save_file(tensors | {copy: tensors[copy].long()}, uploads[0] / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"lm_head\.base_layer\.weight has dtype I64, expected one of") as error:
        merge(base, tmp_path / "again", uploads, "--merge.method=average")
    assert_one_line(error)


def test_names_of_another_version_of_transformers_are_called_that(tmp_path):
    base = saved_base("llama", tmp_path / "base")
    one = upload("llama", base, tmp_path / "one", 0, r=2, target_modules=["q_proj"])
    tensors = load_file(one / "adapter_model.safetensors")
    renamed = {key.replace(".model.layers.", ".decoder.blocks."): tensor for key, tensor in tensors.items()}
    save_file(renamed, one / "adapter_model.safetensors")
    with pytest.raises(
        InputError, match=r"it has layers\.0\.self_attn\.q_proj, as another version of transformers"
    ) as error:
        merge(base, tmp_path / "out", [one], "--merge.method=average")
    assert_one_line(error)


def test_each_adapter_can_have_its_own_weight_in_the_order_of_the_uploads(bert, tmp_path):
    uploads = [upload("bert", bert, tmp_path / str(i), i, r=2, target_modules=["query"]) for i in range(2)]
    one, other = (change("bert", bert, path) for path in uploads)
    for weights, order in (([0.7, 0.3], [0, 1]), ([0.3, 0.7], [1, 0]), ([0.7, 0.3], [1, 0]), ([1.5, -0.5], [0, 1])):
        output = tmp_path / f"{weights} {order}"
        given = [uploads[k] for k in order]
        merge(bert, output, given, "--merge.method=average", f"--merge.weights={weights}")
        first, second = ((one, other)[k] for k in order)
        expected = {name: weights[0] * first[name] + weights[1] * second[name] for name in first}
        assert relative_gap(change("bert", bert, output), expected) < 1e-5


@pytest.mark.parametrize(
    ("weights", "method", "message"),
    [
        ("[0.7]", "average", "1 numbers for 2 uploads"),
        ("[0,0]", "average", "not all of them 0"),
        ("[.nan,1]", "average", "must be finite"),
        ("[1.5,-0.5]", "ties", "ties takes none below 0; average and task_arithmetic do"),
        ("[0.7,0.3]", "median", "clients count alike in median"),
    ],
)
def test_weights_that_cannot_be_are_refused(bert, tmp_path, weights, method, message):
    uploads = [upload("bert", bert, tmp_path / str(i), i, r=2, target_modules=["query"]) for i in range(2)]
    with pytest.raises(InputError, match=message) as error:
        merge(bert, tmp_path / "out", uploads, f"--merge.method={method}", f"--merge.weights={weights}")
    assert_one_line(error)
    assert not (tmp_path / "out").exists()


def test_adapters_that_name_different_bases_are_merged_with_a_warning_that_is_recorded(bert, tmp_path, caplog):
    uploads = [upload("bert", bert, tmp_path / str(i), i, r=2, target_modules=["query"]) for i in range(2)]
    for path, name in zip(uploads, ("org/one", "/home/me/secret/two"), strict=True):
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
    merge(bert, tmp_path / "out", uploads, "--merge.method=average")
    record = (tmp_path / "out" / "merge.json").read_text()
    assert sorted(source["base"] for source in json.loads(record)["sources"]) == ["org/one", "two"]
    (doubt,) = json.loads(record)["doubts"]
    assert "different bases: '0' on org/one, '1' on two" in doubt and doubt in caplog.text
    assert "secret" not in record


def test_a_merge_of_one_adapter_says_so(bert, tmp_path, capsys):
    one = upload("bert", bert, tmp_path / "alone", 0, r=2, target_modules=["query"])
    merge(bert, tmp_path / "out", [one], "--merge.method=average")
    assert "One upload only: what was written is alone, as average changes it" in capsys.readouterr().out


def test_lora_on_a_convolution_is_refused_by_name(tmp_path):
    base = saved_base("vit", tmp_path / "base")
    faulty = upload("vit", base, tmp_path / "faulty", 0, r=2, target_modules=["projection"])
    with pytest.raises(InputError, match=r"projection\.lora_A.*only linear layers") as error:
        merge(base, tmp_path / "out", [faulty], "--merge.method=average")
    assert_one_line(error)


def test_adapters_of_models_of_different_shapes_are_refused_naming_both(bert, tmp_path):
    torch.manual_seed(0)
    wider = BertModel(BertConfig(**SIZES | {"hidden_size": 64}, vocab_size=40))
    wider.save_pretrained(tmp_path / "wider")
    one = upload("bert", bert, tmp_path / "narrow client", 0, r=2, target_modules=["query"])
    other = upload("bert", tmp_path / "wider", tmp_path / "wide client", 1, r=2, target_modules=["query"])
    with pytest.raises(InputError, match=r"wide client.*64, 64.*narrow client.*32, 32") as error:
        merge(bert, tmp_path / "out", [one, other], "--merge.method=average")
    assert_one_line(error)


@pytest.mark.parametrize("options", [[], ["--merge.method=fisher"], ["--merge.method=sap_auto"]])
def test_a_method_that_looks_at_anchors_says_what_to_use_instead(bert, tmp_path, options):
    one = upload("bert", bert, tmp_path / "a", 0, r=2, target_modules=["query"])
    with pytest.raises(InputError, match=r"anchors.*bert.*--merge\.method average") as error:
        merge(bert, tmp_path / "out", [one], *options)
    assert_one_line(error)
    assert not (tmp_path / "out").exists()


def test_a_full_model_of_another_base_than_clip_is_refused(bert, tmp_path):
    one = upload("bert", bert, tmp_path / "a", 0, r=2, target_modules=["query"])
    with pytest.raises(InputError, match=r"merge\.format model.*bert") as error:
        merge(bert, tmp_path / "out", [one], "--merge.method=average", "--merge.format=model")
    assert_one_line(error)
    assert not (tmp_path / "out").exists()


def assert_one_line(error: pytest.ExceptionInfo[InputError]) -> None:
    assert "\n" not in str(error.value)
