"""The u stream, a row at a time: u at row i depends only on rows before i, so a row is a few large products.

A convolution keeps the row above; column attention keeps the keys and values of all earlier rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from ncml.network.layers import AxialAttention, CausalConv, GatedBlock
from ncml.sampling.cached.buffers import BatchShape, ConditionSum
from ncml.sampling.cached.products import DEPTH, activate, attend, gate, multiply, right_factor


class RowConv:
    """A `CausalConv` of the u stream."""

    def __init__(self, conv: CausalConv, shape: BatchShape) -> None:
        R, W = shape.R, shape.W
        self.conv, self.stride = conv, conv.stride[1]
        C = conv.in_channels
        # Side by side at every column: the row above and this row.
        self.buffer = conv.weight.new_zeros(R, W + 2, 2 * C)
        self.halves = self.buffer.split(C, 2)
        self.current = self.buffer[:, 1:-1, C:]
        self.weight = conv.weight.permute(3, 2, 1, 0).reshape(6 * C, -1).contiguous().split(DEPTH)
        self.windows = self.buffer.as_strided(
            (R, W // self.stride, 6 * C), (self.buffer.stride(0), self.stride * 2 * C, 1)
        )

    def advance(self, row_RWC: Tensor) -> None:
        """Make this the current row, and the current one the row above."""
        above, current = self.halves
        above.copy_(current)
        self.current.copy_(row_RWC)

    def __call__(self, row_RWC: Tensor) -> Tensor:
        """Advance to this row and return the convolution's output there, [R, W / stride, G]."""
        self.advance(row_RWC)
        R, W, K = self.windows.shape
        windows = self.windows.reshape(R * W, K).split(DEPTH, 1)
        return multiply(cast(Tensor, self.conv.bias), windows, self.weight).view(R, W, -1)


class RowAttention:
    """`AxialAttention` of the u stream: over the whole row, and over the column's earlier rows from a cache."""

    def __init__(self, attention: AxialAttention, shape: BatchShape) -> None:
        self.attention, self.row_count = attention, 0
        N = attention.heads
        D = attention.out.out_features // N
        self.column_kv = attention.out.weight.new_zeros(2, shape.R * shape.W, N, shape.H, D)
        """Keys and values of every column's earlier rows, of which there are `row_count`."""
        self.project, self.out = right_factor(attention.project), right_factor(attention.out)

    def __call__(self, x_RWF: Tensor) -> Tensor:
        """Return the stream after attention, and add this row to the cache."""
        a = self.attention
        R, W, _ = x_RWF.shape
        qkv = torch.addmm(a.project.bias, a.norm(x_RWF).view(R * W, -1), self.project)
        row, column = qkv.view(R, W, 2, 3, a.heads, -1).unbind(2)
        # Contiguous, because a single image's strides would choose another kernel than a batch's.
        row_RWF = attend(*row.permute(2, 0, 3, 1, 4).contiguous()).transpose(1, 2).reshape(R * W, -1)
        qkv = column.flatten(0, 1)  # [R W, 3, N, D]
        self.column_kv[:, :, :, self.row_count] = qkv[:, 1:].transpose(0, 1)
        self.row_count += 1
        column_RWF = attend(qkv[:, 0].unsqueeze(2), *self.column_kv[:, :, :, : self.row_count]).reshape(R * W, -1)
        out = torch.addmm(a.out.bias, torch.cat([row_RWF, column_RWF], -1), self.out).view_as(x_RWF)
        return (x_RWF + out) * math.sqrt(0.5)


class RowBlock:
    """A `GatedBlock` of the u stream and its attention."""

    def __init__(self, block: GatedBlock, attention: nn.Module, shape: BatchShape) -> None:
        self.conv_in, self.conv_out = RowConv(block.conv_in, shape), RowConv(block.conv_out, shape)
        self.condition = ConditionSum(block, shape)
        self.extra = None if block.extra is None else right_factor(block.extra)
        self.attention = RowAttention(attention, shape) if isinstance(attention, AxialAttention) else None

    def reset(self, embedding_SE: Tensor) -> None:
        """Start a new batch."""
        self.condition.reset(embedding_SE)
        if self.attention is not None:
            self.attention.row_count = 0

    def row_buffers(self) -> Iterator[Tensor]:
        """Yield the buffers that hold the row above."""
        yield from (self.conv_in.buffer, self.conv_out.buffer)

    def __call__(self, x_RWF: Tensor, elu_RWG: Tensor, skip_RWG: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the stream and its activation after this block, given both before it."""
        c_RWF = self.conv_in(elu_RWG).add_(self.condition.sum_RWF)
        if skip_RWG is not None and self.extra is not None:
            c_RWF.flatten(0, 1).addmm_(skip_RWG.flatten(0, 1), self.extra)
        x_RWF = gate(self.conv_out(activate(c_RWF)), x_RWF)
        if self.attention is not None:
            x_RWF = self.attention(x_RWF)
        return x_RWF, activate(x_RWF)
