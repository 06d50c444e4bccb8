"""Patches and areas of an image, described by hidden activations of EfficientNet-Lite0.

A patch is a cell of 8x8 pixels of the judged size. Its features are the outputs of three stages of the network: at a
stride of 4, averaged over the cell; at a stride of 8; and at a stride of 16, interpolated. They are not averaged over
neighbours, which would hide small marks.

An area is a cell of 32x32 pixels of a smaller size, with a longer side of 256 pixels, so that it shows a shape or a
whole region. Its features are those of an earlier stage at a stride of 16, averaged over the cell, and of one at a
stride of 32, which depends on what lies around the cell.

Shapes: N images, h and w rows and columns of patches, r and c of areas, P patches, F features of patches, G of areas.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ncml.images.resizing import Resize
from ncml.network import efficientnet
from ncml.network.efficientnet import EfficientNetLite0
from ncml.ood.conformal import Floats
from ncml.ood.views.view import Pixels

LEAST_SIDE, MOST_SIDE = 448, 640
"""Pixels of the longer side at which an image is judged at least and at most; in between it is its own."""
MOST_ENLARGED = 2
"""How many times images of a texture are enlarged at most: where they show little of it, its marks are large."""
STAGES = (1, 2, 4)
"""Stages of the network that describe patches, at strides 4, 8 and 16."""
AREA_STAGES = (3, 5)
"""Stages that describe areas, at strides 16 and 32."""
CELL, COARSE_CELL = 8, 16
"""Pixels of a cell, and of one of the coarsest stage, of which judged sizes are multiples."""
AREA_SIDE, AREA_CELL = 256, 32
"""Pixels of the longer side at which areas are described, and of an area, of which sides are multiples."""
MIN_DEVIATION = 1e-2
"""Smallest deviation of a feature, which images of one colour do not have at all."""
MAX_ASPECT_DIFFERENCE = 0.02
"""Relative difference of aspect ratios up to which images are judged at one size."""
TIMED_PASSES = 3
"""Passes that are timed: while other programs run, two differ by a third."""


class Candidates(NamedTuple):
    """What a score is the largest of, and the map of each: of one place, or of several sizes."""

    scores_K: Tensor
    maps_K: tuple[Tensor, ...]
    """[h, w] each, fp32; none for a score without a map."""

    @classmethod
    def of(cls, map_hw: Tensor) -> Candidates:
        """Return the largest value of a map."""
        return cls(map_hw.max()[None], (map_hw,))

    @classmethod
    def beyond(cls, typical_K2: Floats, maps_K: tuple[Tensor, ...]) -> Candidates:
        """Return by how much the largest value of each map exceeds that of good images (`typical`)."""
        largest_K = torch.stack([map_hw.max() for map_hw in maps_K]).double()
        own_K2 = torch.tensor(typical_K2.tolist(), dtype=torch.float64, device=largest_K.device)
        return cls((largest_K - own_K2[:, 0]) / own_K2[:, 1], maps_K)


def common_shape(shapes: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Return the median height and width of images of one aspect ratio; None if they differ."""
    aspects = np.array([height / width for height, width in shapes])
    if aspects.max() > aspects.min() * (1 + MAX_ASPECT_DIFFERENCE):
        return None
    return sorted(shapes)[len(shapes) // 2]


def part_size(height: int, width: int) -> tuple[int, int]:
    """Return the height and width at which an image of a part, of this size, is judged: multiples of 16."""
    return _judged_size(height, width, LEAST_SIDE)


def texture_size(height: int, width: int) -> tuple[int, int]:
    """Return the height and width at which an image of a texture, of this size, is judged: multiples of 16."""
    return _judged_size(height, width, min(LEAST_SIDE, MOST_ENLARGED * max(height, width)))


def _judged_size(height: int, width: int, least_side: int) -> tuple[int, int]:
    longer = max(height, width)
    scale = min(max(longer, least_side), MOST_SIDE) / longer
    rows, columns = (max(2, round(side * scale / COARSE_CELL)) for side in (height, width))
    return rows * COARSE_CELL, columns * COARSE_CELL


def area_size(height: int, width: int) -> tuple[int, int]:
    """Return the height and width at which the areas of an image of this size are described: multiples of 32."""
    scale = AREA_SIDE / max(height, width)
    rows, columns = (max(1, round(side * scale / AREA_CELL)) for side in (height, width))
    return rows * AREA_CELL, columns * AREA_CELL


def judged_resize(size: tuple[int, int]) -> Resize:
    """Return what brings an image to a height and width at which it is judged."""
    return Resize(*size, "BICUBIC", reducing_gap=3.0)


def patch_resize(size: tuple[int, int] | None, shape: tuple[int, int]) -> Resize:
    """Return what brings an image of a height and width (`shape`) to that at which its patches are compared.

    size: that of all images; None: they are textures of several aspect ratios, and each is judged at its own.
    """
    return judged_resize(size or texture_size(*shape))


def area_resize(size: tuple[int, int] | None, shape: tuple[int, int]) -> Resize:
    """Return what brings the same image to the size at which its areas are described."""
    return judged_resize(area_size(*(size or shape)))


@torch.inference_mode()
def patch_features(network: EfficientNetLite0, judged_HWC: Pixels | Tensor) -> Tensor:
    """Return the features of the patches of an image, whose sides are multiples of 16: [h, w, F]."""
    fine, middle, coarse = _activations(network, judged_HWC, STAGES)
    coarse = F.interpolate(coarse, size=middle.shape[-2:], mode="bilinear")
    return torch.cat([F.avg_pool2d(fine, 2), middle, coarse], 1)[0].permute(1, 2, 0)


@torch.inference_mode()
def area_features(network: EfficientNetLite0, small_HWC: Pixels | Tensor) -> Tensor:
    """Return the features of the areas of an image, whose sides are multiples of 32: [r, c, G]."""
    inner, outer = _activations(network, small_HWC, AREA_STAGES)
    return torch.cat([F.avg_pool2d(inner, 2), outer], 1)[0].permute(1, 2, 0)


def _activations(network: EfficientNetLite0, image_HWC: Pixels | Tensor, stages: tuple[int, ...]) -> list[Tensor]:
    pixels_HWC = image_HWC if isinstance(image_HWC, Tensor) else torch.from_numpy(np.array(image_HWC))
    pixels_BCHW = pixels_HWC.to(network.stem.conv.weight.device).permute(2, 0, 1)[None]
    return network.activations(pixels_BCHW.float(), stages)


def deviations(features: Iterable[Tensor]) -> Tensor:
    """Return the standard deviation of each feature over all patches, [F]."""
    sums_2F = torch.stack(
        [
            torch.stack([patches_PF.mean(0), patches_PF.square().mean(0)])
            for patches_PF in (features_hwF.flatten(0, 1).double() for features_hwF in features)
        ]
    ).mean(0)
    variance_F = sums_2F[1] - sums_2F[0] ** 2
    return variance_F.clamp(min=MIN_DEVIATION**2).sqrt().float()


def pass_seconds(image_HWC: Pixels, device: str) -> float:
    """Return the seconds of describing the patches of an image on this machine, the median of some passes."""
    network = efficientnet.load(device)
    judged_HWC = judged_resize(part_size(*image_HWC.shape[:2]))(image_HWC)
    patch_features(network, judged_HWC)  # the first also initialises kernels
    seconds: list[float] = []
    for _ in range(TIMED_PASSES):
        started = time.perf_counter()
        patch_features(network, judged_HWC).cpu()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))
