"""The geometry of tiles in a large image, and the map of their scores. Does not import torch.

Shapes: H rows and W columns of the image; R rows and C columns of tiles, which overlap.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ncml.errors import InputError


class Box(NamedTuple):
    """A part of an image, in pixels."""

    left: int
    top: int
    width: int
    height: int


Scores = NDArray[np.float32]


@dataclass(frozen=True)
class TileSize:
    """Height and width of tiles in pixels; neighbours overlap by half or more, and the outer ones end at the edges."""

    height: int
    width: int
    is_even: bool = True
    """Whether all neighbours overlap equally; if not, the last two may nearly coincide, as in format 1 calibrations."""

    @classmethod
    def for_model(cls, height: int, width: int, side: int | None = None) -> TileSize:
        """Return the tiles of a model of this size, whose shorter side has `side` pixels; None: the model's own side.

        Raises `InputError` for tiles smaller than the model.
        """
        model_side = min(height, width)
        side = model_side if side is None else side
        if side < model_side:
            raise InputError(
                "tile_size", f"the side of a tile must be at least the model's {model_side} pixels, not {side}."
            )
        return cls(round(side * height / model_side), round(side * width / model_side))

    @classmethod
    def resolve(cls, height: int, width: int, side: int | None, calibrated: TileSize | None) -> TileSize:
        """Return the tiles for a requested side and a calibration of tiles, if there is one.

        Raises `InputError` for tiles smaller than the model, or of another size than the calibrated ones.
        """
        if calibrated is None:
            return cls.for_model(height, width, side)
        requested = cls.for_model(height, width, side)
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
        return len(self.starts(height, self.height)), len(self.starts(width, self.width))

    def corners(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return (top, left) of every tile of an image, in raster order; raises as `grid_shape` does."""
        self.grid_shape(height, width)
        tops, lefts = self.starts(height, self.height), self.starts(width, self.width)
        return [(top, left) for top in tops for left in lefts]

    def starts(self, length: int, side: int) -> list[int]:
        """Return the first pixel of each tile along a side of the image: `length` pixels, `side` of them per tile."""
        room = length - side
        if not self.is_even:
            return [*range(0, room, max(1, side // 2)), room]
        steps = max(1, -(-room // -(-side // 2)))
        return [step * room // steps for step in range(steps + 1)] if room else [0]


def smallest_tile_side(model_hw: tuple[int, int], image_hw: tuple[int, int], max_tiles: int) -> int | None:
    """Return the smallest side at which an image has at most `max_tiles` tiles; None if there is no such side."""
    H, W = image_hw

    def has_few_tiles(side: int) -> bool:
        tile = TileSize.for_model(*model_hw, side)
        heights, widths = tile.starts(H, min(tile.height, H)), tile.starts(W, min(tile.width, W))
        return len(heights) * len(widths) <= max_tiles  # also where the tile is larger than the image

    sides = range(min(model_hw), min(H, W) + 1)
    index = bisect.bisect_left(sides, True, key=has_few_tiles)  # the number of tiles falls with their side
    if index == len(sides):
        return None
    tile = TileSize.for_model(*model_hw, sides[index])
    return sides[index] if tile.height <= H and tile.width <= W else None


def blend(scores_RC: Scores, tile: TileSize, height: int, width: int) -> Scores:
    """Blend the tiles' scores where they overlap into a map of the image's size [H, W].

    The weight of a tile falls from its centre to its edges, and weights add up to 1 at every pixel.
    """
    across_WR = _spread(scores_RC.T, tile.starts(width, tile.width), tile.width, width)
    return _spread(across_WR.T, tile.starts(height, tile.height), tile.height, height)


def _spread(scores_NK: Scores, starts: list[int], side: int, length: int) -> Scores:
    """Blend N tiles along a line of `length` pixels, for K lines at once: [length, K]."""
    ramp = (1 - np.abs(np.arange(side) + 0.5 - side / 2) / (side / 2) * (1 - 1 / side)).astype(np.float32)
    spread = np.zeros((length, scores_NK.shape[1]), np.float32)
    weight = np.zeros((length, 1), np.float32)
    for start, score_K in zip(starts, scores_NK, strict=True):
        spread[start : start + side] += ramp[:, None] * score_K
        weight[start : start + side] += ramp[:, None]
    spread /= weight
    return spread
