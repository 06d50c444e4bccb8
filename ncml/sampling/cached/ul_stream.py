"""The ul stream, a position at a time: ul at (i, j) depends on every pixel before it.

When a row starts, `prepare` computes what the row above and the u stream contribute to all its positions, as large
products. At each position, `step` adds what comes from the left neighbour and from the position itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncml.network.layers import AxialAttention, CausalConv, GatedBlock
from ncml.sampling.cached.buffers import BatchShape, ConditionSum, RowBuffer, RowSums, ULState
from ncml.sampling.cached.products import DEPTH, attend, multiply, right_factor


class PositionConv:
    """A `CausalConv` of the ul stream. Its output goes into `out_SWG`.

    With `signed_input` it reads [x, -x], and ignores the second half.
    """

    def __init__(self, conv: CausalConv, out_SWG: Tensor, R: int, *, signed_input: bool = False) -> None:
        C = conv.in_channels
        taps = conv.weight.permute(2, 3, 1, 0)  # [row above and this row, left and self, C, G]
        if signed_input:
            taps = F.pad(taps, (0, 0, 0, C))
        self.stride = conv.stride[1]
        self.above, self.current = (row.split(DEPTH) for row in taps.flatten(1, 2).contiguous())
        self.bias = cast(Tensor, conv.bias)
        self.out = RowSums(out_SWG, R)

    def prepare(self, above: RowBuffer, more_RWG: Tensor | None = None) -> None:
        """Start a row with the terms of the row above it, and `more_RWG`."""
        out = multiply(self.bias, above.pair_matrix(self.stride).split(DEPTH, 1), self.above)
        out_RWG = out.view_as(self.out.row_RWG)
        self.out.reset(out_RWG if more_RWG is None else out_RWG.add_(more_RWG))

    def step(self, j: int, pair_parts: Sequence[Tensor]) -> None:
        """Add the terms of the left neighbour and the position itself to column j, given in parts of DEPTH."""
        out_SG = self.out.padded_positions[j]
        for x_SK, factor_KG in zip(pair_parts, self.current, strict=True):
            out_SG.addmm_(x_SK, factor_KG)


class PositionAttention:
    """`AxialAttention` of the ul stream, with caches of the keys and values of the row and of all columns."""

    def __init__(self, attention: AxialAttention, shape: BatchShape) -> None:
        self.attention = attention
        like, N = attention.out.weight, attention.heads
        S, R, H, W = shape.S, shape.R, shape.H, shape.W
        width = attention.out.out_features
        D = width // N
        self.column_kv = like.new_zeros(2, W, R, N, H, D)
        self.columns = self.column_kv.unbind(1)
        row_kv = like.new_zeros(2, R, N, W, D)
        self.row_positions = row_kv.unbind(3)
        self.row_prefixes = [row_kv[:, :, :, : j + 1].unbind(0) for j in range(W)]
        self.qkv_SG, self.both_SG = like.new_zeros(S, 6 * width), like.new_zeros(S, 2 * width)
        row_qkv, column_qkv = self.qkv_SG[:R].view(R, 2, 3, N, 1, D).unbind(1)
        self.row_query, self.column_query = row_qkv[:, 0], column_qkv[:, 0]
        self.new_row_kv, self.new_column_kv = (
            part[:, 1:].squeeze(-2).transpose(0, 1) for part in (row_qkv, column_qkv)
        )
        self.both_RG = self.both_SG[:R]
        self.project, self.out = right_factor(attention.project), right_factor(attention.out)

    def step(self, x_SF: Tensor, i: int, j: int) -> None:
        """Apply attention at (i, j) in place, and add the position to the caches."""
        a, column = self.attention, self.columns[j]
        torch.addmm(a.project.bias, a.norm(x_SF), self.project, out=self.qkv_SG)
        self.row_positions[j].copy_(self.new_row_kv)
        column[:, :, :, i] = self.new_column_kv
        from_row = attend(self.row_query, *self.row_prefixes[j])
        from_column = attend(self.column_query, *column[:, :, :, : i + 1])
        torch.cat([from_row.flatten(1), from_column.flatten(1)], 1, out=self.both_RG)
        x_SF.add_(torch.addmm(a.out.bias, self.both_SG, self.out)).mul_(math.sqrt(0.5))


class PositionBlock:
    """A `GatedBlock` of the ul stream and its attention."""

    def __init__(self, block: GatedBlock, attention: nn.Module, shape: BatchShape) -> None:
        assert block.extra is not None
        self.block = block
        width = block.conv_in.out_channels
        like = block.conv_in.weight
        self.hidden, gated_SWG = ULState(shape, width, like), like.new_zeros(shape.S, shape.W, 2 * width)
        self.conv_in = PositionConv(block.conv_in, self.hidden.values_SWF, shape.R)
        self.conv_out = PositionConv(block.conv_out, gated_SWG, shape.R)
        self.linear, self.gate = (half.unbind(1) for half in gated_SWG[: shape.R].chunk(2, 2))
        extra = right_factor(block.extra)
        self.u_factor, self.skip_factor = extra[: 2 * width], extra[2 * width :]
        self.condition = ConditionSum(block, shape)
        self.attention = PositionAttention(attention, shape) if isinstance(attention, AxialAttention) else None

    def prepare(self, above: ULState, u_elu_RWG: Tensor) -> None:
        """Start a row, given this block's input in the row above it and the u stream of the row itself."""
        R, W, G = u_elu_RWG.shape
        self.conv_out.prepare(self.hidden.elu)
        from_u = torch.mm(u_elu_RWG.reshape(R * W, G), self.u_factor).view(R, W, -1)
        self.conv_in.prepare(above.elu, from_u.add_(self.condition.sum_RWF))

    def step(self, before: ULState, after: ULState, skip: ULState | None, i: int, j: int) -> None:
        """Compute the state after this block at (i, j) from the state before it."""
        self.conv_in.step(j, before.elu.pair_parts[j])
        if skip is not None:
            self.conv_in.out.padded_positions[j].addmm_(skip.elu.padded_positions[j], self.skip_factor)
        self.hidden.activate(j)
        self.conv_out.step(j, self.hidden.elu.pair_parts[j])
        torch.addcmul(before.values[j], self.linear[j], self.gate[j].sigmoid_(), out=after.values[j])
        if self.attention is not None:
            self.attention.step(after.padded_values[j], i, j)
        after.activate(j)
