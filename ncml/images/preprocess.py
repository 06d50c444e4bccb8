"""Bytes to a checked picture, a picture to model size, and back to PNG. Pillow and numpy only.

Everything that trains, calibrates or serves goes through `open_image` and `fit`, so a picture means the same
numbers everywhere. `PREPROCESSING` names these rules; a calibration made under others does not apply.

The rules:

- Read are PNG, JPEG, WebP, BMP, TIFF and GIF; every other decoder of Pillow is off.
- EXIF rotation is applied. Colour profiles are ignored: sample values are taken as sRGB.
- Grey, palette, CMYK and YCbCr become RGB; of 16-bit samples the high byte is kept.
- Transparency is composited on white (in `half_canvas` it marks the unknown half instead). A 16-bit RGB PNG with one
  transparent colour is refused: its high bytes do not tell which pixels have that colour.
- Of an animation or a multi-page file the first frame is used.
- `fit` crops the centre to the wanted aspect and resizes by Pillow's antialiased bicubic filter; a picture that
  already has the wanted size passes unchanged.
"""

import io
import math
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ncml.errors import InputError, NotAnImage, TooLarge
from ncml.images import tiff

Keep = Literal["top", "bottom", "left", "right"]

KEEPS: tuple[Keep, ...] = ("top", "bottom", "left", "right")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
PREPROCESSING: dict[str, str | int] = {"name": "centre-crop-bicubic", "version": 1}
MAX_BYTES = 16 * 2**20
MAX_PIXELS = 2**25

_READABLE = "PNG, JPEG, WebP, BMP, TIFF or GIF"
_ALPHA_KNOWN = 128
_MAX_BLOCKS = 2**17


def open_image(
    data: bytes | str | os.PathLike[str],
    *,
    field: str = "image",
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> NDArray[np.uint8]:
    """Read a picture from its file's bytes, or from a path, into uint8 (H, W, 3) RGB in [0, 255].

    Bytes are counted before they are read and pixels before they are decoded, so a small file that would unfold
    into a huge picture costs nothing. `field` is how the caller knows this input; errors carry it.

    Raises `TooLarge` beyond `max_bytes` or `max_pixels`, `NotAnImage` for anything that does not decode whole,
    `InputError` for a path that cannot be read.
    """
    return to_rgb(_decode(data, field, max_bytes, max_pixels))


def to_rgb(picture: Image.Image) -> NDArray[np.uint8]:
    """Convert a loaded Pillow picture, as it stands, to uint8 (H, W, 3) RGB by the rules of this module."""
    picture = _plain(picture)
    if picture.mode == "RGBA":
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture).convert("RGB")
    return np.array(picture, dtype=np.uint8)


def fit(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Bring uint8 (h, w, 3) to (height, width, 3): centre crop to the aspect, then antialiased bicubic."""
    if image.shape == (height, width, 3):
        return image
    top, left, bottom, right = _centre(image.shape[0], image.shape[1], height, width)
    picture = Image.fromarray(np.ascontiguousarray(image[top:bottom, left:right]))
    return np.array(picture.resize((width, height), Image.Resampling.BICUBIC), dtype=np.uint8)


def half_canvas(
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
    """Place the known half of a picture on a canvas of model size, uint8 (height, width, 3), unknown half black.

    Three forms are understood, in this order:

    1. Pixels with alpha below 128 are unknown. The rest must be exactly one half (of an odd size, up to the
       middle row or column) and names `keep` itself.
    2. A picture of exactly half the model's aspect is that half, placed by `keep`: top or bottom (default top)
       for one of half the height, left or right (default left) for one of half the width.
    3. Any other picture is whole; its `keep` half (default top) is held and the rest discarded.

    `keeps` are the halves that the model completes. Returns the canvas and the half that is known.
    Raises `InputError` with the field "keep" for a half that the model or the picture does not allow, and what
    `open_image` raises.
    """
    if keep is not None and keep not in KEEPS:
        raise InputError("keep", f"keep is {keep!r}; it must be one of {', '.join(KEEPS)}.")
    picture = _plain(_decode(data, field, max_bytes, max_pixels))
    h, w = picture.height, picture.width
    known = np.asarray(picture.getchannel("A")) >= _ALPHA_KNOWN if picture.mode == "RGBA" else np.ones((h, w), np.bool_)
    if not known.all():
        place, side = _known_half(known, field)
        if keep not in (None, place):
            raise InputError(
                "keep", f"keep is {keep!r}, but the opaque half of {field} is its {place}: leave keep out or match it."
            )
        whole = _mirrored(np.array(picture.convert("RGB"), dtype=np.uint8)[side], place, h, w)
    elif 2 * h * width == w * height or h * width == 2 * w * height:
        wide = 2 * h * width == w * height
        sides = ("top", "bottom") if wide else ("left", "right")
        if keep is not None and keep not in sides:
            raise InputError(
                "keep",
                f"keep is {keep!r}, but {field} ({w} x {h} pixels) is half of a picture: keep must be {sides[0]} or "
                f"{sides[1]}, or crop the picture to {_aspect(width, height)}.",
            )
        place = cast(Keep, keep or sides[0])
        whole = _mirrored(to_rgb(picture), place, 2 * h if wide else h, w if wide else 2 * w)
    else:
        place = cast(Keep, keep or "top")
        whole = to_rgb(picture)
    if place not in keeps:
        offered = " or ".join(name for name in KEEPS if name in keeps)
        remedy = f"it completes pictures of which the {offered} half is known" if offered else "it completes none"
        raise InputError("keep", f"This model cannot complete a picture from its {place} half: {remedy}.")
    canvas = np.zeros((height, width, 3), np.uint8)
    side = _side(place, height // 2 if place in ("top", "bottom") else width // 2)
    canvas[side] = fit(whole, height, width)[side]
    return canvas, place


def to_png(image: NDArray[np.uint8]) -> bytes:
    """Encode uint8 (H, W, 3) as the bytes of a PNG file, losslessly."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def grid(images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8], columns: int | None = None) -> NDArray[np.uint8]:
    """Tile n uint8 (H, W, 3) pictures row by row into one; as square as n allows unless `columns` is given.

    Cells left over are black. Raises `ValueError` for no picture at all.
    """
    stack = np.asarray(images, dtype=np.uint8)
    if stack.ndim != 4 or len(stack) == 0:
        raise ValueError(f"a grid needs pictures (n, H, W, 3) with n >= 1, not {stack.shape}")
    n, h, w, c = stack.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    cells = np.zeros((rows * columns, h, w, c), np.uint8)
    cells[:n] = stack
    return cells.reshape(rows, columns, h, w, c).swapaxes(1, 2).reshape(rows * h, columns * w, c)


def _read(data: bytes | str | os.PathLike[str], field: str, max_bytes: int) -> bytes:
    """The file's bytes, of which at most `max_bytes` are read."""
    if isinstance(data, bytes):
        size, raw = len(data), data
    else:
        try:
            with Path(data).open("rb") as file:
                size, raw = os.fstat(file.fileno()).st_size, file.read(max_bytes + 1)
        except OSError as error:
            named = field if field == os.fspath(data) else f"{field} {os.fspath(data)!r}"
            raise InputError(field, f"{named} cannot be read: {error.strerror}.") from error
    if max(size, len(raw)) > max_bytes:
        raise TooLarge(field, f"{field} has {max(size, len(raw))} bytes; at most {max_bytes} are accepted.")
    if not raw:
        raise NotAnImage(field, f"{field} is empty (zero bytes); send a {_READABLE} file.")
    return raw


def _decode(data: bytes | str | os.PathLike[str], field: str, max_bytes: int, max_pixels: int) -> Image.Image:
    """The first frame, loaded and rotated as its EXIF says, in whatever mode the file has."""
    raw = _read(data, field, max_bytes)
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow's own limit, one for the whole process, guards what opening costs
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    try:
        _check_blocks(raw, field, max_pixels)
        picture = Image.open(io.BytesIO(raw), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        has = re.search(r"\d+ pixels", str(error))
        raise TooLarge(
            field,
            f"{field} has {has[0] if has else 'too many pixels'}; at most {max_pixels} pixels are accepted, "
            "so make it smaller first.",
        ) from error
    except (MemoryError, TooLarge):
        raise
    except Exception as error:  # a decoder that is fed hostile bytes may raise anything
        raise NotAnImage(field, f"{field} is not an image that is read here; send a {_READABLE} file.") from error
    if picture.width * picture.height > max_pixels:
        raise TooLarge(
            field,
            f"{field} is {picture.width} x {picture.height} pixels; at most {max_pixels} pixels are accepted, "
            "so make it smaller first.",
        )
    try:
        picture.load()
        _settle_transparency(picture, raw, field)
        ImageOps.exif_transpose(picture, in_place=True)
        return _plain(picture)
    except (MemoryError, NotAnImage):
        raise
    except Exception as error:  # as above
        raise NotAnImage(
            field,
            f"{field} is a {picture.format} file that is damaged, cut short or of a kind that is not read; "
            "save it again as an ordinary PNG or JPEG.",
        ) from error


def _check_blocks(raw: bytes, field: str, max_pixels: int) -> None:
    """Refuse a TIFF file whose strips and tiles cost far more than its width and height tell."""
    cut = tiff.blocks(raw)
    if cut is None:
        return
    if cut.tile_width * cut.tile_height > max_pixels:
        has, most = f"tiles of {cut.tile_width} x {cut.tile_height} pixels", f"{max_pixels} pixels"
    elif cut.count > _MAX_BLOCKS:
        has, most = f"{cut.count} strips or tiles", f"{_MAX_BLOCKS}"
    else:
        return
    raise TooLarge(
        field, f"{field} is a TIFF file in {has}; at most {most} are accepted, so save it again as an ordinary PNG."
    )


def _settle_transparency(picture: Image.Image, raw: bytes, field: str) -> None:
    """Bring the transparent colour of a PNG to the scale of its samples, which Pillow leaves at the file's depth."""
    if picture.format != "PNG" or "transparency" not in picture.info:
        return
    depth = raw[24]
    if picture.mode == "L" and depth < 8:
        picture.info["transparency"] *= 255 // (2**depth - 1)
    elif picture.mode == "RGB" and depth == 16:
        raise NotAnImage(
            field,
            f"{field} is a PNG of 16 bits with one transparent colour, which 8 bits cannot tell from its neighbours; "
            "save it again with an alpha channel or without transparency.",
        )


def _plain(picture: Image.Image) -> Image.Image:
    """The same picture in mode RGB, or RGBA where it has transparency."""
    if picture.mode in ("RGB", "RGBA") and not (picture.mode == "RGB" and "transparency" in picture.info):
        return picture
    if picture.mode.startswith("I;16"):
        samples = np.asarray(picture)
        grey = Image.fromarray((samples >> 8).astype(np.uint8)).convert("RGB")
        if "transparency" in picture.info:
            opaque = np.where(samples == picture.info["transparency"], 0, 255)
            grey.putalpha(Image.fromarray(opaque.astype(np.uint8)))
        return grey
    if picture.mode in ("I", "F"):
        raise ValueError("32-bit samples have no agreed range")
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")


def _centre(h: int, w: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of the largest centred box of aspect height:width inside h by w."""
    box_h, box_w = h, w
    if w * height > h * width:
        box_w = max(1, round(h * width / height))
    else:
        box_h = max(1, round(w * height / width))
    top, left = (h - box_h) // 2, (w - box_w) // 2
    return top, left, top + box_h, left + box_w


def _side(place: Keep, cut: int) -> tuple[slice, slice]:
    """Index of what lies on the `place` side of the row or column `cut`."""
    along = slice(0, cut) if place in ("top", "left") else slice(cut, None)
    return (along, slice(None)) if place in ("top", "bottom") else (slice(None), along)


def _aspect(width: int, height: int) -> str:
    """The shape of pictures of a size, as one says it."""
    part = math.gcd(width, height)
    return "a square" if width == height else f"{width // part}:{height // part}"


def _known_half(known: NDArray[np.bool_], field: str) -> tuple[Keep, tuple[slice, slice]]:
    """Which half a mask (h, w) marks, and its index."""
    for place in KEEPS:
        size = known.shape[0 if place in ("top", "bottom") else 1]
        for cut in {size // 2, (size + 1) // 2} - {0, size}:
            half = np.zeros_like(known)
            half[_side(place, cut)] = True
            if np.array_equal(half, known):
                return place, _side(place, cut)
    raise InputError(
        field,
        f"{field} has transparent pixels (alpha below {_ALPHA_KNOWN}), and the rest is not exactly its top, bottom, "
        "left or right half: make one half opaque and the other transparent, or send it without transparency.",
    )


def _mirrored(half: NDArray[np.uint8], place: Keep, h: int, w: int) -> NDArray[np.uint8]:
    """(h, w, 3) with `half` on its side and its reflection on the other, so that resizing blends nothing foreign in."""
    rows, columns = h - half.shape[0], w - half.shape[1]
    before = place in ("bottom", "right")
    return np.pad(
        half, [(rows, 0) if before else (0, rows), (columns, 0) if before else (0, columns), (0, 0)], "symmetric"
    )
