"""How a batch is divided into the groups that are sampled together, and the setting for it. Does not import torch.

A library may choose its kernels by the shape of an operation, and a kernel may round a row by its position. So the
bytes of an image depend on the shapes that it is sampled in and on its row, and on nothing else of its batch:

    fast groups     of the sizes FAST_SIZES only, all of which `batch_invariance` checks at every position
    fixed groups    of FIXED_SIZE images, an image always at row seed % FIXED_SIZE: one shape and row in every batch
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
"""Images in a fast group. A batch is padded to the next size, and divided where it exceeds the largest."""

FIXED_SIZE = 8
"""Images in a fixed group, of which any may be absent."""

Group = Sequence[int | None]
"""The member of the batch at each row, by index; None where the row is padding."""


@dataclass(frozen=True)
class Batching:
    """How a model's batches are sampled, and why."""

    groups: Literal["fast", "fixed"]
    check: Literal["passed", "failed", "error", "skipped"]
    """Outcome for the fast groups; error: the check could not run."""
    detail: str
    """The reason, in one sentence."""

    def divide(self, seeds: Sequence[int]) -> list[Group]:
        """Divide a batch, given the seed of each image."""
        return fast_groups(len(seeds)) if self.groups == "fast" else fixed_groups(seeds)


def fast_groups(count: int) -> list[Group]:
    """Divide a batch into as few groups as possible, padded at their end."""
    groups: list[Group] = []
    for start in range(0, count, FAST_SIZES[-1]):
        members = range(start, min(start + FAST_SIZES[-1], count))
        size = next(size for size in FAST_SIZES if size >= len(members))
        groups.append([*members, *[None] * (size - len(members))])
    return groups


def fixed_groups(seeds: Sequence[int]) -> list[Group]:
    """Place every image at row seed % FIXED_SIZE; images that share a row go to different groups."""
    groups: list[list[int | None]] = []
    for member, seed in enumerate(seeds):
        row = seed % FIXED_SIZE
        group = next((group for group in groups if group[row] is None), None)
        if group is None:
            groups.append(group := FIXED_SIZE * [cast(int | None, None)])
        group[row] = member
    return [*groups]


def batching_setting(value: str | None = None) -> BatchingSetting:
    """Return a valid setting: `value`, by default NCML_BATCHING, else auto; raise `InputError` for any other."""
    name = ENVIRONMENT_VARIABLE if value is None else "batching"
    text = os.environ.get(ENVIRONMENT_VARIABLE) or "auto" if value is None else value
    for setting in get_args(BatchingSetting):
        if text == setting:
            return setting
    raise InputError(name, f"{name} must be auto, fast or fixed, not {text!r}.")
