"""Images as the files of a request: paths and bytes are sent as they are, arrays and Pillow images as PNG."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ncml.errors import InputError

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]"
"""One image: the path of a file, its bytes, a Pillow image, or uint8 [H, W, 3], [H, W, 4] or [H, W]."""

Upload = tuple[str, bytes]
"""The name and the bytes of a file."""

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def list_images(images: ImageSource | Sequence[ImageSource]) -> list[ImageSource]:
    """Return the images of one image, a sequence of them, or an array [N, H, W, 3]."""
    if isinstance(images, np.ndarray):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, (str, os.PathLike, bytes, Image.Image)):
        return [images]
    return list(images)


def read_upload(image: ImageSource) -> Upload:
    """Return an image as a file; raise `InputError` if it cannot be read or is of another kind."""
    if isinstance(image, bytes):
        return "", image
    if isinstance(image, Image.Image):
        return "", _encode(image)
    if isinstance(image, np.ndarray):
        is_image = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
        if image.dtype != np.uint8 or not is_image or not image.size:
            shape = "x".join(map(str, image.shape))
            raise InputError("image", f"image must be uint8 [H, W, 3], [H, W, 4] or [H, W], not {image.dtype} {shape}.")
        return "", _encode(Image.fromarray(image))
    if not isinstance(image, (str, os.PathLike)):
        kind = type(image).__name__
        raise InputError("image", f"image must be a path, bytes, a Pillow image or a uint8 array, not {kind}.")
    path = Path(image)
    try:
        return path.name, path.read_bytes()
    except OSError as error:
        raise InputError("image", f"{path} cannot be read: {error.strerror}.") from error


def _encode(image: Image.Image) -> bytes:
    if image.mode == "F":
        raise InputError("image", "image has floating-point samples, which have no agreed range: convert it to RGB.")
    file = io.BytesIO()
    (image if image.mode in _PNG_MODES else image.convert("RGB")).save(file, "PNG")
    return file.getvalue()
