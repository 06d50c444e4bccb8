"""The exact cached sampler: each activation of the network is computed once, in the order of the raster scan.

It reads the weights of `ncml.network` and mirrors its structure, stream by stream:

    for each row i        u of the whole row, at every level whose stride divides i; then, for every ul block, all that
                          comes from the row above and from u, for the whole row at once (`prepare`)
    for each position j   ul at every level whose stride divides i and j, from the left neighbour and itself (`step`);
                          the head; one draw

Of three levels, these move at the positions of a picture (level l where 2^l divides row and column):

    row 0   012 0 01 0 012 0 01 0       at (i, j): up the blocks of level 0;
    row 1   0   0 0  0 0   0 0  0                  where i and j are even, shrink to (i/2, j/2) of level 1, the same
    row 2   01  0 01 0 01  0 01 0                  there, and grow its position to a 2x2 block;
    row 3   0   0 0  0 0   0 0  0                  down the blocks of level 0

The block's upper row waits in `grown[0]`, the lower one in `grown[1]`: row i starts down from `grown[i % 2]`, and has
`grown[1 - i % 2]`, not yet overwritten, as the row above. (At the lowest level both are the last state going up.)
A shrinking convolution reads an even row and the odd one above it, which u remembers by `push`.

Only about a quarter of the arithmetic is left to the sequential part. Known rows are run through the network itself
once, with hooks on its layers that fill the caches (`_Run._know`).

On a CPU an image does not depend on what shares its batch, to the bit: `ncml.batch_invariance` checks the shapes that
batches are sampled in, and samples in a single shape where they fail. To pass, these were found to be needed (oneMKL on
Intel with AVX-512; they do not suffice for its AVX2 kernels, or on AMD for products of fewer than 12 columns):

    products              a multiple of SLOT rows; a right factor stored by rows, not transposed; sums of at most DEPTH
                          terms, since longer ones are split by the number of rows
    elementwise           whole vectors for each image, on one thread (`_on_one_thread`): remainders may round otherwise
    conditioning          SLOT images at a time (`_by_slots`), known rows one at a time (`_Run._know`)

Shapes: S slots (the batch, padded), R images of a row product, H rows, W columns, F filters, N heads, D channels of a
head, K components. A row buffer has a column of zeros on its left, which is the convolutions' padding.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncml.generate import Conditions
from ncml.layers import AxialAttention, CausalConv, GatedBlock, Grow
from ncml.likelihood import Draw, PixelNoise, by_component, wide
from ncml.network import CHANNELS, NCPN, Pair, Resample, Stem

SLOT = 8
"""Rows of a matrix product come in multiples of this."""

DEPTH = 384
"""Terms that a convolution's product sums at most; longer sums are several products.

Products over the channels of one position are not split: these are as long only in levels wider than 192.
"""

ONE_THREAD = 32768
"""Elements up to which PyTorch computes an elementwise operation on one thread."""

VECTOR = 32
"""Elements that it computes at a time, at most."""

# What F.elu and F.glu call: F's wrappers hide `out`, and cost as much again as a small operation does.
_nn: Any = torch._C._nn  # pyright: ignore[reportAttributeAccessIssue]
elu, elu_, glu = _nn.elu, _nn.elu_, _nn.glu

Chooser = Callable[[int, int, Tensor, Tensor], Tensor]
"""(row, column, logits [B, K], components [B, K, 9] as `Draw` reads them) -> the pixels there, [B, 3].

All four may be overwritten in the next row.
"""


def incremental(
    network: NCPN,
    x_BCHW: Tensor,
    conditions: Conditions,
    noise: PixelNoise,
    *,
    first_row: int,
    on_row: Callable[[int], bool],
) -> None:
    """Draw the pixels of x from row `first_row` on, in place; a `ncml.generate.Sampler`."""
    drawing = Drawing(network, x_BCHW, first_row=first_row, clean=conditions.t == 0)
    drawing.begin(x_BCHW, conditions, noise)
    drawing.finish(x_BCHW, drawing.row, on_row)


def walk(
    network: NCPN, x_BCHW: Tensor, conditions: Conditions, choose: Chooser, *, on_row: Callable[[int], bool]
) -> None:
    """Visit the pixels of x, in place, each set to what `choose` makes of its mixture."""
    B, _, H, W = x_BCHW.shape
    run = _Run(network, B, H, W)
    run.begin(conditions, x_BCHW[:, :, :0])
    for i in range(H):
        run.row(i, x_BCHW, choose)
        if on_row(i + 1):
            return


class Drawing:
    """Drawings of one kind, one after another, in memory of their own: a row is the same operations on it every time.

    So a row can be recorded and replayed (`ncml.replay`).
    """

    def __init__(self, network: NCPN, x_BCHW: Tensor, *, first_row: int, clean: bool) -> None:
        """For batches like x, of which the rows before `first_row` are known; `clean` where t = 0."""
        B, _, H, W = x_BCHW.shape
        K, like = network.config.model.mixtures, wide(network.head.weight)
        self.run, self.first_row = _Run(network, B, H, W), first_row
        self.x_BCHW = torch.empty_like(x_BCHW)
        # The levels of the network are in step again at every multiple of the largest stride.
        self.filled = first_row - first_row % self.run.stride
        self.rows = range(self.filled, H)
        self.noise = [like.new_empty(H * W, B, channels) for channels in (K, 3, 3)]
        """By position, so that one position's draws lie together."""
        self.draws = [PixelNoise(*at) for at in zip(*self.noise, strict=True)]
        self.draw = Draw(B, K, W, like, clean=clean)

    def begin(
        self, x_BCHW: Tensor, conditions: Conditions, noise: PixelNoise, *, images: Sequence[int] | None = None
    ) -> None:
        """Start a drawing; of images that are not among `images` (None: all are) known rows are left out."""
        for mine, given in zip(self.noise, (noise.gumbel_BK, noise.logistic_BC, noise.uniform_BC), strict=True):
            mine.copy_(given.flatten(2).permute(2, 0, 1))
        self.x_BCHW.copy_(x_BCHW)
        self.run.begin(conditions, x_BCHW[:, :, : self.filled], images)

    def row(self, i: int) -> None:
        """Compute row i, after those before it."""
        self.run.row(i, self.x_BCHW, self._choose, self.first_row)

    def finish(self, x_BCHW: Tensor, row: Callable[[int], None], on_row: Callable[[int], bool]) -> None:
        """Have all rows computed by `row`, and put them into x; `on_row` is called as `Sampler` says."""
        for i in self.rows:
            row(i)
            x_BCHW[:, :, i] = self.x_BCHW[:, :, i]
            if i >= self.first_row and on_row(i + 1):
                return

    def _choose(self, i: int, j: int, logit_BK: Tensor, component_BK9: Tensor) -> Tensor:
        return self.draw(j, logit_BK, component_BK9, self.draws[i * self.run.W + j])


def _slots(B: int) -> int:
    return -(-B // SLOT) * SLOT


def _by_slots(module: nn.Module, *inputs_S: Tensor) -> Tensor:
    """What a module of the network makes of its inputs, SLOT rows at a time."""
    return torch.cat([module(*some) for some in zip(*(part.split(SLOT) for part in inputs_S), strict=True)])


def _factor(linear: nn.Linear) -> Tensor:
    """A linear layer's weight as the right factor of a product."""
    return linear.weight.t().contiguous()


def _product(bias: Tensor, x: Sequence[Tensor], factor: Sequence[Tensor]) -> Tensor:
    """The sum of `bias` and x @ factor, both in parts of DEPTH: x [M, K] by column, factor [K, G] by row."""
    out = torch.addmm(bias, x[0], factor[0])
    for part in range(1, len(factor)):
        out.addmm_(x[part], factor[part])
    return out


def _activate(x_RWF: Tensor) -> Tensor:
    return _on_one_thread(lambda some: elu_(torch.cat([some, -some], -1)), x_RWF)


def _gate(ab_RWG: Tensor, x_RWF: Tensor) -> Tensor:
    return x_RWF + _on_one_thread(lambda some: glu(some, -1), ab_RWG)


def _on_one_thread(elementwise: Callable[[Tensor], Tensor], x_RWF: Tensor) -> Tensor:
    """Apply an operation to so few images at a time that threads do not share it.

    The elements at the ends of a thread's part are not computed as vectors, which may round otherwise; and where these
    ends lie depends on the size of the whole.
    """
    if torch.get_num_threads() == 1 or x_RWF.numel() <= ONE_THREAD:
        return elementwise(x_RWF)
    return torch.cat([elementwise(some) for some in x_RWF.split(max(1, ONE_THREAD // x_RWF[0].numel()))])


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[M, N, 1, D] or [M, N, W, D] on [M, N, L, D]."""
    return F.scaled_dot_product_attention(q, k, v)


class _RowConv:
    """A `CausalConv` of the u stream, a row at a time."""

    def __init__(self, conv: CausalConv, R: int, W: int) -> None:
        self.conv, self.stride = conv, conv.stride[1]
        C = conv.in_channels
        # Beside each other at every column: the row above and this row.
        self.buffer = conv.weight.new_zeros(R, W + 2, 2 * C)
        self.halves = self.buffer.split(C, 2)
        self.current = self.buffer[:, 1:-1, C:]
        self.weight = conv.weight.permute(3, 2, 1, 0).reshape(6 * C, -1).contiguous().split(DEPTH)
        self.windows = self.buffer.as_strided(
            (R, W // self.stride, 6 * C), (self.buffer.stride(0), self.stride * 2 * C, 1)
        )

    def push(self, row_RWC: Tensor) -> None:
        """Make this the current row, and the current one the row above."""
        above, current = self.halves
        above.copy_(current)
        self.current.copy_(row_RWC)

    def __call__(self, row_RWC: Tensor) -> Tensor:
        """The convolution's output at this row, [R, W / stride, G]."""
        self.push(row_RWC)
        R, W, K = self.windows.shape
        windows = self.windows.reshape(R * W, K).split(DEPTH, 1)
        return _product(cast(Tensor, self.conv.bias), windows, self.weight).view(R, W, -1)


class _RowAttention:
    """`AxialAttention` of the u stream, a row at a time: the whole row, and the column's earlier rows from a cache."""

    def __init__(self, attention: AxialAttention, R: int, H: int, W: int) -> None:
        self.attention, self.rows = attention, 0
        N = attention.heads
        D = attention.out.out_features // N
        self.column = attention.out.weight.new_zeros(2, R * W, N, H, D)
        """Keys and values of every column's earlier rows."""
        self.project, self.out = _factor(attention.project), _factor(attention.out)

    def __call__(self, x_RWF: Tensor) -> Tensor:
        a = self.attention
        R, W, _ = x_RWF.shape
        qkv = torch.addmm(a.project.bias, a.norm(x_RWF).view(R * W, -1), self.project)
        row, column = qkv.view(R, W, 2, 3, a.heads, -1).unbind(2)
        # Contiguous, because a lone image's strides would choose another kernel than a batch's.
        row_RWF = _attend(*row.permute(2, 0, 3, 1, 4).contiguous()).transpose(1, 2).reshape(R * W, -1)
        qkv = column.flatten(0, 1)  # [R W, 3, N, D]
        self.column[:, :, :, self.rows] = qkv[:, 1:].transpose(0, 1)
        self.rows += 1
        column_RWF = _attend(qkv[:, 0].unsqueeze(2), *self.column[:, :, :, : self.rows]).reshape(R * W, -1)
        out = torch.addmm(a.out.bias, torch.cat([row_RWF, column_RWF], -1), self.out).view_as(x_RWF)
        return (x_RWF + out) * math.sqrt(0.5)


class _Condition:
    """What a `GatedBlock` adds to its hidden layer everywhere: of noise, class and orientation, and a bias."""

    def __init__(self, block: GatedBlock, S: int, R: int) -> None:
        self.block = block
        self.sum_SF = block.conv_in.weight.new_empty(S, block.conv_in.out_channels)
        self.sum_RWF = self.sum_SF[:R, None]

    def begin(self, embedding_SE: Tensor) -> None:
        """Start a drawing."""
        self.sum_SF.copy_(_by_slots(self.block.condition, embedding_SE))
        if self.block.extra is not None:
            self.sum_SF.add_(self.block.extra.bias)


class _RowBlock:
    """A `GatedBlock` of the u stream and its attention, a row at a time."""

    def __init__(self, block: GatedBlock, attention: nn.Module, S: int, R: int, H: int, W: int) -> None:
        self.conv_in, self.conv_out = _RowConv(block.conv_in, R, W), _RowConv(block.conv_out, R, W)
        self.condition = _Condition(block, S, R)
        self.extra = None if block.extra is None else _factor(block.extra)
        self.attention = _RowAttention(attention, R, H, W) if isinstance(attention, AxialAttention) else None

    def __call__(self, x_RWF: Tensor, elu_RWG: Tensor, skip_RWG: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stream and its activation -> the same, after this block."""
        c_RWF = self.conv_in(elu_RWG).add_(self.condition.sum_RWF)
        if skip_RWG is not None and self.extra is not None:
            c_RWF.flatten(0, 1).addmm_(skip_RWG.flatten(0, 1), self.extra)
        x_RWF = _gate(self.conv_out(_activate(c_RWF)), x_RWF)
        if self.attention is not None:
            x_RWF = self.attention(x_RWF)
        return x_RWF, _activate(x_RWF)


class _Row:
    """A row buffer, [S, 1 + W, C], and views of every position that are made once, when first needed.

    Products read and write all slots; everything else is done for R images, so that a lone one does not pay for SLOT.
    """

    def __init__(self, S: int, R: int, W: int, C: int, like: Tensor) -> None:
        self.R = R
        self.data = like.new_zeros(S, 1 + W, C)

    @cached_property
    def slots(self) -> Sequence[Tensor]:
        """[S, C]."""
        return self.data[:, 1:].unbind(1)

    @cached_property
    def at(self) -> Sequence[Tensor]:
        """[R, C]."""
        return self.channels(0, self.data.shape[2])[: self.R].unbind(1)

    @cached_property
    def parts(self) -> Sequence[Sequence[Tensor]]:
        """Left neighbour and position itself, side by side, in parts of DEPTH: [S, 2 C] in all."""
        return list(zip(*(part.unbind(1) for part in self._windows_SWG.split(DEPTH, 2)), strict=True))

    @cached_property
    def pairs(self) -> Sequence[Tensor]:
        """Left neighbour and position itself, side by side: [S, 2 C]."""
        return self._windows_SWG.unbind(1)

    @property
    def _windows_SWG(self) -> Tensor:
        S, _, C = self.data.shape
        return self.data.view(S, -1).unfold(1, 2 * C, C)

    def channels(self, start: int, end: int) -> Tensor:
        """A view of some channels of every position, [S, W, end - start]."""
        return self.data[:, 1:, start:end]

    def matrix(self, stride: int = 1) -> Tensor:
        """Left neighbour and position itself of every `stride`-th column as one matrix, [R W / stride, 2 C]."""
        _, columns, C = self.data.shape
        view = self.data.as_strided((self.R, (columns - 1) // stride, 2 * C), (self.data.stride(0), stride * C, 1))
        return view.reshape(-1, 2 * C)


class _Pixels:
    """A row of pixels as the stem reads them: colours and a channel of ones, and a column of zeros on both sides."""

    def __init__(self, data_SWC: Tensor, B: int) -> None:
        self.data = data_SWC
        self.left = data_SWC.unbind(1)
        """The left neighbour of every position, [S, 4]."""
        self.colour = data_SWC[:B, 1:-1, :CHANNELS].unbind(1)
        """[B, 3]."""
        self.ones = data_SWC[:B, 1:-1, CHANNELS]


class _State:
    """The ul stream at one depth, a row of it: [x, -x], and the concat_elu that is their elementwise ELU."""

    def __init__(self, S: int, R: int, W: int, width: int, like: Tensor) -> None:
        self.x, self.elu = _Row(S, R, W, 2 * width, like), _Row(S, R, W, 2 * width, like)
        self.values_SWF = self.x.channels(0, width)
        self.value = self.values_SWF[:R].unbind(1)
        self.negative = self.x.channels(width, 2 * width)[:R].unbind(1)

    @cached_property
    def slots(self) -> Sequence[Tensor]:
        """The values with all slots, [S, F]."""
        return self.values_SWF.unbind(1)

    def activate(self, j: int) -> None:
        """Fill in the rest at column j, of which the value has been written."""
        torch.neg(self.value[j], out=self.negative[j])
        elu(self.x.at[j], out=self.elu.at[j])


def _signed(weight: Tensor) -> Tensor:
    """Columns that yield y become columns that yield [y, -y]."""
    return torch.cat([weight, -weight], -1).contiguous()


class _Sums:
    """Where a row of products is summed: what is known of all positions first, the rest at each position's turn."""

    def __init__(self, out_SWG: Tensor, R: int) -> None:
        self.known_RWG, self.slots = out_SWG[:R], out_SWG.unbind(1)

    def begin(self, known_RWG: Tensor) -> None:
        """Start a row."""
        self.known_RWG.copy_(known_RWG)


class _PositionConv:
    """A `CausalConv` of the ul stream: what comes from above for a whole row, then a position at a time.

    With `signed_input` it reads [x, -x], of which the second half does not count. Its output goes into `out_SWG`.
    """

    def __init__(self, conv: CausalConv, out_SWG: Tensor, R: int, *, signed_input: bool = False) -> None:
        C = conv.in_channels
        taps = conv.weight.permute(2, 3, 1, 0)  # [above and here, left and self, C, G]
        if signed_input:
            taps = F.pad(taps, (0, 0, 0, C))
        self.stride = conv.stride[1]
        self.above, self.here = (row.split(DEPTH) for row in taps.flatten(1, 2).contiguous())
        self.bias = cast(Tensor, conv.bias)
        self.out = _Sums(out_SWG, R)

    def prepare(self, above: _Row, more_RWG: Tensor | None = None) -> None:
        """Start a row, given the row above it (and more that is added)."""
        out = _product(self.bias, above.matrix(self.stride).split(DEPTH, 1), self.above)
        out_RWG = out.view_as(self.out.known_RWG)
        self.out.begin(out_RWG if more_RWG is None else out_RWG.add_(more_RWG))

    def __call__(self, j: int, x: Sequence[Tensor]) -> None:
        """Complete column j, given its left neighbour and itself in parts of DEPTH."""
        out_SG = self.out.slots[j]
        for x_SK, factor_KG in zip(x, self.here, strict=True):
            out_SG.addmm_(x_SK, factor_KG)


class _PositionAttention:
    """`AxialAttention` of the ul stream, a position at a time, with the row's and the columns' keys and values."""

    def __init__(self, attention: AxialAttention, S: int, R: int, H: int, W: int) -> None:
        self.attention = attention
        like, N = attention.out.weight, attention.heads
        F_ = attention.out.out_features
        D = F_ // N
        self.column = like.new_zeros(2, W, R, N, H, D)
        self.column_at = self.column.unbind(1)
        row = like.new_zeros(2, R, N, W, D)
        self.row_at = row.unbind(3)
        self.row_until = [row[:, :, :, : j + 1].unbind(0) for j in range(W)]
        self.qkv_SG, self.both_SG = like.new_zeros(S, 6 * F_), like.new_zeros(S, 2 * F_)
        of_row, of_column = self.qkv_SG[:R].view(R, 2, 3, N, 1, D).unbind(1)
        self.row_query, self.column_query = of_row[:, 0], of_column[:, 0]
        self.row_kv, self.column_kv = (part[:, 1:].squeeze(-2).transpose(0, 1) for part in (of_row, of_column))
        self.both_RG = self.both_SG[:R]
        self.project, self.out = _factor(attention.project), _factor(attention.out)

    def __call__(self, x_SF: Tensor, i: int, j: int) -> None:
        """In place."""
        a, column = self.attention, self.column_at[j]
        torch.addmm(a.project.bias, a.norm(x_SF), self.project, out=self.qkv_SG)
        self.row_at[j].copy_(self.row_kv)
        column[:, :, :, i] = self.column_kv
        from_row = _attend(self.row_query, *self.row_until[j])
        from_column = _attend(self.column_query, *column[:, :, :, : i + 1])
        torch.cat([from_row.flatten(1), from_column.flatten(1)], 1, out=self.both_RG)
        x_SF.add_(torch.addmm(a.out.bias, self.both_SG, self.out)).mul_(math.sqrt(0.5))


class _PositionBlock:
    """A `GatedBlock` of the ul stream and its attention, a position at a time."""

    def __init__(self, block: GatedBlock, attention: nn.Module, S: int, R: int, H: int, W: int) -> None:
        assert block.extra is not None
        self.block = block
        width = block.conv_in.out_channels
        like = block.conv_in.weight
        self.hidden, gated_SWG = _State(S, R, W, width, like), like.new_zeros(S, W, 2 * width)
        self.conv_in = _PositionConv(block.conv_in, self.hidden.values_SWF, R)
        self.conv_out = _PositionConv(block.conv_out, gated_SWG, R)
        self.linear, self.gate = (half.unbind(1) for half in gated_SWG[:R].chunk(2, 2))
        extra = _factor(block.extra)
        self.from_u, self.from_skip = extra[: 2 * width], extra[2 * width :]
        self.condition = _Condition(block, S, R)
        self.attention = _PositionAttention(attention, S, R, H, W) if isinstance(attention, AxialAttention) else None

    def prepare(self, above: _State, u_elu_RWG: Tensor) -> None:
        """Start a row, given this block's input in the row above it and the u stream of the row itself."""
        R, W, G = u_elu_RWG.shape
        self.conv_out.prepare(self.hidden.elu)
        from_u = torch.mm(u_elu_RWG.reshape(R * W, G), self.from_u).view(R, W, -1)
        self.conv_in.prepare(above.elu, from_u.add_(self.condition.sum_RWF))

    def __call__(self, before: _State, after: _State, skip: _State | None, i: int, j: int) -> None:
        """From the state before this block to the state after it, at one position."""
        self.conv_in(j, before.elu.parts[j])
        if skip is not None:
            self.conv_in.out.slots[j].addmm_(skip.elu.slots[j], self.from_skip)
        self.hidden.activate(j)
        self.conv_out(j, self.hidden.elu.parts[j])
        torch.addcmul(before.value[j], self.linear[j], self.gate[j].sigmoid_(), out=after.value[j])
        if self.attention is not None:
            self.attention(after.slots[j], i, j)
        after.activate(j)


class _Level:
    """One resolution: its blocks and states going up and down, and the way to the level below and back."""

    def __init__(self, run: _Run, index: int, up: Iterable[Pair], down: Iterable[Pair], below: _Level | None) -> None:
        network, S, R = run.network, run.S, run.R
        self.H, self.W = run.H >> index, run.W >> index
        width = network.config.model.levels[index].width
        like = network.head.weight

        def blocks(pairs: Iterable[Pair]) -> list[tuple[_RowBlock, _PositionBlock]]:
            return [
                (
                    _RowBlock(pair.u_block, pair.u_attention, S, R, self.H, self.W),
                    _PositionBlock(pair.ul_block, pair.ul_attention, S, R, self.H, self.W),
                )
                for pair in pairs
            ]

        def state() -> _State:
            return _State(S, R, self.W, width, like)

        self.up, self.down = blocks(up), blocks(down)
        self.up_states = [state() for _ in range(len(self.up) + 1)]
        # What the level below emits for an even and for an odd row; the lowest level starts from its own last state.
        last = self.up_states[-1]
        self.grown = (last, last) if below is None else (state(), state())
        self.down_states = [state() for _ in self.down]
        self.u_grown: Tensor | None = None
        self.below = below
        if below is not None:
            shrink = cast(Resample, network.shrink[index])
            self.shrink_u = _RowConv(cast(CausalConv, shrink.u), R, self.W)
            self.shrink_module = cast(CausalConv, shrink.ul)
            self.shrink_ul = _PositionConv(self.shrink_module, below.up_states[0].values_SWF, R, signed_input=True)
            grow = cast(Resample, network.grow[index])
            # u emits two rows of three columns, [F, 6 G].
            u, ul = cast(Grow, grow.u), cast(Grow, grow.ul)
            self.grow_u_weight = u.weight.permute(0, 2, 3, 1).flatten(1).contiguous()
            self.grow_u_bias = cast(Tensor, u.bias)
            # ul emits a 2x2 block: for each of two rows, two columns of [x, -x] side by side, [F, 4 G].
            columns = _signed(ul.weight.permute(2, 0, 3, 1)).flatten(2)
            self.grow_ul = [weight.contiguous() for weight in columns.unbind(0)]
            self.grow_ul_bias = _signed(cast(Tensor, ul.bias)).repeat(2)
        self.up_steps = [
            (block, before, after)
            for (_, block), before, after in zip(self.up, self.up_states, self.up_states[1:], strict=False)
        ]
        """ul blocks going up, each with the states before and after it."""
        skips = reversed(self.up_states[: len(self.down)])
        after = list(zip((block for _, block in self.down), self.down_states, skips, strict=True))
        self.down_steps = [
            [
                (block, before, after, skip)
                for (block, after, skip), before in zip(after, [grown, *self.down_states], strict=False)
            ]
            for grown in self.grown
        ]
        """ul blocks coming down, with the states before and after and the skip, in an even and in an odd row."""


class _Run:
    """The caches of one batch and the walk over them."""

    def __init__(self, network: NCPN, B: int, H: int, W: int) -> None:
        self.network, self.B, self.H, self.W = network, B, H, W
        self.S = _slots(B)
        self.stride = 2 ** (len(network.up) - 1)
        # Row products are padded only where an image's row is not a multiple of SLOT, or not of whole vectors.
        rows = [(W >> index, level.width) for index, level in enumerate(network.config.model.levels)]
        whole = all(columns % SLOT == 0 and columns * width % VECTOR == 0 for columns, width in rows)
        self.R = self.B if whole else self.S
        self.levels: list[_Level] = []
        for index in reversed(range(len(network.up))):
            pairs = cast(Iterable[Pair], network.up[index]), cast(Iterable[Pair], network.down[index])
            self.levels.insert(0, _Level(self, index, *pairs, self.levels[0] if self.levels else None))
        self._begin_stem(network.stem)
        # By component, as `Draw` reads it.
        K = network.config.model.mixtures
        order = torch.cat([part.flatten() for part in by_component(torch.arange(10 * K)[None], K)])
        self.head_weight = network.head.weight[order].t().contiguous()
        self.head_bias = network.head.bias[order].contiguous()
        parameters_SWP = self.head_bias.new_zeros(self.S, W, 10 * K)
        self.parameters = _Sums(parameters_SWP, self.B)
        logit_BWK, rest = parameters_SWP[: self.B].split_with_sizes((K, 9 * K), 2)
        self.logit, self.component = logit_BWK.unbind(1), rest.unflatten(2, (K, 9)).unbind(1)
        self.is_wide = wide(parameters_SWP) is parameters_SWP

    def begin(self, conditions: Conditions, known_BCHW: Tensor, images: Sequence[int] | None = None) -> None:
        """Start a drawing of which these rows are known, none or as many as the largest stride divides.

        images: whose known rows are computed; None stands for all.
        """
        padded = [F.pad(part, (0, self.S - self.B)) for part in (conditions.class_B, conditions.orientation_B)]
        t_S = torch.full((self.S,), conditions.t, device=padded[0].device)
        embedding_SE = _by_slots(self.network.conditioning, t_S, *padded)
        for level in self.levels:
            for block in itertools.chain(*level.up, *level.down):
                block.condition.begin(embedding_SE)
        for buffer in self._row_buffers():
            buffer.zero_()
        self._know(known_BCHW, conditions, range(self.B) if images is None else images)

    def row(self, i: int, x_BCHW: Tensor, choose: Chooser, first_row: int = 0) -> None:
        """Visit row i of x, after those before it; before `first_row` its pixels are known."""
        self._begin_row(i)
        pixels: list[Tensor] = []
        for j in range(self.W):
            elu_SG = self._step(i, j)
            pixels.append(x_BCHW[:, :, i, j] if i < first_row else choose(i, j, *self._head(j, elu_SG)))
            self._put(i, j, pixels[j])
        x_BCHW[:, :, i] = torch.stack(pixels, -1)

    # The stem: u reads the two rows above; ul the row above, and the left column of this row and of the one above.

    def _begin_stem(self, stem: Stem) -> None:
        like = stem.u.weight
        C = CHANNELS + 1
        self.stem_u = _RowConv(stem.u, self.R, self.W)
        self.pixels = [_Pixels(like.new_zeros(self.S, self.W + 2, C), self.B) for _ in range(2)]
        """Of an even and of an odd row."""
        self.stem_above = stem.ul_above.weight.permute(3, 2, 1, 0).reshape(3 * C, -1).contiguous()
        self.stem_left_up, self.stem_left = (w.t().contiguous() for w in stem.ul_left.weight[..., 0].unbind(2))
        self.stem_ul = _Sums(self.levels[0].up_states[0].values_SWF, self.R)

    def _stem_row(self, i: int) -> tuple[Tensor, Tensor]:
        """At row i: u, and what ul gets from above and from the left of that. [R, W, F] each."""
        stem, R = self.network.stem, self.R
        self.pixels[i % 2].ones.fill_(1)
        above = self.pixels[1 - i % 2].data[:R]
        left = above[:, :-2].reshape(R * self.W, -1)
        ul_RWF = torch.addmm(cast(Tensor, stem.ul_left.bias), left, self.stem_left_up).view(R, self.W, -1)
        ul_RWF[:, 0] = 0  # the shift to the right
        if i == 0:
            return torch.zeros_like(ul_RWF), ul_RWF
        windows = above.unfold(1, 3, 1).transpose(2, 3).reshape(R * self.W, -1)
        ul_RWF += torch.addmm(cast(Tensor, stem.ul_above.bias), windows, self.stem_above).view_as(ul_RWF)
        return self.stem_u(above[:, 1:-1]), ul_RWF

    def _put(self, i: int, j: int, x_BC: Tensor) -> None:
        self.pixels[i % 2].colour[j].copy_(self.network.context(x_BC))

    # A row: the u stream, and what it and the row above give to ul.

    def _begin_row(self, i: int) -> None:
        """Compute u for row i and prepare ul."""
        u, ul = self._stem_row(i)
        self._row(0, i, u, _activate(u))
        # Last, since a level without blocks going up shrinks the row above that this overwrites. So does `_row`.
        self.stem_ul.begin(ul)
        self.parameters.begin(self.head_bias)

    def _row(self, index: int, i: int, x: Tensor, elu: Tensor) -> None:
        level, odd = self.levels[index], i % 2
        u_states = [(x, elu)]
        for (u_block, ul_block), before in zip(level.up, level.up_states, strict=False):
            u_states.append(u_block(*u_states[-1], None))
            ul_block.prepare(before, u_states[-1][1])
        x, elu = u_states[-1]
        if level.below is not None:
            if odd:
                level.shrink_u.push(x)
                assert level.u_grown is not None
            else:
                below = level.shrink_u(x)
                self._row(index + 1, i // 2, below, _activate(below))
                level.shrink_ul.prepare(level.up_states[-1].x)
            x = level.u_grown[:, odd]  # type: ignore[index]
            elu = _activate(x)
        skips = list(reversed(u_states))[len(u_states) - len(level.down) :]
        above = [level.grown[1 - odd], *level.down_states]
        for (u_block, ul_block), state, skip in zip(level.down, above, skips, strict=False):
            x, elu = u_block(x, elu, skip[1])
            ul_block.prepare(state, elu)
        if index:
            self._grow_row(self.levels[index - 1], x)

    def _grow_row(self, level: _Level, x_RWF: Tensor) -> None:
        """Both rows that u at one row emits to the level above it: column 2J + k - 1 from J, k = 0, 1, 2."""
        R, W, F_ = x_RWF.shape
        six = (x_RWF.reshape(R * W, F_) @ level.grow_u_weight).view(R, W, 2, 3, -1).transpose(1, 2)
        out = torch.zeros(R, 2, 2 * W, six.shape[-1], dtype=six.dtype, device=six.device)
        out[:, :, 0::2] = six[:, :, :, 1]
        out[:, :, 1::2] = six[:, :, :, 2]
        out[:, :, 1:-1:2] += six[:, :, 1:, 0]
        level.u_grown = out + level.grow_u_bias

    # A position: the ul stream.

    def _step(self, i: int, j: int) -> Tensor:
        """Compute ul at (i, j); returns the last activation, [S, 2 F]."""
        first = self.levels[0].up_states[0]
        self.stem_ul.slots[j].addmm_(self.pixels[i % 2].left[j], self.stem_left)
        first.activate(j)
        return self._position(0, i, j).elu.slots[j]

    def _position(self, index: int, i: int, j: int) -> _State:
        level = self.levels[index]
        for block, before, after in level.up_steps:
            block(before, after, None, i, j)
        if level.below is not None and i % 2 == 0 and j % 2 == 0:
            self._descend(index, i // 2, j // 2)
        last = level.grown[i % 2]
        for block, before, after, skip in level.down_steps[i % 2]:
            block(before, after, skip, i, j)
            last = after
        return last

    def _descend(self, index: int, i: int, j: int) -> None:
        """Shrink to position (i, j) of the level below, walk it, and grow what it emits."""
        level, first = self.levels[index], self.levels[index + 1].up_states[0]
        level.shrink_ul(j, level.up_states[-1].x.parts[2 * j])
        first.activate(j)
        x_SF = self._position(index + 1, i, j).slots[j]
        for state, weight in zip(level.grown, level.grow_ul, strict=True):
            torch.addmm(level.grow_ul_bias, x_SF, weight, out=state.x.pairs[2 * j + 1])
            elu(state.x.pairs[2 * j + 1], out=state.elu.pairs[2 * j + 1])

    def _head(self, j: int, elu_SG: Tensor) -> tuple[Tensor, Tensor]:
        """The mixture's parameters at column j by component: logits [B, K] and [B, K, 9]."""
        self.parameters.slots[j].addmm_(elu_SG, self.head_weight)
        logit_BK, component_BK9 = self.logit[j], self.component[j]
        return (logit_BK, component_BK9) if self.is_wide else (wide(logit_BK), wide(component_BK9))

    # Known rows.

    def _know(self, x_BCHW: Tensor, conditions: Conditions, images: Iterable[int]) -> None:
        """Fill the caches with the known rows of some images by passes of the network."""
        rows = x_BCHW.shape[2]
        for index, level in enumerate(self.levels):
            for u_block, _ in (*level.up, *level.down):
                if u_block.attention is not None:
                    u_block.attention.rows = rows >> index
        if not rows:
            return
        keepers = list(self._keepers())
        # One image at a time: a whole pass chooses its kernels by the size of the batch. And each in memory of its own,
        # which is aligned alike for every image.
        for b in images:
            one = slice(b, b + 1)
            given = conditions.of(one)
            with contextlib.ExitStack() as hooks:  # which are gone even when the pass fails
                for module, keep in keepers:
                    hook = module.register_forward_hook(
                        lambda _, inputs, output, keep=keep: keep(one, inputs[0], output)  # noqa: B023
                    )
                    hooks.callback(hook.remove)
                self.network(x_BCHW[one].clone(), given.t_B, given.class_B, given.orientation_B)
        # The last row of pixels becomes the row above; the stem's u holds the one before it.
        self._set_pixels(self.pixels[(rows - 1) % 2].data[:, 1:-1], x_BCHW[:, :, -1])
        if rows > 1:
            self._set_pixels(self.stem_u.buffer[:, 1:-1, CHANNELS + 1 :], x_BCHW[:, :, -2])

    def _set_pixels(self, row_SWC: Tensor, x_BCW: Tensor) -> None:
        row_SWC[: self.B, :, :CHANNELS] = self.network.context(x_BCW).transpose(1, 2)
        row_SWC[..., CHANNELS] = 1

    def _row_buffers(self) -> Iterator[Tensor]:
        """What a row finds of the row above it, which is nothing when a drawing starts."""
        yield from (self.stem_u.buffer, *(pixels.data for pixels in self.pixels))
        for level in self.levels:
            states = {*level.up_states, *level.grown, *level.down_states}
            for u_block, ul_block in (*level.up, *level.down):
                yield from (u_block.conv_in.buffer, u_block.conv_out.buffer)
                states.add(ul_block.hidden)
            for state in states:
                yield from (state.x.data, state.elu.data)
            if level.below is not None:
                yield level.shrink_u.buffer

    def _keepers(self) -> Iterator[tuple[nn.Module, Keeper]]:
        """Each layer of the network whose input or output a cache holds, and what keeps it."""
        for level in self.levels:
            for blocks, states in ((level.up, level.up_states), (level.down, [level.grown[1], *level.down_states])):
                for (u_block, ul_block), before in zip(blocks, states, strict=False):
                    yield u_block.conv_in.conv, _last_row(u_block.conv_in.current)
                    yield u_block.conv_out.conv, _last_row(u_block.conv_out.current)
                    yield ul_block.block.conv_in, _last_row(before.elu.data[:, 1:])
                    yield ul_block.block.conv_out, _last_row(ul_block.hidden.elu.data[:, 1:])
                    if u_block.attention is not None:
                        by_row = u_block.attention.column.unflatten(1, (self.R, -1))  # [2, R, W, N, H, D]
                        yield u_block.attention.attention.project, _columns(by_row)
                    if ul_block.attention is not None:
                        yield ul_block.attention.attention.project, _columns(ul_block.attention.column.transpose(1, 2))
            if level.below is not None:
                C = level.shrink_u.conv.in_channels
                yield level.shrink_u.conv, _last_row(level.shrink_u.current)
                yield level.shrink_module, _last_row(level.up_states[-1].x.data[:, 1:, :C])


Keeper = Callable[[slice, Tensor, Tensor], None]
"""(images of the batch, a layer's input, its output)."""


def _last_row(row_SWF: Tensor) -> Keeper:
    """Keeps the last row of the input."""

    def keep(images: slice, x_BFHW: Tensor, _: Tensor) -> None:
        row_SWF[images] = x_BFHW[:, :, -1].transpose(1, 2)

    return keep


def _columns(cache_2SWNHD: Tensor) -> Keeper:
    """Keeps the keys and values of column attention from the output of its projection."""

    def keep(images: slice, _: Tensor, qkv_BHWF: Tensor) -> None:
        N, H = cache_2SWNHD.shape[3], qkv_BHWF.shape[1]
        kv = qkv_BHWF.chunk(2, -1)[1].unflatten(-1, (3, N, -1))[:, :, :, 1:]  # [B, H, W, 2, N, D]
        cache_2SWNHD[:, images, :, :, :H] = kv.permute(3, 0, 2, 4, 1, 5)

    return keep
