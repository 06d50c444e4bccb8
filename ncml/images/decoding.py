"""Decode an image file to RGB pixels, under limits of bytes, pixels and structure.

The rules:

- PNG, JPEG, WebP, BMP, TIFF and GIF are read; every other decoder of Pillow is off.
- EXIF rotation is applied. Colour profiles are ignored: sample values are taken as sRGB.
- Grey, palette, CMYK and YCbCr become RGB; of 16-bit samples the high byte is kept.
- Transparency is composited on white (in `place_known_half` it marks the unknown half instead). A 16-bit RGB PNG with
  one transparent colour is refused: the high bytes do not identify the pixels that have that colour.
- Of an animation or a multi-page file the first frame is used.
"""

import io
import os
import re
import warnings
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ncml.errors import InputError, NotAnImage, TooLarge
from ncml.images import structure, tiff
from ncml.object_storage import StoragePath

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""The file name suffixes of these formats."""
MAX_BYTES = 16 * 2**20
MAX_PIXELS = 2**25

_FORMAT_NAMES = "PNG, JPEG, WebP, BMP, TIFF or GIF"
_MAX_TIFF_BLOCKS = 2**17
_STRIP_ROWS = 256


File: TypeAlias = bytes | str | os.PathLike[str] | StoragePath
"""The bytes of a file, or its path."""


def open_image(
    data: File,
    *,
    field: str = "image",
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> NDArray[np.uint8]:
    """Read an image from a file's bytes, or from a path, into uint8 (H, W, 3) RGB in [0, 255].

    Bytes are counted before they are read and pixels before they are decoded, so a small file that would expand into a
    huge image costs nothing. `field` is the caller's name for this input; errors carry it.

    Raises `TooLarge` beyond `max_bytes` or `max_pixels`, `NotAnImage` for a file that does not decode completely,
    `InputError` for a path that cannot be read.
    """
    return to_rgb(decode(data, field, max_bytes, max_pixels))


def is_grey(image_HWC: NDArray[np.uint8]) -> bool:
    """Return whether the three channels of an image, [H, W, 3], are equal."""
    return all(np.array_equal(image_HWC[..., 0], image_HWC[..., channel]) for channel in (1, 2))


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Convert a loaded Pillow image to uint8 (H, W, 3) RGB by the rules of this module."""
    image = to_rgb_or_rgba(image)
    if image.mode == "RGB":
        return np.array(image, dtype=np.uint8)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, _STRIP_ROWS):  # in strips, to avoid two more copies of a large image
        strip = image.crop((0, top, image.width, min(top + _STRIP_ROWS, image.height)))
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        pixels[top : top + _STRIP_ROWS] = np.asarray(Image.alpha_composite(white, strip).convert("RGB"))
    return pixels


def decode(data: File, field: str, max_bytes: int, max_pixels: int) -> Image.Image:
    """Decode the first frame, rotated by its EXIF orientation, to mode RGB or RGBA; raises as `open_image` does."""
    raw = _read(data, field, max_bytes)
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow's own limit, one for the whole process, bounds the cost of opening
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # such images are refused below
    structure.check(raw, field)
    try:
        _check_tiff_blocks(raw, field, max_pixels)
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
    except Image.DecompressionBombError as error:
        count = re.search(r"\d+ pixels", str(error))
        raise TooLarge(
            field,
            f"{field} has {count[0] if count else 'too many pixels'}; at most {max_pixels} pixels are accepted, "
            "so make it smaller first.",
        ) from error
    except (MemoryError, TooLarge):
        raise
    except Exception as error:  # a decoder may raise any error for hostile bytes
        raise NotAnImage(
            field, f"{field} is not an image in a supported format; send a {_FORMAT_NAMES} file."
        ) from error
    if image.width * image.height > max_pixels:
        raise TooLarge(
            field,
            f"{field} is {image.width} x {image.height} pixels; at most {max_pixels} pixels are accepted, "
            "so make it smaller first.",
        )
    try:
        image.load()
        _scale_transparent_colour(image, raw, field)
        ImageOps.exif_transpose(image, in_place=True)
        return to_rgb_or_rgba(image)
    except (MemoryError, NotAnImage):
        raise
    except Exception as error:  # as above
        raise NotAnImage(
            field,
            f"{field} is a {image.format} file that is damaged, cut short or of an unsupported kind; "
            "save it again as an ordinary PNG or JPEG.",
        ) from error


def to_rgb_or_rgba(image: Image.Image) -> Image.Image:
    """Convert to mode RGB, or RGBA if the image has transparency."""
    if image.mode in ("RGB", "RGBA") and not (image.mode == "RGB" and "transparency" in image.info):
        return image
    if image.mode.startswith("I;16"):
        samples = np.asarray(image)
        grey = Image.fromarray((samples >> 8).astype(np.uint8)).convert("RGB")
        if "transparency" in image.info:
            opaque = np.where(samples == image.info["transparency"], 0, 255)
            grey.putalpha(Image.fromarray(opaque.astype(np.uint8)))
        return grey
    if image.mode in ("I", "F"):
        raise ValueError("32-bit samples have no agreed range")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _read(data: File, field: str, max_bytes: int) -> bytes:
    """Return the file's bytes; read at most `max_bytes` + 1. Raises `StorageError` as `StoragePath.read` does."""
    if isinstance(data, bytes):
        size, raw = len(data), data
    elif isinstance(data, StoragePath):
        size, raw = data.read(max_bytes)
    else:
        try:
            with Path(data).open("rb") as file:
                size, raw = os.fstat(file.fileno()).st_size, file.read(max_bytes + 1)
        except (OSError, ValueError) as error:  # ValueError: a null character
            name = field if field == os.fspath(data) else f"{field} {os.fspath(data)!r}"
            raise InputError(field, f"{name} cannot be read: {getattr(error, 'strerror', error)}.") from error
    if max(size, len(raw)) > max_bytes:
        raise TooLarge(field, f"{field} has {max(size, len(raw))} bytes; at most {max_bytes} are accepted.")
    if not raw:
        raise NotAnImage(field, f"{field} is empty (zero bytes); send a {_FORMAT_NAMES} file.")
    return raw


def _check_tiff_blocks(raw: bytes, field: str, max_pixels: int) -> None:
    """Refuse a TIFF file whose strips and tiles cost far more than its width and height suggest."""
    blocks = tiff.read_blocks(raw)
    if blocks is None:
        return
    if blocks.tile_width * blocks.tile_height > max_pixels:
        layout, limit = f"tiles of {blocks.tile_width} x {blocks.tile_height} pixels", f"{max_pixels} pixels"
    elif blocks.count > _MAX_TIFF_BLOCKS:
        layout, limit = f"{blocks.count} strips or tiles", f"{_MAX_TIFF_BLOCKS}"
    else:
        return
    raise TooLarge(
        field, f"{field} is a TIFF file in {layout}; at most {limit} are accepted, so save it again as an ordinary PNG."
    )


def _scale_transparent_colour(image: Image.Image, raw: bytes, field: str) -> None:
    """Scale the transparent colour of a PNG to its 8-bit samples: Pillow leaves it at the file's bit depth."""
    if image.format != "PNG" or "transparency" not in image.info:
        return
    depth = raw[24]
    if image.mode == "L" and depth < 8:
        image.info["transparency"] *= 255 // (2**depth - 1)
    elif image.mode == "RGB" and depth == 16:
        raise NotAnImage(
            field,
            f"{field} is a PNG of 16 bits with one transparent colour, which 8 bits cannot distinguish from its "
            "neighbours; save it again with an alpha channel or without transparency.",
        )
