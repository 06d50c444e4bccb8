"""Rows of the streams in memory, with ready-made views of each position.

For a single image, launching operations and creating views takes most of the time, so all views are created once. A
sequence of views is indexed by column. A row buffer has a column of zeros on its left, which is the convolutions'
padding. Products read and write all S images; everything else is computed for R images, so that a single one is not
padded to SLOT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ncml.network.layers import GatedBlock
from ncml.network.ncpn import CHANNELS, NCPN
from ncml.sampling.cached.products import DEPTH, SLOT, VECTOR, apply_by_slots, elu, padded_count


@dataclass(frozen=True)
class BatchShape:
    """The numbers of images, and the size of an image at one level of the network."""

    B: int
    S: int
    """Images, padded, of products by position."""
    R: int
    """Images of products by row: B or S."""
    H: int
    W: int

    @classmethod
    def plan(cls, network: NCPN, B: int, H: int, W: int) -> BatchShape:
        """Choose the padding of a batch."""
        S = padded_count(B)
        # Row products are padded only where an image's row is not a multiple of SLOT, or not of whole vectors.
        rows = [(W >> index, level.width) for index, level in enumerate(network.config.model.levels)]
        whole = all(columns % SLOT == 0 and columns * width % VECTOR == 0 for columns, width in rows)
        return cls(B, S, B if whole else S, H, W)

    def at_level(self, index: int) -> BatchShape:
        """Return the shape at a level, given the shape at level 0."""
        return replace(self, H=self.H >> index, W=self.W >> index)


class RowBuffer:
    """A row of a stream, [S, 1 + W, C]."""

    def __init__(self, shape: BatchShape, C: int, like: Tensor) -> None:
        self.R = shape.R
        self.data = like.new_zeros(shape.S, 1 + shape.W, C)

    @cached_property
    def positions(self) -> Sequence[Tensor]:
        """Every position, [R, C]."""
        return self.channels(0, self.data.shape[2])[: self.R].unbind(1)

    @cached_property
    def padded_positions(self) -> Sequence[Tensor]:
        """Every position of all S images, [S, C]."""
        return self.data[:, 1:].unbind(1)

    @cached_property
    def pairs(self) -> Sequence[Tensor]:
        """Left neighbour and position itself, side by side: [S, 2 C]."""
        return self._windows_SWG.unbind(1)

    @cached_property
    def pair_parts(self) -> Sequence[Sequence[Tensor]]:
        """Left neighbour and position itself, side by side, in parts of DEPTH: [S, 2 C] in all."""
        return list(zip(*(part.unbind(1) for part in self._windows_SWG.split(DEPTH, 2)), strict=True))

    @property
    def _windows_SWG(self) -> Tensor:
        S, _, C = self.data.shape
        return self.data.view(S, -1).unfold(1, 2 * C, C)

    def channels(self, start: int, end: int) -> Tensor:
        """Return a view of some channels of every position, [S, W, end - start]."""
        return self.data[:, 1:, start:end]

    def pair_matrix(self, stride: int = 1) -> Tensor:
        """Return left neighbour and position itself of every `stride`-th column as one matrix, [R W / stride, 2 C]."""
        _, columns, C = self.data.shape
        view = self.data.as_strided((self.R, (columns - 1) // stride, 2 * C), (self.data.stride(0), stride * C, 1))
        return view.reshape(-1, 2 * C)


class ULState:
    """A row of the ul stream at one depth: [x, -x], and the concat_elu that is their elementwise ELU."""

    def __init__(self, shape: BatchShape, width: int, like: Tensor) -> None:
        self.x, self.elu = RowBuffer(shape, 2 * width, like), RowBuffer(shape, 2 * width, like)
        self.values_SWF = self.x.channels(0, width)
        self.values = self.values_SWF[: shape.R].unbind(1)
        self.negatives = self.x.channels(width, 2 * width)[: shape.R].unbind(1)

    @cached_property
    def padded_values(self) -> Sequence[Tensor]:
        """The values of all S images, [S, F]."""
        return self.values_SWF.unbind(1)

    def activate(self, j: int) -> None:
        """Compute -x and the ELU at column j, where x has been written."""
        torch.neg(self.values[j], out=self.negatives[j])
        elu(self.x.positions[j], out=self.elu.positions[j])


class RowSums:
    """A row of sums: the terms that are known for the whole row are written first, a position's own are added later."""

    def __init__(self, out_SWG: Tensor, R: int) -> None:
        self.row_RWG, self.padded_positions = out_SWG[:R], out_SWG.unbind(1)

    def reset(self, terms_RWG: Tensor) -> None:
        """Start a row with its known terms."""
        self.row_RWG.copy_(terms_RWG)


class PixelRow:
    """A row of pixels as the stem reads them: colours, a channel of ones, and a column of zeros on both sides."""

    def __init__(self, data_SWC: Tensor, B: int) -> None:
        self.data = data_SWC
        self.left_neighbours = data_SWC.unbind(1)
        """[S, 4]."""
        self.colours = data_SWC[:B, 1:-1, :CHANNELS].unbind(1)
        """[B, 3]."""
        self.ones = data_SWC[:B, 1:-1, CHANNELS]


class ConditionSum:
    """What a `GatedBlock` adds to its hidden layer everywhere: noise, class and orientation, and a bias."""

    def __init__(self, block: GatedBlock, shape: BatchShape) -> None:
        self.block = block
        self.sum_SF = block.conv_in.weight.new_empty(shape.S, block.conv_in.out_channels)
        self.sum_RWF = self.sum_SF[: shape.R, None]

    def reset(self, embedding_SE: Tensor) -> None:
        """Compute the sum for a new batch."""
        self.sum_SF.copy_(apply_by_slots(self.block.condition, embedding_SE))
        if self.block.extra is not None:
            self.sum_SF.add_(self.block.extra.bias)
