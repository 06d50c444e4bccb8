"""Lossless compression with the model's distributions: an arithmetic coder that follows the exact sampler.

The length of an image's code is the model's bits per dimension, which makes an archive the most practical check of that
number. (The coder follows the mixture without the outlier component, and bounds the cost of every value itself.)

Encoder and decoder visit the pixels of the same batches in the same way (`ncml.sampling.cached.visit_pixels`), so that
they round identically; a pass over whole images would be faster for the encoder, but differ from the decoder in the
last bits. `ncml.archive` has the format of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import constriction
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncml.archive import Header, check_names, digest, groups, read_archive, write_archive
from ncml.errors import InputError
from ncml.model import Model
from ncml.network.mixture import LOG_SCALES, from_uint8
from ncml.paths import printable
from ncml.progress import OnProgress, Progress, ignore_progress
from ncml.sampling.cached import visit_pixels
from ncml.sampling.conditions import Conditions, OnRow

range_coding: Any = constriction.stream  # pyright: ignore[reportAttributeAccessIssue] - a compiled module without stubs

GREY_LEVELS = 256
"""Number of values of a channel."""
MIN_MASS = 1e-30
"""Lower bound of a component's mass, which could underflow; the coder gives every level at least 2^-24."""


def compress(
    model: Model, pixels_NHWC: NDArray[np.uint8], names: Sequence[str], on_progress: OnProgress = ignore_progress
) -> bytes:
    """Compress images of the model's size, uint8 [N, H, W, 3], to an archive.

    names: file names, without extension. on_progress: counts pixel rows.
    """
    image_shape = (model.height, model.width, 3)
    if pixels_NHWC.dtype != np.uint8 or pixels_NHWC.shape[1:] != image_shape or not len(pixels_NHWC):
        raise InputError("files", f"only uint8 images of {model.width} x {model.height} pixels can be compressed.")
    check_names(names, len(pixels_NHWC))
    streams: list[NDArray[np.uint32]] = []
    for group in groups(len(pixels_NHWC)):
        on_row = _row_counter(on_progress, "compress", group, len(pixels_NHWC), model.height)
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
    return write_archive(header, model.version, pixels_NHWC, streams)


def decompress(
    model: Model, archive: bytes, on_progress: OnProgress = ignore_progress
) -> tuple[list[str], NDArray[np.uint8]]:
    """Return the names and images of an archive, uint8 [N, H, W, 3].

    Raise `InputError` if it belongs to another model, is damaged, or does not decode to the original pixels.
    """
    content = read_archive(archive, model.description)
    header = content.header
    pixels = np.empty((len(header.names), model.height, model.width, 3), np.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(header.threads)
    try:
        for group, stream in zip(groups(len(pixels)), content.streams, strict=True):
            on_row = _row_counter(on_progress, "decompress", group, len(pixels), model.height)
            _decode(model, stream, pixels[group], on_row)
    finally:
        torch.set_num_threads(threads)
    if digest(pixels) != content.digest:
        raise InputError(
            "archive",
            f"the archive does not decode to the original images: it is damaged, or was made on a machine that rounds "
            f"differently (with PyTorch {header.torch}; this is {torch.__version__}).",
        )
    return header.names, pixels


def _row_counter(on_progress: OnProgress, stage: str, group: slice, n: int, height: int) -> OnRow:
    """Return an `on_row` of a group, which counts pixel rows of all n images."""

    def on_row(row: int) -> bool:
        on_progress(Progress(stage, group.start * height + row * (group.stop - group.start), n * height))
        return False

    return on_row


Coder = Callable[[int, int, int, NDArray[np.float32]], NDArray[np.int32]]
"""(row, column, channel, probabilities [B, 256]) -> the levels at that position, [B]."""


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


def _decode(model: Model, stream: NDArray[np.uint32], pixels_BHWC: NDArray[np.uint8], on_row: OnRow) -> None:
    """Fill `pixels_BHWC`."""
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


@torch.inference_mode()
def _code_pixels(model: Model, B: int, code: Coder, on_row: OnRow) -> None:
    """Visit the pixels of a group at t = 0 under the null class; pass the distribution of each value to `code`."""
    weight = model.network.head.weight
    grid_V = from_uint8(torch.arange(GREY_LEVELS, dtype=torch.uint8).view(1, 1, GREY_LEVELS, 1))[0, 0, 0].to(weight)

    def choose_pixels(i: int, j: int, logit_BK: Tensor, component_BK9: Tensor) -> Tensor:
        x_BC = logit_BK.new_zeros(B, 3)
        mixture = component_BK9.double().cpu()
        weight_BK = torch.softmax(logit_BK.double().cpu(), 1)
        for c in range(3):
            mass_BKV = _masses(mixture, x_BC.double().cpu(), c)
            probability_BV = torch.einsum("bk,bkv->bv", weight_BK, mass_BKV)
            level_B = torch.from_numpy(code(i, j, c, probability_BV.numpy().astype(np.float32))).long()
            weight_BK = weight_BK * mass_BKV[torch.arange(B), :, level_B]
            weight_BK /= weight_BK.sum(1, keepdim=True)
            x_BC[:, c] = grid_V[level_B.to(grid_V.device)]
        return x_BC

    x_BCHW = weight.new_zeros(B, 3, model.height, model.width)
    null_B = torch.full((B,), len(model.classes), device=weight.device)
    conditions = Conditions(0.0, null_B, torch.zeros_like(null_B))
    visit_pixels(model.network, x_BCHW, conditions, choose_pixels, on_row)


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
