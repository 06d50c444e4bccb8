"""Changes of an image that keep its size: processing, which users may want to tolerate, and alterations of content.

Calibration applies the tolerated ones, and measures how often those of `PROCESSING` and `ALTERATIONS` are flagged; the
controls in docs/ood-method.md use more of them. Each maps uint8 [H, W, 3] and a generator to uint8 [H, W, 3]. Does not
import torch.
"""

import io
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from ncml.errors import InputError

Pixels = NDArray[np.uint8]
Perturbation = Callable[[Pixels, np.random.Generator], Pixels]

Filter = Image.Resampling
FILTERS = (Filter.BOX, Filter.BILINEAR, Filter.BICUBIC, Filter.LANCZOS)

Tolerance = Literal["jpeg", "resize"]


def jpeg(quality: int) -> Perturbation:
    """Compress to JPEG and decode again."""

    def perturb(image: Pixels, _: np.random.Generator) -> Pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        return np.array(Image.open(file), np.uint8)

    return perturb


def resample(factor: float, first_filter: Filter, second_filter: Filter) -> Perturbation:
    """Resize by a factor with one filter and back with another."""

    def perturb(image: Pixels, _: np.random.Generator) -> Pixels:
        height, width = image.shape[:2]
        size = max(1, round(width * factor)), max(1, round(height * factor))
        resized = Image.fromarray(image).resize(size, first_filter)
        return np.array(resized.resize((width, height), second_filter), np.uint8)

    return perturb


def blur(sigma: float) -> Perturbation:
    """Apply Gaussian blur; sigma in pixels."""
    return lambda image, _: np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)), np.uint8)


def noise(grey_levels: float) -> Perturbation:
    """Add Gaussian noise of this standard deviation to every value, round and clip."""
    return lambda image, rng: rounded(image + grey_levels * rng.standard_normal(image.shape))


def contrast(factor: float) -> Perturbation:
    """Scale the distance of every value from the image's mean grey."""
    return lambda image, _: rounded(image.mean() + factor * (image - image.mean()))


def flip_lowest_bits(image: Pixels, _: np.random.Generator) -> Pixels:
    """Flip the lowest bit of every value."""
    return image ^ np.uint8(1)


def mirror(image: Pixels, _: np.random.Generator) -> Pixels:
    """Swap left and right."""
    return image[:, ::-1].copy()


def swap_channels(image: Pixels, _: np.random.Generator) -> Pixels:
    """Swap red and blue."""
    return image[:, :, ::-1].copy()


def shuffle_patches(side: int) -> Perturbation:
    """Split into squares and reassemble them in random order."""

    def perturb(image: Pixels, rng: np.random.Generator) -> Pixels:
        height, width = image.shape[:2]
        rows, columns = height // side, width // side
        patches = image.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        patches = patches[rng.permutation(len(patches))]
        return patches.reshape(rows, columns, side, side, 3).swapaxes(1, 2).reshape(image.shape)

    return perturb


def shift_colours(grey_levels: float) -> Perturbation:
    """Add one random offset of up to this size to each channel."""
    return lambda image, rng: rounded(image + rng.uniform(-grey_levels, grey_levels, 3))


def paste_patch(side: float) -> Perturbation:
    """Copy a random square to another random place, turned by 90 degrees; side: a share of the image's shorter one.

    After Li et al., "CutPaste: Self-Supervised Learning for Anomaly Detection and Localization", 2021.
    """

    def perturb(image: Pixels, rng: np.random.Generator) -> Pixels:
        pixels = max(1, round(side * min(image.shape[:2])))
        (top, new_top), (left, new_left) = (rng.integers(size - pixels + 1, size=2) for size in image.shape[:2])
        pasted = image.copy()
        pasted[new_top : new_top + pixels, new_left : new_left + pixels] = np.rot90(
            image[top : top + pixels, left : left + pixels]
        )
        return pasted

    return perturb


def apply_tolerances(images: Sequence[Pixels] | Pixels, tolerate: Sequence[Tolerance], *, seed: int = 0) -> Pixels:
    """Perturb each image, with probability 1/2, by one of the tolerated changes; uint8 [N, H, W, 3].

    jpeg: a quality of 50 to 95. resize: to a scale of 0.6 to 2 and back, each with its own random filter.
    The result is a function of the images and the seed.
    """
    for name in tolerate:
        if name not in TOLERANCES:
            raise InputError(
                "tolerate", f"there is no change {name!r} to tolerate: choose from {', '.join(TOLERANCES)}."
            )
    rng = np.random.default_rng(seed)

    def perturb(image: Pixels) -> Pixels:
        if not tolerate or rng.random() < 0.5:
            return image
        return TOLERANCES[tolerate[int(rng.integers(len(tolerate)))]](image, rng)

    return np.stack([perturb(image) for image in images])


def _random_jpeg(image: Pixels, rng: np.random.Generator) -> Pixels:
    return jpeg(int(rng.integers(50, 96)))(image, rng)


def _random_resample(image: Pixels, rng: np.random.Generator) -> Pixels:
    first_filter, second_filter = (FILTERS[i] for i in rng.integers(len(FILTERS), size=2))
    return resample(float(rng.uniform(0.6, 2)), first_filter, second_filter)(image, rng)


def rounded(values: NDArray[np.float64]) -> Pixels:
    """Return the values as pixels, rounded and clipped to 0 to 255."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


TOLERANCES: dict[Tolerance, Perturbation] = {"jpeg": _random_jpeg, "resize": _random_resample}

PROCESSING: dict[str, Perturbation] = {
    **{f"JPEG, quality {quality}": jpeg(quality) for quality in (95, 75, 50)},
    "half size and back": resample(0.5, Filter.BOX, Filter.BICUBIC),
    "blur, 0.5 pixels": blur(0.5),
    "noise, 1 grey level": noise(1),
}
"""Barely visible processing: the share that a calibration flags shows whether it needs a tolerance."""

ALTERATIONS: dict[str, Perturbation] = {
    "blur, 1.5 pixels": blur(1.5),
    "noise, 5 grey levels": noise(5),
    "JPEG, quality 20": jpeg(20),
    "colour shift, 40 grey levels": shift_colours(40),
    "pasted patch, 3/8 of the side": paste_patch(3 / 8),
}
"""Changes that a detector should flag: the share that a calibration flags is a measure of its power."""
