"""Batch-invariant sampling on every CPU: a seed gives the same bytes in every batch, since its groups are checked.

The check fills a group of each size in `batching.FAST_SIZES` with copies of one image. All of them must equal the image
sampled alone, to the bit: then neither shape nor position changes a result, since fast groups have no other shapes.
The copies are sampled at t > 0 without a tilt, which chooses a cell of a grid and so hides most differences; then, for
a tilt, once more with it.
Where the check fails, or cannot run, batches are sampled in fixed groups, which need no check: every operation on an
image has the same shape, memory layout and position in every batch. (Known rows, gradients and norms are
computed one image at a time in any case.) Where the check passes, both kinds of groups give the same bytes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ncml.errors import ModelError
from ncml.network.mixture import PixelDraws
from ncml.network.ncpn import NCPN
from ncml.network.sde import end_time
from ncml.runtime import first_line
from ncml.sampling.batching import Batching, BatchingSetting, Group, fast_sizes
from ncml.sampling.cached import RowSampler
from ncml.sampling.conditions import NO_TILT, Conditions, OnRow, Tilt

log = logging.getLogger(__name__)

LIMIT_S = 60.0
"""Seconds after which the check is given up. It takes about one for the bundled model on one core, two with a tilt."""


@dataclass(frozen=True)
class GroupedSampler:
    """A `ncml.sampling.sample.Sampler` that samples a batch group by group."""

    groups: Sequence[Group]

    def __call__(self, network: NCPN, x_BCHW: Tensor, conditions: Conditions, draws: PixelDraws, on_row: OnRow) -> None:
        """Sample the unknown pixels of x, in place; `on_row` gets the mean of the groups' rows."""
        sampler, size, first_row = None, None, conditions.first_row
        for index, group in enumerate(self.groups):
            members = [member for member in group if member is not None]
            rows = [row for row, member in enumerate(group) if member is not None]
            padded_G = torch.tensor([members[0] if member is None else member for member in group])
            member_N, row_N = padded_G[rows], torch.tensor(rows)
            x_GCHW, group_conditions = x_BCHW[padded_G], conditions.select(padded_G)
            if sampler is None or size != len(group):
                size, sampler = len(group), RowSampler(network, x_GCHW, group_conditions)
            sampler.reset(x_GCHW, group_conditions, draws.select(padded_G), images=rows)
            for i in sampler.rows:
                sampler.sample_row(i)
                if i < first_row:
                    continue
                x_BCHW[member_N, :, i] = sampler.x_BCHW[row_N, :, i]
                rows_done = index * (x_BCHW.shape[2] - first_row) + i + 1 - first_row
                if on_row(first_row + rows_done // len(self.groups)):
                    return


def choose_batching(
    network: NCPN, setting: BatchingSetting = "auto", tilt: Tilt = NO_TILT, *, untilted_passed: bool = False
) -> Batching:
    """Choose how to sample batches on this CPU with the current number of threads: in fast groups if they pass.

    untilted_passed: the check without a tilt has passed already, and is not repeated.
    """
    if setting != "auto":
        return Batching(setting, "skipped", f"the setting requires {setting} groups.")
    start = time.perf_counter()
    try:
        failure = None if untilted_passed else check_fast_groups(network)
        if failure is None and tilt != NO_TILT:
            failure = check_fast_groups(network, tilt)
    except Exception as error:  # of any kind: fixed groups are safe, and sampling reports the error itself
        batching = Batching("fixed", "error", f"the check of fast groups did not run: {first_line(error)}")
        log.warning("batches are sampled in fixed groups: %s", batching.detail)
        return batching
    seconds = time.perf_counter() - start
    if failure is None:
        batching = Batching("fast", "passed", "an image has the same bytes in every fast group, at every position.")
    else:
        batching = Batching("fixed", "failed", failure)
    log.info("batches are sampled in %s groups: %s (%.1f s)", batching.groups, batching.detail, seconds)
    return batching


@torch.inference_mode()
def check_fast_groups(network: NCPN, tilt: Tilt = NO_TILT) -> str | None:
    """Compare copies of one image in every size of fast group with the image in the smallest; return the difference.

    For each canvas size of the model, sample as many rows as every level needs to have a row above.
    """
    model = network.config.model
    canvases = {(model.height, model.width)}
    if model.orientations:
        canvases.add((model.width, model.height))
    deadline = time.monotonic() + LIMIT_S
    smallest, *sizes = fast_sizes(tilt.rows_per_image)
    for H, W in sorted(canvases):
        alone_CHW = _sample_copies(network, smallest, H, W, tilt, deadline)[0]
        if not alone_CHW.isfinite().all():
            raise ModelError("the model's samples are not finite.")
        for size in sizes:
            differs_G = (_sample_copies(network, size, H, W, tilt, deadline) != alone_CHW).flatten(1).any(1)
            if count := int(differs_G.sum()):
                return f"an image differs from the same image alone at {count} of {size} positions of a group."
    return None


def _sample_copies(network: NCPN, size: int, H: int, W: int, tilt: Tilt, deadline: float) -> Tensor:
    """Sample the first rows of `size` copies of one image, [size, 3, H, W]; raise `TimeoutError` past the deadline."""
    weight, K = network.head.weight, network.config.model.mixtures
    rows = min(network.config.model.stride + 1, H)
    parts_PHW = torch.randn(K + 6, H, W, generator=torch.Generator().manual_seed(0)).to(weight)
    draws = PixelDraws(*(part.expand(size, -1, -1, -1) for part in parts_PHW.split([K, 3, 3])))
    x_BCHW = torch.zeros(size, 3, H, W, dtype=weight.dtype).contiguous(memory_format=torch.channels_last)
    index_B = torch.zeros(size, dtype=torch.long)
    conditions = Conditions(end_time(network.config.sde), index_B, index_B, tilt)

    def on_row(row: int) -> bool:
        if time.monotonic() > deadline:
            raise TimeoutError(f"it takes longer than {LIMIT_S:g} s.")
        return row == rows

    GroupedSampler([range(size)])(network, x_BCHW, conditions, draws, on_row)
    return x_BCHW
