"""Known rows: fill the caches by passes of the network, with hooks on its layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor, nn

from ncml.sampling.cached.levels import LevelCache
from ncml.sampling.cached.network_cache import NetworkCache
from ncml.sampling.conditions import Conditions

CacheWriter = Callable[[slice, Tensor, Tensor], None]
"""Writes to a cache; (images of the batch, a layer's input, its output)."""


def prefill(cache: NetworkCache, x_BCHW: Tensor, conditions: Conditions, groups: Iterable[Sequence[int]]) -> None:
    """Add known rows to a cache that was reset, none or as many as `cache.stride` divides.

    groups: the positions of the images of each pass, ascending (`ncml.sampling.batching.passes`). Those between them
    are computed, too; the caches of all others stay empty.
    """
    rows = x_BCHW.shape[2]
    if not rows:
        return
    for index, level in enumerate(cache.levels):
        for u_block, _ in (*level.up, *level.down):
            if u_block.attention is not None:
                u_block.attention.row_count = rows >> index
    writers = [writer for level in cache.levels for writer in _cache_writers(level)]
    for group in groups:
        part = slice(group[0], group[-1] + 1)
        x_GCHW = x_BCHW[part].clone()  # so that the memory of every image has the same alignment
        group_conditions = conditions.select(part)
        with contextlib.ExitStack() as hooks:  # which are removed even when the pass fails
            for module, write in writers:
                hook = module.register_forward_hook(
                    lambda _, inputs, output, write=write: write(part, inputs[0], output)  # noqa: B023
                )
                hooks.callback(hook.remove)
            cache.network(x_GCHW, group_conditions.t_B, group_conditions.class_B, group_conditions.orientation_B)
    cache.stem.prefill(x_BCHW)


def _cache_writers(level: LevelCache) -> Iterator[tuple[nn.Module, CacheWriter]]:
    """Yield each layer of the network whose input or output a cache holds, and what writes it to the cache."""
    R = level.shape.R
    for blocks, states in ((level.up, level.up_states), (level.down, [level.grown[1], *level.down_states])):
        for (u_block, ul_block), before in zip(blocks, states, strict=False):
            yield u_block.conv_in.conv, _write_last_row(u_block.conv_in.current)
            yield u_block.conv_out.conv, _write_last_row(u_block.conv_out.current)
            yield ul_block.block.conv_in, _write_last_row(before.elu.data[:, 1:])
            yield ul_block.block.conv_out, _write_last_row(ul_block.hidden.elu.data[:, 1:])
            if u_block.attention is not None:
                by_row = u_block.attention.column_kv.unflatten(1, (R, -1))  # [2, R, W, N, H, D]
                yield u_block.attention.attention.project, _write_columns(by_row)
            if ul_block.attention is not None:
                yield ul_block.attention.attention.project, _write_columns(ul_block.attention.column_kv.transpose(1, 2))
    if level.below is not None:
        resample = level.resample
        C = resample.shrink_u.conv.in_channels
        yield resample.shrink_u.conv, _write_last_row(resample.shrink_u.current)
        yield resample.shrink_module, _write_last_row(level.up_states[-1].x.data[:, 1:, :C])


def _write_last_row(row_SWF: Tensor) -> CacheWriter:
    """Return a writer of the last row of a layer's input."""

    def write(images: slice, x_BFHW: Tensor, _: Tensor) -> None:
        row_SWF[images] = x_BFHW[:, :, -1].transpose(1, 2)

    return write


def _write_columns(cache_2RWNHD: Tensor) -> CacheWriter:
    """Return a writer of the keys and values of column attention, from the output of its projection."""

    def write(images: slice, _: Tensor, qkv_BHWF: Tensor) -> None:
        N, H = cache_2RWNHD.shape[3], qkv_BHWF.shape[1]
        kv = qkv_BHWF.chunk(2, -1)[1].unflatten(-1, (3, N, -1))[:, :, :, 1:]  # [B, H, W, 2, N, D]
        cache_2RWNHD[:, images, :, :, :H] = kv.permute(3, 0, 2, 4, 1, 5)

    return write
