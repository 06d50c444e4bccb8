"""Sampling with the caches: a whole batch, single rows on request, or with pixels chosen by another rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ncml.network.mixture import PixelDraws, promote_to_fp32
from ncml.network.ncpn import NCPN
from ncml.sampling.batching import passes
from ncml.sampling.cached.network_cache import NetworkCache, PixelChooser
from ncml.sampling.cached.prefill import prefill
from ncml.sampling.conditions import Conditions, OnRow
from ncml.sampling.guidance import TiltedPixelSampler, grid_of, make_pixel_sampler


def sample_cached(network: NCPN, x_BCHW: Tensor, conditions: Conditions, draws: PixelDraws, on_row: OnRow) -> None:
    """Sample the unknown pixels of x, in place; a `ncml.sampling.sample.Sampler`."""
    sampler = RowSampler(network, x_BCHW, conditions)
    sampler.reset(x_BCHW, conditions, draws)
    sampler.sample_rows(x_BCHW, sampler.sample_row, on_row)


def visit_pixels(
    network: NCPN, x_BCHW: Tensor, conditions: Conditions, choose_pixels: PixelChooser, on_row: OnRow
) -> None:
    """Set the pixels of x, in place and in raster order, to what `choose_pixels` returns for their mixtures."""
    B, _, H, W = x_BCHW.shape
    cache = NetworkCache(network, B, H, W)
    cache.reset(conditions)
    for i in range(H):
        cache.advance(i, x_BCHW, choose_pixels)
        if on_row(i + 1):
            return


class RowSampler:
    """Samples batches of one kind, one after another, in its own memory.

    A row runs the same operations on that memory every time, so it can be recorded (`ncml.sampling.cuda_graphs`).
    """

    def __init__(self, network: NCPN, x_BCHW: Tensor, conditions: Conditions) -> None:
        """Allocate memory for batches like x of the same kind (`ncml.sampling.cuda_graphs.BatchKind`)."""
        B, _, H, W = x_BCHW.shape
        self.rows_per_image = conditions.tilt.rows_per_image
        self.null_class = len(network.config.model.classes)
        self.cache, self.first_row = NetworkCache(network, B * self.rows_per_image, H, W), conditions.first_row
        self.x_NCHW = torch.empty_like(x_BCHW).repeat(self.rows_per_image, 1, 1, 1)
        self.x_BCHW = self.x_NCHW[:B]
        K, like = network.config.model.mixtures, promote_to_fp32(network.head.weight)
        # Whole strides are prefilled, since all levels are in step again at every multiple of the largest stride.
        self.prefilled = self.first_row - self.first_row % self.cache.stride
        self.rows = range(self.prefilled, H)
        self.draw_buffers = [like.new_empty(H * W, B, channels) for channels in (K, 3, 3)]
        """By position, so that one position's draws lie together."""
        self.pixel_draws = [PixelDraws(*position) for position in zip(*self.draw_buffers, strict=True)]
        self.sample_pixels = make_pixel_sampler(network, B, W, conditions)

    def reset(
        self, x_BCHW: Tensor, conditions: Conditions, draws: PixelDraws, *, images: Sequence[int] | None = None
    ) -> None:
        """Start a batch; `images` are the positions of those whose known rows are computed (default: all)."""
        for buffer, part in zip(self.draw_buffers, (draws.gumbel_BK, draws.logistic_BC, draws.uniform_BC), strict=True):
            buffer.copy_(part.flatten(2).permute(2, 0, 1))
        self.x_NCHW.copy_(x_BCHW.repeat(self.rows_per_image, 1, 1, 1))
        if isinstance(self.sample_pixels, TiltedPixelSampler):
            self.sample_pixels.set_tilt(conditions.tilt, grid_of(self.cache.network, conditions))
        row_conditions = conditions.expand(self.null_class)
        self.cache.reset(row_conditions)
        B, images = len(x_BCHW), range(len(x_BCHW)) if images is None else images
        known_rows = [b + part * B for part in range(self.rows_per_image) for b in images]
        groups = passes(known_rows, x_BCHW.device.type)
        prefill(self.cache, self.x_NCHW[:, :, : self.prefilled], row_conditions, groups)

    def sample_row(self, i: int) -> None:
        """Sample row i into `x_BCHW`, after those before it."""
        self.cache.advance(i, self.x_NCHW, self._choose_pixels, self.first_row)

    def sample_rows(self, x_BCHW: Tensor, sample_row: Callable[[int], None], on_row: OnRow) -> None:
        """Sample all rows by `sample_row`, and copy them to x; stop when `on_row` returns True."""
        for i in self.rows:
            sample_row(i)
            x_BCHW[:, :, i] = self.x_BCHW[:, :, i]
            if i >= self.first_row and on_row(i + 1):
                return

    def _choose_pixels(self, i: int, j: int, logit_NK: Tensor, component_NK9: Tensor) -> Tensor:
        return self.sample_pixels(j, logit_NK, component_NK9, self.pixel_draws[i * self.cache.shape.W + j])
