"""Lossless compression with the model's distributions: an arithmetic coder that follows the exact sampler.

The length of an image's code is the model's bits per dimension, which makes an archive the most practical check of that
number. Encoder and decoder visit the pixels of the same batches in the same way (`ncml.sampling.cached.visit_pixels`),
so that they round identically; a pass over whole images would be faster for the encoder, but differ from the decoder in
the last bits.

An archive, format 1, numbers little-endian:

    4 bytes   NCML
    1 byte    the format: 1
    32 bytes  version of the model, SHA-256
    16 bytes  start of the SHA-256 of the pixels, uint8 in raster order
    4 bytes   length of the header
    header    JSON, deflated: see `Header`
    streams   one for each group of 64 images: 32-bit words of a range coder, pixel by pixel in raster order, red,
              green and blue, the images of the group in turn

An archive has no random parts. A processor that rounds differently decodes other images, which the digest detects:
decoding is guaranteed for one build of PyTorch, kind of processor and number of threads.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import PurePath
from typing import Annotated, Any

import constriction
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ncml.errors import InputError
from ncml.model import Model
from ncml.network.likelihood import LOG_SCALES, from_uint8
from ncml.paths import printable
from ncml.progress import OnProgress, Progress, ignore_progress
from ncml.sampling.cached import visit_pixels
from ncml.sampling.conditions import Conditions

range_coding: Any = constriction.stream  # pyright: ignore[reportAttributeAccessIssue] - a compiled module without stubs

MAGIC, FORMAT = b"NCML", 1
START = struct.Struct("<4sB32s16sI")
GROUP = 64
"""Images coded in one stream, side by side."""
MAX_HEADER = 2**24
GREY_LEVELS = 256
"""Values of a channel."""
MIN_MASS = 1e-30
"""Lower bound of a component's mass, which could underflow; the coder gives every level at least 2^-24."""


class Header(BaseModel):
    """The header of an archive."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str
    """Name of the model, for readers; the version identifies it."""
    height: int
    width: int
    torch: str
    threads: Annotated[int, Field(ge=1, le=256)]
    names: Annotated[list[str], Field(min_length=1, max_length=2**20)]
    """File names of the images, without folder and extension."""
    words: list[Annotated[int, Field(ge=0)]]
    """Length of each stream."""


def compress(
    model: Model, pixels_NHWC: NDArray[np.uint8], names: Sequence[str], on_progress: OnProgress = ignore_progress
) -> bytes:
    """Compress images of the model's size, uint8 [N, H, W, 3], to an archive.

    names: file names, without extension. on_progress: counts pixel rows.
    """
    image_shape = (model.height, model.width, 3)
    if pixels_NHWC.dtype != np.uint8 or pixels_NHWC.shape[1:] != image_shape or not len(pixels_NHWC):
        raise InputError("files", f"only uint8 images of {model.width} x {model.height} pixels can be compressed.")
    if len(names) != len(pixels_NHWC) or not all(map(_is_name, names)):
        raise InputError("files", "every image needs a file name, without a folder.")
    if invalid := next((name for name in names if name.encode(errors="replace").decode() != name), None):
        raise InputError("files", f"the file name {invalid!r} is not valid UTF-8: rename the file.")
    if duplicate := next((name for name, count in Counter(names).items() if count > 1), None):
        raise InputError("files", f"two images are named {duplicate!r}: rename one of the files.")
    streams: list[NDArray[np.uint32]] = []
    for group in _groups(len(pixels_NHWC)):
        on_row = _row_counter(on_progress, "compress", group.start, len(pixels_NHWC), model.height)
        streams.append(_encode(model, pixels_NHWC[group], on_row))
    header = Header(
        model=printable(model.name),
        height=model.height,
        width=model.width,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        names=list(names),
        words=[len(stream) for stream in streams],
    )
    text = zlib.compress(header.model_dump_json().encode(), 9)
    start = START.pack(MAGIC, FORMAT, bytes.fromhex(model.version), _digest(pixels_NHWC), len(text))
    return start + text + b"".join(stream.astype("<u4").tobytes() for stream in streams)


def decompress(
    model: Model, archive: bytes, on_progress: OnProgress = ignore_progress
) -> tuple[list[str], NDArray[np.uint8]]:
    """Return the names and images of an archive, uint8 [N, H, W, 3].

    Raise `InputError` if it belongs to another model, is damaged, or does not decode to the original pixels.
    """
    header, streams = read_archive(archive)
    _, _, version, digest, _ = START.unpack_from(archive)
    if version.hex() != model.version:
        raise InputError(
            "archive",
            f"the archive was made by {header.model} {version.hex()[:12]}, not by {model.name} {model.version[:12]}: "
            "choose that model.",
        )
    if (header.height, header.width) != (model.height, model.width):
        raise InputError("archive", "the archive is damaged: its images do not have the size of its model.")
    pixels = np.empty((len(header.names), model.height, model.width, 3), np.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(header.threads)
    try:
        for group, stream in zip(_groups(len(pixels)), streams, strict=True):
            on_row = _row_counter(on_progress, "decompress", group.start, len(pixels), model.height)
            pixels[group] = _decode(model, stream, pixels[group], on_row)
    finally:
        torch.set_num_threads(threads)
    if _digest(pixels) != digest:
        raise InputError(
            "archive",
            f"the archive does not decode to the original images: it is damaged, or was made on a machine that rounds "
            f"differently (with PyTorch {header.torch}; this is {torch.__version__}).",
        )
    return header.names, pixels


def read_archive(archive: bytes) -> tuple[Header, list[NDArray[np.uint32]]]:
    """Return the header and the streams of an archive; raise `InputError` if it is invalid or incomplete."""
    if archive[:4] != MAGIC:
        raise InputError("archive", "the file is not an archive written by ncml compress.")
    if archive[4:5] != bytes([FORMAT]):
        raise InputError("archive", f"the archive is not of format {FORMAT}, the only one that this version reads.")
    try:
        *_, length = START.unpack_from(archive)
        text = zlib.decompressobj().decompress(archive[START.size : START.size + length], MAX_HEADER)
        header = Header.model_validate_json(text)
        body = np.frombuffer(archive[START.size + length :], "<u4").astype(np.uint32)
        ends = np.cumsum([0, *header.words]).tolist()
        if len(header.words) != len(_groups(len(header.names))) or ends[-1] != len(body):
            raise ValueError("its streams do not have the stated lengths")
        if len(set(header.names)) != len(header.names) or not all(map(_is_name, header.names)):
            raise ValueError("its image names are not file names")
    except ValidationError as error:
        raise InputError("archive", "the archive is damaged: its header cannot be read.") from error
    except (ValueError, struct.error, zlib.error) as error:
        raise InputError("archive", f"the archive is damaged: {error}.") from error
    return header, [body[start:end] for start, end in pairwise(ends)]


def _digest(pixels_NHWC: NDArray[np.uint8]) -> bytes:
    return hashlib.sha256(pixels_NHWC.tobytes()).digest()[:16]


def _is_name(name: str) -> bool:
    """Return whether this is a plain file name: no folder, not hidden, no way out of a folder."""
    return bool(name) and not name.startswith(".") and not set(name) & set("/\\:\0") and PurePath(name).name == name


def _groups(n: int) -> list[slice]:
    return [slice(start, min(start + GROUP, n)) for start in range(0, n, GROUP)]


def _row_counter(on_progress: OnProgress, stage: str, start: int, n: int, height: int) -> Callable[[int, int], bool]:
    """Return an `on_row` of the group from image `start` on, which counts pixel rows of all n images."""

    def on_row(row: int, images: int) -> bool:
        on_progress(Progress(stage, start * height + row * images, n * height))
        return False

    return on_row


OnRow = Callable[[int, int], bool]
"""(rows done, images of the group)."""

Coder = Callable[[int, int, int, NDArray[np.float32]], NDArray[np.int32]]
"""(row, column, channel, probabilities [B, 256]) -> the levels there, [B]."""


def _encode(model: Model, pixels_BHWC: NDArray[np.uint8], on_row: OnRow) -> NDArray[np.uint32]:
    encoder = range_coding.queue.RangeEncoder()
    family = range_coding.model.Categorical(perfect=False)
    levels_BHWC = pixels_BHWC.astype(np.int32)

    def code(i: int, j: int, c: int, probabilities_BV: NDArray[np.float32]) -> NDArray[np.int32]:
        levels_B = np.ascontiguousarray(levels_BHWC[:, i, j, c])
        encoder.encode(levels_B, family, probabilities_BV)
        return levels_B

    _code_pixels(model, len(pixels_BHWC), code, on_row)
    return encoder.get_compressed()


def _decode(
    model: Model, stream: NDArray[np.uint32], pixels_BHWC: NDArray[np.uint8], on_row: OnRow
) -> NDArray[np.uint8]:
    """Fill and return `pixels_BHWC`."""
    decoder = range_coding.queue.RangeDecoder(stream)
    family = range_coding.model.Categorical(perfect=False)

    def code(i: int, j: int, c: int, probabilities_BV: NDArray[np.float32]) -> NDArray[np.int32]:
        levels_B = decoder.decode(family, probabilities_BV)
        pixels_BHWC[:, i, j, c] = levels_B
        return levels_B

    try:
        _code_pixels(model, len(pixels_BHWC), code, on_row)
    except AssertionError as error:  # raised by the decoder for an invalid stream
        raise InputError("archive", "the archive is damaged: one of its streams cannot be decoded.") from error
    return pixels_BHWC


@torch.inference_mode()
def _code_pixels(model: Model, B: int, code: Coder, on_row: OnRow) -> None:
    """Visit the pixels of a group at t = 0 under the null class; pass the distribution of each value to `code`."""
    weight = model.network.head.weight
    grid_V = from_uint8(torch.arange(GREY_LEVELS, dtype=torch.uint8).view(1, 1, GREY_LEVELS, 1))[0, 0, 0].to(weight)

    def choose_pixels(i: int, j: int, logit_SK: Tensor, component_SK9: Tensor) -> Tensor:
        x_SC = logit_SK.new_zeros(len(logit_SK), 3)
        mixture = component_SK9[:B].double().cpu()
        weight_BK = torch.softmax(logit_SK[:B].double().cpu(), 1)
        for c in range(3):
            mass_BKV = _masses(mixture, x_SC[:B].double().cpu(), c)
            probability_BV = torch.einsum("bk,bkv->bv", weight_BK, mass_BKV)
            level_B = torch.from_numpy(code(i, j, c, probability_BV.numpy().astype(np.float32))).long()
            weight_BK = weight_BK * mass_BKV[torch.arange(B), :, level_B]
            weight_BK /= weight_BK.sum(1, keepdim=True)
            x_SC[:B, c] = grid_V[level_B.to(grid_V.device)]
        return x_SC

    x_BCHW = weight.new_zeros(B, 3, model.height, model.width)
    null_B = torch.full((B,), len(model.classes), device=weight.device)
    conditions = Conditions(0.0, null_B, torch.zeros_like(null_B))
    visit_pixels(model.network, x_BCHW, conditions, choose_pixels, on_row=lambda row: on_row(row, B))


def _masses(mixture_BK9: Tensor, x_BC: Tensor, c: int) -> Tensor:
    """Compute the mass of every level of channel c in each component, given earlier channels. fp64 [B, K, 256]."""
    mean_BK = mixture_BK9[..., c]
    coefficient_BK3 = torch.tanh(mixture_BK9[..., 6:])
    if c == 1:
        mean_BK = mean_BK + coefficient_BK3[..., 0] * x_BC[:, None, 0]
    if c == 2:
        mean_BK = mean_BK + coefficient_BK3[..., 1] * x_BC[:, None, 0] + coefficient_BK3[..., 2] * x_BC[:, None, 1]
    inverse_BK = torch.exp(-mixture_BK9[..., 3 + c].clamp(*LOG_SCALES))
    border_V = (torch.arange(GREY_LEVELS - 1, dtype=torch.float64) - 127) / 127.5
    below_BKV = torch.sigmoid((border_V - mean_BK[..., None]) * inverse_BK[..., None])
    ends = below_BKV.new_zeros(*below_BKV.shape[:2], 1)
    return torch.diff(torch.cat([ends, below_BKV, ends + 1], 2)).clamp(min=MIN_MASS)
