"""The scores of good images: how they are standardised and weighted, and the refusal of images without a finite one.

Shapes: N good images, the reviewed ones last; M altered and D defective images; V scores of views.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ncml.data.inventory import counted
from ncml.data.scenes import Integers, fold_scenes
from ncml.errors import InputError, enumerated
from ncml.images.reading import name_image
from ncml.ood.conformal import Floats
from ncml.ood.detector_calibration import MIN_DEVIATION, Scale
from ncml.ood.judging import Detector
from ncml.ood.scene_ranks import SceneRanks, cutoff
from ncml.ood.views.known_defects import DEFECTIVE_FOLDS, KnownDefects
from ncml.ood.views.view import Pixels
from ncml.ood.weights import KNOWN_WEIGHT, learn_weights

MAX_NAMES = 20
"""Names of images that an error lists at most."""


def check_finite(name: str, scores_N: Floats, names: Sequence[str]) -> None:
    """Raise `InputError` for the images whose score is not finite: values of a network have overflowed."""
    faulty = [names[i] for i in np.flatnonzero(~np.isfinite(scores_N)).tolist()]
    if faulty:
        raise InputError(
            "data",
            f"the score {name} of {counted(len(faulty), 'image')} is not finite: leave out "
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
    altered: Mapping[str, Floats]
    """Scores of altered estimation images, none of them reviewed; by name, [M]."""
    are_processed_M: NDArray[np.bool_]
    """Whether the whole of an altered image has changed, or only a region."""
    defective: Mapping[str, Floats]
    """Scores of defective images, by name, [D]; of a view that learns from them, without their part of the scenes."""
    defective_scenes_D: Integers
    are_learned_D: NDArray[np.bool_]
    """Whether the detector learns from a defective image: none of its scene ranks."""
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
        """How each score is standardised and weighted.

        Reviewed images were chosen for being unusual, so they have a part in the scale of a score only if that is all
        that images change of it, and the weights are learned without them.
        """
        return self._weighted(self._scales(self.estimating), self.estimating, self.are_learned_D)

    @functools.cached_property
    def combined_N(self) -> Floats:
        """The score of each image."""
        return combine(self.scales, self.scores)

    @property
    def leading_views_N(self) -> list[str]:
        """The view score with the largest part in that of each image."""
        names = list(self.scores)
        return [names[i] for i in _squares(self.scales, self.scores).argmax(0)]

    @property
    def ranks(self) -> SceneRanks:
        """The ranking images by their score."""
        return self._rank(self.combined_N)

    def threshold_without(self, positions: Set[int], rate: float, confidence: float | None) -> float | None:
        """Return the threshold if images at these positions did not rank; None if none of them does, or too few others.

        Views and scales stay as they are.
        """
        others = np.array([i for i in self.ranking.tolist() if i not in positions], np.int64)
        if not 0 < len(others) < len(self.ranking):
            return None
        ranks = SceneRanks.rank(self.combined_N[others], self.scenes_N[others])
        try:
            return ranks.threshold(cutoff(ranks.scenes, rate, confidence))
        except InputError:  # too few scenes
            return None

    def count_flagged_again(self, cutoff: float) -> int:
        """Return how many reviewed images would be flagged if those of their scene had no part in the detector.

        For each scene, scores that are only scaled are standardised without it, and weights and threshold follow.
        The other scores of ranking images are those under views that have seen the scene, and the altered images stay.
        """
        is_reviewed_N = np.arange(len(self.scenes_N)) >= len(self.scenes_N) - self.reviewed
        count = 0
        for scene in np.unique(self.scenes_N[is_reviewed_N]):
            is_own_N = self.scenes_N == scene
            estimating = self.estimating[~is_own_N[self.estimating]]
            others = self._scales(estimating)
            changed = {name: others[name] if name in self.only_scaled else scale for name, scale in self.scales.items()}
            combined_N = combine(self._weighted(changed, estimating, self.are_learned_D), self.scores)
            count += int((combined_N[is_own_N & is_reviewed_N] > self._rank(combined_N).threshold(cutoff)).sum())
        return count

    def are_found(self, cutoff: float) -> NDArray[np.bool_]:
        """Return whether each defective image is flagged if nothing is learned from its part of the scenes, [D].

        The weights are learned without it, as are its scores (`KnownDefects.estimate`). Images from which nothing is
        learned are judged as new ones are.
        """
        folds_D = np.full(len(self.are_learned_D), -1)
        folds_D[self.are_learned_D] = fold_scenes(self.defective_scenes_D[self.are_learned_D], DEFECTIVE_FOLDS)
        scales, are_found_D = self._scales(self.estimating), np.zeros(len(folds_D), np.bool_)
        for fold in np.unique(folds_D).tolist():
            is_own_D = folds_D == fold
            weighted = self._weighted(scales, self.estimating, self.are_learned_D & ~is_own_D)
            threshold = self._rank(combine(weighted, self.scores)).threshold(cutoff)
            are_found_D[is_own_D] = combine(weighted, self.defective)[is_own_D] > threshold
        return are_found_D

    def _scales(self, estimating: Integers) -> dict[str, Scale]:
        return {
            name: Scale.estimate(
                scores_N[estimating if name in self.only_scaled else self._unreviewed(estimating)],
                self.least_deviations.get(name, MIN_DEVIATION),
            )
            for name, scores_N in self.scores.items()
        }

    def _weighted(
        self, scales: Mapping[str, Scale], estimating: Integers, are_learned_D: NDArray[np.bool_]
    ) -> dict[str, Scale]:
        """Return scales with the weights that are learned from scores that they standardise."""
        good = {name: scores_N[self._unreviewed(estimating)] for name, scores_N in self.scores.items()}
        others = {name: scale for name, scale in scales.items() if name != KnownDefects.name}
        weights_V = learn_weights(
            _standardise(others, good),
            _standardise(others, self.altered),
            self.are_processed_M,
            _standardise(others, self.defective)[:, are_learned_D],
            self.defective_scenes_D[are_learned_D],
        )
        weights = dict(zip(others, weights_V.tolist(), strict=True))
        return {name: replace(scale, weight=weights.get(name, KNOWN_WEIGHT)) for name, scale in scales.items()}

    def _unreviewed(self, positions: Integers) -> Integers:
        return positions[positions < len(self.scenes_N) - self.reviewed]

    def _rank(self, combined_N: Floats) -> SceneRanks:
        return SceneRanks.rank(combined_N[self.ranking], self.scenes_N[self.ranking])


def _standardise(scales: Mapping[str, Scale], scores: Mapping[str, Floats]) -> Floats:
    """Return standardised scores, [V, N]."""
    return np.stack([(scores[name] - scale.median) / scale.deviation for name, scale in scales.items()])


def combine(scales: Mapping[str, Scale], scores: Mapping[str, Floats]) -> Floats:
    """Return the score of each image, [N]."""
    return np.sqrt(_squares(scales, scores).sum(0))


def _squares(scales: Mapping[str, Scale], scores: Mapping[str, Floats]) -> Floats:
    """Return what each view adds to the square of the score of each image, [V, N]."""
    weights_V = np.array([scale.weight for scale in scales.values()])
    return weights_V[:, None] * np.maximum(0, _standardise(scales, scores)) ** 2
