"""The geometry of tiles: how a large picture is cut, and the map of its tiles' scores. Knows no torch and no model.

Shapes: H rows and W columns of the picture; R rows and C columns of tiles, which overlap.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ncml.errors import InputError

Box = tuple[int, int, int, int]
"""(left, top, width, height) in pixels of the picture."""

Scores = NDArray[np.float32]


@dataclass(frozen=True)
class Cut:
    """How pictures are cut: tiles of `height` x `width` pixels, each half over the next, and flush with every edge."""

    height: int
    width: int

    @classmethod
    def of(cls, height: int, width: int, side: int | None = None) -> Cut:
        """Tiles for a model of that size, resized to it: `side` pixels (the shorter one); None is the model's own.

        Raises `InputError` for tiles smaller than the model.
        """
        least = min(height, width)
        side = least if side is None else side
        if side < least:
            raise InputError("tile_size", f"a tile has at least the model's {least} pixels, not {side}.")
        return cls(round(side * height / least), round(side * width / least))

    @classmethod
    def asked(cls, height: int, width: int, side: int | None, calibrated: Cut | None) -> Cut:
        """The same where tiles may have been calibrated: they have one size then, and no other may be asked for."""
        if calibrated is None:
            return cls.of(height, width, side)
        if side is not None and cls.of(height, width, side) != calibrated:
            size = f"{calibrated.width} x {calibrated.height}"
            raise InputError(
                "tile_size", f"tiles were calibrated at {size} pixels; leave their size out, or calibrate."
            )
        return calibrated

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles in a picture; raises `InputError` for one that is smaller than a tile."""
        if self.height > height or self.width > width:
            raise InputError(
                "image",
                f"a picture of {width} x {height} pixels is smaller than a tile of {self.width} x {self.height}: "
                "score it without tiles.",
            )
        return len(_starts(height, self.height)), len(_starts(width, self.width))

    def corners(self, height: int, width: int) -> list[tuple[int, int]]:
        """(top, left) of every tile of a picture, in raster order; raises `InputError` as `grid` does."""
        self.grid(height, width)
        return [(top, left) for top in _starts(height, self.height) for left in _starts(width, self.width)]


def least_side(model_hw: tuple[int, int], picture_hw: tuple[int, int], most: int) -> int | None:
    """The smallest side that cuts a picture into at most `most` tiles for a model; None where there is none."""
    H, W = picture_hw

    def cut(side: int) -> Cut:
        return Cut.of(*model_hw, side)

    def few(side: int) -> bool:
        return len(_starts(H, cut(side).height)) * len(_starts(W, cut(side).width)) <= most

    sides = range(min(model_hw), min(H, W) + 1)
    found = bisect.bisect_left(sides, True, key=few)  # larger tiles are never more
    inside = found < len(sides) and cut(sides[found]).height <= H and cut(sides[found]).width <= W
    return sides[found] if inside else None


def blend(scores_RC: Scores, cut: Cut, height: int, width: int) -> Scores:
    """The tiles' scores, mixed where they overlap, as a map of the picture's own size [H, W].

    A tile counts most at its centre: its weight falls towards its edges, and weights add up to 1 at every pixel.
    """
    across_WR = _spread(scores_RC.T, cut.width, width)
    return _spread(across_WR.T, cut.height, height)


def _spread(scores_NK: Scores, side: int, length: int) -> Scores:
    """N tiles along a line of `length` pixels, K lines at once: [length, K]."""
    ramp = (1 - np.abs(np.arange(side) + 0.5 - side / 2) / (side / 2) * (1 - 1 / side)).astype(np.float32)
    spread = np.zeros((length, scores_NK.shape[1]), np.float32)
    weight = np.zeros((length, 1), np.float32)
    for start, score_K in zip(_starts(length, side), scores_NK, strict=True):
        spread[start : start + side] += ramp[:, None] * score_K
        weight[start : start + side] += ramp[:, None]
    spread /= weight
    return spread


def _starts(length: int, side: int) -> list[int]:
    return [*range(0, length - side, max(1, side // 2)), length - side]
