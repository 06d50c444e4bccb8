"""Limits and choices that the library, the command line, the queue and the service share. Does not import torch."""

from __future__ import annotations

import operator
import secrets
from typing import Literal, SupportsFloat, SupportsIndex

from ncml.errors import InputError

MAX_SEED = 2**32 - 1
"""The largest seed: PyTorch's generator on CPUs uses 32 bits of a seed, so larger ones would repeat its numbers."""

MAX_STEPS = 1000
"""Maximum number of refinement steps."""

MAX_HEADER_BYTES = 4 * 2**20
"""Maximum size of the header of a weights file: names and shapes of some 30,000 tensors."""

MAX_IMAGES_PER_CALL = 1024
"""Maximum images that one call of the library samples: they are sampled together, at some megabytes each."""

MAX_IMAGES_PER_REQUEST = 64
"""Maximum images that one request may send or request; a worker with a smaller batch works in chunks."""

MAX_JUDGED_IMAGES = 4
"""Maximum images that one request may have judged by a detector at their own sizes, which takes some tenths of a second
each: the lane of quick scores is busy with one job for about three seconds at most."""
MAX_SHEET_BYTES = 512 * 2**10
"""Bytes of the pictures of what a detector finds and misses, which workers publish."""

MAX_JUDGED_PIXELS = 2**25
"""Maximum pixels of several such images together, for the same reason."""

MIN_TUNING_IMAGES = 16
"""Minimum images that `ncml tune` generates with each candidate, and of the data that it compares them with."""

MIN_ESTIMATION_IMAGES = 20
"""Minimum number of images from which a mean and covariance are estimated."""

Keep = Literal["top", "bottom", "left", "right"]
"""The known half of an image that is completed."""

KEEPS: tuple[Keep, ...] = ("top", "bottom", "left", "right")

DETECTOR = "detector"
"""The name of a detector's calibration; requests that name none use it."""

View = Literal["worst_tile", "peak", "mean"]
"""A view of a large image in tiles (`ncml.ood.tile_views`)."""

VIEWS: tuple[View, ...] = ("worst_tile", "mean", "peak")
"""The views in the order in which a calibration adds them; each additional one needs more ranking images."""


def check_count(field: str, value: SupportsIndex, maximum: int | None = None) -> int:
    """Return a positive integer (NumPy's included) as Python's; raise `InputError` for anything else."""
    try:
        count = operator.index(value)
    except TypeError as error:
        raise InputError(field, f"{field} must be an integer, not {value!r}.") from error
    if count < 1 or (maximum is not None and count > maximum):
        bounds = "at least 1" if maximum is None else f"1 to {maximum}"
        raise InputError(field, f"{field} must be {bounds}, not {count}.")
    return count


def check_number(field: str, value: SupportsFloat) -> float:
    """Return a number (NumPy's included) as Python's; raise `InputError` for anything else."""
    if not isinstance(value, SupportsFloat):
        raise InputError(field, f"{field} must be a number, not {value!r}.")
    return float(value)


def random_seed(n: int) -> int:
    """Return a random seed from which n consecutive seeds are in range."""
    return secrets.randbelow(max(1, MAX_SEED - n + 2))
