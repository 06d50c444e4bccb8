"""Alterations of an image at its own size, as defects and processing make them, each at three sizes in pixels.

The power of a detector is the share of altered good images that it flags. Marks (scratches, spots, pits, stains) differ
from what they cover by a stated number of grey levels, and lie anywhere in the region; parts that are erased, replaced,
missing or moved lie where that changes the image most of `CANDIDATES` random places, because nobody misses a piece of
an even ground. Processing changes the whole image.

An altered image is a function of the image, the alteration, the seed and, for pasted patches, another good image. Does
not import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ncml.errors import InputError
from ncml.images.perturbations import blur, jpeg, noise, rounded
from ncml.images.tiling import Box

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]

CONTRAST = 40
"""Grey levels by which scratches, spots and pits differ from what they cover: darker on light ground, else lighter."""

STAIN_CONTRAST = 25
"""Grey levels by which the middle of a stain is darker or lighter; it fades towards its edge."""

CANDIDATES = 16
"""Random places of which a part is erased, replaced, missing or moved where that changes the image most."""

SIZES = 3
"""Number of sizes of each kind in `ALTERATIONS`."""

MAX_SHARE = 0.5
"""An altered region is at most this share of the image's height and width."""


class Altered(NamedTuple):
    """An altered image."""

    image_HWC: Pixels
    box: Box | None
    """The region outside which nothing has changed; None: the whole image has."""


@dataclass(frozen=True)
class Context:
    """What an alteration works with."""

    image_HWC: Pixels
    region: Box
    rng: np.random.Generator
    other_HWC: Pixels


@dataclass(frozen=True)
class Alteration:
    """One alteration at one size."""

    kind: str
    """Such as `scratch`; the same for its three sizes."""
    size: str
    """In words, such as `1 pixel wide, 20 long`."""
    extent: int
    """Side in pixels of the smallest square that can hold the change; 0 for one of the whole image."""
    change: Callable[[Context], Pixels]

    @property
    def name(self) -> str:
        """Kind and size, such as `scratch, 1 pixel wide, 20 long`."""
        return f"{self.kind}, {self.size}"

    @property
    def is_local(self) -> bool:
        """Whether it changes only a region."""
        return self.extent > 0

    def fits(self, height: int, width: int) -> bool:
        """Return whether an image or a region of this size is large enough."""
        return self.extent <= MAX_SHARE * min(height, width)

    def apply(
        self, image_HWC: Pixels, seed: int, *, other_HWC: Pixels | None = None, region: Box | None = None
    ) -> Altered:
        """Alter an image, uint8 [H, W, 3].

        other_HWC: another good image, from which a patch may be pasted; None, or if it is too small: the image itself.
        region: the part of the image that may change, except under processing; None: all of it.
        Raises `InputError` for an image or a region that is too small (`fits`).
        """
        height, width = image_HWC.shape[:2]
        region = region or Box(0, 0, width, height)
        if not self.fits(region.height, region.width):
            raise InputError(
                "image",
                f"{self.name} needs {round(self.extent / MAX_SHARE)} pixels in each direction, and there are "
                f"{region.width} x {region.height}: use a smaller alteration.",
            )
        rng = np.random.default_rng([seed, crc32(self.name.encode())])
        if other_HWC is None or min(other_HWC.shape[:2]) < self.extent:
            other_HWC = image_HWC
        altered_HWC = self.change(Context(image_HWC, region, rng, other_HWC))
        return Altered(altered_HWC, Box.around((altered_HWC != image_HWC).any(2)) if self.is_local else None)


def scratch(width: int, length: int) -> Callable[[Context], Pixels]:
    """Draw a straight line, in any direction."""

    def change(context: Context) -> Pixels:
        top, left, side = _square(context, length + width)
        angle = context.rng.uniform(0, np.pi)
        y, x = offsets(side)
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        beyond = np.maximum(np.abs(along) - (length - width) / 2, 0)
        return _mark(context, top, left, cover(np.hypot(beyond, across) - width / 2), CONTRAST)

    return change


def spot(radius: int) -> Callable[[Context], Pixels]:
    """Draw a round spot."""

    def change(context: Context) -> Pixels:
        top, left, side = _square(context, 2 * radius + 1)
        y, x = offsets(side)
        return _mark(context, top, left, cover(np.hypot(x, y) - radius), CONTRAST)

    return change


def pit(radius: int) -> Callable[[Context], Pixels]:
    """Shade a round depression: dark on the side of the light, light on the other, unchanged in between."""

    def change(context: Context) -> Pixels:
        top, left, side = _square(context, 2 * radius + 1)
        y, x = offsets(side)
        distance, angle = np.hypot(x, y), context.rng.uniform(0, 2 * np.pi)
        # The slope of a bowl is steepest at its rim, where a pixel or two fade into the surface.
        shade = (x * np.cos(angle) + y * np.sin(angle)) / radius * cover(distance - radius)
        return _add(context, top, left, CONTRAST * np.clip(shade, -1, 1))

    return change


def stain(radius: int) -> Callable[[Context], Pixels]:
    """Darken or lighten a round area that fades towards its edge."""

    def change(context: Context) -> Pixels:
        top, left, side = _square(context, 2 * radius + 1)
        y, x = offsets(side)
        share = np.cos(np.pi / 2 * np.minimum(np.hypot(x, y) / radius, 1)) ** 2
        return _mark(context, top, left, share, STAIN_CONTRAST)

    return change


def erase(side: int) -> Callable[[Context], Pixels]:
    """Fill a square with its mean colour."""

    def change(context: Context) -> Pixels:
        def fill(square_HWC: Pixels, top: int, left: int) -> Pixels:
            return np.broadcast_to(square_HWC.mean((0, 1)).round().astype(np.uint8), square_HWC.shape)

        return _replace(context, side, fill)

    return change


def paste(side: int) -> Callable[[Context], Pixels]:
    """Replace a square by one from a random place of another good image."""

    def change(context: Context) -> Pixels:
        height, width = context.other_HWC.shape[:2]
        if min(height, width) < side:
            raise InputError("image", f"a patch of {side} pixels cannot be cut from {width} x {height} pixels.")
        from_top, from_left = (int(context.rng.integers(room - side + 1)) for room in (height, width))
        patch_HWC = context.other_HWC[from_top : from_top + side, from_left : from_left + side]
        return _replace(context, side, lambda square_HWC, top, left: patch_HWC)

    return change


def remove(side: int) -> Callable[[Context], Pixels]:
    """Replace a square by its surroundings: each pixel by the mean of those at the edge, weighted by nearness."""

    def change(context: Context) -> Pixels:
        image_HWC = context.image_HWC
        height, width = image_HWC.shape[:2]
        share = (np.arange(side) + 0.5)[:, None] / side
        near, far = 1 / share, 1 / (1 - share)

        def fill(square_HWC: Pixels, top: int, left: int) -> Pixels:
            rows, columns = slice(top, top + side), slice(left, left + side)
            above = image_HWC[max(0, top - 1), columns].astype(float)
            below = image_HWC[min(height - 1, top + side), columns].astype(float)
            before = image_HWC[rows, max(0, left - 1)].astype(float)
            after = image_HWC[rows, min(width - 1, left + side)].astype(float)
            vertical = near[:, None] * above[None] + far[:, None] * below[None]
            horizontal = near[None] * before[:, None] + far[None] * after[:, None]
            weight = (near + far)[:, None] + (near + far)[None]
            return np.rint((vertical + horizontal) / weight).astype(np.uint8)

        return _replace(context, side, fill)

    return change


def move(side: int, distance: int) -> Callable[[Context], Pixels]:
    """Shift the content of a square in a random direction; what it leaves is filled from its edge."""

    def change(context: Context) -> Pixels:
        down, right = ((distance, 0), (-distance, 0), (0, distance), (0, -distance))[int(context.rng.integers(4))]
        rows = np.clip(np.arange(side) - down, 0, side - 1)
        columns = np.clip(np.arange(side) - right, 0, side - 1)
        return _replace(context, side, lambda square_HWC, top, left: square_HWC[rows][:, columns])

    return change


def brighten(percent: int) -> Callable[[Context], Pixels]:
    """Make every value larger or smaller by this share."""

    def change(context: Context) -> Pixels:
        sign = context.rng.choice([-1, 1])
        return rounded(context.image_HWC * (1 + sign * percent / 100))

    return change


def tint(grey_levels: int) -> Callable[[Context], Pixels]:
    """Raise one channel and lower the others by half as much, or the reverse, so that the brightness is kept."""

    def change(context: Context) -> Pixels:
        offset_C = np.full(3, -grey_levels / 2)
        offset_C[int(context.rng.integers(3))] = grey_levels
        return rounded(context.image_HWC + context.rng.choice([-1, 1]) * offset_C)

    return change


def rotate(degrees: float) -> Callable[[Context], Pixels]:
    """Turn about the middle, to the left or to the right; what enters at the corners mirrors the image."""

    def change(context: Context) -> Pixels:
        height, width = context.image_HWC.shape[:2]
        margin = int(np.ceil(np.sin(np.deg2rad(degrees)) * max(height, width))) + 2
        padded_HWC = np.pad(context.image_HWC, ((margin, margin), (margin, margin), (0, 0)), "symmetric")
        angle = float(context.rng.choice([-1, 1]) * degrees)
        turned = Image.fromarray(padded_HWC).rotate(angle, Image.Resampling.BICUBIC)
        return np.asarray(turned)[margin : margin + height, margin : margin + width].copy()

    return change


def _square(context: Context, side: int) -> tuple[int, int, int]:
    """Return a random square of the region: top, left and side."""
    region = context.region
    top = region.top + int(context.rng.integers(region.height - side + 1))
    left = region.left + int(context.rng.integers(region.width - side + 1))
    return top, left, side


def offsets(side: int) -> tuple[Floats, Floats]:
    """Return the rows and columns of a square's pixels from its middle."""
    steps = np.arange(side, dtype=np.float64) - (side - 1) / 2
    return steps[:, None], steps[None, :]


def cover(distance_HW: Floats) -> Floats:
    """Return the share of each pixel inside a shape, from its distance to the outline, negative inside."""
    return np.clip(0.5 - distance_HW, 0, 1)


def _mark(context: Context, top: int, left: int, share_HW: Floats, contrast: float) -> Pixels:
    """Darken what is light, or lighten what is dark, by a contrast in grey levels times a share."""
    height, width = share_HW.shape
    covered_HWC = context.image_HWC[top : top + height, left : left + width]
    brightness = np.average(covered_HWC.mean(2), weights=share_HW)
    return _add(context, top, left, (-contrast if brightness > 127.5 else contrast) * share_HW)


def _add(context: Context, top: int, left: int, levels_HW: Floats) -> Pixels:
    """Add grey levels to every channel, from a pixel on."""
    altered_HWC = context.image_HWC.copy()
    window = altered_HWC[top : top + levels_HW.shape[0], left : left + levels_HW.shape[1]]
    window[:] = rounded(window + levels_HW[:, :, None])
    return altered_HWC


def _replace(context: Context, side: int, fill: Callable[[Pixels, int, int], Pixels]) -> Pixels:
    """Replace a square where that changes the image most, of random places.

    fill: the square, its top and its left, to its new content.
    """
    changes: list[tuple[float, int, int, Pixels]] = []
    for _ in range(CANDIDATES):
        top, left, _side = _square(context, side)
        square_HWC = context.image_HWC[top : top + side, left : left + side]
        content_HWC = fill(square_HWC, top, left)
        change = float(np.abs(content_HWC.astype(float) - square_HWC).mean())
        changes.append((change, top, left, content_HWC))
    _change, top, left, content_HWC = max(changes, key=lambda candidate: candidate[0])
    altered_HWC = context.image_HWC.copy()
    altered_HWC[top : top + side, left : left + side] = content_HWC
    return altered_HWC


def _processing(perturb: Callable[[Pixels, np.random.Generator], Pixels]) -> Callable[[Context], Pixels]:
    """Return a perturbation as a change."""
    return lambda context: perturb(context.image_HWC, context.rng)


def _pixels(count: float) -> str:
    return f"{count:g} pixel{'' if count == 1 else 's'}"


ALTERATIONS: tuple[Alteration, ...] = (
    *(
        Alteration("scratch", f"{_pixels(width)} wide, {length} long", length + width, scratch(width, length))
        for width, length in ((1, 20), (2, 50), (3, 100))
    ),
    *(Alteration("spot", f"radius {_pixels(r)}", 2 * r + 1, spot(r)) for r in (2, 6, 16)),
    *(Alteration("pit", f"radius {_pixels(r)}", 2 * r + 1, pit(r)) for r in (2, 6, 16)),
    *(Alteration("stain", f"radius {_pixels(r)}", 2 * r + 1, stain(r)) for r in (8, 20, 50)),
    *(Alteration("erased patch", f"{_pixels(side)} wide", side, erase(side)) for side in (8, 20, 50)),
    *(Alteration("pasted patch", f"{_pixels(side)} wide", side, paste(side)) for side in (8, 20, 50)),
    *(Alteration("missing part", f"{_pixels(side)} wide", side, remove(side)) for side in (12, 30, 60)),
    *(Alteration("moved part", f"by {_pixels(shift)}", 48, move(48, shift)) for shift in (2, 5, 12)),
    *(Alteration("blur", _pixels(sigma), 0, _processing(blur(sigma))) for sigma in (0.5, 1, 2)),
    *(Alteration("noise", f"{levels} grey levels", 0, _processing(noise(levels))) for levels in (2, 5, 12)),
    *(Alteration("JPEG", f"quality {quality}", 0, _processing(jpeg(quality))) for quality in (75, 50, 20)),
    *(Alteration("brightness", f"{percent}%", 0, brighten(percent)) for percent in (5, 15, 40)),
    *(Alteration("colour", f"{levels} grey levels", 0, tint(levels)) for levels in (5, 12, 30)),
    *(Alteration("rotation", f"{degrees} degrees", 0, rotate(degrees)) for degrees in (2, 6, 20)),
)
"""By kind, from the least to the greatest."""
