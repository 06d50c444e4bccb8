"""Heat maps: arrays of numbers as images, dark for low and bright for high. Does not import torch."""

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


def render_detection(
    image_HWC: NDArray[np.uint8], map_HW: NDArray[np.floating], box: tuple[int, int, int, int]
) -> NDArray[np.uint8]:
    """Return the image in grey with the local scores of a detector's view, over their own range, and its box."""
    return frame(overlay(image_HWC, map_HW, float(map_HW.min()), float(map_HW.max())), box)


def _bands(map_HW: NDArray[np.floating]) -> Iterator[slice]:
    return (slice(top, top + BAND) for top in range(0, len(map_HW), BAND))


def frame(image_HWC: NDArray[np.uint8], box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """Return a copy with a red frame inside the box (left, top, width, height).

    Its thickness grows with the image, but leaves most of a small box visible.
    """
    left, top, width, height = box
    thickness = max(1, min(round(min(image_HWC.shape[:2]) / 200), min(width, height) // 8))
    framed = image_HWC.copy()
    boxed = framed[top : top + height, left : left + width]
    interior = boxed[thickness:-thickness, thickness:-thickness].copy()
    boxed[:] = (255, 32, 32)
    boxed[thickness:-thickness, thickness:-thickness] = interior
    return framed


def save(path: Path, image_HWC: NDArray[np.uint8], map_HW: NDArray[np.floating]) -> None:
    """Write `path` + .png and `path` + .npz (array `map`, float32 [H, W]), creating their folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + ".png").write_bytes(to_png(image_HWC))
        np.savez_compressed(path.with_name(path.name + ".npz"), map=map_HW.astype(np.float32, copy=False))
    except OSError as error:
        raise InputError("map", f"{path} cannot be written: {error.strerror}.") from error
