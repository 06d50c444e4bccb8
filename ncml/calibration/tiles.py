"""Calibration of a model's tiles on whole good pictures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ncml.images.tiling import Cut
from ncml.model import Model
from ncml.ood import conformal
from ncml.ood.statistics import Columns, Gaussian
from ncml.ood.tiles import Picture, TileCalibration, measured, scan
from ncml.progress import Bar

FIT_TILES = 4000
"""Tiles that fit the Gaussian, at most: taken evenly from the pictures that fit it."""


def calibrate(
    model: Model,
    fit_pictures: list[Callable[[], Picture]],
    rank_pictures: list[Callable[[], Picture]],
    *,
    side: int | None = None,
    false_positive_rate: float = 0.05,
    batch_size: int = 32,
    bar: Bar = lambda stage, done, total, note="": None,
) -> TileCalibration:
    """Calibrate tiles on whole good pictures, each opened when its turn comes: one list fits, the other ranks.

    Raises `InputError` for fewer pictures than the false-positive rate needs, or fewer tiles than the Gaussian needs.
    """
    conformal.threshold(np.zeros(len(rank_pictures)), false_positive_rate)
    cut = Cut.of(model.height, model.width, side)
    parts: list[Columns] = []
    share = max(1, FIT_TILES // max(1, len(fit_pictures)))
    for index, opened in enumerate(fit_pictures):
        picture_HWC = opened()
        corners = cut.corners(*picture_HWC.shape[:2])
        taken = corners[:: -(-len(corners) // share)]
        parts += measured(model.network, picture_HWC, cut, taken, batch_size)
        bar("fit", index + 1, len(fit_pictures), "pictures")
    names = model.statistics["multiscale"].needs
    joined = {name: np.concatenate([part[name] for part in parts]) if parts else np.empty(0) for name in names}
    gaussian = Gaussian.fitted(joined)
    unranked = TileCalibration(model.version, cut, gaussian, np.zeros(len(rank_pictures)), 0, false_positive_rate)
    scores: list[float] = []
    for index, opened in enumerate(rank_pictures):
        scores.append(scan(model.network, opened(), unranked, batch_size=batch_size).score)
        bar("rank", index + 1, len(rank_pictures), "pictures")
    return TileCalibration(
        model.version, cut, gaussian, conformal.ranked(scores), len(fit_pictures), false_positive_rate
    )
