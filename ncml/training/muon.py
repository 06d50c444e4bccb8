"""Muon: steps along the momentum of a matrix, with all of its singular values moved close to 1.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), with the update scaled as in Liu et
al., "Muon is Scalable for LLM Training" (2025).

Shapes: N matrices of R rows and C columns.

Closed gates. A gated block (`ncml.network.layers`) whose gate is closed passes on neither its values nor its gradient.
Such gates close early (in `cifar10_tiny` within 10,000 images), probably because what new blocks add is mostly noise at
first. Muon would scale even their gradients, with norms of 1e-9, to steps of full size: the weights behind a gate drift
at random, until the values that it blocks reach 1,200, and the network fails if it opens. That is probably how a run of
`cifar10_base` at a constant rate diverged after 489,000 images: a block that had contributed nothing was then open.
`EPSILON` keeps such weights still: from 357,000 to 1.18 million images at the constant rates of `cifar10_base`, those
of two such blocks changed by less than 1%. The run nevertheless returned to saved weights 15 times and then diverged,
so closed gates are not the only cause.

Large weights. Updates have a fixed size, so weights without decay keep growing: after 1.3 million images of
`cifar10_base`, they had 6 (projections of the other stream) to 106 times (output convolutions of gated blocks) the root
mean square that they began with (medians). Nothing normalises what a gated block adds, so large weights amplify an
unusual input from block to block: shortly before a run from such weights at twice the rates of `cifar10_base` diverged,
after 8,700 images, the last block added 6,700 instead of 4 to an image whose loss exceeded 100 bits/dim. Attention
cannot amplify in this way: it returns means of its values.

Weight decay (0.1 times the learning rate) makes the weights smaller: the same weights had 1.7 and 31 times their first
root mean square after 1.3 million further images with it, in batches of 64 at 0.71 of the rates. That run never
returned to saved weights; whether the decay or the batches prevented it was not tested. Over fewer images, decay gains
nothing. Held-out bits/dim with and without it (one run each, one core of an Intel Xeon with AMX, 2026-12-02):

    from random weights, 40,000 images                     3.711, 3.702
    after 1.3 million images, 60,000 at half the rates     3.328, 3.328    convolutions with a fifth less; rounding to
                                                                           bf16 costs 0.011 instead of 0.013
    from there, at twice the rates                         the loss of single images exceeds 100 bits/dim after about
                                                           8,000 images with it and without it

Attempts to keep gates open, with held-out bits/dim with and without them (one run each, one core of an AMD EPYC with
AVX-512, 2026-11-30):

    weight decay of 0.1                    3.926, 3.903    `cifar10_tiny`, 37,504 images; the same gates closed
    rate halved at each lower resolution   3.990, 3.969    `cifar10_tiny`, 30,000 images; open, but slow to learn
    four blocks initialised again          3.325, 3.323    after 1.3 million images, 16,000 at a quarter of the rates;
                                                           at the full rates, two closed again within 20,000, and with
                                                           decay the other two are open 1.33 million images later
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

    def __init__(self, groups: Iterable[dict[str, Any]], *, momentum: float, weight_decay: float = 0.0) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the matrices by their gradients; the root mean square of an update is about 0.2 learning rates.

        Weight decay is decoupled (Loshchilov and Hutter, 2019): it subtracts its share of the learning rate of them.
        """
        for group in self.param_groups:
            of_shape: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                of_shape.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in of_shape.items():  # products of small matrices use several threads only together
                average_NRC = torch.stack([self._average(matrix, group["momentum"]) for matrix in matrices])
                kept = 1 - group["weight_decay"] * group["lr"]
                step = 0.2 * math.sqrt(max(shape)) * group["lr"]
                for matrix, direction_RC in zip(matrices, orthogonalize(average_NRC), strict=True):
                    matrix.mul_(kept).add_(direction_RC, alpha=-step)

    def _average(self, matrix: Tensor, momentum: float) -> Tensor:
        """Include the gradient of a matrix in its moving average; return Nesterov's average, which looks ahead."""
        state, gradient = self.state[matrix], matrix.grad
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        average: Tensor = state["momentum_buffer"]
        average.lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)


def orthogonalize(x_NRC: Tensor) -> Tensor:
    """Return matrices with singular values moved into about [0.7, 1.2] by a Newton-Schulz iteration, [N, R, C].

    Each iteration multiplies X by a polynomial of X X^T. Only this matrix, which is smaller, is iterated, and X is then
    multiplied by the product of the polynomials. That needs fp32: errors of small eigenvalues grow twelvefold with each
    iteration.

    Singular values below about 0.2 % of the Frobenius norm remain smaller, and so do all where that norm is below
    `EPSILON`.
    """
    if x_NRC.shape[1] > x_NRC.shape[2]:
        return orthogonalize(x_NRC.mT).mT
    a, b, c = COEFFICIENTS
    norm_N11 = x_NRC.norm(dim=(1, 2), keepdim=True) + EPSILON
    x_NRC = x_NRC / norm_N11
    gram_NRR = x_NRC @ x_NRC.mT
    product_NRR = torch.eye(x_NRC.shape[1], dtype=x_NRC.dtype, device=x_NRC.device)
    for iteration in range(ITERATIONS):
        factor_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        factor_NRR.diagonal(dim1=1, dim2=2).add_(a)
        product_NRR = factor_NRR @ product_NRR
        if iteration < ITERATIONS - 1:
            gram_NRR = factor_NRR @ gram_NRR @ factor_NRR
    return product_NRR @ x_NRC * (1 - EPSILON / norm_N11)
