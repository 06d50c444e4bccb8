"""Bits/dim of every pixel of an image of any size, by a network without attention, at several scales.

One pass covers the whole image; a large one is computed in strips of rows, each with enough rows above it that nothing
changes. Sums over windows come from cumulative sums.

Shapes: H rows and W columns of an image at one scale, R and C rows and columns of windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
from ncml.ood.conformal import Floats

Precision = Literal["fp32", "bf16"]
Pixels = NDArray[np.uint8]

NOISE = 2.5
"""Grey levels of noise at which the density is taken: single pixels are less surprising than without noise."""
STRIP_PIXELS = 1_500_000
"""Pixels of a strip: about 600 MB of activations."""


def context_rows(model: ModelConfig) -> int:
    """Return a number of rows above a pixel on which its parameters depend at most, a multiple of the stride.

    Every gated block has two convolutions, of two rows each, on either stream; a block of a level, and a change of
    resolution, count as many rows of the image as the level's stride.
    """
    last = len(model.levels) - 1
    rows = 2
    for index, level in enumerate(model.levels):
        pairs = 2 * level.blocks + (index < last)
        rows += 2**index * (4 * pairs + 4)
    stride = 2**last
    return -(-rows // stride) * stride


@torch.inference_mode()
def bits_map(
    network: NCPN, image_HWC: Pixels, *, precision: Precision = "fp32", strip_pixels: int = STRIP_PIXELS
) -> Tensor:
    """Return bits/dim of each pixel given those before it at `NOISE`, fp32 [H, W].

    The network must not have attention. Sides that are not multiples of its stride are extended with their last pixels.
    """
    height, width = image_HWC.shape[:2]
    stride = 2 ** (len(network.config.model.levels) - 1)
    weight = network.head.weight
    x_BCHW = from_uint8(torch.from_numpy(np.ascontiguousarray(image_HWC))[None]).to(weight)
    x_BCHW = F.pad(x_BCHW, (0, -width % stride, 0, -height % stride), mode="replicate")
    sde = make_sde(network.config.sde)
    t_B = torch.full((1,), sde.time_of(NOISE), device=weight.device)
    x_BCHW = (x_BCHW * broadcast_to(sde.alpha(t_B), x_BCHW)).contiguous(memory_format=torch.channels_last)
    context = context_rows(network.config.model)
    rows = max(stride, strip_pixels // x_BCHW.shape[3] // stride * stride)
    strips: list[Tensor] = []
    for top in range(0, x_BCHW.shape[2], rows):
        above = min(top, context)
        strip_BCHW = x_BCHW[:, :, top - above : top + rows]
        with torch.autocast(weight.device.type, torch.bfloat16, enabled=precision == "bf16"):
            parameters_BPHW = network(strip_BCHW, t_B)
        log_mixture_BHW = log_mixture(strip_BCHW[:, :, above:], parameters_BPHW[:, :, above:], edges_B=None)
        strips.append(bits_per_dim(log_mixture_BHW[0], 1))
    return torch.cat(strips)[:height, :width]


def halved(image_HWC: Pixels) -> Pixels:
    """Return the image at half its size: means of 2x2 pixels, without an odd last row or column."""
    height, width = image_HWC.shape[0] // 2 * 2, image_HWC.shape[1] // 2 * 2
    blocks = image_HWC[:height, :width].reshape(height // 2, 2, width // 2, 2, 3)
    return np.rint(blocks.mean((1, 3), dtype=np.float32)).astype(np.uint8)


def scales_of(height: int, width: int, side: int) -> int:
    """Return how often an image can be looked at, at its own size and halved sizes, until it is below `side`."""
    return max(0, (min(height, width) // side).bit_length())


@dataclass(frozen=True)
class Windows:
    """Measurements of square windows of an image, evenly spaced from edge to edge."""

    mean_RC: Floats
    """Bits/dim."""
    log_deviation_RC: Floats
    """Of bits/dim over the window's pixels."""


def measure_windows(bits_HW: Tensor, side: int, step: int) -> Windows:
    """Measure windows of `side` pixels, at most `step` apart."""
    bits = bits_HW.double().cpu().numpy()
    tops, lefts = (np.array(starts(length, side, 1 + -(-(length - side) // step))) for length in bits.shape)

    def sums(values_HW: Floats) -> Floats:
        total = np.pad(values_HW.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        below, above = total[tops + side], total[tops]
        return (below - above)[:, lefts + side] - (below - above)[:, lefts]

    count = side * side
    mean_RC = sums(bits) / count
    variance_RC = np.maximum(sums((bits - bits.mean()) ** 2) / count - (mean_RC - bits.mean()) ** 2, 0)
    return Windows(mean_RC, np.log(np.sqrt(variance_RC) + 1e-3))
