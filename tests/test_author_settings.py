"""SAP as its authors run it, against a dense script: PEFT on both towers of a CLIPModel, autograd on A and B."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from places import REPOSITORY, SHAPES_CLIP
from references import quiet_trainer, randn
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from sap_lightning.commands import COMMANDS
from sap_lightning.data.anchors import AnchorDataModule
from sap_lightning.merging import SAP
from sap_lightning.modules.merge import MergeModule
from sap_lightning.results import Results

ANCHORS, BATCH, RANK, ALPHA, CAP = 7, 4, 4, 8, 10.0
PROMPTS = ["A photo of a dog.", "A photo of an elephant in the snow."]
Factors = dict[str, Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny CLIPModel with random weights, and the built-in tokenizer and image processor."""
    folder = tmp_path_factory.mktemp("tiny") / "clip"
    shutil.copytree(SHAPES_CLIP, folder)
    config = CLIPConfig.from_pretrained(SHAPES_CLIP)
    for tower in (config.text_config, config.vision_config):
        tower.hidden_size, tower.intermediate_size, tower.num_hidden_layers, tower.num_attention_heads = 32, 64, 2, 2
    config.projection_dim = config.text_config.projection_dim = config.vision_config.projection_dim = 16
    clip = CLIPModel(config)
    with torch.no_grad():
        for index, (name, weight) in enumerate(clip.named_parameters()):
            # Large enough for attention to look somewhere, which CLIP's own initialisation is not.
            if name != "logit_scale":
                weight.copy_(0.2 * randn(100 + index, *weight.shape) + (1 if weight.ndim == 1 else 0))
    clip.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def uploads(base, tmp_path_factory) -> list[Path]:
    """Three clients with LoRA on q, k and v of both towers, as PEFT saves them."""
    folders = []
    for client in range(3):
        model = get_peft_model(plain(base), lora_config())
        with torch.no_grad():
            for index, (name, weight) in enumerate(model.named_parameters()):
                if "lora_" in name:
                    weight.copy_(0.2 * randn(1000 * (client + 1) + index, *weight.shape))
        folders.append(tmp_path_factory.mktemp("uploads") / f"client {client}")
        model.save_pretrained(folders[-1])
    return folders


@pytest.fixture(scope="module")
def anchors(base, world) -> AnchorDataModule:
    return AnchorDataModule(str(world / "anchors"), ANCHORS, str(base), batch_size=BATCH, cache=False)


def lora_config() -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "k_proj", "v_proj"])


def plain(base: Path) -> CLIPModel:
    return CLIPModel.from_pretrained(base).eval()


def dense_clients(base: Path, uploads: Sequence[Path], anchors: AnchorDataModule) -> list[tuple[Factors, Factors]]:
    """A and B of every client, and their gradients summed over the batches, in float64."""
    tokenizer, pixels, captions = AutoTokenizer.from_pretrained(base), anchors.images().double(), anchors.captions
    clients = []
    for upload in uploads:
        model = PeftModel.from_pretrained(plain(base), upload, is_trainable=True).double().eval()
        for start in range(0, ANCHORS, BATCH):
            texts = tokenizer(captions[start : start + BATCH], padding=True, return_tensors="pt")
            out = model(**texts, pixel_values=pixels[start : start + BATCH])
            own = torch.arange(len(out.logits_per_image))
            loss = cross_entropy(out.logits_per_image, own) + cross_entropy(out.logits_per_text, own)
            (loss / 2).backward()
        lora = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
        clients.append(({n: w.detach() for n, w in lora.items()}, {n: w.grad for n, w in lora.items()}))
    return clients


def dense_merge(clients: Sequence[tuple[Factors, Factors]], sparsity: float, rescale: bool) -> Factors:
    """Every tensor without its lowest |θ·∂L/∂θ|, perhaps made as long again as before, and the mean of the clients."""
    merged: Factors = {}
    for name in clients[0][0]:
        pruned = []
        for weights, gradients in clients:
            score = (weights[name] * gradients[name]).abs()
            drop = round(sparsity * score.numel())
            keep = score > score.flatten().kthvalue(drop).values if drop else torch.ones_like(score)
            left = weights[name] * keep
            factor = min(float(weights[name].abs().sum() / left.abs().sum()), CAP) if rescale else 1.0
            pruned.append(factor * left)
        merged[name] = sum(pruned) / len(pruned)
    return merged


@pytest.fixture(scope="module")
def clients(base, uploads, anchors) -> list[tuple[Factors, Factors]]:
    return dense_clients(base, uploads, anchors)


@pytest.mark.parametrize("rescale", [False, True], ids=["as pruned", "l1 up to a cap"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_the_merge_is_that_of_the_dense_script(base, uploads, anchors, clients, sparsity, rescale, tmp_path):
    settings = {"rescale": "l1", "rescale_scope": "tensor", "rescale_cap": CAP} if rescale else {"rescale": "none"}
    sap = SAP(
        sparsity,
        "factor",
        "tensor",
        "mean_then_abs",
        mean_of="factors",
        loss="contrastive_symmetric",
        **settings,
    )
    module = MergeModule(str(base), method=sap)
    module.use(module.read_uploads(uploads))
    quiet_trainer().validate(module, anchors, verbose=False)
    expected = dense_merge(clients, sparsity, rescale)
    assert len(expected) == 24 and sum("text_model" in name for name in expected) == 12
    scale = (ALPHA / RANK) ** 0.5
    for name, wanted in expected.items():
        layer, factor = name.removeprefix("base_model.model.").split(".lora_")
        ours = getattr(module.merged.update[layer], factor[0]).double() / scale
        torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)
    assert_same_features(base, module, expected, anchors, tmp_path)


@torch.no_grad()
def assert_same_features(base: Path, module: MergeModule, factors: Factors, anchors: AnchorDataModule, folder: Path):
    """What is measured, and what is written, is PEFT's CLIPModel with these factors."""
    model = get_peft_model(plain(base), lora_config())
    model.load_state_dict({name: weight.float() for name, weight in factors.items()}, strict=False)
    written = PeftModel.from_pretrained(plain(base), module.merged.save(folder / "adapter"))
    whole = plain(module.merged.save(folder / "model", format="model"))
    tokens = AutoTokenizer.from_pretrained(base)(PROMPTS, padding=True, return_tensors="pt")
    images, texts = module.image_features(anchors.images()), module.texts(PROMPTS)
    for other in (model, written.eval(), whole):
        of_images = normalize(other.get_image_features(pixel_values=anchors.images()).pooler_output, dim=-1)
        of_texts = normalize(other.get_text_features(**tokens).pooler_output, dim=-1)
        torch.testing.assert_close(images, of_images, atol=1e-5, rtol=0)
        torch.testing.assert_close(texts, of_texts, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def office_home(tmp_path_factory) -> Path:
    """Three classes in four domains, four images each: noise around a colour of the class."""
    root, generator = tmp_path_factory.mktemp("office") / "home", np.random.default_rng(0)
    for domain in ("Art", "Clipart", "Product", "Real World"):
        for colour, label in enumerate(("Alarm_Clock", "Backpack", "Bike")):
            folder = root / domain / label
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = generator.integers(0, 120, (64, 64, 3), dtype=np.uint8)
                pixels[..., colour] += 120
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def test_the_authors_table_is_one_command_on_a_tree_like_office_home(office_home, world, tmp_path):
    configs = [REPOSITORY / "configs" / name for name in ("office_home.yaml", "ablations/author.yaml")]
    places = [f"--model.base={SHAPES_CLIP}", f"--data.root={office_home}", f"--anchors.root={world / 'anchors'}"]
    small = ["--model.rank=4", "--anchors.num_pairs=7", "--data.batch_size=4", "--trainer.max_epochs=1"]
    small += ["--trainer.accelerator=cpu", f"--federation.run_dir={tmp_path / 'run'}"]
    COMMANDS["sweep"]([*(f"--config={file}" for file in configs), *places, *small])
    rows = Results(tmp_path / "run").rows
    assert {row.unseen for row in rows} == {"Real World"} and len({tuple(row.sources) for row in rows}) == 5
    assert (tmp_path / "run" / "figures" / "tower_drift.png").is_file()
    merges = [row for row in rows if row.kind == "merge"]
    assert [row.model for row in merges].count("sap") == 3 and len(merges) == 1 + 4 * 3
    assert all(0 <= row.metrics["accuracy"] <= 1 for row in rows)
