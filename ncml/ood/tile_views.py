"""Three views of an image in tiles: each turns their measurements into an OOD score of the image, and of each tile.

| view | score of a tile | score of the image | finds |
|---|---|---|---|
| worst_tile | Mahalanobis distance of its measurements | the largest of its tiles | changes of a region |
| peak | the largest mean bits/dim of 5x5 pixels, minus the tile's mean | the largest of its tiles | small defects |
| mean | its share of the image's score | Mahalanobis distance of the mean over tiles | global changes |

No single statistic finds all three: a small defect is lost in the average of a tile, and a global change in the
variation between tiles. `worst_tile` uses the measurements of `multiscale`, `mean` those of `multiscale_corr`
(`ncml.ood.statistics`); both use Gaussians of tiles, since a Gaussian of the means of some 30 images was measured to
detect less. `peak` is measured at the smallest noise level above 0, where single pixels are least surprising.

Shapes: T tiles, M measurements.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ncml.config import Config
from ncml.limits import View
from ncml.ood.columns import Columns, column_name, noise_levels
from ncml.ood.conformal import Floats
from ncml.ood.statistics import Gaussian, build_statistics

STATISTICS: dict[View, str] = {"worst_tile": "multiscale", "mean": "multiscale_corr"}
"""The statistics whose measurements have a Gaussian, by view."""


@dataclass(frozen=True)
class ViewScore:
    """An image in one view."""

    score: float
    tiles_T: Floats
    """The score of each tile."""


def peak_level(config: Config) -> float:
    """Return the noise level of the view `peak`, in grey levels."""
    return noise_levels(config)[:2][-1]


def columns_of(config: Config, views: Iterable[View]) -> dict[View, tuple[str, ...]]:
    """Return the names of the measurements that each view needs."""
    statistics = build_statistics(config)
    peak = (column_name("peak", peak_level(config)),)
    return {view: statistics[STATISTICS[view]].needs if view in STATISTICS else peak for view in views}


def score_views(
    columns: Columns, names: Mapping[View, tuple[str, ...]], gaussians: Mapping[View, Gaussian]
) -> dict[View, ViewScore]:
    """Score an image in the views of `names`, the result of `columns_of`, from the measurements of its tiles."""
    return {view: _score(view, columns, columns_of_view, gaussians) for view, columns_of_view in names.items()}


def _score(view: View, columns: Columns, names: tuple[str, ...], gaussians: Mapping[View, Gaussian]) -> ViewScore:
    if view == "mean":
        return _score_mean(columns, gaussians[view])
    tiles_T = columns[names[0]] if view == "peak" else gaussians[view].distance(columns)
    return ViewScore(float(tiles_T.max()), tiles_T)


def _score_mean(columns: Columns, gaussian: Gaussian) -> ViewScore:
    """Score the mean d of the tiles' deviations d_i: s = sqrt(d' P d), the mean of the shares d_i' P d / s."""
    deviations_TM = np.stack([columns[name] for name in gaussian.columns], 1) - np.array(gaussian.mean)
    weights_M = np.array(gaussian.precision) @ deviations_TM.mean(0)
    score = float(np.sqrt(deviations_TM.mean(0) @ weights_M))
    return ViewScore(score, deviations_TM @ weights_M / max(score, 1e-12))
