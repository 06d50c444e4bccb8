"""The caches of the whole network for one batch at a time: `reset` starts a batch, `advance` computes its next row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ncml.network.ncpn import NCPN
from ncml.sampling.cached.buffers import BatchShape
from ncml.sampling.cached.levels import LevelCache
from ncml.sampling.cached.products import activate, apply_by_slots
from ncml.sampling.cached.stem_and_head import HeadCache, StemCache
from ncml.sampling.conditions import Conditions

PixelChooser = Callable[[int, int, Tensor, Tensor], Tensor]
"""(row, column, logits [B, K], components [B, K, 9] as `PixelSampler` reads them) -> the pixels there, [B, 3].

The tensors may be overwritten in the next row.
"""


class NetworkCache:
    """The caches for batches of one shape, in memory that is allocated once."""

    def __init__(self, network: NCPN, B: int, H: int, W: int) -> None:
        self.network = network
        self.shape = BatchShape.plan(network, B, H, W)
        self.stride = network.config.model.stride
        """Rows whose index it divides reach every level."""
        self.levels: list[LevelCache] = []
        for index in reversed(range(len(network.up))):
            below = self.levels[0] if self.levels else None
            self.levels.insert(0, LevelCache(network, index, self.shape.at_level(index), below))
        self.stem = StemCache(network, self.shape, self.levels[0].up_states[0])
        self.head = HeadCache(network, self.shape)

    def reset(self, conditions: Conditions) -> None:
        """Start a batch of which no row is known; `prefill` adds known rows."""
        padding = (0, self.shape.S - self.shape.B)
        class_S, orientation_S = (F.pad(part, padding) for part in (conditions.class_B, conditions.orientation_B))
        t_S = torch.full((self.shape.S,), conditions.t, device=class_S.device)
        embedding_SE = apply_by_slots(self.network.conditioning, t_S, class_S, orientation_S)
        for level in self.levels:
            level.reset(embedding_SE)
        self.stem.reset(self.network.reach(torch.tensor(conditions.t)))

    def advance(self, i: int, x_BCHW: Tensor, choose_pixels: PixelChooser, first_row: int = 0) -> None:
        """Compute row i of x, in place, after those before it; before `first_row` its pixels are known."""
        self._prepare_row(i)
        pixels: list[Tensor] = []
        for j in range(self.shape.W):
            elu_SG = self._step(i, j)
            x_BC = x_BCHW[:, :, i, j] if i < first_row else choose_pixels(i, j, *self.head.step(j, elu_SG))
            self.stem.set_pixels(i, j, x_BC)
            pixels.append(x_BC)
        x_BCHW[:, :, i] = torch.stack(pixels, -1)

    def _prepare_row(self, i: int) -> None:
        """Compute u for row i and prepare ul."""
        u, ul = self.stem.advance(i)
        self.levels[0].advance(i, u, activate(u))
        # Last, since a level without blocks going up shrinks the row above that this overwrites.
        self.stem.ul.reset(ul)
        self.head.prepare()

    def _step(self, i: int, j: int) -> Tensor:
        """Compute ul at (i, j); return the last activation, [S, 2 F]."""
        first = self.levels[0].up_states[0]
        self.stem.step(i, j)
        first.activate(j)
        return self.levels[0].step(i, j).elu.padded_positions[j]
