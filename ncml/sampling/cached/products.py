"""Matrix products and elementwise operations that give an image the same bits in every batch, on most CPUs.

`batch_invariance` checks the shapes that batches are sampled in, and samples in a single shape where they fail. To
pass, these were found to be necessary (Intel with AVX-512, oneMKL). They do not suffice for its AVX2 kernels, or on AMD
for products of fewer than 12 columns:

    products        a multiple of SLOT rows; a right factor stored by rows, not transposed; sums of at most DEPTH terms,
                    since longer ones are split by the number of rows
    elementwise     whole vectors for each image, on one thread: remainders can round differently
    whole modules   conditioning SLOT images at a time (`apply_by_slots`), known rows one image at a time (`prefill`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLOT = 8
"""Rows of a matrix product come in multiples of this."""

DEPTH = 384
"""Maximum number of terms in a sum of a convolution's product; longer sums are split into several products.

Products over the channels of one position are not split: they are longer only in levels wider than 192.
"""

ONE_THREAD = 32768
"""Elements up to which PyTorch computes an elementwise operation on one thread."""

VECTOR = 32
"""Maximum number of elements that PyTorch computes at a time."""

# What F.elu and F.glu call: F's wrappers hide `out`, and cost as much again as a small operation does.
_nn: Any = torch._C._nn  # pyright: ignore[reportAttributeAccessIssue]
elu, elu_, glu = _nn.elu, _nn.elu_, _nn.glu


def padded_count(B: int) -> int:
    """Return the number of images padded to a multiple of SLOT."""
    return -(-B // SLOT) * SLOT


def apply_by_slots(module: nn.Module, *inputs_S: Tensor) -> Tensor:
    """Apply a module of the network to its inputs, SLOT rows at a time."""
    return torch.cat([module(*parts) for parts in zip(*(input_S.split(SLOT) for input_S in inputs_S), strict=True)])


def right_factor(linear: nn.Linear) -> Tensor:
    """Return a linear layer's weight as the right factor of a product."""
    return linear.weight.t().contiguous()


def with_negative(weight: Tensor) -> Tensor:
    """Extend columns that yield y to columns that yield [y, -y]."""
    return torch.cat([weight, -weight], -1).contiguous()


def multiply(bias: Tensor, x: Sequence[Tensor], factor: Sequence[Tensor]) -> Tensor:
    """Return `bias` + x @ factor, both in parts of DEPTH: x [M, K] by column, factor [K, G] by row."""
    out = torch.addmm(bias, x[0], factor[0])
    for part in range(1, len(factor)):
        out.addmm_(x[part], factor[part])
    return out


def activate(x_RWF: Tensor) -> Tensor:
    """Return the concat_elu of a row, [R, W, 2 F]."""
    return _on_one_thread(_concat_elu, x_RWF)


def gate(ab_RWG: Tensor, x_RWF: Tensor) -> Tensor:
    """Return x + a sigmoid(b)."""
    return x_RWF + _on_one_thread(_glu, ab_RWG)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with queries [M, N, 1, D] or [M, N, W, D] to keys and values [M, N, L, D]."""
    return F.scaled_dot_product_attention(q, k, v)


def _concat_elu(x_RWF: Tensor) -> Tensor:
    return elu_(torch.cat([x_RWF, -x_RWF], -1))


def _glu(ab_RWG: Tensor) -> Tensor:
    return glu(ab_RWG, -1)


def _on_one_thread(elementwise: Callable[[Tensor], Tensor], x_RWF: Tensor) -> Tensor:
    """Apply an operation to so few images at a time that the threads of a CPU do not share it.

    The elements at the ends of a thread's part are not computed as vectors, and can round differently; where these ends
    lie depends on the size of the whole.
    """
    if x_RWF.device.type != "cpu" or torch.get_num_threads() == 1 or x_RWF.numel() <= ONE_THREAD:
        return elementwise(x_RWF)
    return torch.cat([elementwise(part) for part in x_RWF.split(max(1, ONE_THREAD // x_RWF[0].numel()))])
