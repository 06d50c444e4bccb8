"""Decisions from ranks: conformal p-values, the threshold of a false-positive rate, false discovery rates.

Independent of images and models. A higher score and a smaller p-value mean more out-of-distribution.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ncml.errors import InputError

Floats = NDArray[np.float64]

MIN_RATE = 1e-9
"""Lower false-positive rates would need more than a billion ranking images."""


def rank_scores(scores: ArrayLike) -> Floats:
    """Sort calibration scores in ascending order, rounded to six digits: more would be rounding errors of fp32."""
    return np.sort([float(f"{score:.6g}") for score in np.asarray(scores, np.float64)])


def p_values(scores: ArrayLike, ranked: Floats) -> Floats:
    """Compute conformal p-values, (1 + #{calibration scores >= s}) / (n + 1) for each score s.

    ranked: the n calibration scores, ascending.
    If s is exchangeable with them, P(p <= a) <= a for every a (Vovk et al., "Algorithmic Learning in a Random
    World", 2005). The smallest p is 1 / (n + 1).
    """
    at_least = len(ranked) - np.searchsorted(ranked, np.asarray(scores, np.float64), side="left")
    return (1 + at_least) / (len(ranked) + 1)


def threshold(ranked: Floats, false_positive_rate: float) -> float:
    """Return the largest calibration score whose p-value is above the rate: s > threshold exactly when p <= rate.

    Raises `InputError` if the n calibration scores cannot support the rate: 1 / (n + 1) must not exceed it.
    """
    if not MIN_RATE <= false_positive_rate < 1:
        raise InputError(
            "false_positive_rate",
            f"a false-positive rate must be at least {MIN_RATE:g} and less than 1, not {false_positive_rate:g}.",
        )
    n = len(ranked)
    flagged = math.floor(false_positive_rate * (n + 1) + 1e-9) - 1  # of the n, those that may lie above the threshold
    if flagged < 0:
        min_count = math.ceil(1 / false_positive_rate - 1e-9) - 1
        raise InputError(
            "data",
            f"{n} ranking images cannot support a false-positive rate of {false_positive_rate:g}: "
            f"the smallest p-value would be {1 / (n + 1):.3g}, so use at least {min_count} ranking images.",
        )
    return float(ranked[n - 1 - flagged])


def discoveries(p: ArrayLike, rate: float) -> NDArray[np.bool_]:
    """Return which p-values the Benjamini-Hochberg procedure rejects: of these, at most `rate` are false on average.

    With p sorted, it takes the largest k with p_(k) <= rate k / m and rejects the k smallest (Benjamini and Hochberg,
    1995). Conformal p-values against one calibration set are positively dependent, which the procedure
    allows (Bates et al., "Testing for Outliers with Conformal p-values", 2023).
    """
    p = np.asarray(p, np.float64)
    return p <= largest_discovery(p, rate)


def largest_discovery(p: Floats, rate: float) -> float:
    """Return the largest p-value that `discoveries` rejects; -1 if it rejects none."""
    if not 0 < rate < 1:
        raise InputError("fdr", f"a false discovery rate must be more than 0 and less than 1, not {rate:g}.")
    ordered = np.sort(p)
    below = np.flatnonzero(ordered <= rate * np.arange(1, len(p) + 1) / len(p)) if len(p) else np.empty(0, np.intp)
    return float(ordered[below[-1]]) if len(below) else -1.0


def min_discoveries(count: int, smallest_p: float, rate: float) -> int:
    """Return how many of `count` p-values must be the smallest possible one for `discoveries` to reject any.

    More than `count` means that the rate is unreachable.
    """
    return math.ceil(count * smallest_p / rate - 1e-9)
