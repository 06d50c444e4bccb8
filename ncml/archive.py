"""The file of `ncml compress`: the codes of images, bound to the model that wrote them. Does not import torch.

Format 1, numbers little-endian:

    4 bytes   NCML
    1 byte    the format: 1
    32 bytes  version of the model, SHA-256
    16 bytes  start of the SHA-256 of the pixels, uint8 in raster order
    4 bytes   length of the header
    header    JSON, deflated: see `Header`
    streams   one for each group of 64 images: 32-bit words of a range coder, pixel by pixel in raster order, red,
              green and blue, the images of the group in turn

An archive has no random parts. A processor that rounds differently would decode other images, which the digest detects:
decoding is guaranteed for one build of PyTorch, kind of processor and number of threads.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePath
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ncml.checkpoint import Description
from ncml.errors import InputError

MAGIC, FORMAT = b"NCML", 1
START = struct.Struct("<4sB32s16sI")
GROUP = 64
"""Images coded in one stream, side by side."""
MAX_HEADER = 2**24


class Header(BaseModel):
    """The header of an archive."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str
    """Name of the model, for information only: the version identifies it."""
    height: int
    width: int
    torch: str
    threads: Annotated[int, Field(ge=1, le=256)]
    names: Annotated[list[str], Field(min_length=1, max_length=2**20)]
    """File names of the images, without folder and extension."""
    words: list[Annotated[int, Field(ge=0)]]
    """Length of each stream."""


@dataclass(frozen=True)
class Archive:
    """The content of an archive."""

    header: Header
    digest: bytes
    """The result of `digest` for the pixels."""
    streams: list[NDArray[np.uint32]]
    """The words of the range coder, one stream for each of `groups`."""


def write_archive(
    header: Header, version: str, pixels_NHWC: NDArray[np.uint8], streams: list[NDArray[np.uint32]]
) -> bytes:
    """Return the bytes of an archive of these pixels by the model of this version."""
    text = zlib.compress(header.model_dump_json().encode(), 9)
    start = START.pack(MAGIC, FORMAT, bytes.fromhex(version), digest(pixels_NHWC), len(text))
    return start + text + b"".join(stream.astype("<u4").tobytes() for stream in streams)


def read_archive(archive: bytes, model: Description) -> Archive:
    """Read an archive of a model; raise `InputError` if it is invalid, incomplete or of another model."""
    if archive[:4] != MAGIC:
        raise InputError("archive", "the file is not an archive written by ncml compress.")
    if archive[4:5] != bytes([FORMAT]):
        raise InputError("archive", f"the archive is not of format {FORMAT}, the only one that this version reads.")
    try:
        _, _, version, digest, length = START.unpack_from(archive)
        text = zlib.decompressobj().decompress(archive[START.size : START.size + length], MAX_HEADER)
        header = Header.model_validate_json(text)
    except (ValidationError, struct.error, zlib.error) as error:
        raise InputError("archive", "the archive is damaged: its header cannot be read.") from error
    body = archive[START.size + length :]
    ends = np.cumsum([0, *header.words]).tolist()
    if len(header.words) != len(groups(len(header.names))) or 4 * ends[-1] != len(body):
        raise InputError("archive", "the archive is damaged: its streams do not have the stated lengths.")
    if len(set(header.names)) != len(header.names) or not all(map(_is_name, header.names)):
        raise InputError("archive", "the archive is damaged: its image names are not file names.")
    if version.hex() != model.version:
        raise InputError(
            "archive",
            f"the archive was made by {header.model} {version.hex()[:12]}, not by {model.name} {model.version[:12]}: "
            "choose that model.",
        )
    if (header.height, header.width) != (model.height, model.width):
        raise InputError("archive", "the archive is damaged: its images do not have the size of its model.")
    words = np.frombuffer(body, "<u4").astype(np.uint32)
    return Archive(header, digest, [words[start:end] for start, end in pairwise(ends)])


def check_names(names: Sequence[str], count: int) -> None:
    """Raise `InputError` unless these are `count` different file names, valid UTF-8, without folder and extension."""
    if len(names) != count:
        raise InputError("files", f"{count} images need as many file names, not {len(names)}.")
    refused = next((name for name in names if not _is_name(name)), None)
    if refused is not None:
        reason = "is empty or hidden, or contains a slash, a backslash or a colon"
        raise InputError("files", f"the file name {refused!r} {reason}: rename the file.")
    if invalid := next((name for name in names if name.encode(errors="replace").decode() != name), None):
        raise InputError("files", f"the file name {invalid!r} is not valid UTF-8: rename the file.")
    if duplicate := next((name for name, count in Counter(names).items() if count > 1), None):
        raise InputError("files", f"two images are named {duplicate!r}: rename one of the files.")


def digest(pixels_NHWC: NDArray[np.uint8]) -> bytes:
    """Return the first 16 bytes of the SHA-256 of pixels, uint8 in raster order."""
    return hashlib.sha256(pixels_NHWC.tobytes()).digest()[:16]


def groups(n: int) -> list[slice]:
    """Return the range of images of each stream, given the number of images."""
    return [slice(start, min(start + GROUP, n)) for start in range(0, n, GROUP)]


def _is_name(name: str) -> bool:
    """Return whether this is a plain file name: not hidden, without folder or drive."""
    return bool(name) and not name.startswith(".") and not set(name) & set("/\\:\0") and PurePath(name).name == name
