"""One resolution of the network: its blocks going up and down, and the resampling to the level below and back.

The level below emits 2x2 blocks of ul: an even row's positions wait in `grown[0]`, an odd row's in `grown[1]`. On the
way down, row i starts from `grown[i % 2]` and has `grown[1 - i % 2]`, not yet overwritten, as the row above. (At the
lowest level both are the last state going up.) A shrinking convolution reads an even row and the odd one above it,
which u keeps by `advance`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ncml.network.layers import CausalConv, Grow
from ncml.network.ncpn import NCPN, Pair, Resample
from ncml.sampling.cached.buffers import BatchShape, ULState
from ncml.sampling.cached.products import activate, elu, with_negative
from ncml.sampling.cached.u_stream import RowBlock, RowConv
from ncml.sampling.cached.ul_stream import PositionBlock, PositionConv

Blocks = list[tuple[RowBlock, PositionBlock]]
"""The u block and the ul block at each depth."""


class BlockStep(NamedTuple):
    """A ul block between the states that it reads and writes."""

    block: PositionBlock
    before: ULState
    after: ULState
    skip: ULState | None


def _chain(
    blocks: Blocks, first: ULState, states: Sequence[ULState], skips: Sequence[ULState | None]
) -> list[BlockStep]:
    """Return the steps of ul blocks, each of which reads the state that the one before it writes, or `first`."""
    befores = [first, *states][: len(blocks)]
    ul_blocks = [ul_block for _, ul_block in blocks]
    return [BlockStep(*step) for step in zip(ul_blocks, befores, states, skips, strict=True)]


class LevelCache:
    """The blocks and states of a level, which reads and writes the level below."""

    def __init__(self, network: NCPN, index: int, shape: BatchShape, below: LevelCache | None) -> None:
        """`shape` is the batch's at this level."""
        width = network.config.model.levels[index].width
        like = network.head.weight

        def make_blocks(pairs: Iterable[Pair]) -> Blocks:
            return [
                (
                    RowBlock(pair.u_block, pair.u_attention, shape),
                    PositionBlock(pair.ul_block, pair.ul_attention, shape),
                )
                for pair in pairs
            ]

        def make_state() -> ULState:
            return ULState(shape, width, like)

        self.shape = shape
        self.up = make_blocks(cast(Iterable[Pair], network.up[index]))
        self.down = make_blocks(cast(Iterable[Pair], network.down[index]))
        self.up_states = [make_state() for _ in range(len(self.up) + 1)]
        # What the level below emits for an even and for an odd row; the lowest level starts from its own last state.
        last = self.up_states[-1]
        self.grown = (last, last) if below is None else (make_state(), make_state())
        self.down_states = [make_state() for _ in self.down]
        self.below = below
        if below is not None:
            self.resample = LevelResample(network, index, shape, below)
        no_skips = [None] * len(self.up)
        self.up_steps = _chain(self.up, self.up_states[0], self.up_states[1:], no_skips)
        skips = list(reversed(self.up_states[: len(self.down)]))
        self.down_steps = [_chain(self.down, grown, self.down_states, skips) for grown in self.grown]
        """Those of an even and of an odd row."""

    def reset(self, embedding_SE: Tensor) -> None:
        """Start a new batch, given its conditioning vectors."""
        for u_block, ul_block in (*self.up, *self.down):
            u_block.reset(embedding_SE)
            ul_block.condition.reset(embedding_SE)
        for buffer in self._row_buffers():
            buffer.zero_()

    def advance(self, i: int, x: Tensor, x_elu: Tensor) -> Tensor:
        """Compute u for row i, here and below, and prepare ul. Return the last u of the row."""
        odd = i % 2
        u_states = [(x, x_elu)]
        for (u_block, ul_block), before in zip(self.up, self.up_states, strict=False):
            u_states.append(u_block(*u_states[-1], None))
            ul_block.prepare(before, u_states[-1][1])
        x, x_elu = u_states[-1]
        if self.below is not None:
            if odd:
                self.resample.shrink_u.advance(x)
            else:
                below = self.resample.shrink_u(x)
                self.resample.grow_row(self.below.advance(i // 2, below, activate(below)))
                self.resample.shrink_ul.prepare(self.up_states[-1].x)
            x = self.resample.grown_u(odd)
            x_elu = activate(x)
        skips = list(reversed(u_states))[len(u_states) - len(self.down) :]
        above = [self.grown[1 - odd], *self.down_states]
        for (u_block, ul_block), state, skip in zip(self.down, above, skips, strict=False):
            x, x_elu = u_block(x, x_elu, skip[1])
            ul_block.prepare(state, x_elu)
        return x

    def step(self, i: int, j: int) -> ULState:
        """Compute ul at (i, j), here and below, from its first state; return the last state."""
        for block, before, after, skip in self.up_steps:
            block.step(before, after, skip, i, j)
        if self.below is not None and i % 2 == 0 and j % 2 == 0:
            self._descend(self.below, i // 2, j // 2)
        last = self.grown[i % 2]
        for block, before, after, skip in self.down_steps[i % 2]:
            block.step(before, after, skip, i, j)
            last = after
        return last

    def _descend(self, below: LevelCache, i: int, j: int) -> None:
        """Shrink to position (i, j) of the level below, compute it, and grow what it emits."""
        first = below.up_states[0]
        self.resample.shrink_ul.step(j, self.up_states[-1].x.pair_parts[2 * j])
        first.activate(j)
        self.resample.grow_position(below.step(i, j).padded_values[j], self.grown, j)

    def _row_buffers(self) -> Iterator[Tensor]:
        """Yield the buffers that hold the row above."""
        states = {*self.up_states, *self.grown, *self.down_states}
        for u_block, ul_block in (*self.up, *self.down):
            yield from u_block.row_buffers()
            states.add(ul_block.hidden)
        for state in states:
            yield from (state.x.data, state.elu.data)
        if self.below is not None:
            yield self.resample.shrink_u.buffer


class LevelResample:
    """Resampling from a level to the one below (`shrink_u`, `shrink_ul`) and back (`grow_row`, `grow_position`)."""

    def __init__(self, network: NCPN, index: int, shape: BatchShape, below: LevelCache) -> None:
        shrink = cast(Resample, network.shrink[index])
        self.shrink_u = RowConv(cast(CausalConv, shrink.u), shape)
        self.shrink_module = cast(CausalConv, shrink.ul)
        self.shrink_ul = PositionConv(self.shrink_module, below.up_states[0].values_SWF, shape.R, signed_input=True)
        grow = cast(Resample, network.grow[index])
        # u emits two rows of three columns, [F, 6 G].
        u, ul = cast(Grow, grow.u), cast(Grow, grow.ul)
        self.grow_u_weight = u.weight.permute(0, 2, 3, 1).flatten(1).contiguous()
        self.grow_u_bias = cast(Tensor, u.bias)
        # ul emits a 2x2 block: for each of two rows, two columns of [x, -x] side by side, [F, 4 G].
        columns = with_negative(ul.weight.permute(2, 0, 3, 1)).flatten(2)
        self.grow_ul_weights = [weight.contiguous() for weight in columns.unbind(0)]
        self.grow_ul_bias = with_negative(cast(Tensor, ul.bias)).repeat(2)
        self._grown_u: Tensor | None = None

    def grow_row(self, x_RWF: Tensor) -> None:
        """Keep both rows that u at one row of the level below emits: column 2J + k - 1 from J, k = 0, 1, 2."""
        R, W, width = x_RWF.shape
        six = (x_RWF.reshape(R * W, width) @ self.grow_u_weight).view(R, W, 2, 3, -1).transpose(1, 2)
        out = torch.zeros(R, 2, 2 * W, six.shape[-1], dtype=six.dtype, device=six.device)
        out[:, :, 0::2] = six[:, :, :, 1]
        out[:, :, 1::2] = six[:, :, :, 2]
        out[:, :, 1:-1:2] += six[:, :, 1:, 0]
        self._grown_u = out + self.grow_u_bias

    def grown_u(self, odd: int) -> Tensor:
        """Return the even or the odd row that the level below emitted."""
        assert self._grown_u is not None
        return self._grown_u[:, odd]

    def grow_position(self, x_SF: Tensor, grown: tuple[ULState, ULState], j: int) -> None:
        """Write the 2x2 block that ul at column j of the level below emits, and its activation."""
        for state, weight in zip(grown, self.grow_ul_weights, strict=True):
            torch.addmm(self.grow_ul_bias, x_SF, weight, out=state.x.pairs[2 * j + 1])
            elu(state.x.pairs[2 * j + 1], out=state.elu.pairs[2 * j + 1])
