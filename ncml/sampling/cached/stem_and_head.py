"""Caches of both ends of the network: the stem, from pixels to both streams, and the head, from ul to a mixture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from ncml.network.mixture import PARAMETERS, group_by_component, promote_to_fp32
from ncml.network.ncpn import CHANNELS, NCPN
from ncml.sampling.cached.buffers import BatchShape, PixelRow, RowSums, ULState
from ncml.sampling.cached.u_stream import RowConv


class StemCache:
    """The stem: u reads the two rows above; ul the row above, and the left column of this row and of the one above."""

    def __init__(self, network: NCPN, shape: BatchShape, first: ULState) -> None:
        """`first` is the state of ul that the stem writes."""
        self.shape = shape
        self.stem = stem = network.stem
        C, like = CHANNELS + 1, stem.u.weight
        self.low, self.high = like.new_tensor(-1), like.new_tensor(1)
        """The range of the pixels that are read, in memory because recorded operations serve every t."""
        self.u = RowConv(stem.u, shape)
        self.pixels = [PixelRow(like.new_zeros(shape.S, shape.W + 2, C), shape.B) for _ in range(2)]
        """The pixels of an even and of an odd row."""
        self.above = stem.ul_above.weight.permute(3, 2, 1, 0).reshape(3 * C, -1).contiguous()
        self.left_above, self.left = (w.t().contiguous() for w in stem.ul_left.weight[..., 0].unbind(2))
        self.ul = RowSums(first.values_SWF, shape.R)

    def reset(self, reach: Tensor) -> None:
        """Start a batch whose pixels are read up to this magnitude (`NCPN.reach`)."""
        self.low.copy_(-reach)
        self.high.copy_(reach)
        for buffer in self.row_buffers():
            buffer.zero_()

    def advance(self, i: int) -> tuple[Tensor, Tensor]:
        """Start row i: return u, and the terms of ul that come from the row above. [R, W, F] each."""
        stem, R, W = self.stem, self.shape.R, self.shape.W
        self.pixels[i % 2].ones.fill_(1)
        above = self.pixels[1 - i % 2].data[:R]
        left = above[:, :-2].reshape(R * W, -1)
        ul_RWF = torch.addmm(cast(Tensor, stem.ul_left.bias), left, self.left_above).view(R, W, -1)
        ul_RWF[:, 0] = 0  # the shift to the right
        if i == 0:
            return torch.zeros_like(ul_RWF), ul_RWF
        windows = above.unfold(1, 3, 1).transpose(2, 3).reshape(R * W, -1)
        ul_RWF += torch.addmm(cast(Tensor, stem.ul_above.bias), windows, self.above).view_as(ul_RWF)
        return self.u(above[:, 1:-1]), ul_RWF

    def step(self, i: int, j: int) -> None:
        """Add the terms of the left neighbour to ul at (i, j)."""
        self.ul.padded_positions[j].addmm_(self.pixels[i % 2].left_neighbours[j], self.left)

    def set_pixels(self, i: int, j: int, x_BC: Tensor) -> None:
        """Store the pixels at (i, j)."""
        self.pixels[i % 2].colours[j].copy_(x_BC.clamp(self.low, self.high))

    def prefill(self, x_BCHW: Tensor) -> None:
        """Store the known rows: the last one becomes the row above, and u holds the one before it."""
        rows = x_BCHW.shape[2]
        self._fill_row(self.pixels[(rows - 1) % 2].data[:, 1:-1], x_BCHW[:, :, -1])
        if rows > 1:
            self._fill_row(self.u.buffer[:, 1:-1, CHANNELS + 1 :], x_BCHW[:, :, -2])

    def _fill_row(self, row_SWC: Tensor, x_BCW: Tensor) -> None:
        row_SWC[: self.shape.B, :, :CHANNELS] = x_BCW.clamp(self.low, self.high).transpose(1, 2)
        row_SWC[..., CHANNELS] = 1

    def row_buffers(self) -> Iterator[Tensor]:
        """Yield the buffers that hold the rows above."""
        yield from (self.u.buffer, *(pixels.data for pixels in self.pixels))


class HeadCache:
    """The head, with its outputs laid out by component, as `ncml.network.mixture.PixelSampler` reads them."""

    def __init__(self, network: NCPN, shape: BatchShape) -> None:
        K = network.config.model.mixtures
        order = torch.cat([part.flatten() for part in group_by_component(torch.arange(PARAMETERS * K)[None], K)])
        self.weight = network.head.weight[order].t().contiguous()
        self.bias = network.head.bias[order].contiguous()
        parameters_SWP = self.bias.new_zeros(shape.S, shape.W, PARAMETERS * K)
        self.sums = RowSums(parameters_SWP, shape.B)
        logit_BWK, component_BWG = parameters_SWP[: shape.B].split_with_sizes((K, (PARAMETERS - 1) * K), 2)
        self.logits, self.components = logit_BWK.unbind(1), component_BWG.unflatten(2, (K, PARAMETERS - 1)).unbind(1)
        self.is_fp32 = promote_to_fp32(parameters_SWP) is parameters_SWP

    def prepare(self) -> None:
        """Start a row."""
        self.sums.reset(self.bias)

    def step(self, j: int, elu_SG: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixture's parameters at column j by component: logits [B, K] and [B, K, 9]."""
        self.sums.padded_positions[j].addmm_(elu_SG, self.weight)
        logit_BK, component_BK9 = self.logits[j], self.components[j]
        return (
            (logit_BK, component_BK9) if self.is_fp32 else (promote_to_fp32(logit_BK), promote_to_fp32(component_BK9))
        )
