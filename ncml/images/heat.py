"""Heat maps: arrays of numbers as images, dark for low and bright for high. Does not import torch."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ncml.errors import InputError
from ncml.images.encoding import enlarge, to_png

_STOPS = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], np.float32)
"""Five evenly spaced colours of matplotlib's inferno: brightness rises evenly, also for colour-blind viewers."""

BAND = 256
"""Rows that are rendered at once, to bound memory."""

BRIGHTEST = 8.0
"""Bits per dimension of the brightest colour in a map of pixels: those of a pixel that is not predicted at all."""

BRIGHTEST_SHARE = 0.5
"""Least share of the way from the median of a map to its maximum from which it is brightest."""

MAX_NAME_BYTES = 255
"""Bytes of the name of a file on common file systems."""

FLAGGED, UNFLAGGED = (255, 32, 32), (150, 150, 150)
"""Colours of the box of an image that is flagged, and of one that is not."""


def render(map_HW: NDArray[np.floating], low: float, high: float) -> NDArray[np.uint8]:
    """Colour a map from `low` (black) to `high` (pale yellow), clipped; uint8 [H, W, 3]."""
    ramp = np.linspace(0, 1, 256)
    table = np.stack([np.interp(ramp, np.linspace(0, 1, len(_STOPS)), channel) for channel in _STOPS.T], 1)
    colours = np.rint(table).astype(np.uint8)
    rendered_HWC = np.empty((*map_HW.shape, 3), np.uint8)
    for rows in _bands(map_HW):
        level_HW = (map_HW[rows] - low) / max(high - low, 1e-12)
        rendered_HWC[rows] = colours[np.rint(level_HW.clip(0, 1) * 255).astype(np.uint8)]
    return rendered_HWC


def render_pixel_map(map_HW: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Render an image's map of bits per dimension, from 0 to `BRIGHTEST`, enlarged."""
    return enlarge(render(map_HW, 0, BRIGHTEST))


def score_range(map_HW: NDArray[np.floating], threshold: float | None) -> tuple[float, float]:
    """Return the range in which a map of tiles is rendered: from its minimum to the threshold, or else its maximum.

    If the whole map is above the threshold, all of it is bright.
    """
    high = float(map_HW.max()) if threshold is None else threshold
    return min(float(map_HW.min()), high), high


def overlay(image_HWC: NDArray[np.uint8], map_HW: NDArray[np.floating], low: float, high: float) -> NDArray[np.uint8]:
    """Mix the rendered map and the image in grey in equal parts; uint8 [H, W, 3]."""
    mixed_HWC = np.empty_like(image_HWC)
    for rows in _bands(map_HW):
        grey_HW1 = image_HWC[rows].mean(2, keepdims=True, dtype=np.float32) / 2
        mixed_HWC[rows] = np.rint(grey_HW1 + render(map_HW[rows], low, high) / 2)
    return mixed_HWC


def detection_range(grid_hw: NDArray[np.floating], score: float, threshold: float) -> tuple[float, float]:
    """Return the range in which the map of a detector's view is rendered, so that colours mean the same in all images.

    Local scores of views have no common unit, so colours follow the score of the image, for which the map's maximum
    counts: it is black at 0, where no view exceeds its median of good images, and brightest from the threshold on. The
    map's median is black, and what lies between is interpolated, but brightest only from `BRIGHTEST_SHARE` on.
    """
    if not grid_hw.size:
        return 0.0, 1.0
    median, largest = float(np.median(grid_hw)), float(grid_hw.max())
    if score > 0:
        return median, median + (largest - median) * max(BRIGHTEST_SHARE, threshold / score)
    return largest, largest + 1


def render_detection(
    image_HWC: NDArray[np.uint8],
    map_HW: NDArray[np.floating],
    colours: tuple[float, float],
    box: tuple[int, int, int, int],
    is_flagged: bool,
) -> NDArray[np.uint8]:
    """Return the image in grey with the local scores of a detector's view, and its box, red if the image is flagged.

    colours: the local scores that are darkest and brightest (`detection_range`).
    """
    return frame(overlay(image_HWC, map_HW, *colours), box, FLAGGED if is_flagged else UNFLAGGED)


def _bands(map_HW: NDArray[np.floating]) -> Iterator[slice]:
    return (slice(top, top + BAND) for top in range(0, len(map_HW), BAND))


def frame(
    image_HWC: NDArray[np.uint8], box: tuple[int, int, int, int], colour: tuple[int, int, int] = FLAGGED
) -> NDArray[np.uint8]:
    """Return a copy with a frame inside the box (left, top, width, height).

    Its thickness grows with the image, but leaves most of a small box visible.
    """
    left, top, width, height = box
    thickness = max(1, min(round(min(image_HWC.shape[:2]) / 200), min(width, height) // 8))
    framed = image_HWC.copy()
    boxed = framed[top : top + height, left : left + width]
    interior = boxed[thickness:-thickness, thickness:-thickness].copy()
    boxed[:] = colour
    boxed[thickness:-thickness, thickness:-thickness] = interior
    return framed


def save(path: Path, image_HWC: NDArray[np.uint8], map_HW: NDArray[np.floating]) -> None:
    """Write `path` + .png and `path` + .npz (array `map`, float32 [H, W]), creating their folder.

    The SHA-256 digest takes the place of a name that leaves no room for the suffix.
    """
    name = os.fsencode(path.name)
    if len(name) + len(".png") > MAX_NAME_BYTES:
        path = path.with_name(hashlib.sha256(name).hexdigest())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + ".png").write_bytes(to_png(image_HWC))
        np.savez_compressed(path.with_name(path.name + ".npz"), map=map_HW.astype(np.float32, copy=False))
    except OSError as error:
        raise InputError("map", f"{path} cannot be written: {error.strerror}.") from error
