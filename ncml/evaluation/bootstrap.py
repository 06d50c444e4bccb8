"""Means, shares and detection rates over images, with 95% intervals: bootstrap, for shares Wilson's.

Shapes: N and M images. A higher OOD score means more out-of-distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

Json = Mapping[str, Any]
"""An estimate as `Estimate.to_json` returns it."""
Indices = NDArray[np.intp]

RESAMPLES = 1000
CURVE_RESAMPLES = 200
"""Number of resamples for statistics that need a sort or a matrix product each."""
LEVEL = 0.95
ROUNDING = 1e-9
"""Error of a rate that is a sum of shares."""


@dataclass(frozen=True)
class Estimate:
    """A value, its 95% interval, and the number of images behind it."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"value": self.value, "interval": [self.low, self.high], "n": self.n}


def format_json(estimate: Json, digits: int = 3) -> str:
    """Return an estimate and its interval for a sentence."""
    value, low, high = (f"{number:.{digits}f}" for number in (estimate["value"], *estimate["interval"]))
    return f"{value} [{low}, {high}]"


def bootstrap(
    statistic: Callable[..., Sequence[float]], *sizes: int, resamples: int = CURVE_RESAMPLES
) -> list[Estimate]:
    """Estimate statistics of images, computed from one index array for each set, with percentile intervals."""
    values = np.array([statistic(*indices) for indices in resample(*sizes, resamples=resamples)])
    return [percentile_estimate(column, sum(sizes)) for column in values.T]


def resample(*sizes: int, resamples: int = CURVE_RESAMPLES) -> Iterator[tuple[Indices, ...]]:
    """Yield the indices of every set in order, and then those of each bootstrap sample."""
    yield tuple(map(np.arange, sizes))
    rng = np.random.default_rng(0)
    for _ in range(resamples):
        yield tuple(rng.integers(size, size=size) for size in sizes)


def resample_counts(*sizes: int) -> list[Floats]:
    """Return how often each image of each set occurs, in the set itself and in each bootstrap sample. [S, N] each.

    With these, statistics of all samples are products of matrices.
    """
    indices = zip(*resample(*sizes), strict=True)
    return [
        np.array([np.bincount(index, minlength=size) for index in set_indices], np.float64)
        for set_indices, size in zip(indices, sizes, strict=True)
    ]


def percentile_estimate(values: Floats, n: int) -> Estimate:
    """Return the first value with the percentile interval of the others, those of bootstrap samples of n images."""
    low, high = np.quantile(values[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(values[0]), float(low), float(high), n)


def mean(values_N: Floats) -> Estimate:
    """Estimate the mean over images."""
    return bootstrap(lambda index: (float(values_N[index].mean()),), len(values_N), resamples=RESAMPLES)[0]


def share(flags_N: NDArray[np.bool_]) -> Estimate:
    """Estimate the share of images with a property, with Wilson's interval, which has a width at 0 and 1, too."""
    return _share(int(flags_N.sum()), len(flags_N))


def _share(count: int, n: int) -> Estimate:
    from scipy import stats

    interval: Any = stats.binomtest(count, n).proportion_ci(LEVEL, method="wilson")
    return Estimate(count / n, float(interval.low), float(interval.high), n)


RATES = ("auroc", "aupr", "fpr95")


def detection_rates(inside_N: Floats, outside_M: Floats) -> tuple[float, float, float]:
    """Compute AUROC, AUPR and FPR95 of the scores of in-distribution and other images.

    AUROC: how often, of a pair with one of each, the other image scores higher. AUPR: average precision, other images
    being positive. FPR95: the share of in-distribution images that are flagged at the threshold that flags 95% of the
    others.
    """
    # Numbers of images flagged at each threshold: the distinct scores, from the highest.
    thresholds = np.unique(np.concatenate([inside_N, outside_M]))[::-1]
    inside, outside = (len(s) - np.searchsorted(np.sort(s), thresholds) for s in (inside_N, outside_M))
    false, true = (np.concatenate([[0], flagged / flagged[-1]]) for flagged in (inside, outside))
    average_precision = np.sum(np.diff(true) * outside / (outside + inside))
    return float(np.trapezoid(true, false)), float(average_precision), float(false[np.searchsorted(true, 0.95)])


def estimate_detection(inside_N: Floats, outside_M: Floats) -> dict[str, Estimate]:
    """Estimate `RATES`, resampling both sets.

    Where all bootstrap samples agree, as with sets that do not overlap, AUROC and FPR95 are 0 or 1 and have Wilson's
    interval: AUROC that of min(N, M) independent pairs, FPR95 that of N images.
    """
    N, M = len(inside_N), len(outside_M)
    estimates = bootstrap(lambda i, j: detection_rates(inside_N[i], outside_M[j]), N, M)
    rates: dict[str, Estimate] = dict(zip(RATES, estimates, strict=True))
    for name, n in (("auroc", min(N, M)), ("fpr95", N)):
        rate, bound = rates[name], round(rates[name].value)
        if max(abs(end - bound) for end in (rate.low, rate.value, rate.high)) < ROUNDING:
            rates[name] = replace(_share(bound * n, n), n=rate.n)
    return rates
