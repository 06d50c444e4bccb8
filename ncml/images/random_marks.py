"""Marks and stains of random sizes and contrasts, which are put into good images to learn what they look like.

Unlike the alterations that measure power, marks of a kind vary in size, and are lighter or darker than what they cover.

Shapes: H rows and W columns of an image, K kinds of marks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ncml.images.alterations import Floats, Pixels, cover, offsets

CONTRAST, STAIN_CONTRAST = (15.0, 60.0), (10.0, 45.0)
"""Least and largest difference from what a mark or the middle of a stain covers, in grey levels."""
LEAST_TINT = 0.6
"""A stain changes each colour by this share of its contrast at least."""
MAX_SHARE = 0.25
"""A mark is at most this share of the image's height and width."""


def add_marks(
    image_HWC: Pixels,
    rng: np.random.Generator,
    count: int,
    judged_HW: NDArray[np.bool_] | None = None,
    kinds: Sequence[str] | None = None,
) -> tuple[Pixels, NDArray[np.float32]]:
    """Return an image with this number of marks, and the share of each kind at each pixel, [K, H, W].

    judged_HW: the pixels that marks change, at least one; None: all.
    kinds: of `KINDS` and `STAIN`; None: `KINDS`.
    The share is 0 where black or white leaves no room for half of the change.
    """
    height, width = image_HWC.shape[:2]
    most = int(MAX_SHARE * min(height, width))
    marked_HWC = image_HWC.copy()
    kinds = KINDS if kinds is None else kinds
    shares_KHW = np.zeros((len(kinds), height, width), np.float32)
    for number in range(count):
        kind = number % len(kinds)
        is_stain = kinds[kind] == STAIN
        share_HW = _DRAW[kinds[kind]](rng, most)
        side = len(share_HW)
        contrast = rng.uniform(*(STAIN_CONTRAST if is_stain else CONTRAST)) * rng.choice([-1, 1])
        contrast_C = contrast * (rng.uniform(LEAST_TINT, 1, 3) if is_stain else np.ones(3))
        if judged_HW is None:
            top, left = (int(rng.integers(room - side + 1)) for room in (height, width))
        else:
            top, left = _around(int(rng.choice(np.flatnonzero(judged_HW))), side, height, width)
        place = slice(top, top + side), slice(left, left + side)
        if judged_HW is not None:
            share_HW = np.where(judged_HW[place], share_HW, 0)
        before_HWC, change_HWC = marked_HWC[place], contrast_C * share_HW[..., None]
        after_HWC = np.clip(np.rint(before_HWC + change_HWC), 0, 255)
        change_HW = np.abs(after_HWC - before_HWC).max(2) + 0.5  # grey levels are rounded
        marked_HWC[place] = after_HWC
        is_seen_HW = change_HW >= np.abs(change_HWC).max(2) / 2
        shares_KHW[kind][place] = np.maximum(shares_KHW[kind][place], np.where(is_seen_HW, np.abs(share_HW), 0))
    return marked_HWC, shares_KHW


def _around(pixel: int, side: int, height: int, width: int) -> tuple[int, int]:
    """Return the top and left of a square inside an image, with a pixel in its middle unless that is near the edge."""
    row, column = divmod(pixel, width)
    return min(max(row - side // 2, 0), height - side), min(max(column - side // 2, 0), width - side)


def _line(rng: np.random.Generator, most: int) -> Floats:
    """Return the share of the contrast at each pixel of a square, of at most this side: a bent line."""
    width, length, bend = rng.uniform(1, 3.5), rng.uniform(15, 110), rng.uniform(-0.008, 0.008)
    along, across = _turned(min(most, int(length + width) + 2), rng)
    beyond = np.maximum(np.abs(along) - (length - width) / 2, 0)
    return cover(np.hypot(beyond, across + bend * along**2) - width / 2)


def _spot(rng: np.random.Generator, most: int) -> Floats:
    """A disc."""
    radius = rng.uniform(2, 10)
    return cover(np.hypot(*_turned(min(most, int(2 * radius) + 3), rng)) - radius)


def _pit(rng: np.random.Generator, most: int) -> Floats:
    """A bowl, dark on the side of the light and light on the other."""
    radius = rng.uniform(3, 14)
    along, across = _turned(min(most, int(2 * radius) + 3), rng)
    return np.clip(along / radius, -1, 1) * cover(np.hypot(along, across) - radius)


def _turned(side: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Return the pixels of a square from its middle, along a random direction and across it."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = offsets(side)
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _stain(rng: np.random.Generator, most: int) -> Floats:
    """An ellipse that fades towards its edge."""
    radius, stretch = rng.uniform(8, 36), rng.uniform(0.7, 1.4)
    along, across = _turned(min(most, int(2 * radius) + 3), rng)
    distance = np.hypot(along * stretch, across / stretch) / radius
    return np.cos(np.minimum(distance, 1) * np.pi / 2) ** 2


STAIN = "stain"
_DRAW = {"line": _line, "spot": _spot, "pit": _pit, STAIN: _stain}
KINDS = "line", "spot", "pit"
