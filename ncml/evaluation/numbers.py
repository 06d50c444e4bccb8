"""Means and detection rates over images, with bootstrap intervals.

Shapes: N and M images. Scores are higher for what is more out-of-distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

RESAMPLES = 1000
RESAMPLES_OF_CURVES = 200
"""For what takes a sort or a matrix product each time."""
LEVEL = 0.95


@dataclass(frozen=True)
class Measured:
    """A value, its 95 % interval, and the number of images behind it."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"value": self.value, "interval": [self.low, self.high], "n": self.n}


def bootstrap(
    statistic: Callable[..., float], *sizes: int, resamples: int = RESAMPLES_OF_CURVES, seed: int = 0
) -> Measured:
    """A statistic of images given by their indices, one array for each set, and its percentile bootstrap interval."""
    rng = np.random.default_rng(seed)
    drawn = [statistic(*(rng.integers(size, size=size) for size in sizes)) for _ in range(resamples)]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Measured(float(statistic(*map(np.arange, sizes))), float(low), float(high), sum(sizes))


def mean(values_N: Floats) -> Measured:
    """The mean over images."""
    return bootstrap(lambda index: float(values_N[index].mean()), len(values_N), resamples=RESAMPLES)


def auroc(inside_N: Floats, outside_M: Floats) -> float:
    """Area under the ROC curve: how often the second set's image scores higher, of a pair with one of each."""
    from sklearn import metrics

    return float(metrics.roc_auc_score(*_labelled(inside_N, outside_M)))


def aupr(inside_N: Floats, outside_M: Floats) -> float:
    """Average precision, out-of-distribution images being the positive ones."""
    from sklearn import metrics

    return float(metrics.average_precision_score(*_labelled(inside_N, outside_M)))


def fpr95(inside_N: Floats, outside_M: Floats) -> float:
    """The share of in-distribution images that are flagged where 95 % of the others are."""
    from sklearn import metrics

    false, true, _ = metrics.roc_curve(*_labelled(inside_N, outside_M))
    return float(false[np.searchsorted(true, 0.95)])


def _labelled(inside_N: Floats, outside_M: Floats) -> tuple[Floats, Floats]:
    return np.repeat([0.0, 1.0], [len(inside_N), len(outside_M)]), np.concatenate([inside_N, outside_M])


DETECTION: dict[str, Callable[[Floats, Floats], float]] = {"auroc": auroc, "aupr": aupr, "fpr95": fpr95}


def detection(inside_N: Floats, outside_M: Floats) -> dict[str, Measured]:
    """AUROC, AUPR and FPR95, both sets resampled."""
    return {
        name: bootstrap(lambda i, j, rate=rate: rate(inside_N[i], outside_M[j]), len(inside_N), len(outside_M))
        for name, rate in DETECTION.items()
    }
