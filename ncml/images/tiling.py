"""The geometry of tiles in a large image, and the map of their scores. Does not import torch.

Shapes: H rows and W columns of the image; R rows and C columns of tiles, which overlap.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ncml.errors import InputError


class Box(NamedTuple):
    """A part of an image, in pixels."""

    left: int
    top: int
    width: int
    height: int

    @classmethod
    def around(cls, mask_HW: NDArray[np.bool_]) -> Box:
        """Return the smallest box that has all True pixels of a mask; of width and height 0 if there are none."""
        rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
        if not len(rows):
            return cls(0, 0, 0, 0)
        left, top = int(columns[0]), int(rows[0])
        return cls(left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top)


Scores = NDArray[np.float32]

OVERLAP = 0.5
"""Default share of a tile that neighbours have in common. A smaller one costs less, and detects less
(docs/report/defects.md).
"""

MAX_OVERLAP = 0.75

BAND_PIXELS = 2**18
"""Pixels of a map that are computed at once."""


@dataclass(frozen=True)
class Tiling:
    """How an image is split into tiles: all neighbours overlap equally, and the outer tiles end at the edges."""

    height: int
    """Rows of a tile."""
    width: int
    """Columns of a tile."""
    overlap: float = OVERLAP
    """Share of a tile that neighbours have in common, or more, up to rounding."""

    def __post_init__(self) -> None:
        """Raise `InputError` for an overlap that is not from 0 to .75."""
        if not 0 <= self.overlap <= MAX_OVERLAP:
            raise InputError(
                "tile_overlap", f"the overlap of tiles must be from 0 to {MAX_OVERLAP}, not {self.overlap:g}."
            )

    @classmethod
    def for_model(cls, height: int, width: int, side: int | None = None, overlap: float = OVERLAP) -> Tiling:
        """Return the tiles of a model of this size, whose shorter side has `side` pixels; None: the model's own side.

        Raises `InputError` for tiles smaller than the model, and for an overlap that is not from 0 to .75.
        """
        model_side = min(height, width)
        side = model_side if side is None else side
        if side < model_side:
            raise InputError(
                "tile_size", f"the side of a tile must be at least the model's {model_side} pixels, not {side}."
            )
        return cls(round(side * height / model_side), round(side * width / model_side), overlap)

    @classmethod
    def resolve(cls, height: int, width: int, side: int | None, calibrated: Tiling | None) -> Tiling:
        """Return the tiles for a requested side and a calibration of tiles, if there is one.

        Raises `InputError` for tiles smaller than the model, or of another size than the calibrated ones.
        """
        requested = cls.for_model(height, width, side)
        if calibrated is None:
            return requested
        if side is not None and (requested.height, requested.width) != (calibrated.height, calibrated.width):
            size = f"{calibrated.width} x {calibrated.height}"
            raise InputError(
                "tile_size", f"tiles were calibrated at {size} pixels; omit the tile size, or calibrate again."
            )
        return calibrated

    def grid_shape(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of tiles in an image; raises `InputError` for one that is smaller than a tile."""
        if self.height > height or self.width > width:
            raise InputError(
                "image",
                f"an image of {width} x {height} pixels is smaller than a tile of {self.width} x {self.height}: "
                "score it without tiles.",
            )
        return self.count_along(height, self.height), self.count_along(width, self.width)

    def corners(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return (top, left) of every tile of an image, in raster order; raises as `grid_shape` does."""
        rows, columns = self.grid_shape(height, width)
        tops, lefts = starts(height, self.height, rows), starts(width, self.width, columns)
        return [(top, left) for top in tops for left in lefts]

    def count_along(self, length: int, side: int) -> int:
        """Return the smallest number of tiles of `side` pixels that cover a line with this overlap."""
        max_step = math.ceil(side * (1 - self.overlap) - 1e-9)
        return 1 + max(0, -(-(length - side) // max_step))


def starts(length: int, side: int, count: int) -> list[int]:
    """Return the first pixel of each of `count` tiles of `side` pixels, evenly spaced along a line of `length`."""
    return [index * (length - side) // max(1, count - 1) for index in range(count)]


def smallest_tile_side(model_hw: tuple[int, int], image_hw: tuple[int, int], max_tiles: int) -> int | None:
    """Return the smallest side at which an image has at most `max_tiles` tiles; None if there is no such side."""
    H, W = image_hw

    def has_few_tiles(side: int) -> bool:
        tile = Tiling.for_model(*model_hw, side)
        return tile.count_along(H, tile.height) * tile.count_along(W, tile.width) <= max_tiles

    sides = range(min(model_hw), min(H, W) + 1)
    index = bisect.bisect_left(sides, True, key=has_few_tiles)  # the number of tiles falls with their side
    if index == len(sides):
        return None
    tile = Tiling.for_model(*model_hw, sides[index])
    return sides[index] if tile.height <= H and tile.width <= W else None


def blend(scores_RC: Scores, tile: Tiling, height: int, width: int) -> Scores:
    """Blend the tiles' scores where they overlap into a map of the image's size [H, W].

    The weight of a tile falls from its centre to its edges, and weights add up to 1 at every pixel.
    """
    map_HW = np.empty((height, width), np.float32)
    top = 0
    for band_HW in blend_bands(scores_RC, tile, height, width):
        map_HW[top : top + len(band_HW)] = band_HW
        top += len(band_HW)
    return map_HW


def blend_bands(scores_RC: Scores, tile: Tiling, height: int, width: int) -> Iterator[Scores]:
    """Yield the map of `blend` in bands of rows, about `BAND_PIXELS` each, from top to bottom."""
    lefts = starts(width, tile.width, scores_RC.shape[1])
    tops = starts(height, tile.height, len(scores_RC))
    band_rows = max(1, BAND_PIXELS // width)
    for top in range(0, height, band_rows):
        bottom = min(top + band_rows, height)
        within = slice(bisect.bisect_right(tops, top - tile.height), bisect.bisect_left(tops, bottom))
        across_WR = _spread(scores_RC[within].T, lefts, tile.width, range(width))
        yield _spread(across_WR.T, tops[within], tile.height, range(top, bottom))


def stretch_bands(grid_hw: Scores, covered: Box, height: int, width: int) -> Iterator[Scores]:
    """Yield a map of an image's size in bands of rows: a grid, resized to the part that it covers; 0 elsewhere."""
    h, w = grid_hw.shape
    grid = Image.fromarray(np.ascontiguousarray(grid_hw, np.float32)) if grid_hw.size else None
    across, band_rows = slice(covered.left, covered.left + covered.width), max(1, BAND_PIXELS // width)
    for top in range(0, height, band_rows):
        band_HW = np.zeros((min(band_rows, height - top), width), np.float32)
        first, last = max(top, covered.top), min(top + len(band_HW), covered.top + covered.height)
        if grid is not None and first < last:
            part = (0, (first - covered.top) * h / covered.height, w, min(h, (last - covered.top) * h / covered.height))
            resized = grid.resize((covered.width, last - first), Image.Resampling.BILINEAR, box=part)
            band_HW[first - top : last - top, across] = np.asarray(resized)
        yield band_HW


def _spread(scores_NK: Scores, first_pixels: Sequence[int], side: int, part: range) -> Scores:
    """Blend N tiles of `side` pixels along part of a line, for K lines at once: [len(part), K]."""
    ramp = (1 - np.abs(np.arange(side) + 0.5 - side / 2) / (side / 2) * (1 - 1 / side)).astype(np.float32)
    spread = np.zeros((len(part), scores_NK.shape[1]), np.float32)
    weight = np.zeros((len(part), 1), np.float32)
    for first, score_K in zip(first_pixels, scores_NK, strict=True):
        begin, end = max(first, part.start), min(first + side, part.stop)
        ramp_N1 = ramp[begin - first : end - first, None]
        spread[begin - part.start : end - part.start] += ramp_N1 * score_K
        weight[begin - part.start : end - part.start] += ramp_N1
    spread /= weight
    return spread
