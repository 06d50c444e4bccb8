"""Kinds of part: what each looks like, on which ground it lies, how precisely it is placed, and what can be missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .canvas import Array, Canvas, box, circle, clouds, grain, line, turned

Rng = np.random.Generator


@dataclass(frozen=True)
class Edit:
    """A change of one feature of a part: left out, of another colour, or moved; features are numbered from 0."""

    missing: int | None = None
    recoloured: int | None = None
    moved: int | None = None
    shift: tuple[float, float] = (0.0, 0.0)
    """By how much the moved feature is displaced, in units."""

    def offset(self, feature: int) -> tuple[float, float]:
        """Return the displacement of a feature."""
        return self.shift if feature == self.moved else (0.0, 0.0)


@dataclass(frozen=True)
class Placement:
    """How much the pose of a part varies: half ranges of the shift in units and of the angle in degrees."""

    shift: float
    angle: float
    scale: float = 0.005


FIXTURE = Placement(shift=0.008, angle=0.8)
"""A part in a holder: 3 pixels of 800."""

TABLE = Placement(shift=0.06, angle=6.0)
"""A part laid down by hand: 24 pixels of 800."""

BELT = Placement(shift=0.12, angle=180.0)
"""A part on a belt, in any direction."""


@dataclass(frozen=True)
class Kind:
    """A kind of part."""

    draw: Callable[[Canvas, Rng, Edit], None]
    """Paint ground and part; the generator is of this one part, and draws what differs between good parts."""
    features: int
    """How many features `Edit` can change; 0 for a surface."""
    placement: Placement
    sizes: tuple[tuple[int, int], ...]
    """Sizes of the images, width and height, of which each image takes one at random."""
    jpeg: int | None = 92
    """Quality of the files; None: PNG."""
    for_choice: bool = False
    """Whether scales and neighbourhoods may be chosen on it; other kinds only report."""


TOOTH = np.array([0.26, 0.245, 0.22], np.float32)
WRONG = np.array([0.62, 0.10, 0.08], np.float32)


def _wood(canvas: Canvas, rng: Rng) -> None:
    bend = clouds(rng, canvas.shape, 0.9, octaves=2)
    rings = np.sin(38 * (canvas.y + 0.035 * bend) + 2.5 * clouds(rng, canvas.shape, 0.5, octaves=2))
    fibres = grain(rng, canvas.shape, 60)
    shade = 1 + 0.09 * rings + 0.05 * fibres + 0.05 * clouds(rng, canvas.shape, 0.4)
    canvas.lay_ground(np.clip(shade, 0.3, 2)[..., None] * np.array([0.42, 0.26, 0.14], np.float32), 0.0006 * fibres)


def _rubber(canvas: Canvas, rng: Rng) -> None:
    bumps = clouds(rng, canvas.shape, 0.012, octaves=2)
    colour = 0.055 * (1 + 0.12 * clouds(rng, canvas.shape, 0.35) + 0.10 * bumps)
    canvas.lay_ground(np.clip(colour, 0.01, 1)[..., None] * np.array([1, 1.02, 1.06], np.float32), 0.0009 * bumps, 0.04)


def _felt(canvas: Canvas, rng: Rng) -> None:
    fluff = clouds(rng, canvas.shape, 0.02, octaves=3)
    colour = np.clip(1 + 0.14 * fluff + 0.08 * clouds(rng, canvas.shape, 0.5, octaves=2), 0.2, 2)
    canvas.lay_ground(colour[..., None] * np.array([0.05, 0.13, 0.20], np.float32), 0.0012 * fluff)


def _paper(canvas: Canvas, rng: Rng) -> None:
    fibres = clouds(rng, canvas.shape, 0.03, octaves=4)
    colour = np.clip(1 + 0.018 * fibres + 0.02 * clouds(rng, canvas.shape, 0.7, octaves=2), 0, 2)
    canvas.lay_ground(colour[..., None] * np.array([0.72, 0.71, 0.67], np.float32), 0.0003 * fibres)


def _steel_table(canvas: Canvas, rng: Rng) -> None:
    lines = grain(rng, canvas.shape, 140)
    colour = np.clip(0.34 * (1 + 0.07 * lines + 0.08 * clouds(rng, canvas.shape, 0.6)), 0, 1)
    canvas.lay_ground(colour[..., None] * np.array([1, 1.01, 1.03], np.float32), 0.0004 * lines, 0.15)


def _metal(canvas: Canvas, rng: Rng, tone: float, warmth: float = 0.0) -> Array:
    """Return the colour of turned or ground metal."""
    shade = tone * (1 + 0.05 * clouds(rng, canvas.shape, 0.15) + 0.05 * clouds(rng, canvas.shape, 0.01, octaves=2))
    return np.clip(shade, 0, 1)[..., None] * np.array([1 + warmth, 1.0, 1.03 - 1.5 * warmth], np.float32)


def washer(canvas: Canvas, rng: Rng, edit: Edit) -> None:
    """A toothed lock washer of zinc-plated steel on wood: the features are its eight inner tabs."""
    _wood(canvas, rng)
    radius = np.hypot(canvas.u, canvas.v)
    angle = np.arctan2(canvas.v, canvas.u)
    rings = 0.5 * np.sin(radius * 420 + rng.uniform(0, 6)) + 0.5 * clouds(rng, canvas.shape, 0.01, octaves=2)
    colour = _metal(canvas, rng, 0.46, 0.03) * (1 + 0.05 * rings[..., None])
    outer, inner = 0.50 + rng.uniform(-0.003, 0.003), 0.30
    canvas.paint(np.maximum(radius - outer, inner - radius), colour, height=0.045, bevel=0.02, gloss=0.55)
    for tab in range(8):
        if tab == edit.missing:
            continue
        shift_u, shift_v = edit.offset(tab)
        u, v = turned(canvas.u - shift_u, canvas.v - shift_v, tab * np.pi / 4)
        tone = WRONG if tab == edit.recoloured else colour
        canvas.paint(box(u - 0.27, v, 0.055, 0.042, 0.012), tone, height=0.045, bevel=0.015, gloss=0.5)
    canvas.paint(np.abs(radius - 0.40) - 0.004 + 0.02 * (np.abs(np.sin(angle * 2)) < 0.1), colour * 0.75, gloss=0.3)


def bracket(canvas: Canvas, rng: Rng, edit: Edit) -> None:
    """A stamped plate with six holes on a rubber belt: the features are the holes."""
    _rubber(canvas, rng)
    lines = grain(rng, canvas.shape, 30)
    colour = _metal(canvas, rng, 0.40) * (1 + 0.06 * lines[..., None])
    u, v = canvas.u, canvas.v
    body = np.minimum(box(u + 0.1, v - 0.18, 0.62, 0.17, 0.05), box(u + 0.52, v + 0.03, 0.20, 0.40, 0.05))
    body = np.minimum(body, box(u - 0.42, v - 0.05, 0.10, 0.30, 0.05))
    canvas.paint(body, colour, height=0.035, bevel=0.02, gloss=0.45)
    canvas.paint(np.abs(v - 0.02) - 0.004 + np.where(np.abs(u + 0.52) < 0.17, 0, 1), colour * 0.7)
    holes = [(-0.52, -0.30, 0.065), (-0.60, -0.12, 0.032), (-0.44, -0.12, 0.032)]
    holes += [(-0.52, 0.18, 0.075), (0.02, 0.18, 0.055), (0.42, -0.12, 0.045)]
    for hole, (hole_u, hole_v, radius) in enumerate(holes):
        if hole == edit.missing:
            continue
        shift_u, shift_v = edit.offset(hole)
        distance = circle(u - hole_u - shift_u, v - hole_v - shift_v, radius)
        rim = np.abs(distance - 0.012) - 0.010
        canvas.paint(rim, WRONG if hole == edit.recoloured else colour * 1.15, gloss=0.6)
        canvas.cut(distance)


def board(canvas: Canvas, rng: Rng, edit: Edit) -> None:
    """A printed circuit board in a fixture on felt: the features are its eighteen components."""
    _felt(canvas, rng)
    u, v = canvas.u, canvas.v
    plan = np.random.default_rng(7)  # the same layout on every board
    mask = np.array([0.02, 0.16, 0.07], np.float32) * (1 + 0.03 * clouds(rng, canvas.shape, 0.2)[..., None])
    canvas.paint(box(u, v, 0.86, 0.60, 0.03), mask, height=0.03, bevel=0.006, gloss=0.25)
    for _ in range(26):  # tracks under the mask
        start_u, start_v = plan.uniform([-0.75, -0.5], [0.75, 0.5])
        end_u = np.clip(start_u + plan.uniform(-0.5, 0.5), -0.8, 0.8)
        end_v = np.clip(start_v + plan.uniform(-0.4, 0.4), -0.55, 0.55)
        for points in ([(start_u, start_v), (end_u, start_v)], [(end_u, start_v), (end_u, end_v)]):
            (first_u, first_v), (last_u, last_v) = points
            reach = 0.02 + np.hypot(last_u - first_u, last_v - first_v) / 2
            track = canvas.near((first_u + last_u) / 2, (first_v + last_v) / 2, reach)
            track.paint(line(track.u, track.v, points, 0.0055), (0.05, 0.27, 0.13), gloss=0.3)
        for via_u, via_v in ((start_u, start_v), (end_u, end_v)):
            via = canvas.near(via_u, via_v, 0.03)
            distance = circle(via.u - via_u, via.v - via_v, 0.014)
            via.paint(distance, (0.55, 0.50, 0.38), gloss=0.6)
            via.paint(distance + 0.008, (0.04, 0.04, 0.04), gloss=0)
    for corner_u, corner_v in ((-0.79, -0.53), (0.79, -0.53), (-0.79, 0.53), (0.79, 0.53)):
        hole = canvas.near(corner_u, corner_v, 0.06)
        hole.paint(circle(hole.u - corner_u, hole.v - corner_v, 0.045), (0.58, 0.52, 0.38), gloss=0.6)
        hole.cut(circle(hole.u - corner_u, hole.v - corner_v, 0.028))
    for part, (part_u, part_v, half_width, half_height) in enumerate(_COMPONENTS):
        place = canvas.near(part_u, part_v, 0.14 + np.hypot(half_width, half_height))
        _component(place, rng, edit, part, part_u, part_v, half_width, half_height)


_COMPONENTS = (
    *((-0.35, -0.12, 0.19, 0.15), (0.30, 0.18, 0.15, 0.15), (0.45, -0.28, 0.12, 0.09)),  # chips
    *((-0.68 + 0.1 * i, 0.40, 0.028, 0.05) for i in range(6)),  # capacitors
    *((0.04 + 0.08 * i, -0.46, 0.022, 0.038) for i in range(5)),  # resistors
    *((0.62, 0.02 + 0.11 * i, 0.045, 0.026) for i in range(4)),
)


def _component(
    canvas: Canvas, rng: Rng, edit: Edit, part: int, part_u: float, part_v: float, half_width: float, half_height: float
) -> None:
    shift_u, shift_v = edit.offset(part)
    pad_u, pad_v = canvas.u - part_u, canvas.v - part_v
    solder = (0.50, 0.50, 0.49)
    is_chip = part < 3
    upright = half_height > half_width
    if is_chip:
        pins = int(half_height / 0.022)
        for pin in range(pins):
            offset = (pin - (pins - 1) / 2) * 2 * half_height / pins
            for side in (-1, 1):
                pad = box(pad_u - side * (half_width + 0.018), pad_v - offset, 0.020, 0.008)
                canvas.paint(pad, solder, height=0.035, bevel=0.005, gloss=0.7)
    else:
        for side in (-1, 1):
            centre_u, centre_v = (0, side * half_height) if upright else (side * half_width, 0)
            pad = box(pad_u - centre_u, pad_v - centre_v, min(half_width, 0.03), min(half_height, 0.03), 0.004)
            canvas.paint(pad, solder, height=0.035, bevel=0.01, gloss=0.7)
    tilt = rng.normal(0, 0.008)
    if part == edit.missing:
        return
    u, v = turned(pad_u - shift_u, pad_v - shift_v, tilt)
    body = box(u, v, half_width, half_height, 0.006)
    dark = np.array([0.022, 0.022, 0.025], np.float32)
    colour = dark if is_chip or part >= 9 else np.array([0.33, 0.22, 0.12], np.float32)
    colour = WRONG if part == edit.recoloured else colour
    canvas.paint(body, colour, height=0.06 if is_chip else 0.05, bevel=0.008, gloss=0.25)
    if is_chip:
        canvas.paint(circle(u + half_width - 0.03, v + half_height - 0.03, 0.011), dark * 0.5, gloss=0.1)
        canvas.stamp(("NC-4250", "PX 32", "T10")[part], part_u, part_v, 0.035, (0.45, 0.45, 0.45), opacity=0.75)
    else:
        for side in (-1, 1):
            cap = box(
                u - (0 if upright else side * half_width),
                v - (side * half_height if upright else 0),
                half_width if upright else 0.010,
                0.010 if upright else half_height,
            )
            canvas.paint(np.maximum(cap, body), (0.55, 0.55, 0.54), gloss=0.7)


def fabric(canvas: Canvas, rng: Rng, edit: Edit) -> None:
    """A twill weave that fills the image: a surface without features."""
    period = 0.030
    wobble = 0.10 * period * clouds(rng, canvas.shape, 0.25, octaves=3)
    across, along = (canvas.u + wobble) / period, (canvas.v - wobble) / period
    warp_index, weft_index = np.floor(across), np.floor(along)
    over = np.mod(warp_index + weft_index, 3) < 1.5
    warp_tone = 1 + 0.10 * np.sin(warp_index * 12.9898 + rng.uniform(0, 6))
    weft_tone = 1 + 0.10 * np.sin(weft_index * 78.233 + rng.uniform(0, 6))
    warp_round = np.sqrt(np.clip(1 - (2 * np.mod(across, 1) - 1) ** 2, 0, 1))
    weft_round = np.sqrt(np.clip(1 - (2 * np.mod(along, 1) - 1) ** 2, 0, 1))
    fuzz = clouds(rng, canvas.shape, 0.006, octaves=2)[..., None]
    warp = np.array([0.16, 0.20, 0.33], np.float32) * (warp_tone * (0.55 + 0.45 * warp_round))[..., None]
    weft = np.array([0.40, 0.38, 0.34], np.float32) * (weft_tone * (0.55 + 0.45 * weft_round))[..., None]
    colour = np.where(over[..., None], warp, weft) * (1 + 0.10 * fuzz)
    canvas.lay_ground(np.clip(colour, 0, 1), 0.006 * np.where(over, warp_round, 0.7 * weft_round), 0.02)
    canvas.part[:] = 1


def ratchet(canvas: Canvas, rng: Rng, edit: Edit) -> None:
    """A ratchet wheel with 18 saw teeth and four slots, in any direction on a steel table: the features are both."""
    _steel_table(canvas, rng)
    u, v = canvas.u, canvas.v
    radius = np.hypot(u, v)
    colour = _metal(canvas, rng, 0.28) * (1 + 0.04 * np.sin(radius * 380 + rng.uniform(0, 6))[..., None])
    canvas.paint(radius - 0.42, colour, height=0.06, bevel=0.012, gloss=0.4)
    for tooth in range(18):
        if tooth == edit.missing:
            continue
        shift_u, shift_v = edit.offset(tooth)
        angle = tooth * np.pi / 9
        place = canvas.near(0.45 * np.cos(angle), 0.45 * np.sin(angle), 0.18)
        along, across = turned(place.u - shift_u, place.v - shift_v, angle)
        slope = np.maximum(across - 0.055, -across - 0.075 + 0.95 * np.clip(along - 0.40, 0, 0.2))
        distance = np.maximum(slope, np.abs(along - 0.44) - 0.075).astype(np.float32)
        tone = WRONG if tooth == edit.recoloured else TOOTH
        place.paint(distance, tone, height=0.06, bevel=0.008, gloss=0.4)
    canvas.paint(np.abs(radius - 0.20) - 0.05, colour * 0.85, height=0.05, bevel=0.01, gloss=0.3)
    for slot in range(4):
        if slot + 18 == edit.missing:
            continue
        shift_u, shift_v = edit.offset(slot + 18)
        along, across = turned(u - shift_u, v - shift_v, (slot + 0.5) * np.pi / 2)
        distance = box(along - 0.30, across, 0.035, 0.085, 0.03)
        canvas.paint(np.abs(distance) - 0.008, WRONG if slot + 18 == edit.recoloured else colour * 1.2, gloss=0.5)
        canvas.cut(distance)
    canvas.cut(np.minimum(circle(u, v, 0.085), box(u, v + 0.085, 0.022, 0.03)))


def gear(canvas: Canvas, rng: Rng, edit: Edit) -> None:
    """A gear with 24 teeth and five holes, in any direction on a steel table: the features are teeth and holes."""
    _steel_table(canvas, rng)
    u, v = canvas.u, canvas.v
    radius = np.hypot(u, v)
    colour = _metal(canvas, rng, 0.24, 0.06) * (1 + 0.04 * np.sin(radius * 500)[..., None])
    canvas.paint(radius - 0.47, colour, height=0.07, bevel=0.012, gloss=0.4)
    for tooth in range(24):
        if tooth == edit.missing:
            continue
        shift_u, shift_v = edit.offset(tooth)
        angle = tooth * np.pi / 12
        place = canvas.near(0.5 * np.cos(angle), 0.5 * np.sin(angle), 0.16)
        along, across = turned(place.u - shift_u, place.v - shift_v, angle)
        flank = np.abs(across) - (0.044 - 0.28 * np.clip(along - 0.45, 0, 0.2))
        distance = np.maximum(flank, np.abs(along - 0.50) - 0.065).astype(np.float32)
        tone = WRONG if tooth == edit.recoloured else TOOTH
        place.paint(distance, tone, height=0.07, bevel=0.008, gloss=0.4)
    canvas.paint(np.abs(radius - 0.26) - 0.14, colour * 0.8, height=0.05, bevel=0.015, gloss=0.25)
    for hole in range(5):
        if hole + 24 == edit.missing:
            continue
        shift_u, shift_v = edit.offset(hole + 24)
        along, across = turned(u - shift_u, v - shift_v, hole * 2 * np.pi / 5)
        distance = circle(along - 0.26, across, 0.075)
        canvas.paint(np.abs(distance) - 0.008, WRONG if hole + 24 == edit.recoloured else colour * 1.2, gloss=0.5)
        canvas.cut(distance)
    canvas.paint(circle(u, v, 0.12), colour * 1.15, height=0.09, bevel=0.012, gloss=0.5)
    canvas.cut(np.minimum(circle(u, v, 0.07), box(u - 0.07, v, 0.022, 0.022)))


def connector(canvas: Canvas, rng: Rng, edit: Edit) -> None:
    """A plug with two rows of ten pins in a black housing on paper: the features are the pins."""
    _paper(canvas, rng)
    u, v = canvas.u, canvas.v
    plastic = 0.035 * (1 + 0.08 * clouds(rng, canvas.shape, 0.01, octaves=2))[..., None] * np.ones(3, np.float32)
    canvas.paint(box(u, v, 0.80, 0.30, 0.04), plastic, height=0.11, bevel=0.025, gloss=0.2)
    canvas.paint(box(u, v + 0.30, 0.12, 0.045, 0.01), plastic * 1.2, height=0.10, bevel=0.015, gloss=0.2)
    canvas.paint(box(u, v, 0.72, 0.22, 0.02), plastic * 0.55, height=0.02, bevel=0.012, gloss=0.05)
    jitter = rng.normal(0, 0.0012, (20, 2))
    for pin in range(20):
        if pin == edit.missing:
            continue
        column, row = pin % 10, pin // 10
        shift_u, shift_v = edit.offset(pin)
        place = canvas.near((column - 4.5) * 0.14, (row - 0.5) * 0.22, 0.12)
        pin_u = place.u - (column - 4.5) * 0.14 - shift_u - jitter[pin, 0]
        pin_v = place.v - (row - 0.5) * 0.22 - shift_v - jitter[pin, 1]
        tone = WRONG if pin == edit.recoloured else np.array([0.58, 0.44, 0.18], np.float32)
        place.paint(box(pin_u, pin_v, 0.028, 0.028, 0.008), tone, height=0.09, bevel=0.014, gloss=0.9)
    canvas.stamp("1", -0.755, -0.13, 0.05, (0.5, 0.5, 0.5))


def cap(canvas: Canvas, rng: Rng, edit: Edit) -> None:
    """A printed bottle cap on a rubber belt, in any direction: the features are its logo's five stars and two words."""
    _rubber(canvas, rng)
    u, v = canvas.u, canvas.v
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    red = np.array([0.36, 0.02, 0.025], np.float32) * (1 + 0.02 * clouds(rng, canvas.shape, 0.2))[..., None]
    outline = radius - (0.50 + 0.014 * np.cos(21 * angle))
    canvas.paint(outline, red * 0.85, height=0.07, bevel=0.05, gloss=0.6)
    canvas.paint(radius - 0.41, red, height=0.12, bevel=0.06, gloss=0.6)
    canvas.paint(np.abs(radius - 0.36) - 0.006, (0.75, 0.72, 0.66), gloss=0.4)
    for star in range(5):
        if star == edit.missing:
            continue
        shift_u, shift_v = edit.offset(star)
        along, across = turned(u - shift_u, v - shift_v, -np.pi / 2 + (star - 2) * 0.42)
        points = np.arctan2(across, along - 0.27)
        distance = np.hypot(along - 0.27, across) - (0.030 + 0.012 * np.cos(5 * points))
        canvas.paint(distance, (0.1, 0.2, 0.5) if star == edit.recoloured else (0.78, 0.75, 0.68), gloss=0.4)
    for word, text, place_v, size in ((5, "NORD", 0.0, 0.13), (6, "QUELLE", 0.18, 0.075)):
        if word != edit.missing:
            shift_u, shift_v = edit.offset(word)
            colour = (0.1, 0.2, 0.5) if word == edit.recoloured else (0.78, 0.75, 0.68)
            canvas.stamp(text, shift_u, place_v + shift_v, size, colour)


def blister(canvas: Canvas, rng: Rng, edit: Edit) -> None:
    """A blister pack with ten tablets on a steel table: the features are the tablets."""
    _steel_table(canvas, rng)
    u, v = canvas.u, canvas.v
    wrinkles = clouds(rng, canvas.shape, 0.05, octaves=3)
    dots = np.sin(u * 190) * np.sin(v * 190)
    foil = 0.50 * (1 + 0.05 * wrinkles + 0.05 * dots)[..., None] * np.array([1, 1, 1.02], np.float32)
    canvas.paint(box(u, v, 0.84, 0.42, 0.06), foil, height=0.02, bevel=0.01, gloss=0.5)
    canvas.height += canvas.part * (0.0010 * wrinkles + 0.0006 * dots)
    jitter, grooves = rng.uniform(-0.012, 0.012, (10, 2)), rng.uniform(0, np.pi, 10)
    powder = int(rng.integers(2**31))
    for tablet in range(10):
        column, row = tablet % 5, tablet // 5
        place = canvas.near((column - 2) * 0.31, (row - 0.5) * 0.38, 0.2)
        pocket_u, pocket_v = place.u - (column - 2) * 0.31, place.v - (row - 0.5) * 0.38
        pocket = circle(pocket_u, pocket_v, 0.125)
        place.paint(pocket, (0.46, 0.46, 0.47), height=0.05, bevel=0.03, gloss=0.6)
        if tablet == edit.missing:
            continue
        shift_u, shift_v = edit.offset(tablet)
        inner_u = pocket_u - shift_u - jitter[tablet, 0]
        inner_v = pocket_v - shift_v - jitter[tablet, 1]
        tone = np.array([0.10, 0.32, 0.50] if tablet == edit.recoloured else [0.70, 0.60, 0.36], np.float32)
        speckle = 1 + 0.04 * clouds(np.random.default_rng([tablet, powder]), place.shape, 0.03, octaves=2)[..., None]
        place.paint(circle(inner_u, inner_v, 0.095), tone * speckle, height=0.09, bevel=0.06, gloss=0.3)
        groove_u, groove_v = turned(inner_u, inner_v, grooves[tablet])
        place.paint(box(groove_u, groove_v, 0.085, 0.006), tone * 0.8, gloss=0.1)


def sheet(canvas: Canvas, rng: Rng, edit: Edit) -> None:
    """Brushed metal that fills the image: a surface without features."""
    lines = grain(rng, canvas.shape, 90) + 0.5 * grain(rng, canvas.shape, 400)
    colour = np.clip(0.40 * (1 + 0.08 * lines + 0.05 * clouds(rng, canvas.shape, 0.8, octaves=2)), 0, 1)
    canvas.lay_ground(colour[..., None] * np.array([1, 1.0, 1.02], np.float32), 0.0005 * lines, 0.5)
    canvas.part[:] = 1


def leather(canvas: Canvas, rng: Rng, edit: Edit) -> None:
    """Grained leather that fills the image: a surface without features."""
    pebbles = np.abs(clouds(rng, canvas.shape, 0.035, octaves=2))
    pores = np.clip(clouds(rng, canvas.shape, 0.008, octaves=1) - 2.2, 0, 1)
    shade = 1 + 0.05 * clouds(rng, canvas.shape, 0.5, octaves=3) + 0.06 * np.clip(pebbles - 0.5, -0.5, 1) - 0.5 * pores
    colour = shade[..., None] * np.array([0.24, 0.12, 0.06], np.float32)
    canvas.lay_ground(np.clip(colour, 0.01, 1), 0.004 * np.clip(pebbles, 0, 0.8) - 0.003 * pores, 0.25)
    canvas.part[:] = 1


def tile(canvas: Canvas, rng: Rng, edit: Edit) -> None:
    """A glazed tile with speckles that fills the image: a surface without features."""
    waves = clouds(rng, canvas.shape, 0.25, octaves=3)
    colour = np.array([0.52, 0.48, 0.42], np.float32) * (1 + 0.03 * waves)[..., None]
    speckles = clouds(rng, canvas.shape, 0.012, octaves=2)
    colour = np.where((speckles > 1.9)[..., None], colour * np.array([0.45, 0.4, 0.36], np.float32), colour)
    colour = np.where((speckles < -2.1)[..., None], np.float32(0.72), colour)
    canvas.lay_ground(colour, 0.0015 * waves, 0.5)
    canvas.part[:] = 1


KINDS = {
    "washer": Kind(washer, 8, TABLE, ((640, 480),), for_choice=True),
    "bracket": Kind(bracket, 6, TABLE, ((800, 600), (640, 480), (1152, 864)), for_choice=True),
    "board": Kind(board, len(_COMPONENTS), FIXTURE, ((800, 600),), jpeg=None, for_choice=True),
    "cap": Kind(cap, 7, BELT, ((640, 480),), for_choice=True),
    "ratchet": Kind(ratchet, 22, BELT, ((640, 480),), for_choice=True),
    "fabric": Kind(fabric, 0, TABLE, ((512, 512),), for_choice=True),
    "leather": Kind(leather, 0, TABLE, ((512, 512),), for_choice=True),
    "gear": Kind(gear, 29, BELT, ((800, 600),)),
    "connector": Kind(connector, 20, TABLE, ((800, 600),), jpeg=None),
    "blister": Kind(blister, 10, FIXTURE, ((800, 600), (1024, 768))),
    "sheet": Kind(sheet, 0, FIXTURE, ((640, 480),), jpeg=None),
    "tile": Kind(tile, 0, TABLE, ((512, 512),)),
}
