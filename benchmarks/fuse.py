"""Whole language models fused by us and by mergekit: seconds, peak memory, the largest difference, perplexities.

python benchmarks/fuse.py --base FOLDER --texts '[A.txt,B.txt]' --mergekit VENV/bin/mergekit-yaml

The base is any causal language model that save_pretrained wrote. Two models are trained from it, one on each text but
its last tenth, on which perplexity is measured. Every fusion runs in a process of its own, whose start is in its
seconds and whose peak is all that it ever held. The last table is of random weights in the shapes of a 7B Llama, as
many layers as make so many gigabytes a model, which are deleted after.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from jsonargparse import auto_cli
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

from sap_lightning.console import quieten

TOKENS = 64
"""Of a piece of text that is learned or measured."""
PIECES = 32
"""Of a text on which perplexity is measured."""
PAIRS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "average": ([], {"merge_method": "linear", "weight": 0.5}),
    "task_arithmetic": (["--fuse.method.scale=0.3"], {"merge_method": "task_arithmetic", "weight": 0.3}),
    "ties": (
        ["--fuse.method.variant=mergekit"],
        {"merge_method": "ties", "weight": 0.5, "density": 0.2, "normalize": True},
    ),
}
"""Our method with its options, and mergekit's."""
OURS: dict[str, list[str]] = {
    "average": [],
    "task_arithmetic": ["--fuse.method.scale=0.3"],
    "task_arithmetic, λ 0.6": ["--fuse.method.scale=0.6"],
    "ties": [],
    "dare": [],
    "ataf, α 0.2": ["--fuse.method.alpha=0.2"],
    "ataf, α by texts": [],
    "safe_m, by texts": [],
    "sap, by texts": [],
    "sap, one threshold, by texts": ["--fuse.method.scope=global"],
    "sap, one threshold, not rescaled, by texts": ["--fuse.method.scope=global", "--fuse.method.rescale=none"],
}
WATCH = """
import resource, subprocess, sys, time
started = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)
sys.exit(code)
"""
WIDTH, MLP, VOCABULARY = 4096, 11008, 32000


class Cost(NamedTuple):
    """Of a command from its start to its end: seconds, those that processors worked for it, and the most MiB held."""

    seconds: float
    cpu: float
    mib: float


def main(
    base: Path,
    texts: tuple[Path, Path],
    mergekit: Path | None = None,
    work: Path = Path("runs/fuse"),
    steps: int = 40,
    gigabytes: float = 10,
) -> None:
    """Prints the tables.

    Args:
        base: folder of the model that both are trained from.
        texts: two text files of different kinds.
        mergekit: the command of mergekit's that merges; without it the peer is left out.
        work: where the trained models stay.
        steps: of training, of 4 pieces each.
        gigabytes: of each random model; 0 leaves them out.
    """
    quieten()
    models = [trained(base, text, work / text.stem, steps) for text in texts]
    if mergekit:
        print(
            "| method | ours s | CPU s | MiB | mergekit s | CPU s | MiB | largest difference | elements that differ |"
        )
        print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
        for method in PAIRS:
            compare(method, base, models, mergekit)
    print("\n| model | seconds | CPU s | MiB | " + " | ".join(f"perplexity, {text.stem}" for text in texts) + " |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, model in {"base": base, **{model.name: model for model in models}}.items():
        show(name, "– | – | –", model, base, texts)
    for name, options in OURS.items():
        with tempfile.TemporaryDirectory(dir=work) as place:
            if name.endswith("texts"):
                options = [*options, f"--fuse.texts={unlabelled(texts, Path(place, 'unlabelled.txt'))}"]
            out = Path(place, "out")
            cost = fuse(name.partition(",")[0], options, models, base, out)
            show(name, f"{cost.seconds:.1f} | {cost.cpu:.1f} | {cost.mib:.0f}", out, base, texts)
    if gigabytes:
        random_models(gigabytes, work)


def show(name: str, cost: str, model: Path, base: Path, texts: Sequence[Path]) -> None:
    measured = " | ".join(f"{one:.2f}" for one in perplexities(model, base, texts))
    print(f"| {name} | {cost} | {measured} |", flush=True)


# Training and measuring


def trained(base: Path, text: Path, folder: Path, steps: int) -> Path:
    """The base after some steps on all but the last tenth of a text, in its own dtype."""
    if folder.exists():
        return folder
    set_seed(0)
    model = loaded(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    learned, _ = pieces(base, text)
    for batch in learned[torch.randperm(len(learned))[: 4 * steps]].split(4):
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    dtype = getattr(torch, str(json.loads((base / "config.json").read_text())["dtype"]))
    model.to(dtype).save_pretrained(folder, max_shard_size="100MB")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def loaded(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def pieces(base: Path, text: Path) -> tuple[Tensor, Tensor]:
    """A text's tokens in pieces, shape (n, TOKENS): the first nine tenths and the last."""
    tokens = AutoTokenizer.from_pretrained(base)(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    every = tokens[: len(tokens) // TOKENS * TOKENS].view(-1, TOKENS)
    return every[: len(every) * 9 // 10], every[len(every) * 9 // 10 :]


@torch.inference_mode()
def perplexities(model: Path, base: Path, texts: Sequence[Path]) -> list[float]:
    """Of a model on what was held out of each text, in the base's tokens."""
    fused, found = loaded(model), []
    for text in texts:
        _, held_out = pieces(base, text)
        losses = [float(fused(batch, labels=batch).loss) for batch in held_out[:PIECES].split(8)]
        found.append(math.exp(sum(losses) / len(losses)))
    return found


def unlabelled(texts: Sequence[Path], file: Path) -> Path:
    """Lines of the texts that were learned, in turn; how many are looked at is for the command to say."""
    lines = [[line for line in text.read_text(encoding="utf-8").splitlines() if len(line) > 60][:16] for text in texts]
    file.write_text("\n".join(line for pair in zip(*lines, strict=True) for line in pair), encoding="utf-8")
    return file


# Fusing


def fuse(method: str, options: Sequence[str], models: Sequence[Path], base: Path, out: Path) -> Cost:
    line = [f"--fuse.models=[{','.join(map(str, models))}]", f"--fuse.base={base}", f"--fuse.output={out}"]
    return run([sys.executable, "-m", "sap_lightning", "fuse", *line, f"--fuse.method={method}", *options])


def compare(method: str, base: Path, models: Sequence[Path], mergekit: Path) -> None:
    options, peer = PAIRS[method]
    with tempfile.TemporaryDirectory(dir=models[0].parent) as place:
        ours = fuse(method, options, models, base, Path(place, "ours"))
        config = Path(place, "config.yaml")
        config.write_text(yaml.safe_dump(mergekit_config(peer, models, base)))
        theirs = run([str(mergekit), str(config), str(Path(place, "theirs")), "--quiet"])
        largest, share = difference(Path(place, "ours"), Path(place, "theirs"))
    costs = " | ".join(f"{cost.seconds:.1f} | {cost.cpu:.1f} | {cost.mib:.0f}" for cost in (ours, theirs))
    print(f"| {method} | {costs} | {largest:.1e} | {share:.1e} |", flush=True)


def mergekit_config(peer: dict[str, Any], models: Sequence[Path], base: Path) -> dict[str, Any]:
    of_each = {name: peer[name] for name in ("weight", "density") if name in peer}
    config: dict[str, Any] = {
        "merge_method": peer["merge_method"],
        "models": [{"model": str(model.absolute()), "parameters": of_each} for model in models],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    if peer["merge_method"] != "linear":
        config |= {"base_model": str(base.absolute()), "parameters": {"normalize": peer.get("normalize", False)}}
    return config


def run(command: Sequence[str]) -> Cost:
    """Runs a command to its end, under a process that is small: Linux counts what held a command before it began."""
    said = subprocess.run([sys.executable, "-c", WATCH, *command], stdout=subprocess.PIPE, text=True)
    if said.returncode:
        sys.exit(f"{' '.join(command)}: ended with {said.returncode}")
    return Cost(*map(float, said.stdout.splitlines()[-1].split()))


def difference(ours: Path, theirs: Path) -> tuple[float, float]:
    """The largest difference of two models' weights, and the share of elements that are not the same."""
    largest, different, elements = 0.0, 0, 0
    other = dict(tensors_in(theirs))
    for key, tensor in tensors_in(ours):
        gap = (tensor.float() - other[key].float()).abs()
        largest, different, elements = (
            max(largest, float(gap.max())),
            different + int((gap > 0).sum()),
            elements + gap.numel(),
        )
    return largest, different / elements


def tensors_in(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # it is no mapping
                yield key, file.get_tensor(key)


# Random models


def random_models(gigabytes: float, work: Path) -> None:
    """Fuses two models of that size on a base of zeros, which takes no room, and prints seconds and peak."""
    needed = 3 * gigabytes * 1e9 + 5e9
    if (free := shutil.disk_usage(work).free) < needed:
        sys.exit(f"{work}: {free / 1e9:.0f} GB free, {needed / 1e9:.0f} are needed; lower --gigabytes")
    print("\n| method | GB a model | seconds | CPU s | MiB |\n|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory(dir=work) as place:
        *models, base = [write_random(Path(place, name), seed, gigabytes) for seed, name in enumerate("abc")]
        size = sum(path.stat().st_size for path in base.glob("*.safetensors")) / 1e9
        for method in ("average", "ties"):
            cost = fuse(method, [], models, base, Path(place, "out"))
            print(f"| {method} | {size:.1f} | {cost.seconds:.0f} | {cost.cpu:.0f} | {cost.mib:.0f} |", flush=True)
            shutil.rmtree(Path(place, "out"))


def write_random(folder: Path, seed: int, gigabytes: float) -> Path:
    """A model in bfloat16 of a 7B Llama's shapes, a layer a shard; that of seed 2 is zero."""
    folder.mkdir()
    layer = {
        **{f"self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"},
        **{f"mlp.{name}_proj.weight": (MLP, WIDTH) for name in ("gate", "up")},
        "mlp.down_proj.weight": (WIDTH, MLP),
        "input_layernorm.weight": (WIDTH,),
        "post_attention_layernorm.weight": (WIDTH,),
    }
    layers = round((gigabytes * 1e9 - 2 * 2 * VOCABULARY * WIDTH) / (2 * sum(map(math.prod, layer.values()))))
    shards = [{f"model.layers.{index}.{name}": shape for name, shape in layer.items()} for index in range(layers)]
    shards += [{"model.embed_tokens.weight": (VOCABULARY, WIDTH)}, {"lm_head.weight": (VOCABULARY, WIDTH)}]
    drawn = torch.randn(2**24, generator=torch.Generator().manual_seed(seed)).mul_(0.02).bfloat16()
    placed: dict[str, str] = {}
    for index, shapes in enumerate(shards):
        name = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        write_shard(folder / name, shapes, drawn if seed < 2 else None)
        placed |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": WIDTH}))
    return folder


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], numbers: Tensor | None) -> None:
    """Tensors of these shapes, of these numbers over and over; without numbers a hole, which reads as zeros."""
    header, at = {}, 0
    for key, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if numbers is not None:
            content = numbers.view(torch.uint8).numpy().data
            for start in range(0, at, len(content)):
                file.write(content[: at - start])
        file.truncate(8 + len(text) + at)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
