"""Four orientations of an image in the raster scan, so that each half of it comes first in one of them.

A network conditioned on the orientation has learned all four, so it completes every half exactly: the known half is a
prefix, and the other half is sampled in raster order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ncml.limits import KEEPS

# In orientation i the half `KEEPS[i]` comes first: identity, vertical flip, transpose, both.


def orient(x_BCHW: Tensor, orientation: int) -> Tensor:
    """Turn images so that the half `KEEPS[orientation]` becomes the top one. [B, C, H, W] -> [B, C, H, W] or W x H."""
    if orientation >= 2:
        x_BCHW = x_BCHW.transpose(2, 3)
    return x_BCHW.flip(2) if orientation % 2 else x_BCHW


def restore(x_BCHW: Tensor, orientation: int) -> Tensor:
    """Invert `orient`."""
    if orientation % 2:
        x_BCHW = x_BCHW.flip(2)
    return x_BCHW.transpose(2, 3) if orientation >= 2 else x_BCHW


def orient_each(x_BCHW: Tensor, orientation_B: Tensor) -> Tensor:
    """Turn each image of a batch of square images to its own orientation."""
    x_BCHW = x_BCHW.clone()
    for orientation in range(1, len(KEEPS)):
        mask_B = orientation_B == orientation
        if mask_B.any():
            x_BCHW[mask_B] = orient(x_BCHW[mask_B], orientation)
    return x_BCHW


def draw_orientations(count: int, probability: float, square: bool, generator: torch.Generator) -> Tensor:
    """Draw orientations for a training batch: not the identity with this probability. [B] int64.

    Images that are not square change shape when transposed, so a batch of them is turned as a whole.
    """
    draws = count if square else 1
    orientation_B = torch.randint(1, len(KEEPS), (draws,), generator=generator)
    orientation_B[torch.rand(draws, generator=generator) >= probability] = 0
    return orientation_B.expand(count)
