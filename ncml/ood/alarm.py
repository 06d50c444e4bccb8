"""An anytime-valid alarm on a stream of verdicts: whether more images are flagged than the calibration expects.

The ranking images are a sample, so the true share q of flagged in-distribution images is itself random: for n of them
Beta(f + 1, n - f), f of them being above the threshold. The alarm tests q <= q0, the upper bound of q that is exceeded
with probability alpha / 2, against q1 = q0 + the false-positive rate, by likelihood ratios:

    L_t = q1 / q0 for a flagged image, (1 - q1) / (1 - q0) for another

    S_t = L_t (S_{t-1} + w_t)        w_1 + w_2 + ... = 1

S is the capital of bets that start at every image, w_t of them at image t. Under q <= q0, S_t plus the weights to come
is a nonnegative supermartingale that starts at 1, so the probability that S ever reaches 2 / alpha is at most
alpha / 2, however often one looks (Ville, 1939; Ramdas et al., "Game-Theoretic Statistics and Safe Anytime-Valid
Inference", 2023). Together, the probability of a false alarm is at most alpha over the whole stream. Half of the weight
starts at the first image, and the other half decays so slowly that a rise is noticed after a long quiet stream, too.

Does not import torch.
"""

from __future__ import annotations

import copy

import numpy as np
from numpy.typing import ArrayLike

from ncml.ood.conformal import Floats
from ncml.ood.scene_ranks import flagged_ranks, rate_bound

ALPHA = 0.01
"""Probability of a false alarm over the whole stream."""

RESTART = 500
"""Images over which half of the restarting weight is spent."""

MAX_EVIDENCE = 1e6
"""S is capped here, so that an alarm ends after its cause: within some 400 images at a false-positive rate of 5%, and
1,800 at 1%. A cap only lowers S."""


class FlaggedRateAlarm:
    """Evidence that more images of a stream are flagged than in-distribution images would be.

    update: takes one verdict, or an array with one verdict for each of several streams.
    """

    def __init__(self, n_rank: int, false_positive_rate: float, *, alpha: float = ALPHA) -> None:
        self.limit = 2 / alpha
        """Evidence at which the alarm is raised."""
        self.null_rate = rate_bound(flagged_ranks(n_rank, false_positive_rate), n_rank, 1 - alpha / 2)
        alternative = min(self.null_rate + false_positive_rate, (1 + self.null_rate) / 2)
        self._flagged = alternative / self.null_rate
        self._unflagged = (1 - alternative) / (1 - self.null_rate)
        self.images = 0
        self.evidence: Floats = np.zeros(())

    def update(self, is_flagged: ArrayLike) -> Floats:
        """Add a verdict and return the evidence."""
        self.images += 1
        weight = 0.5 * RESTART / ((self.images + RESTART - 1) * (self.images + RESTART)) + 0.5 * (self.images == 1)
        ratio = np.where(is_flagged, self._flagged, self._unflagged)
        self.evidence = np.minimum(ratio * (self.evidence + weight), MAX_EVIDENCE)
        return self.evidence

    @property
    def shortest_run(self) -> int:
        """Number of further images of one stream that raise the alarm if all of them are flagged."""
        alarm = copy.copy(self)
        while alarm.evidence < self.limit:
            alarm.update(True)
        return alarm.images - self.images


def alarm_of(n_rank: int, smallest_p: float, cutoff: float) -> FlaggedRateAlarm | None:
    """Return the alarm on images that a calibration flags at p-values up to `cutoff`.

    n_rank: number of ranking images. None if scenes of several images rank: the bound of the rate is that of single
    images, and the images of a stream come in scenes, too, so they are not exchangeable.
    """
    is_of_images = round(1 / smallest_p) == n_rank + 1
    return FlaggedRateAlarm(n_rank, cutoff) if is_of_images else None
