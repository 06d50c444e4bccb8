"""Sources of images: a path, the bytes of a file, a Pillow image or an array; several of these, or a folder.

`ncml.Model` and the clients of a service accept the same.
"""

from __future__ import annotations

import io
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageOps

from ncml.errors import InputError, NotAnImage
from ncml.images.decoding import MAX_BYTES, MAX_PIXELS, SUFFIXES, decode, to_rgb, to_rgb_or_rgba
from ncml.object_storage import StoragePath
from ncml.paths import list_local_files, printable

Image: TypeAlias = "str | os.PathLike[str] | StoragePath | bytes | PILImage.Image | NDArray[np.uint8]"
"""The path or the bytes of a file, a Pillow image, or an array uint8 [H, W, 3], [H, W, 4] or [H, W]."""
Images: TypeAlias = "Image | Iterable[Image]"
"""An image, several of them (a list or a generator), an array of them uint8 [B, H, W, 3], or a folder."""


def list_images(images: Images, field: str = "images") -> list[Image]:
    """Return the images one by one; of a folder, the files with an image's suffix.

    Raises `InputError` if there is no image, or if a value has an unsupported type.
    """
    listed = list(_iterate(images, field))
    if not listed:
        raise InputError(field, "there is no image; pass at least one.")
    return listed


def _iterate(images: Any, field: str) -> Iterator[Image]:
    if isinstance(images, str) and not images:
        raise InputError(field, "the path of an image is empty: name a file or a folder.")
    if isinstance(images, str | os.PathLike) and os.path.isdir(images):  # noqa: PTH112 Path.is_dir raises for long names
        folder = Path(images)
        files = [path for path in list_local_files(folder) if path.suffix.lower() in SUFFIXES]
        if not files:
            formats = ", ".join(suffix.removeprefix(".") for suffix in SUFFIXES)
            raise InputError(field, f"there is no image in {printable(folder)}: name a folder of {formats} files.")
        yield from files
    elif isinstance(images, str | os.PathLike | StoragePath | bytes | PILImage.Image):
        yield images
    elif hasattr(images, "__array__") and (array := np.asarray(images)).dtype.kind not in "OU":
        yield from array if array.ndim == 4 else [array]
    elif isinstance(images, Iterable) and not isinstance(images, Mapping | bytearray | memoryview | io.IOBase):
        for image in images:
            yield from _iterate(image, field)
    else:
        raise _not_an_image(images, field)


def _not_an_image(value: object, field: str) -> InputError:
    kinds = "a path, bytes, a PIL image or a uint8 array"
    return InputError(field, f"an image must be {kinds}, not {reprlib.repr(value)}.")


def _conversion(array: NDArray[Any]) -> str:
    """Return how to convert an array that is not an image."""
    steps: list[str] = []
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (3, 4):
        steps.append("move the channels to the end with numpy.moveaxis(image, 0, 2)")
    if array.dtype.kind == "f":
        steps.append("convert values from 0 to 1 with (255 * image).round().astype('uint8')")
    return " and ".join(steps) or "convert it"


def name_of(image: Image) -> str | None:
    """Return the path of an image that was passed as one."""
    return printable(image) if isinstance(image, str | os.PathLike | StoragePath) else None


def name_image(error: InputError, name: str) -> InputError:
    """Return an error of an image that was judged, with its name instead of "image" as field and in the detail."""
    return InputError(name, name + error.detail.removeprefix("image")) if error.field == "image" else error


def read_image(image: Image, field: str = "images") -> NDArray[np.uint8]:
    """Return one image as uint8 [H, W, 3], in its own size."""
    return to_rgb(read_pil(image, field))


def read_pil(image: Image, field: str = "images") -> PILImage.Image:
    """Return one image, rotated by its EXIF orientation, in mode RGB or RGBA; raises `InputError` if it is none."""
    if isinstance(image, str | os.PathLike | StoragePath | bytes):
        return decode(image, name_of(image) or field, MAX_BYTES, MAX_PIXELS)
    if isinstance(image, PILImage.Image):
        if not image.width * image.height:
            raise NotAnImage(field, "a PIL image has no pixels: pass another one.")
        try:
            return to_rgb_or_rgba(ImageOps.exif_transpose(image))
        except (OSError, SyntaxError, ValueError) as error:  # damaged, or its samples have no agreed range
            raise NotAnImage(field, f"a PIL image cannot be converted to RGB: {error}.") from error
    if not hasattr(image, "__array__"):
        raise _not_an_image(image, field)
    array = np.asarray(image)
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not is_image or not array.size:
        subject = "an image" if field in ("image", "images") else field
        raise InputError(
            field,
            f"{subject} must be uint8 [height, width, 3], not {array.dtype} {list(array.shape)}: {_conversion(array)}, "
            "or pass a PIL image or a path.",
        )
    return to_rgb_or_rgba(PILImage.fromarray(array))
