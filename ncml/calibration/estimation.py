"""Calibration of a model on held-out images.

Two sets of images that the model was not trained on: one fits the statistics of `ncml.ood` that need it, the other
ranks.

Shapes: N images, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ncml.errors import ModelError
from ncml.images.perturbations import Tolerance, tolerated
from ncml.model import Model
from ncml.ood import conformal
from ncml.ood.calibration import Calibration
from ncml.ood.conformal import Floats
from ncml.ood.statistics import Columns, Fit, Gaussian, catalogue, check_enough_to_fit, columns_for, measure
from ncml.progress import Bar


def calibrate(
    model: Model,
    fit_images: NDArray[np.uint8] | Tensor,
    rank_images: NDArray[np.uint8] | Tensor,
    *,
    false_positive_rate: float = 0.05,
    tolerate: Sequence[Tolerance] = (),
    batch_size: int = 32,
    bar: Bar = lambda stage, done, total, note="": None,
) -> Calibration:
    """Calibrate a model on held-out images, uint8 [N, H, W, 3]: one set fits the statistics, the other ranks.

    The two sets must be disjoint from each other and from what the model was trained on; else p-values are too small.
    tolerate: changes of processing (`ncml.images.perturbations`) that half of the images go through, so that they are
        not flagged.
    Raises `InputError` where there are too few images: 20 to fit, and 1 / false_positive_rate - 1 to rank.
    """
    fit_pixels, rank_pixels = (np.asarray(some, np.uint8) for some in (fit_images, rank_images))
    check_enough_to_fit(len(fit_pixels))
    conformal.threshold(np.zeros(len(rank_pixels)), false_positive_rate)
    statistics = catalogue(model.config)

    def measured(stage: str, pixels: NDArray[np.uint8], names: Sequence[str], seed: int) -> Columns:
        parts: list[dict[str, Floats]] = []
        for start in range(0, len(pixels), batch_size):
            some = tolerated(pixels[start : start + batch_size], tolerate, seed=seed + start)
            parts.append(measure(model.network, some, names)[0])
            bar(stage, min(start + batch_size, len(pixels)), len(pixels), "")
        joined = {name: np.concatenate([part[name] for part in parts]) for name in names}
        for name, values in joined.items():
            if not np.isfinite(values).all():
                raise ModelError(f"{model.folder} measures {name} of a {stage} image as not finite; train it anew.")
        return joined

    taught = [name for name, statistic in statistics.items() if statistic.fitted]
    fit_columns = measured("fit", fit_pixels, columns_for(taught, statistics), seed=1)
    gaussian = Gaussian.fitted({name: fit_columns[name] for name in statistics["multiscale"].needs})
    fit = Fit(float(fit_columns["bits_0"].mean()), gaussian)
    ranking = measured("rank", rank_pixels, columns_for(statistics, statistics), seed=2**20)
    ranked = {name: conformal.ranked(statistic.of(ranking, fit)) for name, statistic in statistics.items()}
    return Calibration(model.version, fit, ranked, len(fit_pixels), false_positive_rate, tolerate=tuple(tolerate))
