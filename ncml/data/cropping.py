"""Random crops of large images, at the scale at which tiles of them are judged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ncml import images
from ncml.data.sources import Row
from ncml.errors import InputError
from ncml.images.tiling import Tiling

MAX_CROPS, MIN_CROPS, TOTAL_CROPS = 64, 4, 50_000
"""Maximum and minimum crops per image, and crops in total, more than a run of the recipe `detector` draws."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Cropping:
    """How crops are cut from an image."""

    tile: Tiling
    """Height and width of a crop in pixels of the image."""
    count: int
    """Number of crops per image."""

    def cut(self, image_HWC: Pixels, name: str, occurrence: int, height: int, width: int) -> list[Pixels]:
        """Return crops at random positions, resized to this size; raise `InputError` for an image smaller than a crop.

        name: the name of the image in its source, and `occurrence` the number of earlier images of that name, on which
            the positions depend: so they do not depend on files that are not images.
        """
        H, W = image_HWC.shape[:2]
        crop_height, crop_width = self.tile.height, self.tile.width
        if crop_height > H or crop_width > W:
            raise InputError(
                "crop",
                f"{name} has {W} x {H} pixels, less than a crop of {crop_width} x {crop_height}: use a smaller --crop.",
            )
        rng = np.random.default_rng([occurrence, *name.encode()])
        tops, lefts = (rng.integers(0, room + 1, self.count) for room in (H - crop_height, W - crop_width))
        return [
            images.resize_to(image_HWC[top : top + crop_height, left : left + crop_width], height, width)
            for top, left in zip(tops, lefts, strict=True)
        ]


def crops_per_image(image_count: int) -> int:
    """Return how many crops are cut from each of this many images."""
    return max(MIN_CROPS, min(MAX_CROPS, TOTAL_CROPS // max(1, image_count)))


def image_readers(rows: Iterable[Row]) -> list[Callable[[], Pixels]]:
    """Return functions that open images, each at its own size."""
    return [functools.partial(images.open_image, row.data, field="data") for row in rows]
