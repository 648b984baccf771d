"""Classifiers of two tasks joined by HM3, real images: what is left of each task, and over the labels of both.

python benchmarks/hm3.py --base FOLDER --tasks '[FOLDER,FOLDER]'

A task is a folder domain/class/image. Each classifier is trained from the base's vision tower on three quarters of its
images, the head first, then all weights; every fourth image of a class is measured. Accuracy is over the labels of the
image's own task, as HM3 has it, and over those of both, where the task is not told.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import CLIPConfig, CLIPForImageClassification, CLIPModel

from sap_lightning.checkpoints.fusion import Fusion
from sap_lightning.checkpoints.methods import HM3
from sap_lightning.console import quieten
from sap_lightning.data.cache import load_pixels
from sap_lightning.data.images import file_picture, is_image
from sap_lightning.data.preprocess import Preprocess
from sap_lightning.merging import TIES, Average, MergeMethod, TaskArithmetic

BATCH = 16
METHODS: dict[str, MergeMethod] = {
    "average": Average(),
    **{f"task_arithmetic, λ = {scale}": TaskArithmetic(scale=scale) for scale in (0.7, 1.0)},
    "ties": TIES(),
}


class Images(NamedTuple):
    """Images of a task, uint8 of shape (n, 3, side, side), and their labels, numbers of the classes."""

    images: Tensor
    labels: Tensor
    classes: list[str]


def main(
    base: str, tasks: tuple[Path, Path], work: Path = Path("runs/hm3"), head_steps: int = 100, steps: int = 100
) -> None:
    """Prints the table.

    Args:
        base: folder of a CLIP model, whose vision tower the classifiers have.
        tasks: folders of images.
        work: where classifiers stay; one that stands is not trained again.
        head_steps: of training the head alone, of 16 images each.
        steps: of training all weights.
    """
    quieten()
    work.mkdir(parents=True, exist_ok=True)
    preprocess = Preprocess(base)
    learned, held = zip(*(images_in(folder, preprocess) for folder in tasks), strict=True)
    models = [
        trained(base, images, work / folder.name, preprocess, head_steps, steps)
        for folder, images in zip(tasks, learned, strict=True)
    ]
    measured = {folder.name: images for folder, images in zip(tasks, held, strict=True)}
    print(f"| model | {' | '.join(f'{name} | of both' for name in measured)} |\n|---|{'---:|' * 2 * len(tasks)}")
    for model in models:
        show(f"trained on {model.name} alone", model, measured, preprocess)
    for name, method in METHODS.items():
        out = work / "out"
        shutil.rmtree(out, ignore_errors=True)
        Fusion([str(model) for model in models], str(out), base, HM3(method=method)).run()
        show(name, out, measured, preprocess)


def images_in(folder: Path, preprocess: Preprocess) -> tuple[Images, Images]:
    """A task's images, those that are learned and every fourth of a class's, which is measured."""
    classes = sorted({place.name for place in folder.glob("*/*") if place.is_dir()})
    files = [file for file in sorted(folder.glob("*/*/*")) if is_image(file)]
    pixels = load_pixels([file_picture(file, folder) for file in files], "", preprocess, cache=False)
    images = torch.from_numpy(pixels.images.copy())
    labels = torch.tensor([classes.index(file.parent.name) for file in files])
    held = torch.zeros(len(files), dtype=torch.bool)
    for label in range(len(classes)):
        held[(labels == label).nonzero()[::4]] = True
    return Images(images[~held], labels[~held], classes), Images(images[held], labels[held], classes)


def trained(base: str, images: Images, folder: Path, preprocess: Preprocess, head_steps: int, steps: int) -> Path:
    """The base's vision tower under a head for the task, both trained."""
    if folder.exists():
        return folder
    seed_everything(0)
    model = classifier(base, images.classes)
    train(model, model.classifier, images, preprocess, head_steps, 3e-3)
    train(model, model, images, preprocess, steps, 1e-5)
    model.eval().save_pretrained(folder)
    shutil.copy(Path(base, "preprocessor_config.json"), folder)
    return folder


def classifier(base: str, classes: list[str]) -> CLIPForImageClassification:
    named = dict(enumerate(classes))
    config = CLIPConfig.from_pretrained(base, id2label=named, label2id={name: label for label, name in named.items()})
    model = CLIPForImageClassification(config)
    model.vision_model.load_state_dict(CLIPModel.from_pretrained(base).vision_model.state_dict())
    return model


def train(
    model: CLIPForImageClassification,
    part: nn.Module,
    images: Images,
    preprocess: Preprocess,
    steps: int,
    rate: float,
) -> None:
    model.train().requires_grad_(False)
    optimizer = torch.optim.AdamW(part.requires_grad_(True).parameters(), lr=rate)
    for _ in range(steps):
        drawn = torch.randint(len(images.labels), (BATCH,))
        logits = model(pixel_values=preprocess.normalise(images.images[drawn])).logits
        optimizer.zero_grad()
        cross_entropy(logits, images.labels[drawn]).backward()
        optimizer.step()


def show(name: str, model: Path, measured: Mapping[str, Images], preprocess: Preprocess) -> None:
    """Prints a row: the accuracy on each task by its own labels, and by those of all tasks that the model knows."""
    loaded = CLIPForImageClassification.from_pretrained(model).eval()
    groups = loaded.config.to_dict().get("label_groups", {model.name: (0, loaded.config.num_labels)})
    cells = []
    for task, images in measured.items():
        if task not in groups:
            cells += ["–", "–"]
            continue
        logits, (first, end) = logits_of(loaded, images, preprocess), groups[task]
        own, any_task = logits[:, first:end].argmax(1), logits.argmax(1) - first
        right = [f"{(said == images.labels).float().mean():.3f}" for said in (own, any_task)]
        cells += right if len(groups) > 1 else [right[0], "–"]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


@torch.inference_mode()
def logits_of(model: CLIPForImageClassification, images: Images, preprocess: Preprocess) -> Tensor:
    return torch.cat([model(pixel_values=preprocess.normalise(some)).logits for some in images.images.split(BATCH)])


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
