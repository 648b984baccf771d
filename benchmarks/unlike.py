"""Methods that look at models at work, on real pairs: what each does to held-out text, and to held-out anchors.

python benchmarks/unlike.py --base FOLDER --texts '[A.txt,B.txt]'
python benchmarks/unlike.py --towers '[A,B]' --anchors FOLDER

Language models: two are trained from the base as benchmarks/fuse.py does, one on each text, and perplexity is measured
on the last tenth of both. A third is the second one with its stream, heads and hidden neurons in another order, which
computes the same. Towers: CLIP models of any sizes that take the same images; what is measured is 1 − cos of image and
caption over pairs that no method was shown, by the first model's text tower.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from fuse import loaded, perplexities, trained, unlabelled
from jsonargparse import auto_cli

from sap_lightning.checkpoints.fusion import Fusion
from sap_lightning.checkpoints.pairs import Pairs
from sap_lightning.console import quieten
from sap_lightning.data.anchors import AnchorDataModule

sys.path.append(str(Path(__file__).parent.parent / "tests" / "checkpoints"))
from permuted import permuted  # which stands beside the tests

SHOWN, MEASURED = 32, 32
"""Anchor pairs that methods see, and others after them that are measured."""


def main(
    base: Path | None = None,
    texts: tuple[Path, Path] | None = None,
    towers: tuple[Path, Path] | None = None,
    anchors: Path | None = None,
    work: Path = Path("runs/unlike"),
    steps: int = 40,
) -> None:
    """Prints the tables.

    Args:
        base: folder of the language model that both are trained from.
        texts: two text files of different kinds.
        towers: folders of two CLIP models.
        anchors: folder of image–caption pairs.
        work: where trained models stay.
        steps: of training, of 4 pieces each.
    """
    quieten()
    work.mkdir(parents=True, exist_ok=True)
    if base and texts:
        language_models(base, texts, work, steps)
    if towers and anchors:
        vision_towers(towers, anchors, work)


def language_models(base: Path, texts: tuple[Path, Path], work: Path, steps: int) -> None:
    a, b = (trained(base, text, work / text.stem, steps) for text in texts)
    shuffled = reordered(b, work / f"{b.name}-reordered")
    shown = str(unlabelled(texts, work / "shown.txt"))
    own = [str(unlabelled([text], work / f"shown_{text.name}")) for text in texts]
    print(f"\n| model | CPU s | {' | '.join(f'perplexity, {text.stem}' for text in texts)} |\n|---|---:|---:|---:|")
    runs: dict[str, tuple[Sequence[Path], dict[str, object]]] = {
        "mean": ([a, b], {"method": "average"}),
        "safe_m": ([a, b], {"method": "safe_m", "base": str(base), "texts": shown}),
        "fam": ([a, b], {"method": "fam", "texts": shown}),
        "adamms": ([a, b], {"method": "adamms", "texts": shown}),
        "stats_merging": ([a, b], {"method": "stats_merging", "base": str(base), "texts": shown}),
        "mergeme": ([a, b], {"method": "mergeme", "base": str(base), "texts": own}),
        f"safe_m, {b.name} first": ([b, a], {"method": "safe_m", "base": str(base), "texts": shown}),
        f"fam, {b.name} first": ([b, a], {"method": "fam", "texts": shown}),
        f"mean, {b.name} reordered": ([a, shuffled], {"method": "average"}),
        f"fam, {b.name} reordered": ([a, shuffled], {"method": "fam", "texts": shown}),
    }
    for model in (base, a, b, shuffled):
        show(model.name, "–", perplexities(model, base, texts))
    for name, (models, options) in runs.items():
        out, seconds = fused(models, work, options)
        show(name, f"{seconds:.0f}", perplexities(out, base, texts))


def vision_towers(towers: tuple[Path, Path], anchors: Path, work: Path) -> None:
    print("\n| model | CPU s | 1 − cos, pairs not shown |\n|---|---:|---:|")
    runs: dict[str, tuple[Sequence[Path], dict[str, object]]] = {}
    for one, other in (towers, towers[::-1]):
        show(one.name, "–", [anchor_loss(one, one, anchors)])
        data = {"anchors": AnchorDataModule(str(anchors), SHOWN, str(one))}
        runs[f"fam, {one.name} first"] = [one, other], {"method": "fam", **data}
    for name, (models, options) in runs.items():
        out, seconds = fused(models, work, options)
        show(name, f"{seconds:.0f}", [anchor_loss(out, models[0], anchors)])


def show(name: str, seconds: str, measured: Sequence[float]) -> None:
    print(f"| {name} | {seconds} | {' | '.join(f'{one:.3f}' for one in measured)} |", flush=True)


def fused(models: Sequence[Path], work: Path, options: dict[str, object]) -> tuple[Path, float]:
    """The folder of the fused model, over that of the last one, and the seconds that processors worked for it."""
    out, started = work / "out", time.process_time()
    shutil.rmtree(out, ignore_errors=True)
    Fusion([str(model) for model in models], str(out), **options).run()  # type: ignore[arg-type]
    return out, time.process_time() - started


def reordered(model: Path, folder: Path) -> Path:
    """The same model with its neurons in another order."""
    if not folder.exists():
        shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        permuted(loaded(model))[0].save_pretrained(folder)
    return folder


@torch.inference_mode()
def anchor_loss(model: Path, like: Path, anchors: Path) -> float:
    """Mean of 1 − cos over the pairs after those that were shown."""
    pairs = Pairs(AnchorDataModule(str(anchors), SHOWN + MEASURED, str(like)), like)
    losses = [float(loss) for loss in pairs.losses(pairs.load(model))]
    return sum(losses[SHOWN:]) / MEASURED


if __name__ == "__main__":
    auto_cli(main)
