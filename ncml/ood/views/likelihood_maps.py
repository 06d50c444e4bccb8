"""Bits/dim of every pixel of an image of any size, by a network without attention, at several scales.

One pass covers the whole image; a large one is computed in strips of rows, and a wide one in columns as well, each with
enough pixels around it that nothing changes. Sums over windows come from cumulative sums.

Shapes: H rows and W columns of an image at one scale, R and C rows and columns of windows.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ncml.config import ModelConfig
from ncml.images.tiling import starts
from ncml.network.mixture import bits_per_dim, from_uint8, log_mixture
from ncml.network.ncpn import NCPN
from ncml.network.sde import broadcast_to, make_sde

Pixels = NDArray[np.uint8]

NOISE = 2.5
"""Grey levels of noise at which the density is taken: single pixels are less surprising than without noise."""
STRIP_PIXELS = 500_000
"""Pixels of a strip, without those above it: about 0.9 GB of activations at 2,000 columns. Larger ones are slower."""
STRIP_COLUMNS = 4096
"""Columns of a strip, without those beside it: those of a wide image, with the rows above, would take all memory."""


def context_rows(model: ModelConfig) -> int:
    """Return a number of rows above a pixel on which its parameters depend at most, a multiple of the stride.

    They depend on no more columns on either side of it.

    Every gated block has two convolutions, of two rows each, on either stream; a block of a level, and a change of
    resolution, count as many rows of the image as the level's stride.
    """
    last = len(model.levels) - 1
    rows = 2
    for index, level in enumerate(model.levels):
        pairs = 2 * level.blocks + (index < last)
        rows += 2**index * (4 * pairs + 4)
    return -(-rows // model.stride) * model.stride


@torch.inference_mode()
def bits_map(network: NCPN, image_HWC: Pixels, *, strip_pixels: int = STRIP_PIXELS) -> Tensor:
    """Return bits/dim of each pixel given those before it at `NOISE`, fp32 [H, W].

    The network must not have attention. Sides that are not multiples of its stride are extended with their last pixels.
    """
    return surprise(network, torch.from_numpy(np.array(image_HWC)), strip_pixels)


def surprise(network: NCPN, image_HWC: Tensor, strip_pixels: int | None = None) -> Tensor:
    """Return `bits_map` of a tensor. strip_pixels: pixels that are computed at once; None: all."""
    if strip_pixels is None:
        return _surprise(network, image_HWC)
    height, width = image_HWC.shape[:2]
    stride, context = network.config.model.stride, context_rows(network.config.model)
    columns = min(-(-width // stride) * stride, STRIP_COLUMNS)
    rows = max(stride, strip_pixels // columns // stride * stride)
    strips: list[Tensor] = []
    for top in range(0, height, rows):
        parts: list[Tensor] = []
        above = min(top, context)
        for left in range(0, width, columns):
            before = min(left, context)
            part_HWC = image_HWC[top - above : top + rows, left - before : left + columns + context]
            parts.append(_surprise(network, part_HWC, above)[:, before : before + columns])
        strips.append(torch.cat(parts, 1))
    return torch.cat(strips)


def _surprise(network: NCPN, image_HWC: Tensor, above: int = 0) -> Tensor:
    """Return `bits_map` of a tensor without its first rows, computed at once."""
    height, width = image_HWC.shape[:2]
    stride = network.config.model.stride
    weight = network.head.weight
    x_BCHW = from_uint8(image_HWC[None]).to(weight)
    x_BCHW = F.pad(x_BCHW, (0, -width % stride, 0, -height % stride), mode="replicate")
    sde = make_sde(network.config.sde)
    t_B = torch.full((1,), sde.time_of(NOISE), device=weight.device)
    x_BCHW = (x_BCHW * broadcast_to(sde.alpha(t_B), x_BCHW)).contiguous(memory_format=torch.channels_last)
    parameters_BPHW = network(x_BCHW, t_B)
    log_mixture_BHW = log_mixture(x_BCHW[:, :, above:], parameters_BPHW[:, :, above:], edges_B=None)
    return bits_per_dim(log_mixture_BHW[0], 1)[: height - above, :width]


def halved(image_HWC: Pixels) -> Pixels:
    """Return the image at half its size: means of 2x2 pixels, without an odd last row or column."""
    height, width = image_HWC.shape[0] // 2 * 2, image_HWC.shape[1] // 2 * 2
    blocks = image_HWC[:height, :width].reshape(height // 2, 2, width // 2, 2, 3)
    return np.rint(blocks.mean((1, 3), dtype=np.float32)).astype(np.uint8)


def scales_of(height: int, width: int, side: int) -> int:
    """Return how often an image can be looked at, at its own size and halved sizes, until it is below `side`."""
    return max(0, (min(height, width) // side).bit_length())


def window_starts(length: int, side: int, step: int) -> list[int]:
    """Return the first pixel of each window along a line, from edge to edge, at most `step` apart."""
    return starts(length, side, 1 + -(-(length - side) // step))


def measure_windows(bits_HW: Tensor, side: int, step: int) -> Tensor:
    """Return the mean bits/dim of each window, and the logarithm of their deviation over its pixels, fp64 [R, C, 2]."""
    bits_HW = bits_HW.double()
    tops, lefts = (window_starts(length, side, step) for length in bits_HW.shape)

    def sums(values_HW: Tensor) -> Tensor:
        total = F.pad(values_HW.cumsum(0).cumsum(1), (1, 0, 1, 0))
        columns = total[:, [left + side for left in lefts]] - total[:, lefts]
        return columns[[top + side for top in tops]] - columns[tops]

    count, mean = side * side, bits_HW.mean()
    mean_RC = sums(bits_HW) / count
    variance_RC = (sums((bits_HW - mean).square()) / count - (mean_RC - mean).square()).clamp(min=0)
    return torch.stack([mean_RC, torch.log(variance_RC.sqrt() + 1e-3)], 2)
