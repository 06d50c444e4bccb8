"""Variations of good parts that a line brings later: a label, a moved lamp, a batch of another colour, a stain.

None of them is a defect, though a detector that never saw one flags it (`benchmarks/reviews.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy import ndimage

from .canvas import Canvas, Light, box, turned
from .marks import stain

Rng = np.random.Generator
Variation = Callable[[Canvas, Rng, Light], Light]
"""Change the surface, and return the light in which it is photographed."""

SECTOR = 0.3
"""Half the angle, seen from the middle of the part, in which a label lies: at one place of a round part, too."""


def label(canvas: Canvas, rng: Rng, light: Light) -> Light:
    """A white label with a number, glued by hand at one place of the part."""
    angle = np.arctan2(canvas.v, canvas.u)
    inside = np.pad((canvas.part > 0.95) & (np.abs(angle) < SECTOR), 1)
    depth = ndimage.distance_transform_edt(inside)[1:-1, 1:-1]
    place = np.unravel_index(int(np.argmax(depth)), canvas.shape)
    u, v = canvas.u[place] + rng.normal(0, 0.006), canvas.v[place] + rng.normal(0, 0.006)
    tilt = float(rng.normal(0, 0.05))
    outline = box(*turned(canvas.u - u, canvas.v - v, tilt), 0.055, 0.035, 0.006)
    canvas.paint(outline, (0.72, 0.71, 0.67), gloss=0.3)
    canvas.stamp(str(rng.integers(100, 1000)), float(u), float(v), 0.035, (0.05, 0.05, 0.06), angle=tilt)
    return light


def lamp(canvas: Canvas, rng: Rng, light: Light) -> Light:
    """A lamp that was moved, and shines brighter."""
    return replace(light, azimuth=light.azimuth + 1.2, exposure=1.15 * light.exposure)


def batch(canvas: Canvas, rng: Rng, light: Light) -> Light:
    """A darker and cooler colour of the material."""
    canvas.albedo *= 1 - canvas.part[..., None] * np.array([0.18, 0.09, 0.0], np.float32)
    return light


def allowed_stain(canvas: Canvas, rng: Rng, light: Light) -> Light:
    """A soft dark stain anywhere on the part, as large as those that count as defects, that is allowed from now on."""
    stain(canvas, rng)
    return light


VARIATIONS: dict[str, Variation] = {"label": label, "lamp": lamp, "batch": batch, "stain": allowed_stain}
