"""Images as the files of a request: paths and bytes are sent as they are, arrays and Pillow images as PNG."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

from ncml.errors import InputError
from ncml.images.reading import Image, name_of, read_pil
from ncml.object_storage import StoragePath
from ncml.paths import printable

Upload = tuple[str, bytes]
"""The name and the bytes of a file."""


MAX_BYTES = 60 * 2**20
"""Bytes of the files in one request: a service accepts bodies of 64 MiB by default."""


def read_uploads(images: Sequence[Image]) -> list[Upload]:
    """Return the first images as files: at least one, and as many as one request may hold; raise as `read_upload`."""
    files: list[Upload] = []
    size = 0
    for image in images:
        files.append(read_upload(image))
        size += len(files[-1][1])
        if size > MAX_BYTES and len(files) > 1:
            return files[:-1]
    return files


def read_upload(image: Image) -> Upload:
    """Return an image as a file; raise `InputError` if it cannot be read or is of another kind."""
    if isinstance(image, bytes):
        return "", image
    if isinstance(image, StoragePath):
        return image.name, image.read(MAX_BYTES)[1]
    if isinstance(image, str | os.PathLike):
        try:
            return printable(Path(image).name), Path(image).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a null character
            reason = getattr(error, "strerror", error)
            raise InputError("image", f"{name_of(image)} cannot be read: {reason}.") from error
    file = io.BytesIO()
    read_pil(image, "image").save(file, "PNG")
    return "", file.getvalue()
