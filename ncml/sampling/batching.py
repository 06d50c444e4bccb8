"""How a batch is divided into the groups that are sampled together, and the setting for it. Does not import torch.

A library may choose its kernels by the shape of an operation, and a kernel may round a row by its position. So the
bytes of an image depend on the shapes that it is sampled in and on its row, and on nothing else of its batch:

    fast groups     the sizes in SIZES and no others, all of which `batch_invariance` checks at every position
    fixed groups    always FIXED images, an image always at row seed % FIXED: the same shape and row in every batch
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from ncml.errors import InputError

BatchingSetting = Literal["auto", "fast", "fixed"]
"""auto: fast groups where they pass the check, else fixed ones. fast and fixed: these, without a check."""

VARIABLE = "NCML_BATCHING"

SIZES = (1, 4, 8, 16, 32, 64)
"""Images in a fast group. A batch is padded to the next size, and divided where it exceeds the largest."""

FIXED = 8
"""Images in a fixed group, of which any may be absent."""

Group = Sequence[int | None]
"""The member of the batch at each row, by index; None where the row is padding."""


@dataclass(frozen=True)
class Batching:
    """How a model's batches are sampled, and why."""

    groups: Literal["fast", "fixed"]
    check: Literal["passed", "failed", "error", "skipped"]
    """Of the fast groups; error: it could not run."""
    detail: str
    """The reason, in one sentence."""

    def divide(self, seeds: Sequence[int]) -> list[Group]:
        """Divide a batch, given the seed of each image."""
        return fast_groups(len(seeds)) if self.groups == "fast" else fixed_groups(seeds)


def fast_groups(count: int) -> list[Group]:
    """As few groups as possible, padded at their end."""
    groups: list[Group] = []
    for start in range(0, count, SIZES[-1]):
        members = range(start, min(start + SIZES[-1], count))
        size = next(size for size in SIZES if size >= len(members))
        groups.append([*members, *[None] * (size - len(members))])
    return groups


def fixed_groups(seeds: Sequence[int]) -> list[Group]:
    """Every image at row seed % FIXED; images that share a row go to different groups."""
    groups: list[list[int | None]] = []
    for member, seed in enumerate(seeds):
        row = seed % FIXED
        group = next((group for group in groups if group[row] is None), None)
        if group is None:
            groups.append(group := FIXED * [cast(int | None, None)])
        group[row] = member
    return [*groups]


def batching_setting(value: str | None = None) -> BatchingSetting:
    """Return this setting, by default that of NCML_BATCHING, else auto; `InputError` for any other value."""
    name = VARIABLE if value is None else "batching"
    text = os.environ.get(VARIABLE) or "auto" if value is None else value
    for setting in get_args(BatchingSetting):
        if text == setting:
            return setting
    raise InputError(name, f"{name} must be auto, fast or fixed, not {text!r}.")
