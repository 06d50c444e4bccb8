"""Preprocess whole images, or the known half of one, to the model's size.

Training, calibration and serving all use `decoding.open_image` and `resize_to`, so an image has the same pixels in all
of them. `PREPROCESSING` names their rules; a calibration made under other rules does not apply.

`resize_to` crops the centre to the model's aspect and resizes by Pillow's antialiased bicubic filter; an image that
already has the model's size passes unchanged.
"""

import math
import os
from collections.abc import Collection
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ncml.errors import InputError
from ncml.images.decoding import MAX_BYTES, MAX_PIXELS, decode, open_image, to_rgb
from ncml.limits import KEEPS, Keep

PREPROCESSING: dict[str, str | int] = {"name": "centre-crop-bicubic", "version": 1}

_MIN_KNOWN_ALPHA = 128

Index = tuple[slice, slice]


def resize_to(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Resize uint8 (h, w, 3) to (height, width, 3): centre crop to the aspect, then antialiased bicubic."""
    if image.shape == (height, width, 3):
        return image
    top, left, bottom, right = _centre_box(image.shape[0], image.shape[1], height, width)
    cropped = Image.fromarray(np.ascontiguousarray(image[top:bottom, left:right]))
    return np.array(cropped.resize((width, height), Image.Resampling.BICUBIC), dtype=np.uint8)


def open_resized(
    data: bytes | str | os.PathLike[str],
    height: int,
    width: int,
    *,
    field: str = "image",
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> NDArray[np.uint8]:
    """Read an image into uint8 (height, width, 3): `open_image`, then `resize_to`; raises as `open_image` does."""
    image = open_image(data, field=field, max_bytes=max_bytes, max_pixels=max_pixels)
    return resize_to(image, height, width)


def place_known_half(
    data: bytes | str | os.PathLike[str],
    height: int,
    width: int,
    *,
    keeps: Collection[str],
    keep: str | None = None,
    field: str = "image",
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> tuple[NDArray[np.uint8], Keep]:
    """Place the known half of an image on a canvas of model size, uint8 (height, width, 3), unknown half black.

    Three forms are accepted, in this order:

    1. Pixels with alpha below 128 are unknown. The others must be exactly one half (of an odd size, up to the middle
       row or column), which determines `keep`.
    2. An image of exactly half the model's aspect is that half, placed by `keep`: top or bottom (default top) for one
       of half the height, left or right (default left) for one of half the width.
    3. Any other image is whole; its `keep` half (default top) is kept and the other discarded.

    `keeps` are the halves that the model can complete from. Returns the canvas and the known half.
    Raises `InputError` with the field "keep" for a half that the model or the image does not allow, and the errors of
    `open_image`.
    """
    _check_keep(keep)  # before the image is decoded
    image = decode(data, field, max_bytes, max_pixels)
    return place_known_half_of(image, height, width, keeps=keeps, keep=keep, field=field)


def place_known_half_of(
    image: Image.Image,
    height: int,
    width: int,
    *,
    keeps: Collection[str],
    keep: str | None = None,
    field: str = "image",
) -> tuple[NDArray[np.uint8], Keep]:
    """Place the known half of a Pillow image as `place_known_half` does."""
    whole, half = _locate_half(image, height, width, _check_keep(keep), field)
    if half not in keeps:
        supported = " or ".join(name for name in KEEPS if name in keeps)
        remedy = f"it completes images of which the {supported} half is known" if supported else "it completes none"
        raise InputError("keep", f"This model cannot complete an image from its {half} half: {remedy}.")
    canvas = np.zeros((height, width, 3), np.uint8)
    index = _half_index(half, height // 2 if half in ("top", "bottom") else width // 2)
    canvas[index] = resize_to(whole, height, width)[index]
    return canvas, half


def _check_keep(keep: str | None) -> Keep | None:
    if keep is not None and keep not in KEEPS:
        raise InputError("keep", f"keep is {keep!r}; it must be one of {', '.join(KEEPS)}.")
    return cast(Keep | None, keep)


def _locate_half(
    image: Image.Image, height: int, width: int, keep: Keep | None, field: str
) -> tuple[NDArray[np.uint8], Keep]:
    """Return the whole image (h, w, 3), the unknown half mirrored if it is missing, and the half that is known."""
    h, w = image.height, image.width
    if image.mode == "RGBA":
        known_mask = np.asarray(image.getchannel("A")) >= _MIN_KNOWN_ALPHA
        if not known_mask.all():
            half, index = _half_of_mask(known_mask, field)
            if keep not in (None, half):
                raise InputError(
                    "keep",
                    f"keep is {keep!r}, but the opaque half of {field} is its {half}: omit keep, or name that half.",
                )
            return _mirror(np.array(image.convert("RGB"), dtype=np.uint8)[index], half, h, w), half
    is_wide_half, is_tall_half = 2 * h * width == w * height, h * width == 2 * w * height
    if not (is_wide_half or is_tall_half):
        return to_rgb(image), keep or "top"
    halves: tuple[Keep, Keep] = ("top", "bottom") if is_wide_half else ("left", "right")
    if keep is not None and keep not in halves:
        raise InputError(
            "keep",
            f"keep is {keep!r}, but {field} ({w} x {h} pixels) is half of an image: keep must be {halves[0]} or "
            f"{halves[1]}, or crop the image to {_describe_aspect(width, height)}.",
        )
    half = keep or halves[0]
    return _mirror(to_rgb(image), half, 2 * h if is_wide_half else h, w if is_wide_half else 2 * w), half


def _half_of_mask(known_mask: NDArray[np.bool_], field: str) -> tuple[Keep, Index]:
    """Return the half that a mask (h, w) marks, and its index."""
    for half in KEEPS:
        size = known_mask.shape[0 if half in ("top", "bottom") else 1]
        for boundary in {size // 2, (size + 1) // 2} - {0, size}:
            index = _half_index(half, boundary)
            half_mask = np.zeros_like(known_mask)
            half_mask[index] = True
            if np.array_equal(half_mask, known_mask):
                return half, index
    raise InputError(
        field,
        f"{field} has transparent pixels (alpha below {_MIN_KNOWN_ALPHA}), and the others are not exactly its top, "
        "bottom, left or right half: make one half opaque and the other transparent, or send it without transparency.",
    )


def _half_index(half: Keep, boundary: int) -> Index:
    """Return the index of one side of the row or column `boundary`."""
    side = slice(0, boundary) if half in ("top", "left") else slice(boundary, None)
    return (side, slice(None)) if half in ("top", "bottom") else (slice(None), side)


def _mirror(known_half: NDArray[np.uint8], half: Keep, h: int, w: int) -> NDArray[np.uint8]:
    """Pad a half to (h, w, 3) with its own reflection, so that resizing does not blend other pixels into it."""
    rows, columns = h - known_half.shape[0], w - known_half.shape[1]
    pad_before = half in ("bottom", "right")
    return np.pad(
        known_half,
        [(rows, 0) if pad_before else (0, rows), (columns, 0) if pad_before else (0, columns), (0, 0)],
        "symmetric",
    )


def _centre_box(h: int, w: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Return (top, left, bottom, right) of the largest centred box of aspect height:width inside h by w."""
    box_h, box_w = h, w
    if w * height > h * width:
        box_w = max(1, round(h * width / height))
    else:
        box_h = max(1, round(w * height / width))
    top, left = (h - box_h) // 2, (w - box_w) // 2
    return top, left, top + box_h, left + box_w


def _describe_aspect(width: int, height: int) -> str:
    divisor = math.gcd(width, height)
    return "a square" if width == height else f"{width // divisor}:{height // divisor}"
