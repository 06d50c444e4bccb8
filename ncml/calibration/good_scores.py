"""The scores of good images, standardised by those that estimate, and the refusal of images without a finite one.

Shapes: N good images, the reviewed ones last; V scores of views.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np

from ncml.data.inventory import counted, enumerated
from ncml.data.scenes import Integers
from ncml.errors import InputError
from ncml.images.reading import name_image
from ncml.ood.conformal import Floats
from ncml.ood.detector_calibration import MIN_DEVIATION, Scale
from ncml.ood.judging import Detector
from ncml.ood.scene_ranks import SceneRanks, cutoff
from ncml.ood.views.view import Pixels

MAX_NAMES = 20
"""Names of images that an error lists at most."""


def check_finite(name: str, scores_N: Floats, names: Sequence[str]) -> None:
    """Raise `InputError` for the images whose score is not finite: values of a network have overflowed."""
    faulty = [names[i] for i in np.flatnonzero(~np.isfinite(scores_N)).tolist()]
    if faulty:
        raise InputError(
            "data",
            f"the score {name} of {counted(len(faulty), 'good image')} is not finite: leave out "
            f"{enumerated(faulty, MAX_NAMES)}, or save them again as PNG, or compute on another device.",
        )


def is_flagged(detector: Detector, image_HWC: Pixels, name: str) -> bool:
    """Return whether an image is flagged; raise `InputError` with its name for one that cannot be judged."""
    try:
        return detector.flags(image_HWC)
    except InputError as error:
        raise InputError("data", name_image(error, name).detail) from error


@dataclass(frozen=True)
class GoodScores:
    """All scores of the good images of a detector."""

    scores: Mapping[str, Floats]
    """By name, [N]; of an image that estimates, computed without the images of its scene."""
    margins: Mapping[str, float]
    least_deviations: Mapping[str, float]
    """Of the scores that have one (`Estimated.least_deviations`)."""
    only_scaled: frozenset[str]
    """Scores that good images change by nothing but how they are standardised."""
    scenes_N: Integers
    estimating: Integers
    """Positions of the images that estimate, in order; the reviewed ones do."""
    ranking: Integers
    reviewed: int

    @functools.cached_property
    def scales(self) -> dict[str, Scale]:
        """How each score is standardised.

        Reviewed images were chosen for being unusual, so they have a part in the scale of a score only if that is all
        that images change of it.
        """
        return self._scales(self.estimating)

    @functools.cached_property
    def _standardised_VN(self) -> Floats:
        return self._standardise(self.scales)

    @property
    def largest_N(self) -> Floats:
        """The largest standardised score of each image."""
        return self._standardised_VN.max(0)

    @property
    def deciding_N(self) -> list[str]:
        """The name of that score."""
        names = list(self.scores)
        return [names[i] for i in self._standardised_VN.argmax(0)]

    @property
    def ranks(self) -> SceneRanks:
        """The ranking images by their largest standardised score."""
        return self._rank(self.largest_N)

    def threshold_without(self, positions: Set[int], rate: float, confidence: float | None) -> float | None:
        """Return the threshold if images at these positions did not rank; None if none of them does, or too few others.

        Views and scales stay as they are.
        """
        others = np.array([i for i in self.ranking.tolist() if i not in positions], np.int64)
        if not 0 < len(others) < len(self.ranking):
            return None
        ranks = SceneRanks.rank(self.largest_N[others], self.scenes_N[others])
        try:
            return ranks.threshold(cutoff(ranks.scenes, rate, confidence))
        except InputError:  # too few scenes
            return None

    def count_flagged_again(self, cutoff: float) -> int:
        """Return how many reviewed images would be flagged if those of their scene had no part in the detector.

        For each scene, scores that are only scaled are standardised without it, and the threshold follows from them.
        The other scores of ranking images are those under views that have seen the scene.
        """
        is_reviewed_N = np.arange(len(self.scenes_N)) >= len(self.scenes_N) - self.reviewed
        count = 0
        for scene in np.unique(self.scenes_N[is_reviewed_N]):
            is_own_N = self.scenes_N == scene
            others = self._scales(self.estimating[~is_own_N[self.estimating]])
            changed = {name: others[name] if name in self.only_scaled else scale for name, scale in self.scales.items()}
            largest_N = self._standardise(changed).max(0)
            count += int((largest_N[is_own_N & is_reviewed_N] > self._rank(largest_N).threshold(cutoff)).sum())
        return count

    def _scales(self, estimating: Integers) -> dict[str, Scale]:
        unreviewed = estimating[estimating < len(self.scenes_N) - self.reviewed]
        return {
            name: Scale.estimate(
                scores_N[estimating if name in self.only_scaled else unreviewed],
                self.margins[name],
                self.least_deviations.get(name, MIN_DEVIATION),
            )
            for name, scores_N in self.scores.items()
        }

    def _standardise(self, scales: Mapping[str, Scale]) -> Floats:
        return np.stack(
            [(scores_N - scales[name].zero) / scales[name].deviation for name, scores_N in self.scores.items()]
        )

    def _rank(self, largest_N: Floats) -> SceneRanks:
        return SceneRanks.rank(largest_N[self.ranking], self.scenes_N[self.ranking])
