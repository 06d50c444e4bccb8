"""Conformal p-values whose ranks count scenes, and the rate of one calibration. Does not import torch.

Bursts, frames of a video and crops show one scene several times, so they are not exchangeable as single images. Let
scene k of K ranking scenes have the scores S_k. An image with the score s gets

    p = (1 + sum over k of #{S_k >= s} / #S_k) / (K + 1),

which is valid for one image of a fresh scene that is exchangeable with the ranking scenes: P(p <= a) <= a for every a
(hierarchical conformal prediction; Lee, Barber and Willett, 2023). Where each scene is one image, it is the p-value of
`ncml.ood.conformal`.

**The rate of one calibration.** The rate holds on average over calibrations. Where scenes are single images whose
scores are distinct, an image is flagged when it scores above the m-th largest of K, and the share of good images that
do so has the distribution Beta(m, K + 1 - m). With several images in a scene it varies less, unless they agree.
"""

from __future__ import annotations

import bisect
import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ncml.errors import InputError
from ncml.ood import conformal
from ncml.ood.conformal import Floats, Integers

TOLERANCE = 1e-9
"""Rounding of a sum of shares and of a rate."""


@dataclass(frozen=True)
class SceneRanks:
    """The scores of ranking images, and the scene of each."""

    scores_N: Floats
    """Ascending, rounded up by `conformal.round_scores`."""
    scenes_N: Integers
    """From 0, each at least once."""

    @classmethod
    def rank(cls, scores_N: ArrayLike, scenes_N: ArrayLike) -> SceneRanks:
        """Sort and round scores; scenes may be any integers."""
        rounded_N = conformal.round_scores(scores_N)
        order = np.argsort(rounded_N, kind="stable")
        _, numbers_N = np.unique(np.asarray(scenes_N), return_inverse=True)
        return cls(rounded_N[order], numbers_N[order])

    @property
    def scenes(self) -> int:
        """Number of scenes."""
        return int(self.scenes_N.max()) + 1

    @functools.cached_property
    def _shares_at_or_above(self) -> Floats:
        """Sum over scenes of the share of images from position i on, [N + 1]."""
        weights_N = 1 / np.bincount(self.scenes_N)[self.scenes_N]
        tail_N = np.cumsum(weights_N[::-1])[::-1]
        return np.append(np.round(tail_N, 9), 0.0)

    def p_values(self, scores: ArrayLike) -> Floats:
        """Return the p-value of each score."""
        position = np.searchsorted(self.scores_N, np.asarray(scores, np.float64), side="left")
        return (1 + self._shares_at_or_above[position]) / (self.scenes + 1)

    def count_at_or_above(self, score: float) -> int:
        """Return how many ranking images score at least as high."""
        return len(self.scores_N) - int(np.searchsorted(self.scores_N, score, side="left"))

    def threshold(self, cutoff: float) -> float:
        """Return the largest ranking score whose p-value is above a cutoff: s > threshold exactly when p <= cutoff."""
        is_above_N = self.p_values(self.scores_N) > cutoff + TOLERANCE
        if not is_above_N.any() or 1 / (self.scenes + 1) > cutoff + TOLERANCE:
            raise too_few(self.scenes, cutoff)
        return float(self.scores_N[is_above_N][-1])


def too_few(scenes: int, false_positive_rate: float) -> InputError:
    """Return the error for too few ranking scenes at a rate."""
    min_count = conformal.min_ranks(1, false_positive_rate)
    return InputError(
        "data",
        f"{scenes} ranking scenes cannot support a false-positive rate of {false_positive_rate:g}: use good images of "
        f"at least {min_count} scenes to rank.",
    )


def rate_bound(ranks: int, scenes: int, confidence: float) -> float:
    """Return the rate that a calibration has at most with this confidence.

    ranks: m, where scores above the m-th largest of the ranking scenes are flagged. The result is the quantile of
    Beta(m, K + 1 - m), found by bisection of P(Binomial(K, x) >= m).
    """
    low, high = 0.0, 1.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (low, middle) if _at_least(ranks, scenes, middle) >= confidence else (middle, high)
    return high


def share_interval(flagged: int, images: int, confidence: float) -> tuple[float, float]:
    """Return an interval of the share of all images that are flagged, of which these are a random sample.

    It is that of Clopper and Pearson (1934), which contains the share with at least this confidence.
    """
    tail = (1 - confidence) / 2
    return rate_bound(flagged, images, tail), rate_bound(flagged + 1, images, 1 - tail)


def cutoff(scenes: int, false_positive_rate: float, confidence: float | None) -> float:
    """Return the p-value at or below which an image is flagged: the rate, or less for a confidence in it.

    confidence: the probability with which the rate of this very calibration is at most `false_positive_rate`; None: it
        is so on average.
    Raises `InputError` for too few scenes, and as `min_scenes` does.
    """
    if scenes < min_scenes(false_positive_rate, None):
        raise too_few(scenes, false_positive_rate)
    if confidence is None:
        return false_positive_rate
    if scenes < (needed := min_scenes(false_positive_rate, confidence)):
        raise InputError(
            "confidence",
            f"{scenes} ranking scenes cannot bound the rate by {false_positive_rate:g} with a confidence of "
            f"{confidence:g}: use at least {needed}, or omit --confidence.",
        )
    ranks = math.floor(false_positive_rate * (scenes + 1) + TOLERANCE)
    while ranks > 1 and rate_bound(ranks, scenes, confidence) > false_positive_rate:
        ranks -= 1
    return ranks / (scenes + 1)


def min_scenes(false_positive_rate: float, confidence: float | None) -> int:
    """Return the fewest ranking scenes with which an image can be flagged at this rate, with this confidence in it.

    Raises `InputError` for a rate or a confidence that is out of range.
    """
    conformal.check_rate(false_positive_rate)
    least = conformal.min_ranks(1, false_positive_rate)
    if confidence is None:
        return least
    if not 0.5 <= confidence < 1:
        raise InputError("confidence", f"a confidence must be at least 0.5 and less than 1, not {confidence:g}.")
    return max(least, math.ceil(math.log(1 - confidence) / math.log(1 - false_positive_rate) - TOLERANCE))


def fewest_scenes(scenes: int, false_positive_rate: float, confidence: float | None) -> int:
    """Return the fewest ranking scenes that flag as many ranks as `scenes` do: further ones only lower the rate.

    Raises `InputError` as `cutoff` does.
    """

    def ranks(count: int) -> int:
        return flagged_ranks(count, cutoff(count, false_positive_rate, confidence))

    least = min_scenes(false_positive_rate, confidence)
    return bisect.bisect_left(range(scenes), ranks(scenes), lo=least, key=ranks)


def flagged_ranks(scenes: int, cutoff: float) -> int:
    """Return m, where scores above the m-th largest of the ranking scenes are flagged."""
    return min(scenes, math.floor(cutoff * (scenes + 1) + TOLERANCE))


def _at_least(count: int, n: int, share: float) -> float:
    """Return P(Binomial(n, share) >= count)."""
    if share <= 0:
        return 0.0
    if share >= 1:
        return 1.0
    logs = [
        math.lgamma(n + 1)
        - math.lgamma(i + 1)
        - math.lgamma(n - i + 1)
        + i * math.log(share)
        + (n - i) * math.log1p(-share)
        for i in range(count)
    ]
    return 1 - math.fsum(map(math.exp, logs))
