"""The names of the measurements from which `ncml.ood.statistics` are computed. Does not import torch.

A column is the values of one measurement for N images, named by its kind and noise level in grey levels, as in
`bits_2.5`; `codec`, the size of the image as a lossless WebP file, has no level. `ncml.ood.measurements` measures them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ncml.network.sde import largest_noise, make_sde, reaches
from ncml.ood.conformal import Floats

if TYPE_CHECKING:
    from ncml.config import Config

LEVEL_FRACTIONS = (0.0, 0.25, 1.0)
"""The noise levels of the measurements, as fractions of the model's largest."""

NEIGHBOURS = {"right": (0, 1), "below": (1, 0), "falling": (1, 1), "rising": (-1, 1)}
"""Offsets in rows and columns from a pixel to the neighbour that it is correlated with."""

CHANNELS = ("red", "green", "blue")
CORRELATION_KINDS = (
    *(f"corr_{neighbour}_{channel}" for neighbour in NEIGHBOURS for channel in CHANNELS),
    "corr_red_green",
    "corr_green_blue",
    "corr_red_blue",
)

Columns = Mapping[str, Floats]
"""Measurements of N images by column name, [N] each."""


def noise_levels(config: Config, fractions: Iterable[float] = LEVEL_FRACTIONS) -> tuple[float, ...]:
    """Return fractions of a model's largest noise, as far as its SDE reaches them, in grey levels.

    Only 0 for a model that was trained on clean data only. By default the levels of its statistics.
    """
    if not config.is_noise_conditional:
        return (0.0,)
    sde, largest = make_sde(config.sde), largest_noise(config.sde)
    levels = (min(largest, float(f"{fraction * largest:.6g}")) for fraction in fractions)
    return tuple(level for level in levels if reaches(sde, level))


def column_name(kind: str, level: float) -> str:
    """Return the name of a measurement at a noise level."""
    return f"{kind}_{level:g}"
