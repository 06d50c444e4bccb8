"""Decisions from ranks: conformal p-values, the threshold of a false-positive rate, false discovery rates.

Independent of images and models. A higher score and a smaller p-value mean more out-of-distribution.

**Several views of an image** have one p-value together. Let R_v be the rank of its score in view v among n ranking
images, 1 for the highest, and S the smallest of its V ranks; S_i is the same of ranking image i among the n. Then

    p = min(V S, 1 + #{i: S_i <= S}) / (n + 1)

is valid: P(p <= a) <= a for an image that is exchangeable with the ranking images. Rank all n + 1 images among
themselves: this image keeps its S, and every other gets at least its S_i. So at most 1 + #{S_i <= S} of the n + 1 have
a smallest rank of S or less; and at most V S have, since each view has at most S ranks up to S. That number divided by
n + 1 is the conformal p-value of the score -S, which is a symmetric function of the n + 1 images, and p is no smaller.
With V = 1, p is the p-value of that view. V S alone is Bonferroni's correction; where views agree, the count is less.
"""

import math
from decimal import ROUND_CEILING, Context

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ncml.errors import InputError
from ncml.limits import MIN_ESTIMATION_IMAGES

Floats = NDArray[np.float64]
Integers = NDArray[np.integer]

MIN_RATE = 1e-9
"""Lower false-positive rates would need more than a billion ranking images."""


def rank_scores(scores: ArrayLike) -> Floats:
    """Sort calibration scores in ascending order, rounded by `round_scores`."""
    return np.sort(round_scores(scores))


def round_scores(scores: ArrayLike) -> Floats:
    """Round scores up to six digits: more would be rounding errors of fp32.

    Up, so that an image equal to a ranking image never scores above it: p-values stay valid where images repeat.
    """
    six_digits = Context(prec=6, rounding=ROUND_CEILING)
    return np.array([float(six_digits.create_decimal_from_float(score)) for score in np.asarray(scores, np.float64)])


def p_values(scores: ArrayLike, ranked: Floats) -> Floats:
    """Compute conformal p-values, (1 + #{calibration scores >= s}) / (n + 1) for each score s.

    ranked: the n calibration scores, ascending.
    If s is exchangeable with them, P(p <= a) <= a for every a (Vovk et al., "Algorithmic Learning in a Random
    World", 2005). The smallest p is 1 / (n + 1).
    """
    return ranks(scores, ranked) / (len(ranked) + 1)


def check_rate(false_positive_rate: float) -> None:
    """Raise `InputError` for a false-positive rate that is out of range."""
    if not MIN_RATE <= false_positive_rate < 1:
        raise InputError(
            "false_positive_rate",
            f"a false-positive rate must be at least {MIN_RATE:g} and less than 1, not {false_positive_rate:g}.",
        )


def min_ranks(views: int, false_positive_rate: float) -> int:
    """Return the minimum number of ranking images with which each of this number of views can flag an image."""
    return math.ceil(views / false_positive_rate - 1e-9) - 1


def check_total(count: int, false_positive_rate: float) -> None:
    """Raise `InputError` for fewer good images than a calibration needs to estimate and to rank."""
    check_rate(false_positive_rate)
    n_rank = min_ranks(1, false_positive_rate)
    total = MIN_ESTIMATION_IMAGES + n_rank
    if count < total:
        is_few_for_rate = count > MIN_ESTIMATION_IMAGES
        remedy = f", or raise the false-positive rate ({false_positive_rate:g})" if is_few_for_rate else ""
        raise InputError(
            "data",
            f"{count:,} {'image is' if count == 1 else 'images are'} too few: use at least {total} good images, "
            f"{MIN_ESTIMATION_IMAGES} to estimate and {n_rank} to rank{remedy}.",
        )


def threshold(ranked: Floats, false_positive_rate: float) -> float:
    """Return the largest calibration score whose p-value is above the rate: s > threshold exactly when p <= rate.

    Raises `InputError` if the n calibration scores cannot support the rate: 1 / (n + 1) must not exceed it.
    """
    check_rate(false_positive_rate)
    n = len(ranked)
    # Of the n, those that may lie above the threshold: fewer than n, although the product may be rounded up to n + 1.
    flagged = min(n, math.floor(false_positive_rate * (n + 1) + 1e-9)) - 1
    if flagged < 0:
        min_count = min_ranks(1, false_positive_rate)
        raise InputError(
            "data",
            f"{n} ranking images cannot support a false-positive rate of {false_positive_rate:g}: "
            f"the smallest p-value would be {1 / (n + 1):.3g}, so use at least {min_count} ranking images.",
        )
    return float(ranked[n - 1 - flagged])


def smallest_ranks(scores_VN: ArrayLike) -> Integers:
    """Return the smallest rank of each of N images over V views, ascending, [N]; equal scores share the higher rank."""
    scores_VN = np.asarray(scores_VN, np.float64)
    ranks_VN = [ranks(scores_N, np.sort(scores_N)) - 1 for scores_N in scores_VN]  # an image is among the ranked
    return np.sort(np.min(ranks_VN, 0))


def ranks(scores: ArrayLike, ranked: Floats) -> Integers:
    """Return 1 + #{calibration scores >= s} for each score s; `ranked` is ascending."""
    return 1 + len(ranked) - np.searchsorted(ranked, np.asarray(scores, np.float64), side="left")


def combined_p_value(rank: int, views: int, smallest: Integers) -> float:
    """Return the p-value of an image whose smallest rank over its views is `rank`, as the module describes.

    smallest: the result of `smallest_ranks` for the ranking images.
    """
    at_most = 1 + int(np.searchsorted(smallest, rank, side="right"))
    return min(views * rank, at_most) / (len(smallest) + 1)


def largest_rank(views: int, smallest: Integers, false_positive_rate: float) -> int:
    """Return the largest rank whose combined p-value is at most the rate; 0 if there is none."""
    rank = 0
    while rank < len(smallest) and combined_p_value(rank + 1, views, smallest) <= false_positive_rate + 1e-9:
        rank += 1
    return rank


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
    bounds = rate * np.arange(1, len(p) + 1) / max(1, len(p))
    below = np.flatnonzero(ordered <= bounds * (1 + 1e-9))  # p-values often equal their bounds but for rounding errors
    return float(ordered[below[-1]]) if len(below) else -1.0


def min_discoveries(count: int, smallest_p: float, rate: float) -> int:
    """Return how many of `count` p-values must be the smallest possible one for `discoveries` to reject any.

    More than `count` means that the rate is unreachable.
    """
    return math.ceil(count * smallest_p / rate - 1e-9)
