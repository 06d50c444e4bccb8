"""The division of a batch into groups that are sampled together, and the setting for it. Does not import torch.

A library may choose its kernels by the shape of an operation, and a kernel may round a row by its position. So the
bytes of an image depend on the shapes that it is sampled in and on its row, and on nothing else of its batch:

    fast groups     of FAST_SIZES rows only, all of which `batch_invariance` checks at every position
    fixed groups    of FIXED_SIZE rows, the position of an image depending on its seed: one shape and row in every batch

An image takes one row; with guidance it takes two, and a group holds half as many images (`conditions.Tilt`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from ncml.errors import InputError

BatchingSetting = Literal["auto", "fast", "fixed"]
"""auto: fast groups where they pass the check, else fixed ones. fast and fixed: that kind, without a check."""

ENVIRONMENT_VARIABLE = "NCML_BATCHING"

FAST_SIZES = (1, 4, 8, 16, 32, 64)
"""Rows of a fast group. A batch is padded to the next size, and divided where it exceeds the largest."""

FIXED_SIZE = 8
"""Rows of a fixed group, of which any may be absent."""

Group = Sequence[int | None]
"""The member of the batch at each position, by index; None where the position is padding."""


@dataclass(frozen=True)
class Batching:
    """How a model's batches are sampled, and why."""

    groups: Literal["fast", "fixed"]
    check: Literal["passed", "failed", "error", "skipped"]
    """Outcome for the fast groups; error: the check could not run."""
    detail: str
    """The reason, in one sentence."""

    def divide(self, seeds: Sequence[int], rows_per_image: int = 1) -> list[Group]:
        """Divide a batch, given the seed of each member."""
        if self.groups == "fast":
            return fast_groups(len(seeds), rows_per_image)
        return fixed_groups(seeds, rows_per_image)


def fast_sizes(rows_per_image: int = 1) -> list[int]:
    """Return the numbers of images that a fast group may hold, ascending."""
    return [rows // rows_per_image for rows in FAST_SIZES if rows >= rows_per_image]


def padded_size(count: int, rows_per_image: int = 1) -> int:
    """Return the size that a batch is padded to: the next fast size, or the next multiple of the largest."""
    sizes = fast_sizes(rows_per_image)
    return next((size for size in sizes if size >= count), -(-count // sizes[-1]) * sizes[-1])


def fast_groups(count: int, rows_per_image: int = 1) -> list[Group]:
    """Divide a batch into as few groups as possible, padded at their end."""
    largest, groups = fast_sizes(rows_per_image)[-1], list[Group]()
    for start in range(0, count, largest):
        part = range(start, min(start + largest, count))
        groups.append([*part, *[None] * (padded_size(len(part), rows_per_image) - len(part))])
    return groups


def fixed_groups(seeds: Sequence[int], rows_per_image: int = 1) -> list[Group]:
    """Place every member of a batch at a position given by its seed; those that share one go to different groups."""
    size, groups = FIXED_SIZE // rows_per_image, list[list[int | None]]()
    for member, seed in enumerate(seeds):
        position = seed % size
        group = next((group for group in groups if group[position] is None), None)
        if group is None:
            groups.append(group := size * [cast(int | None, None)])
        group[position] = member
    return [*groups]


def passes(images: Sequence[int], device_type: str) -> list[Sequence[int]]:
    """Divide the images that a whole network is applied to, by index, into its passes: on a CPU one for each image.

    There the size of a batch decides which kernels compute it, and so the last bits of an image.
    """
    if device_type == "cpu":
        return [[b] for b in images]
    return [images] if images else []


def batching_setting(value: str | None = None) -> BatchingSetting:
    """Return a valid setting: `value`, by default NCML_BATCHING, else auto; raise `InputError` for any other."""
    name = ENVIRONMENT_VARIABLE if value is None else "batching"
    text = os.environ.get(ENVIRONMENT_VARIABLE) or "auto" if value is None else value
    for setting in get_args(BatchingSetting):
        if text == setting:
            return setting
    raise InputError(name, f"{name} must be auto, fast or fixed, not {text!r}.")
