"""Marks that spoil a part: scratches, spots, pits, stains, chipped edges and fibres, with sizes in pixels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import ndimage

from .canvas import Array, Canvas, circle, clouds, line

Rng = np.random.Generator
Mark = Callable[[Canvas, Rng], dict[str, float]]
"""Add the mark to the surface and return its sizes in pixels."""


def _place(canvas: Canvas, rng: Rng, margin: float) -> tuple[float, float]:
    """Return a random point of the part, `margin` pixels from the edge of the image."""
    inside = canvas.part > 0.95
    border = round(margin)
    inside[:border] = inside[-border:] = False
    inside[:, :border] = inside[:, -border:] = False
    rows, columns = np.nonzero(inside)
    index = int(rng.integers(len(rows)))
    return float(canvas.x[0, columns[index]]), float(canvas.y[rows[index], 0])


def _tint(canvas: Canvas, rng: Rng, share: Array, *, dark: bool | None = None) -> None:
    """Darken or lighten a share of the surface."""
    dark = bool(rng.random() < 0.5) if dark is None else dark
    colour = canvas.albedo * rng.uniform(0.25, 0.55) if dark else canvas.albedo + rng.uniform(0.12, 0.3)
    canvas.albedo += (share * canvas.part)[..., None] * (colour - canvas.albedo).astype(np.float32)


def scratch(canvas: Canvas, rng: Rng) -> dict[str, float]:
    """A line, 1 to 3 pixels wide and 25 to 120 long, slightly bent."""
    width, length = rng.uniform(1, 3), rng.uniform(25, 120)
    x, y = _place(canvas, rng, 8)
    points, angle = [(x, y)], rng.uniform(0, 2 * np.pi)
    for _ in range(4):
        angle += rng.normal(0, 0.12)
        step = length / 4 * canvas.pixel
        points.append((points[-1][0] + step * np.cos(angle), points[-1][1] + step * np.sin(angle)))
    distance = line(canvas.x, canvas.y, points, width / 2 * canvas.pixel)
    share = canvas.cover(distance)
    _tint(canvas, rng, share)
    canvas.height -= share * canvas.part * 1.2 * canvas.pixel
    return {"width": width, "length": length}


def _blob(canvas: Canvas, rng: Rng, radius: float) -> Array:
    x, y = _place(canvas, rng, radius + 2)
    u, v = canvas.x - x, canvas.y - y
    angle = np.arctan2(v, u)
    wobble = sum(rng.normal(0, 0.10) * np.cos(k * angle + rng.uniform(0, 6)) for k in (2, 3, 4))
    return (circle(u, v, radius * canvas.pixel) - radius * canvas.pixel * wobble).astype(np.float32)


def spot(canvas: Canvas, rng: Rng) -> dict[str, float]:
    """A dark or light spot with a radius of 2 to 8 pixels."""
    radius = rng.uniform(2, 8)
    _tint(canvas, rng, canvas.cover(_blob(canvas, rng, radius)))
    return {"radius": radius}


def pit(canvas: Canvas, rng: Rng) -> dict[str, float]:
    """A depression with a radius of 4 to 12 pixels, seen by its shading."""
    radius = rng.uniform(4, 12)
    distance = _blob(canvas, rng, radius)
    depth = np.clip(-distance / (radius * canvas.pixel), 0, 1)
    canvas.height -= canvas.part * (1 - (1 - depth) ** 2) * np.float32(rng.uniform(0.5, 0.9) * radius * canvas.pixel)
    return {"radius": radius}


def stain(canvas: Canvas, rng: Rng) -> dict[str, float]:
    """A soft dark stain with a radius of 12 to 40 pixels."""
    radius = rng.uniform(12, 40)
    distance = _blob(canvas, rng, radius) / canvas.pixel
    share = np.clip(0.5 - distance / (0.7 * radius), 0, 1) * (1 + 0.15 * clouds(rng, canvas.shape, 0.05))
    strength = np.clip(share * canvas.part * rng.uniform(0.2, 0.45), 0, 1)
    tone = np.array(rng.uniform(0.5, 1.0, 3), np.float32)
    canvas.albedo *= 1 - strength[..., None].astype(np.float32) * tone
    return {"radius": radius}


def chip(canvas: Canvas, rng: Rng) -> dict[str, float]:
    """A piece broken out of the edge, with a radius of 5 to 16 pixels."""
    radius = rng.uniform(5, 16)
    outline = ndimage.gaussian_filter(canvas.part, 3)
    edge = (outline > 0.4) & (outline < 0.6)
    edge[:8] = edge[-8:] = False
    edge[:, :8] = edge[:, -8:] = False
    rows, columns = np.nonzero(edge)
    index = int(rng.integers(len(rows)))
    u, v = canvas.x - canvas.x[0, columns[index]], canvas.y - canvas.y[rows[index], 0]
    angle = np.arctan2(v, u)
    wobble = sum(rng.normal(0, 0.12) * np.cos(k * angle + rng.uniform(0, 6)) for k in (2, 3, 5))
    canvas.cut((circle(u, v, radius * canvas.pixel) - radius * canvas.pixel * wobble).astype(np.float32))
    return {"radius": radius}


def fibre(canvas: Canvas, rng: Rng) -> dict[str, float]:
    """A hair that lies on the part, 1 to 2 pixels wide and 40 to 130 long."""
    width, length = rng.uniform(1, 2), rng.uniform(40, 130)
    points, angle = [_place(canvas, rng, 8)], rng.uniform(0, 2 * np.pi)
    turn = rng.normal(0, 0.25)
    for _ in range(10):
        angle += turn + rng.normal(0, 0.2)
        step = length / 10 * canvas.pixel
        points.append((points[-1][0] + step * np.cos(angle), points[-1][1] + step * np.sin(angle)))
    colour = (0.03, 0.03, 0.03) if canvas.albedo[canvas.part > 0.5].mean() > 0.15 else (0.7, 0.7, 0.66)
    share = canvas.cover(line(canvas.x, canvas.y, points, width / 2 * canvas.pixel))
    canvas.albedo += 0.85 * share[..., None] * (np.array(colour, np.float32) - canvas.albedo)
    canvas.height += share * 1.5 * canvas.pixel
    return {"width": width, "length": length}


MARKS: dict[str, Mark] = {mark.__name__: mark for mark in (scratch, spot, pit, stain, chip, fibre)}
