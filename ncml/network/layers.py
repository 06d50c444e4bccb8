"""The parts of the network: causal convolutions, the gated block, axial attention, Fourier features.

Shapes: B batch, C or F channels, H rows, W columns, E embedding, N heads, D channels of a head.

There are two streams. The vertical stream u at (i, j) sees pixels of the rows before i; the horizontal stream ul sees
pixels strictly before (i, j) in raster order. Every layer here preserves that; none normalises over space, which would
leak later pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Stream = Literal["u", "ul"]
LOG2_E = math.log2(math.e)


def concat_elu(x_BFHW: Tensor) -> Tensor:
    """ELU of x and of -x side by side: twice the channels (dimension 1)."""
    return _ConcatELU.apply(x_BFHW) if torch.is_grad_enabled() else _concat_elu(x_BFHW)


def _concat_elu(x: Tensor) -> Tensor:
    # One exponential serves both halves; exp2 is vectorised where exp may be a slow library call.
    below = x.abs().mul_(-LOG2_E).exp2_().sub_(1)
    return torch.cat([torch.maximum(x, below), torch.maximum(-x, below)], 1)


class _ConcatELU(torch.autograd.Function):
    # The derivative is computed from the result: elu(cat(x, -x)) and its backward pass cost three times as much, and
    # would dominate a small network on a CPU.
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = _concat_elu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        is_result = True
        positive, negative = torch.ops.aten.elu_backward(grad_outputs[0], 1, 1, 1, is_result, y).chunk(2, 1)
        return positive - negative


def gate(ab_BGHW: Tensor) -> Tensor:
    """The first half of the channels times the sigmoid of the second: [B, 2 F, H, W] -> [B, F, H, W]."""
    return _Gate.apply(ab_BGHW) if torch.is_grad_enabled() else F.glu(ab_BGHW, 1)


class _Gate(torch.autograd.Function):
    # F.glu keeps its input and computes the sigmoid again, which costs twice as much on a CPU.
    @staticmethod
    def forward(ctx: Any, ab: Tensor) -> Tensor:
        a, b = ab.chunk(2, 1)
        sigmoid_b = b.sigmoid()
        y = a * sigmoid_b
        ctx.save_for_backward(y, sigmoid_b)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        y, sigmoid_b = ctx.saved_tensors
        (grad,) = grad_outputs
        through = grad * y
        return torch.cat([grad * sigmoid_b, torch.addcmul(through, through, sigmoid_b, value=-1)], 1)


class Pointwise(nn.Linear):
    """A 1x1 convolution: one matrix product over all positions, which a CPU does faster than a convolution."""

    bias: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """[B, F, H, W] -> [B, G, H, W]."""
        return self.rows(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def rows(self, x_HWF: Tensor) -> Tensor:
        """[..., F] -> [..., G]: channels last."""
        return super().forward(x_HWF)


class CausalConv(nn.Conv2d):
    """A convolution padded so that it sees no later row (u) or no later pixel (ul): 2x3 for u, 2x2 for ul.

    `kernel` gives another size under the same padding rule: all rows above; columns on both sides (u) or left (ul).
    """

    def __init__(
        self, stream: Stream, in_channels: int, out_channels: int, *, stride: int = 1, kernel: tuple[int, int] = (0, 0)
    ) -> None:
        rows, columns = kernel if all(kernel) else (2, 3 if stream == "u" else 2)
        super().__init__(in_channels, out_channels, (rows, columns), stride)
        side = (columns - 1) // 2
        self.pad = (side, side, rows - 1, 0) if stream == "u" else (columns - 1, 0, rows - 1, 0)

    def forward(self, input: Tensor) -> Tensor:
        """[B, F, H, W] -> [B, G, H / stride, W / stride]."""
        return super().forward(F.pad(input, self.pad))


class Grow(nn.ConvTranspose2d):
    """A transposed convolution of stride 2: each position emits two rows (u, 2x3 kernel) or a 2x2 block (ul)."""

    def __init__(self, stream: Stream, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, (2, 3) if stream == "u" else (2, 2), stride=2)
        self.stream = stream

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """[B, F, H, W] -> [B, G, 2 H, 2 W]."""
        # One matrix product: in bf16 on a CPU, PyTorch's transposed 2x3 convolution takes over three times as long.
        _, out_channels, rows, columns = self.weight.shape
        weight = self.weight.permute(2, 3, 1, 0).flatten(0, 2)
        emitted_BHWrcG = F.linear(input.permute(0, 2, 3, 1), weight).unflatten(-1, (rows, columns, out_channels))
        if self.stream == "u":  # centred on column 2J: the first of three is the odd column of the position to the left
            first, even, odd = emitted_BHWrcG.unbind(4)
            emitted_BHWrcG = torch.stack([even, odd + F.pad(first[:, :, 1:], (0, 0, 0, 0, 0, 1))], 4)
        x_BHWG = emitted_BHWrcG.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return (x_BHWG + cast(Tensor, self.bias).to(x_BHWG.dtype)).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Activations:
    """A stream at one depth and its concat_elu, which up to three layers read."""

    x: Tensor
    elu: Tensor

    @classmethod
    def compute(cls, x_BFHW: Tensor) -> Activations:
        """Activate a stream: [B, F, H, W] -> elu [B, 2 F, H, W]."""
        return cls(x_BFHW, concat_elu(x_BFHW))


class GatedBlock(nn.Module):
    """The gated residual block of PixelCNN++: x + a sigmoid(b), (a, b) = conv(elu(conv(elu(x)) + conditions))."""

    def __init__(self, stream: Stream, width: int, *, extra: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.conv_in = CausalConv(stream, 2 * width, width)
        self.conv_out = CausalConv(stream, 2 * width, 2 * width)
        self.extra = Pointwise(2 * extra, width) if extra else None
        self.condition = nn.Linear(embedding, width)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            # Near-identity blocks: without data-dependent initialisation, deep stacks start near zero and stay finite.
            self.conv_out.weight.mul_(0.1)

    def forward(self, h: Activations, extra_BGHW: Tensor | None, embedding_BE: Tensor) -> Tensor:
        """[B, F, H, W] -> the same; `extra` is the activated other stream and skip, at the same resolution."""
        c_BFHW = self.conv_in(h.elu).add_(self.condition(embedding_BE)[:, :, None, None])
        if self.extra is not None and extra_BGHW is not None:
            c_BFHW.add_(self.extra(extra_BGHW))
        return h.x + gate(self.conv_out(self.dropout(concat_elu(c_BFHW))))


class AxialAttention(nn.Module):
    """Attention along the row and along the column of each position: (x + out(row, column)) / sqrt(2).

    Keys: the row up to and including the position for ul, the whole row for u; the column up to and including the
    position for both. Both attentions read the same normalised input, so that one product computes all queries, keys
    and values, and one combines the results.
    """

    def __init__(self, stream: Stream, width: int, heads: int) -> None:
        super().__init__()
        self.row_is_causal = stream == "ul"
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 6 * width)
        self.out = nn.Linear(2 * width, width)

    def forward(self, x_BFHW: Tensor) -> Tensor:
        """[B, F, H, W] -> the same."""
        x_BHWF = x_BFHW.permute(0, 2, 3, 1)
        row, column = self.project(self.norm(x_BHWF)).chunk(2, -1)
        row_BHWF = self._attend(row, causal=self.row_is_causal)
        column_BWHF = self._attend(column.transpose(1, 2), causal=True)
        out_BHWF = self.out(torch.cat([row_BHWF, column_BWHF.transpose(1, 2)], -1))
        return (x_BFHW + out_BHWF.permute(0, 3, 1, 2)) * math.sqrt(0.5)

    def _attend(self, qkv: Tensor, *, causal: bool) -> Tensor:
        """[B, lines, length, 3 F] -> [B, lines, length, F], attending along `length`."""
        B, lines, length, _ = qkv.shape
        qkv = qkv.reshape(B * lines, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out_BNLD = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=causal)
        return out_BNLD.transpose(1, 2).reshape(B, lines, length, -1)


class FourierFeatures(nn.Module):
    """Gaussian Fourier features of a scalar: [cos(2 pi f v), sin(2 pi f v)], f ~ N(0, 1), fixed."""

    frequencies: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", nn.init.normal_(torch.empty(features // 2)))

    def forward(self, value_B: Tensor) -> Tensor:
        """[B] -> [B, features]."""
        angle = 2 * math.pi * value_B[:, None] * self.frequencies
        return torch.cat([angle.cos(), angle.sin()], -1)
