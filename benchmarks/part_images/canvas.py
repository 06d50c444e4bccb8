"""A surface with colour, height and gloss at every pixel, and the camera that photographs it.

Lengths are in units of half the image's width: x runs from -1 to 1, y down, with 0 in the middle. A shape is a signed
distance to its outline, negative inside, so that parts can be turned and shifted by fractions of a pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

Array = NDArray[np.float32]
Colour = Sequence[float] | Array
"""Reflectance of red, green and blue, 0 to 1: three numbers, or [H, W, 3]."""


@dataclass(frozen=True)
class Pose:
    """Where the part lies: shift in units, angle in radians, scale about 1."""

    x: float = 0.0
    y: float = 0.0
    angle: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Light:
    """One lamp and the camera's exposure."""

    azimuth: float
    """Radians; where the light comes from."""
    elevation: float
    exposure: float
    gradient: tuple[float, float]
    """Relative change of brightness from the middle to the right and to the bottom edge."""
    tint: tuple[float, float, float]
    ambient: float = 0.45


class Canvas:
    """What lies under the camera; `paint` adds shapes, `photograph` looks at them."""

    def __init__(self, width: int, height: int, pose: Pose) -> None:
        self.shape = (height, width)
        self.pixel = 2 / width
        """Side of a pixel in units."""
        x = (np.arange(width, dtype=np.float32) + 0.5) * self.pixel - 1
        y = ((np.arange(height, dtype=np.float32) + 0.5) - height / 2) * self.pixel
        self.x, self.y = np.meshgrid(x, y)
        cos, sin = np.cos(pose.angle), np.sin(pose.angle)
        shifted_x, shifted_y = self.x - pose.x, self.y - pose.y
        self.u = ((cos * shifted_x + sin * shifted_y) / pose.scale).astype(np.float32)
        self.v = ((-sin * shifted_x + cos * shifted_y) / pose.scale).astype(np.float32)
        """Coordinates of the part, which turn and shift with it."""
        self.albedo = np.zeros((*self.shape, 3), np.float32)
        self.height = np.zeros(self.shape, np.float32)
        self.gloss = np.zeros(self.shape, np.float32)
        self.part = np.zeros(self.shape, np.float32)
        """Share of each pixel that the part covers."""
        self.ground: tuple[Array, Array, Array] | None = None

    def near(self, u: float, v: float, radius: float) -> Canvas:
        """Return the part of the canvas within `radius` of a point of the part: painting there paints here."""
        inside = np.hypot(self.u - u, self.v - v) < radius
        rows, columns = np.nonzero(inside.any(1))[0], np.nonzero(inside.any(0))[0]
        if not len(rows):
            rows = columns = np.array([0])
        window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        view = object.__new__(Canvas)
        view.pixel = self.pixel
        for name in ("x", "y", "u", "v", "albedo", "height", "gloss", "part"):
            setattr(view, name, getattr(self, name)[window])
        view.shape = view.u.shape
        view.ground = None if self.ground is None else tuple(layer[window] for layer in self.ground)
        return view

    def lay_ground(self, colour: Colour, height: Array | float = 0.0, gloss: float = 0.0) -> None:
        """Begin with a background, which shows where the part is missing."""
        self.albedo[:] = colour
        self.height[:] = height
        self.gloss[:] = gloss
        self.ground = self.albedo.copy(), self.height.copy(), self.gloss.copy()

    def cover(self, distance: Array) -> Array:
        """Return the share of each pixel inside a shape."""
        return np.clip(0.5 - distance / self.pixel, 0, 1)

    def paint(
        self,
        distance: Array,
        colour: Colour,
        *,
        height: float | Array | None = None,
        bevel: float = 0.01,
        gloss: float = 0.2,
        is_part: bool = True,
    ) -> None:
        """Put a shape of this colour on top; with a height, raise it to that, with an edge rounded over `bevel`."""
        share = self.cover(distance)
        self.albedo += share[..., None] * (np.asarray(colour, np.float32) - self.albedo)
        self.gloss += share * (gloss - self.gloss)
        if height is not None:
            inside = np.clip(-distance / max(bevel, 1e-6), 0, 1)
            profile = np.sqrt(np.clip(1 - (1 - inside) ** 2, 0, 1))
            self.height += np.where(share > 0, profile, 0) * (height - self.height)
        if is_part:
            np.maximum(self.part, share, out=self.part)

    def cut(self, distance: Array) -> None:
        """Remove a shape from the part, down to the ground."""
        assert self.ground is not None
        share = self.cover(distance)
        albedo, height, gloss = self.ground
        self.albedo += share[..., None] * (albedo - self.albedo)
        self.height += share * (height - self.height)
        self.gloss += share * (gloss - self.gloss)
        self.part *= 1 - share

    def stamp(
        self, text: str, u: float, v: float, size: float, colour: Colour, *, opacity: float = 0.9, angle: float = 0.0
    ) -> None:
        """Print a text of this height in units, centred at (u, v) of the part."""
        font = ImageFont.load_default(64)
        left, top, right, bottom = font.getbbox(text)
        mask = Image.new("L", (int(right - left) + 8, int(bottom - top) + 8))
        ImageDraw.Draw(mask).text((4 - left, 4 - top), text, 255, font)
        scale = (bottom - top) / size
        blurred = ndimage.gaussian_filter(np.asarray(mask, np.float32) / 255, 0.4 * scale * self.pixel)
        cos, sin = np.cos(angle), np.sin(angle)
        along = cos * (self.u - u) + sin * (self.v - v)
        down = -sin * (self.u - u) + cos * (self.v - v)
        rows = down * scale + mask.height / 2
        columns = along * scale + mask.width / 2
        near = (rows > -1) & (rows < mask.height) & (columns > -1) & (columns < mask.width)
        share = np.zeros(self.shape, np.float32)
        share[near] = ndimage.map_coordinates(blurred, np.stack([rows[near], columns[near]]), order=1)
        self.albedo += opacity * share[..., None] * (np.asarray(colour, np.float32) - self.albedo)

    def photograph(self, light: Light) -> Array:
        """Return the light that reaches the camera, [H, W, 3], in grey levels from 0 to 255 without noise."""
        slope_y, slope_x = np.gradient(self.height, self.pixel)
        length = np.sqrt(slope_x**2 + slope_y**2 + 1)
        lateral = np.cos(light.elevation)
        to_light = np.array(
            [lateral * np.cos(light.azimuth), lateral * np.sin(light.azimuth), np.sin(light.elevation)], np.float32
        )
        facing = (-slope_x * to_light[0] - slope_y * to_light[1] + to_light[2]) / length
        halfway = to_light + np.array([0, 0, 1], np.float32)
        halfway /= np.linalg.norm(halfway)
        reflected = (-slope_x * halfway[0] - slope_y * halfway[1] + halfway[2]) / length
        lit = 1 - self._shadow(light)
        diffuse = light.ambient + (1 - light.ambient) * lit * np.clip(facing, 0, None) / to_light[2]
        shine = self.gloss * lit * np.clip(reflected, 0, 1) ** 48
        x, y = light.gradient
        falloff = 1 + x * self.x + y * self.y - 0.08 * (self.x**2 + self.y**2)
        linear = self.albedo * diffuse[..., None] + 0.7 * shine[..., None]
        linear *= light.exposure * falloff[..., None] * np.asarray(light.tint, np.float32)
        bright = linear / (1 + 0.25 * np.clip(linear, 0, None) ** 2)  # the shoulder of a camera's response
        return 255 * np.clip(bright, 0, 1) ** np.float32(1 / 2.2)

    def _shadow(self, light: Light) -> Array:
        """Return the share of shadow that higher places cast."""
        height, width = self.shape
        half = ndimage.zoom(self.height, 0.5, order=1)
        rise = np.tan(light.elevation)
        deepest = np.zeros_like(half)
        for step in range(1, 9):
            distance = step * 0.012
            shift = distance / (2 * self.pixel)
            moved = ndimage.shift(
                half, (-shift * np.sin(light.azimuth), -shift * np.cos(light.azimuth)), order=1, mode="nearest"
            )
            deepest = np.maximum(deepest, moved - half - distance * rise)
        soft = ndimage.gaussian_filter(np.clip(deepest / 0.012, 0, 1), 0.006 / (2 * self.pixel))
        return np.asarray(Image.fromarray(soft.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))


def circle(u: Array, v: Array, radius: float) -> Array:
    """Return the distance to a circle around (0, 0)."""
    return np.hypot(u, v) - np.float32(radius)


def box(u: Array, v: Array, half_width: float, half_height: float, corner: float = 0.0) -> Array:
    """Return the distance to a rectangle around (0, 0) with rounded corners."""
    across, along = np.abs(u) - (half_width - corner), np.abs(v) - (half_height - corner)
    outside = np.hypot(np.maximum(across, 0), np.maximum(along, 0))
    return outside + np.minimum(np.maximum(across, along), 0) - np.float32(corner)


def line(u: Array, v: Array, points: Sequence[tuple[float, float]], half_width: float) -> Array:
    """Return the distance to a line through these points with round ends."""
    nearest = np.full(u.shape, np.inf, np.float32)
    for (start_u, start_v), (end_u, end_v) in pairwise(points):
        du, dv = end_u - start_u, end_v - start_v
        share = np.clip(((u - start_u) * du + (v - start_v) * dv) / max(du**2 + dv**2, 1e-12), 0, 1)
        nearest = np.minimum(nearest, np.hypot(u - start_u - share * du, v - start_v - share * dv))
    return nearest - np.float32(half_width)


def turned(u: Array, v: Array, angle: float) -> tuple[Array, Array]:
    """Return the coordinates of something turned by this angle."""
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * u + sin * v, -sin * u + cos * v


def clouds(rng: np.random.Generator, shape: tuple[int, int], coarse: float, *, octaves: int = 4) -> Array:
    """Return smooth random values of mean 0 and deviation 1; the largest features are `coarse` of the width across."""
    height, width = shape
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        cell = max(1.0, coarse * width / 2**octave)
        rows, columns = int(height / cell) + 3, int(width / cell) + 3
        grid = Image.fromarray(rng.standard_normal((rows, columns)).astype(np.float32))
        size = round(columns * cell), round(rows * cell)
        top, left = rng.integers(0, max(1, int(cell)), size=2)
        grown = np.asarray(grid.resize(size, Image.Resampling.BICUBIC))
        total += grown[top : top + height, left : left + width] * 0.6**octave
    return (total - total.mean()) / max(float(total.std()), 1e-6)


def grain(rng: np.random.Generator, shape: tuple[int, int], along: float, *, vertical: bool = False) -> Array:
    """Return fine lines, `along` pixels long, of mean 0 and deviation 1, as brushed metal has them."""
    noise = rng.standard_normal(shape).astype(np.float32)
    lines = ndimage.uniform_filter1d(noise, max(1, round(along)), axis=0 if vertical else 1, mode="wrap")
    lines = ndimage.gaussian_filter1d(lines, 0.5, axis=1 if vertical else 0)
    return lines / max(float(lines.std()), 1e-6)
