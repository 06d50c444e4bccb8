"""Calibration of a model's tiles on large good images."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from ncml.calibration.estimation import OnSuspicious, check_finite
from ncml.errors import InputError
from ncml.images.tiling import Tiling
from ncml.limits import MIN_ESTIMATION_IMAGES, View
from ncml.model import Model
from ncml.ood import conformal
from ncml.ood.columns import Columns
from ncml.ood.conformal import Floats
from ncml.ood.statistics import Gaussian, suspicious, usual_images
from ncml.ood.tile_calibration import TileCalibration, views_for
from ncml.ood.tile_views import STATISTICS, columns_of, score_views
from ncml.ood.tiles import Pixels, concatenate, measure_tiles
from ncml.progress import OnProgress, Progress, ignore_progress

MAX_FIT_TILES = 4000
"""Maximum number of tiles from which the Gaussians are estimated, equally many from each image, at random; more only if
there are more images, because each gives at least one."""


def calibrate(
    model: Model,
    fit_images: list[Callable[[], Pixels]],
    rank_images: list[Callable[[], Pixels]],
    *,
    tiling: Tiling | None = None,
    false_positive_rate: float = 0.05,
    on_suspicious: OnSuspicious = lambda stage, positions: None,
    batch_size: int = 32,
    on_progress: OnProgress = ignore_progress,
) -> TileCalibration:
    """Calibrate tiles on large good images, each opened when it is needed: estimate on one list, rank with the other.

    tiling: None: tiles of the model's size.
    on_suspicious: as for whole images (`ncml.calibration.estimation`), by the means of their tiles.
    At a rate of 5%, 19 ranking images support one view, 39 two, and 59 all three.
    Raises `InputError` for fewer images than the false-positive rate needs, or fewer tiles than the Gaussians need.
    """
    views = views_for(len(rank_images), false_positive_rate)
    tile = tiling or Tiling.for_model(model.height, model.width)
    names = columns_of(model.config, views)

    def measure_image(image_HWC: Pixels, corners: list[tuple[int, int]]) -> Columns:
        columns = concatenate(list(measure_tiles(model.network, image_HWC, tile, corners, names.values(), batch_size)))
        check_finite(columns, model.folder)
        return columns

    max_tiles = max(1, MAX_FIT_TILES // max(1, len(fit_images)))
    fit_columns: list[Columns] = []
    for index, open_image in enumerate(fit_images):
        image_HWC = open_image()
        corners = tile.corners(*image_HWC.shape[:2])
        np.random.default_rng(index).shuffle(corners)  # evenly spaced ones could all lie in one column
        fit_columns.append(measure_image(image_HWC, corners[:max_tiles]))
        on_progress(Progress("fit", index + 1, len(fit_images)))
    fit_count = sum(len(next(iter(columns.values()))) for columns in fit_columns)
    if fit_count < MIN_ESTIMATION_IMAGES:
        raise InputError(
            "data",
            f"{fit_count} tiles of {len(fit_images)} images are too few to estimate the statistics: use more images, "
            f"with at least {MIN_ESTIMATION_IMAGES} tiles in all.",
        )
    fit_means = [_means(columns) for columns in fit_columns]
    is_usual = usual_images(concatenate(fit_means))
    usual_columns = list(itertools.compress(fit_columns, is_usual))
    gaussians: dict[View, Gaussian] = {
        view: Gaussian.estimate(
            {name: np.concatenate([columns[name] for columns in usual_columns]) for name in names[view]}
        )
        for view in views
        if view in STATISTICS
    }
    scores: dict[View, list[float]] = {view: [] for view in views}
    rank_means: list[Columns] = []
    for index, open_image in enumerate(rank_images):
        image_HWC = open_image()
        columns = measure_image(image_HWC, tile.corners(*image_HWC.shape[:2]))
        rank_means.append(_means(columns))
        for view, view_score in score_views(columns, names, gaussians).items():
            scores[view].append(view_score.score)
        on_progress(Progress("rank", index + 1, len(rank_images)))
    is_suspicious = suspicious(concatenate(fit_means + rank_means))
    on_suspicious("fit", np.flatnonzero(is_suspicious[: len(fit_images)]).tolist())
    on_suspicious("rank", np.flatnonzero(is_suspicious[len(fit_images) :]).tolist())
    rounded: dict[View, Floats] = {view: conformal.round_scores(view_scores) for view, view_scores in scores.items()}
    ranked: dict[View, Floats] = {view: np.sort(view_scores) for view, view_scores in rounded.items()}
    return TileCalibration(
        model.version,
        tile,
        gaussians,
        ranked,
        conformal.smallest_ranks(list(rounded.values())),
        len(fit_images),
        false_positive_rate,
    )


def _means(columns: Columns) -> Columns:
    return {name: values.mean(keepdims=True) for name, values in columns.items()}
