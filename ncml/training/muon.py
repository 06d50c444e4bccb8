"""Muon: steps along the momentum of a matrix, with all of its singular values moved close to 1.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), with the update scaled as in Liu et
al., "Muon is Scalable for LLM Training" (2025).

Closed gates. A gated block (`ncml.network.layers`) whose gate is closed passes on neither its values nor its gradient.
Such gates close early (in `cifar10_tiny` within 10,000 images), probably because what new blocks add is mostly noise at
first. Muon would scale even their gradients, with norms of 1e-9, to steps of full size: the weights behind a gate drift
at random, until the values that it blocks reach 1,200, and the network fails if it opens. That is probably how a run of
`cifar10_base` at a constant rate diverged after 489,000 images: a block that had contributed nothing was then open.
`EPSILON` keeps such weights still; no run has been long enough yet to show that this prevents a divergence.

Attempts to keep gates open, with held-out bits/dim with and without them (one run each, one core of an AMD EPYC with
AVX-512, 2026-11-30):

    weight decay of 0.1                    3.926, 3.903    `cifar10_tiny`, 37,504 images; the same gates closed
    rate halved at each lower resolution   3.990, 3.969    `cifar10_tiny`, 30,000 images; open, but slow to learn
    four blocks initialised again          3.325, 3.323    bundled model, 16,000 images at a quarter of the rates;
                                                           at the full rates, two closed again within 20,000
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of Jordan's iteration, chosen for a large slope at 0, so singular values end near 1 rather than at 1."""

ITERATIONS = 5

EPSILON = 1e-7
"""Norm of a gradient below which its update shrinks as well, as behind a closed gate."""


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for matrices, each of which must have a gradient in every step.

    It computes what `torch.optim.Muon` does, in fewer products, and in fp32 instead of bf16.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the matrices by their gradients; the root mean square of an update is about 0.2 learning rates."""
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                average: Tensor = state["momentum_buffer"]
                average.lerp_(matrix.grad, 1 - group["momentum"])
                direction = orthogonalize(matrix.grad.lerp(average, group["momentum"]))
                matrix.add_(direction, alpha=-0.2 * math.sqrt(max(matrix.shape)) * group["lr"])


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return the matrix with singular values moved into about [0.7, 1.2] by a Newton-Schulz iteration.

    Each iteration multiplies X by a polynomial of X X^T. Only this matrix, which is smaller, is iterated, and X is then
    multiplied by the product of the polynomials. That needs fp32: errors of small eigenvalues grow twelvefold with each
    iteration.

    Singular values below about 0.2 % of the Frobenius norm remain smaller, and so do all where that norm is below
    `EPSILON`.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if is_tall else matrix
    norm = x.norm() + EPSILON
    x = x / norm
    gram = x @ x.mT
    product = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for iteration in range(ITERATIONS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor @ product
        if iteration < ITERATIONS - 1:
            gram = factor @ gram @ factor
    x = product @ x * (1 - EPSILON / norm)
    return x.mT if is_tall else x
