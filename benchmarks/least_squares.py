"""The least squares of one layer as regmean and lorm solve them, and by all eigenvalues; one Markdown table.

OMP_NUM_THREADS=1 python benchmarks/least_squares.py

Three clients' random updates of rank 16, and random inputs: fewer tokens than inputs, so that the Gram matrix is
singular, and more. Seconds are the processor's, of which the shorter of two is taken. By eigenvalues is what lorm
did before, and regmean at off_diagonal 1: a pseudo-inverse that leaves out eigenvalues below 1e-6 of the largest. The
difference is that of merged updates, in the Frobenius norm, relative to their length.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor

from sap_lightning.functional.lora import LoRALayer, dense, singular_triplets
from sap_lightning.merging.clients import ClientLayers
from sap_lightning.merging.lorm import LoRM
from sap_lightning.merging.regmean import Regression, nearest

CLIENTS, RANK = 3, 16


def main(inputs: int = 3072, outputs: int = 768) -> None:
    """Prints the table.

    Args:
        inputs: of the layer; of ViT-B/16's widest 3,072.
        outputs: of the layer.
    """
    torch.manual_seed(0)
    print("| method | inputs | tokens | s | s by eigenvalues | difference |\n|---|---|---|---|---|---|")
    jobs = {"regmean": (nearest, nearest_by_eigenvalues), "lorm": (LoRM()._merge_layer, lorm_by_eigenvalues)}
    for tokens in (inputs // 2, 2 * inputs):
        problem = problem_of(tokens, inputs, outputs)
        for name, (ours, plain) in jobs.items():
            (seconds, found), (before, expected) = timed(ours, problem), timed(plain, problem)
            difference = float((dense(found).double() - expected).norm() / expected.norm())
            print(f"| {name} | {inputs} | {tokens} | {seconds:.2f} | {before:.2f} | {difference:.0e} |", flush=True)


def problem_of(tokens: int, inputs: int, outputs: int) -> Regression:
    layers = [LoRALayer(torch.randn(RANK, inputs), torch.randn(outputs, RANK)) for _ in range(CLIENTS)]
    grams = [gram_of(tokens, inputs) for _ in layers]
    products = [layer.delta().double() @ gram for layer, gram in zip(layers, grams, strict=True)]
    adapters: Any = [SimpleNamespace(layers={"fc2": layer}) for layer in layers]
    mean_product, mean_gram = torch.stack(products).mean(0), torch.stack(grams).mean(0)
    return Regression(ClientLayers(adapters, "fc2"), [1 / CLIENTS] * CLIENTS, mean_product, mean_gram)


def gram_of(tokens: int, inputs: int) -> Tensor:
    """XᵀX / tokens of inputs of other sizes that share a direction, summed up in float32 as the probe does."""
    X = (torch.randn(tokens, inputs) + 1) * 10 ** torch.linspace(-1, 1, inputs)
    return (X.T @ X / tokens).double()


def pseudo_inverse(gram: Tensor) -> Tensor:
    sizes = gram.diag().sqrt()
    return torch.linalg.pinv(gram / sizes.outer(sizes), rtol=1e-6, hermitian=True) / sizes.outer(sizes)


def nearest_by_eigenvalues(problem: Regression) -> Tensor:
    average = dense(problem.average).double()
    return average + (problem.product - average @ problem.gram) @ pseudo_inverse(problem.gram)


def lorm_by_eigenvalues(problem: Regression) -> Tensor:
    product, gram, inverse = problem.product, problem.gram, pseudo_inverse(problem.gram)
    U, sigma, V = singular_triplets(problem.average)
    A, B = V[:RANK].double(), (U[:, :RANK] * sigma[:RANK]).double()
    for _ in range(LoRM().sweeps):
        Q, R = torch.linalg.qr(A.T)
        A, B = Q.T, B @ R.T
        B = B + (product - B @ (A @ gram)) @ A.T @ pseudo_inverse(A @ gram @ A.T)
        A = A + torch.linalg.pinv(B) @ (product - B @ (A @ gram)) @ inverse
    return B @ A


def timed(job: Callable[[Regression], Any], problem: Regression) -> tuple[float, Any]:
    seconds = []
    for _ in range(2):
        started = time.process_time()
        found = job(problem)
        seconds.append(time.process_time() - started)
    return min(seconds), found


if __name__ == "__main__":
    auto_cli(main)
