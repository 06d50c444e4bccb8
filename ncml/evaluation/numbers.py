"""Means and detection rates over images, with bootstrap intervals.

Shapes: N and M images. Scores are higher for what is more out-of-distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    statistic: Callable[..., Sequence[float]], *sizes: int, resamples: int = RESAMPLES_OF_CURVES
) -> list[Measured]:
    """Statistics of images given by their indices, one array for each set, with percentile bootstrap intervals."""
    drawn = np.array([statistic(*indices) for indices in resampled(*sizes, resamples=resamples)])
    return [between(values, sum(sizes)) for values in drawn.T]


def resampled(*sizes: int, resamples: int = RESAMPLES_OF_CURVES) -> Iterator[tuple[Indices, ...]]:
    """Indices of every set as it is, and then of so many bootstrap samples of it."""
    yield tuple(map(np.arange, sizes))
    rng = np.random.default_rng(0)
    for _ in range(resamples):
        yield tuple(rng.integers(size, size=size) for size in sizes)


def between(values: Floats, n: int) -> Measured:
    """The first value, and the percentile interval of the others, which are of bootstrap samples of n images."""
    low, high = np.quantile(values[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Measured(float(values[0]), float(low), float(high), n)


def mean(values_N: Floats) -> Measured:
    """The mean over images."""
    return bootstrap(lambda index: (float(values_N[index].mean()),), len(values_N), resamples=RESAMPLES)[0]


RATES = ("auroc", "aupr", "fpr95")


def rates(inside_N: Floats, outside_M: Floats) -> tuple[float, float, float]:
    """AUROC, AUPR and FPR95 of scores of in-distribution and other images.

    AUROC: how often, of a pair with one of each, the other image scores higher. AUPR: average precision, other images
    being positive. FPR95: the share of in-distribution images that are flagged where 95 % of the others are.
    """
    from sklearn import metrics

    truth = np.repeat([0, 1], [len(inside_N), len(outside_M)])
    scores = np.concatenate([inside_N, outside_M])
    false, true, _ = metrics.roc_curve(truth, scores, drop_intermediate=False)  # where 95 % are flagged is such a point
    average_precision = float(metrics.average_precision_score(truth, scores))
    return float(metrics.auc(false, true)), average_precision, float(false[np.searchsorted(true, 0.95)])


def detection(inside_N: Floats, outside_M: Floats) -> dict[str, Measured]:
    """`RATES`, both sets resampled."""
    found = bootstrap(lambda i, j: rates(inside_N[i], outside_M[j]), len(inside_N), len(outside_M))
    return dict(zip(RATES, found, strict=True))
