"""Maps of numbers as pictures: dark for low, bright for high. Knows no torch."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ncml.errors import InputError
from ncml.images import to_png

_STOPS = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], np.float32)
"""Five colours of matplotlib's inferno, evenly spaced: brightness rises evenly, also for the colour-blind."""


BAND = 256
"""Rows that are drawn at once."""

BRIGHTEST = 8.0
"""Bits per dimension that a map of pixels shows brightest: what a pixel costs that is not predicted at all."""

SIDE = 256
"""Pixels to which the map of a small picture is enlarged, at least."""


def heat(map_HW: NDArray[np.floating], low: float, high: float) -> NDArray[np.uint8]:
    """Colours from `low` (black) to `high` (pale yellow), clipped; uint8 [H, W, 3]."""
    ramp = np.linspace(0, 1, 256)
    table = np.stack([np.interp(ramp, np.linspace(0, 1, len(_STOPS)), channel) for channel in _STOPS.T], 1)
    colours = np.rint(table).astype(np.uint8)
    drawn_HWC = np.empty((*map_HW.shape, 3), np.uint8)
    for rows in _bands(map_HW):
        level_HW = (map_HW[rows] - low) / max(high - low, 1e-12)
        drawn_HWC[rows] = colours[np.rint(level_HW.clip(0, 1) * 255).astype(np.uint8)]
    return drawn_HWC


def of_pixels(map_HW: NDArray[np.floating]) -> NDArray[np.uint8]:
    """The map of a picture's bits per dimension, from 0 to `BRIGHTEST`, enlarged so that it can be seen."""
    times = -(-SIDE // min(map_HW.shape))
    return heat(map_HW, 0, BRIGHTEST).repeat(times, 0).repeat(times, 1)


def limits(map_HW: NDArray[np.floating], threshold: float | None) -> tuple[float, float]:
    """The scores between which a map of tiles is drawn: from its lowest to what is flagged, or else to its highest."""
    return float(map_HW.min()), threshold or float(map_HW.max())


def overlay(picture_HWC: NDArray[np.uint8], map_HW: NDArray[np.floating], low: float, high: float) -> NDArray[np.uint8]:
    """The heat over the picture in grey, half and half; uint8 [H, W, 3]."""
    drawn_HWC = np.empty_like(picture_HWC)
    for rows in _bands(map_HW):
        grey_HW1 = picture_HWC[rows].mean(2, keepdims=True, dtype=np.float32) / 2
        drawn_HWC[rows] = np.rint(grey_HW1 + heat(map_HW[rows], low, high) / 2)
    return drawn_HWC


def _bands(map_HW: NDArray[np.floating]) -> Iterator[slice]:
    """All rows, some at a time, for the sake of memory."""
    return (slice(top, top + BAND) for top in range(0, len(map_HW), BAND))


def frame(picture_HWC: NDArray[np.uint8], box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """A copy with a red frame inside the box (left, top, width, height).

    It is as thick as a picture of that size asks for, but leaves most of a small box to be seen.
    """
    left, top, width, height = box
    thick = max(1, min(round(min(picture_HWC.shape[:2]) / 200), min(width, height) // 8))
    framed = picture_HWC.copy()
    inside = framed[top : top + height, left : left + width]
    kept = inside[thick:-thick, thick:-thick].copy()
    inside[:] = (255, 32, 32)
    inside[thick:-thick, thick:-thick] = kept
    return framed


def save(path: Path, picture_HWC: NDArray[np.uint8], map_HW: NDArray[np.floating]) -> None:
    """Write `path` + .png and `path` + .npz (array `map`, float32 [H, W]), making the folder they are in."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + ".png").write_bytes(to_png(picture_HWC))
        np.savez_compressed(path.with_name(path.name + ".npz"), map=map_HW.astype(np.float32, copy=False))
    except OSError as error:
        raise InputError("map", f"{path} cannot be written: {error.strerror}.") from error
