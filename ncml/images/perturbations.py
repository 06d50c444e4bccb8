"""Changes of a picture that keep its size: of processing, which a user may want tolerated, and of content.

Calibration applies those that it is told to tolerate; the controls of docs/ood.md measure which of them are flagged.
Knows no torch: uint8 [H, W, 3] and a generator in, uint8 [H, W, 3] out.
"""

import io
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from ncml.errors import InputError

Picture = NDArray[np.uint8]
Change = Callable[[Picture, np.random.Generator], Picture]

Filter = Image.Resampling
FILTERS = (Filter.BOX, Filter.BILINEAR, Filter.BICUBIC, Filter.LANCZOS)

Tolerance = Literal["jpeg", "resize"]


def jpeg(quality: int) -> Change:
    """Compress to JPEG and open again: what most pictures on the web have been through."""

    def change(picture: Picture, _: np.random.Generator) -> Picture:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality)
        return np.array(Image.open(file), np.uint8)

    return change


def resample(factor: float, there: Filter, back: Filter) -> Change:
    """Resize by a factor with one filter and back with another."""

    def change(picture: Picture, _: np.random.Generator) -> Picture:
        height, width = picture.shape[:2]
        size = max(1, round(width * factor)), max(1, round(height * factor))
        return np.array(Image.fromarray(picture).resize(size, there).resize((width, height), back), np.uint8)

    return change


def blur(sigma: float) -> Change:
    """Gaussian blur; sigma in pixels."""
    return lambda picture, _: np.array(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(sigma)), np.uint8)


def noise(grey_levels: float) -> Change:
    """Add Gaussian noise of this standard deviation to every value, round and clip."""
    return lambda picture, rng: _rounded(picture + grey_levels * rng.standard_normal(picture.shape))


def contrast(factor: float) -> Change:
    """Scale the distance of every value from the picture's mean grey."""
    return lambda picture, _: _rounded(picture.mean() + factor * (picture - picture.mean()))


def flip_lowest_bits(picture: Picture, _: np.random.Generator) -> Picture:
    """Flip the lowest bit of every value."""
    return picture ^ np.uint8(1)


def mirror(picture: Picture, _: np.random.Generator) -> Picture:
    """Left becomes right."""
    return picture[:, ::-1].copy()


def swap_channels(picture: Picture, _: np.random.Generator) -> Picture:
    """Red becomes blue and blue red."""
    return picture[:, :, ::-1].copy()


def shuffle_patches(side: int) -> Change:
    """Cut into squares and put them together in random order."""

    def change(picture: Picture, rng: np.random.Generator) -> Picture:
        height, width = picture.shape[:2]
        patches = (
            picture.reshape(height // side, side, width // side, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        )
        patches = patches[rng.permutation(len(patches))]
        return patches.reshape(height // side, width // side, side, side, 3).swapaxes(1, 2).reshape(picture.shape)

    return change


def tolerated(pictures: Sequence[Picture] | Picture, tolerate: Sequence[Tolerance], *, seed: int = 0) -> Picture:
    """Each picture as it is or, as often, once through one of the tolerated changes; uint8 [N, H, W, 3].

    jpeg: a quality of 50 to 95. resize: to a scale of 0.6 to 2 and back, each way with a filter of its own.
    The result is a function of the pictures and the seed.
    """
    for name in tolerate:
        if name not in TOLERANCES:
            raise InputError(
                "tolerate", f"there is no change {name!r} to tolerate: choose from {', '.join(TOLERANCES)}."
            )
    rng = np.random.default_rng(seed)

    def one(picture: Picture) -> Picture:
        if not tolerate or rng.random() < 0.5:
            return picture
        return TOLERANCES[tolerate[int(rng.integers(len(tolerate)))]](picture, rng)

    return np.stack([one(picture) for picture in pictures])


def _some_jpeg(picture: Picture, rng: np.random.Generator) -> Picture:
    return jpeg(int(rng.integers(50, 96)))(picture, rng)


def _some_resize(picture: Picture, rng: np.random.Generator) -> Picture:
    there, back = (FILTERS[i] for i in rng.integers(len(FILTERS), size=2))
    return resample(float(rng.uniform(0.6, 2)), there, back)(picture, rng)


def _rounded(values: NDArray[np.float64]) -> Picture:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


TOLERANCES: dict[Tolerance, Change] = {"jpeg": _some_jpeg, "resize": _some_resize}
