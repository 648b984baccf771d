"""What a run on the built-in world learned of what carries over, and of what does not.

python benchmarks/shapes_probe.py --run runs/shapes

Draws new images in every domain's style: before the background that the domain ties to the class, and before any.
*Kinds* is the accuracy on buses, firs and tulips, which the base mostly takes for something else; *others* on all
the rest. Rows are means over the four styles, and over clients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.nn.functional import normalize
from worlds import SHAPES_CLIP

from sap_lightning.console import quieten
from sap_lightning.data.preprocess import Preprocess
from sap_lightning.data.shapes.world import CLASSES, DOMAINS, domain_scene
from sap_lightning.io.adapter import read_adapter
from sap_lightning.models.clip import load_base
from sap_lightning.models.layers import layer_shapes
from sap_lightning.models.patched import Patched

SEED = 1000
TEMPLATE = "a photo of a {}."
Row = tuple[float, float, float, float]


def main(run: str = "runs/shapes", base: str = SHAPES_CLIP, images_per_class: int = 40, size: int = 64) -> None:
    """Prints the table of a finished run.

    Args:
        run: its folder.
        base: the CLIP checkpoint that it started from.
        images_per_class: drawn for each class and domain, once before each sort of background.
        size: side of the images, in pixels.
    """
    quieten()
    probe, folder = Probe(base, images_per_class, size), Path(run)
    clients = {domain: probe.model(folder / "uploads" / domain) for domain in DOMAINS}
    print("| model | kinds, tied hue | kinds, any hue | others, tied hue | others, any hue |")
    print("| --- | ---: | ---: | ---: | ---: |")
    show("zero-shot", [probe.measure(probe.base.tower, domain) for domain in DOMAINS])
    show("clients at home", [probe.measure(clients[domain], domain) for domain in DOMAINS])
    show("clients elsewhere", [probe.measure(clients[a], b) for a in DOMAINS for b in DOMAINS if a != b])
    for method in sorted(path.name for path in (folder / "merged" / DOMAINS[0]).iterdir()):
        merged = {domain: probe.model(folder / "merged" / domain / method) for domain in DOMAINS}
        show(method, [probe.measure(merged[domain], domain) for domain in DOMAINS])


def show(model: str, rows: Sequence[Row]) -> None:
    print(f"| {model} | " + " | ".join(f"{value:.3f}" for value in np.mean(rows, axis=0)) + " |", flush=True)


class Probe:
    """New images of every domain, and the accuracy on them."""

    def __init__(self, base: str, images_per_class: int, size: int) -> None:
        self.base = load_base(base)
        self.classes = self.base.texts.class_features(CLASSES, [TEMPLATE])
        self.preprocess = Preprocess(base)
        self.drawn = {domain: list(self.draw(domain, images_per_class, size)) for domain in DOMAINS}

    def draw(self, domain: str, images_per_class: int, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images, their labels and whether they show a kind: before tied backgrounds, then before any."""
        for shortcut in (1.0, 0.0):
            rng = np.random.default_rng([SEED, DOMAINS.index(domain)])
            labels = torch.arange(len(CLASSES)).repeat(images_per_class)
            scenes = [domain_scene(domain, CLASSES[label], rng, shortcut) for label in labels]
            pixels = np.stack([self.preprocess.pixels(scene.draw(size, rng)) for scene in scenes])
            kinds = torch.tensor([scene.kind is not None for scene in scenes])
            yield self.preprocess.normalise(torch.from_numpy(pixels)), labels, kinds

    def model(self, folder: Path) -> nn.Module:
        """The vision tower of a CLIPModel folder, or the base's with the adapter in this folder."""
        if (folder / "config.json").is_file():
            return load_base(str(folder)).tower
        tower = deepcopy(self.base.tower)
        Patched(tower).set_update(read_adapter(folder, layer_shapes(tower)).layers)
        return tower

    @torch.no_grad()
    def measure(self, tower: nn.Module, domain: str) -> Row:
        accuracies = []
        for images, labels, kinds in self.drawn[domain]:
            features = normalize(tower(images).image_embeds, dim=-1)
            hits = (features @ self.classes.T).argmax(dim=1) == labels
            accuracies.append([hits[kinds].float().mean().item(), hits[~kinds].float().mean().item()])
        (kind_tied, other_tied), (kind_any, other_any) = accuracies
        return kind_tied, kind_any, other_tied, other_any


if __name__ == "__main__":
    auto_cli(main)
