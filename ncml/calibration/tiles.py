"""Calibration of a model's tiles on large good images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ncml.images.tiling import TileSize
from ncml.model import Model
from ncml.ood import conformal
from ncml.ood.measurements import Columns
from ncml.ood.statistics import Gaussian
from ncml.ood.tiles import Pixels, TileCalibration, measure_tiles, scan
from ncml.progress import OnProgress, Progress, ignore_progress

MAX_FIT_TILES = 4000
"""Tiles that estimate the Gaussian, at most: taken evenly from the images of that set."""


def calibrate(
    model: Model,
    fit_images: list[Callable[[], Pixels]],
    rank_images: list[Callable[[], Pixels]],
    *,
    side: int | None = None,
    false_positive_rate: float = 0.05,
    batch_size: int = 32,
    on_progress: OnProgress = ignore_progress,
) -> TileCalibration:
    """Calibrate tiles on large good images, each opened when it is needed: one list estimates, the other ranks.

    Raises `InputError` for fewer images than the false-positive rate needs, or fewer tiles than the Gaussian needs.
    """
    conformal.threshold(np.zeros(len(rank_images)), false_positive_rate)
    tile = TileSize.for_model(model.height, model.width, side)
    batches: list[Columns] = []
    tiles_per_image = max(1, MAX_FIT_TILES // max(1, len(fit_images)))
    for index, open_image in enumerate(fit_images):
        image_HWC = open_image()
        corners = tile.corners(*image_HWC.shape[:2])
        stride = -(-len(corners) // tiles_per_image)
        batches += measure_tiles(model.network, image_HWC, tile, corners[::stride], batch_size)
        on_progress(Progress("fit", index + 1, len(fit_images), "images"))
    names = model.statistics["multiscale"].needs
    columns = {name: np.concatenate([batch[name] for batch in batches]) if batches else np.empty(0) for name in names}
    gaussian = Gaussian.estimate(columns)
    unranked = TileCalibration(model.version, tile, gaussian, np.zeros(len(rank_images)), 0, false_positive_rate)
    scores: list[float] = []
    for index, open_image in enumerate(rank_images):
        scores.append(scan(model.network, open_image(), unranked, batch_size=batch_size).score)
        on_progress(Progress("rank", index + 1, len(rank_images), "images"))
    ranked = conformal.rank_scores(scores)
    return TileCalibration(model.version, tile, gaussian, ranked, len(fit_images), false_positive_rate)
