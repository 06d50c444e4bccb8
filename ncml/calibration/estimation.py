"""Calibration of a model on two sets of held-out images.

One is used to estimate the parameters of the statistics of `ncml.ood`, the other to rank images.

Shapes: N images, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ncml.calibration.held_out_power import IMAGES, measure_power
from ncml.data.blocks import evenly_spaced, one_of_each_block
from ncml.data.scenes import Integers
from ncml.errors import ModelError
from ncml.images.perturbations import Tolerance, apply_tolerances
from ncml.limits import MIN_ESTIMATION_IMAGES
from ncml.model import Model
from ncml.ood import conformal
from ncml.ood.calibration import DEFAULT_STATISTIC, Calibration
from ncml.ood.columns import Columns
from ncml.ood.measurements import measure
from ncml.ood.statistics import Estimates, build_statistics, check_image_count, required_columns, suspicious
from ncml.ood.storage import DEFAULT_NAME
from ncml.progress import OnProgress, Progress, ignore_progress

ESTIMATION_SHARE = 2 / 7
"""Share of the images that are used to estimate, but at least `MIN_ESTIMATION_IMAGES` images."""

OnSuspicious = Callable[[str, list[int]], None]
"""Called with "fit" or "rank", and positions of images in that set."""


def calibrate(
    model: Model,
    fit_images: NDArray[np.uint8] | Tensor,
    rank_images: NDArray[np.uint8] | Tensor,
    *,
    false_positive_rate: float = 0.05,
    tolerate: Sequence[Tolerance] = (),
    name: str = DEFAULT_NAME,
    power_images: int = IMAGES,
    foreign: Mapping[str, NDArray[np.uint8]] | None = None,
    prior: Calibration | None = None,
    on_suspicious: OnSuspicious = lambda stage, positions: None,
    batch_size: int = 32,
    on_progress: OnProgress = ignore_progress,
) -> Calibration:
    """Calibrate a model on held-out images, uint8 [N, H, W, 3]: estimate on `fit_images`, rank with `rank_images`.

    The two sets must be disjoint from each other and from the training images; else p-values are too small.
    tolerate: kinds of processing (`ncml.images.perturbations`) applied to half of the images, so that they are not
        flagged.
    name: name of the calibration in the model folder.
    power_images: number of ranking images on which the calibration's power is measured; 0 does not measure it.
    foreign: foreign images, by name, on which its power is also measured.
    prior: a calibration on other images, towards whose correlations the Gaussians are shrunk.
    on_suspicious: called with "fit" and with "rank", and the positions of the images of that set that lie far from all
        others in the measurements of the default statistic. Each parameter is estimated without the images of
        `fit_images` that lie far from the others in its own measurements, if 20 others remain. All `rank_images` are
        used, since p-values would be too small without some of them.
    Raises `InputError` for too few images: the minimum is 20 to estimate, and 1 / false_positive_rate - 1 to rank.
    """
    fit_pixels, rank_pixels = np.asarray(fit_images, np.uint8), np.asarray(rank_images, np.uint8)
    check_counts(len(fit_pixels), len(rank_pixels), false_positive_rate)
    statistics = build_statistics(model.config)

    def measure_all(stage: str, pixels: NDArray[np.uint8], names: Sequence[str], seed: int) -> Columns:
        pixels, batches = apply_tolerances(pixels, tolerate, seed=seed), list[Columns]()
        for start in range(0, len(pixels), batch_size):
            batches.append(measure(model.network, pixels[start : start + batch_size], names)[0])
            on_progress(Progress(stage, min(start + batch_size, len(pixels)), len(pixels)))
        columns = {name: np.concatenate([batch[name] for batch in batches]) for name in names}
        check_finite(columns, model.folder)
        return columns

    estimated = [name for name, statistic in statistics.items() if statistic.needs_estimates]
    fit_columns = measure_all("fit", fit_pixels, required_columns(estimated, statistics), seed=1)
    estimates = Estimates.estimate(fit_columns, statistics, None if prior is None else prior.estimates)
    rank_columns = measure_all("rank", rank_pixels, required_columns(statistics, statistics), seed=2**20)
    needs = statistics[DEFAULT_STATISTIC].needs
    is_suspicious = suspicious({name: np.concatenate([fit_columns[name], rank_columns[name]]) for name in needs})
    on_suspicious("fit", np.flatnonzero(is_suspicious[: len(fit_pixels)]).tolist())
    on_suspicious("rank", np.flatnonzero(is_suspicious[len(fit_pixels) :]).tolist())
    scores = {name: statistic.compute(rank_columns, estimates) for name, statistic in statistics.items()}
    calibration = Calibration(
        model.version,
        estimates,
        {name: conformal.rank_scores(values) for name, values in scores.items()},
        len(fit_pixels),
        false_positive_rate,
        tolerate=tuple(tolerate),
        name=name,
    )
    if not power_images:
        return calibration
    sample = evenly_spaced(len(rank_pixels), power_images)
    measured = measure_power(
        model,
        calibration,
        rank_pixels[sample],
        scores[calibration.statistic][sample],
        foreign=foreign,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    return replace(calibration, power=measured)


def divide(count: int, false_positive_rate: float) -> tuple[Integers, Integers]:
    """Return the positions of the images that estimate, one of each of as many consecutive blocks, and of the others.

    Raises `InputError` for fewer images than both need.
    """
    conformal.check_total(count, false_positive_rate)
    most = count - conformal.min_ranks(1, false_positive_rate)
    estimating = one_of_each_block(count, max(MIN_ESTIMATION_IMAGES, min(most, round(ESTIMATION_SHARE * count))))
    return estimating, np.setdiff1d(np.arange(count), estimating)


def check_counts(n_fit: int, n_rank: int, false_positive_rate: float) -> None:
    """Raise `InputError` for too few images to estimate, or to rank at this false-positive rate."""
    check_image_count(n_fit)
    conformal.threshold(np.zeros(n_rank), false_positive_rate)


def check_finite(columns: Columns, folder: Path) -> None:
    """Raise ModelError if a measurement of the model in `folder` is not finite."""
    for name, values in columns.items():
        if not np.isfinite(values).all():
            raise ModelError(f"{folder}: {name} of an image is not finite; train the model again.")
