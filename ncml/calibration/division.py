"""Good images of a detector, divided by scene between those that estimate and those that rank.

Shapes: N images, in the order of their folder, and reviewed ones after them.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ncml.data import scenes as finding
from ncml.data.blocks import one_of_each_block
from ncml.data.good_images import GoodImages
from ncml.data.inventory import counted
from ncml.data.overlaps import overlapping
from ncml.data.scenes import Integers
from ncml.errors import InputError, enumerated
from ncml.ood.power import reliable_ranks
from ncml.ood.scene_ranks import fewest_scenes, min_scenes
from ncml.progress import OnProgress, ignore_progress

MIN_ESTIMATION_SCENES = 11
"""Scenes from which views are estimated at least."""
ESTIMATION_SHARE = 0.3
"""Share of the scenes that are used to estimate at least, if enough remain to rank."""
MAX_ESTIMATION_SCENES = 200
"""Scenes from which views are estimated at most; the others rank."""
MAX_REFUSED = 20
"""Names of refused reviewed images that are listed at most; the others are counted."""
MAX_NAMES = 100
"""Names of images that are listed at most, so that they can be removed from a folder."""


class RankedScenesError(InputError):
    """Reviewed images show scenes of ranking images."""

    def __init__(self, names: Sequence[str]) -> None:
        subject = f"{counted(len(names), 'reviewed image')} {'shows' if len(names) == 1 else 'show'}"
        super().__init__(
            "reviewed",
            f"{subject} scenes of ranking images, which would make the rate wrong: leave out "
            f"{enumerated(names, MAX_REFUSED)} (on a service, delete the reviews).",
        )
        self.names = tuple(names)
        """The names of all these images."""


def find_scenes(
    good: GoodImages,
    group: str = finding.AUTO,
    original_count: int | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Integers:
    """Return the scene of each image: by near-duplicates and overlaps, or by the names of the files.

    original_count: number of the first images, if others were added to them (`near_duplicates`); None: all.

    Raises `InputError` for images that are all equal, and for a name that states no scene.
    """
    if group != finding.AUTO:
        return finding.scenes_by_name(good.scene_names, group)
    if len(set(good.digests)) == 1:
        raise InputError("data", "all images are equal: use images that show how good ones differ.")
    if good.points is None:
        raise ValueError("these images were opened without their points")
    duplicates_N = finding.near_duplicates(good.thumbnails_NF, good.digests, original_count, on_progress)
    return finding.merge(duplicates_N, overlapping(good.points))


def find_common_scenes(
    good: GoodImages, reviewed: GoodImages, group: str, on_progress: OnProgress = ignore_progress
) -> Integers:
    """Return the scene of each good and then of each reviewed image.

    Reviewed images need no names that state scenes: those whose names do, and near-duplicates, join their scene. With
    `--group image` only equal images do.
    """
    joined = good.join(reviewed)
    if group == finding.IMAGE:
        return finding.number(joined.digests)
    scenes_N = find_scenes(joined, original_count=len(good), on_progress=on_progress)
    if group == finding.AUTO:
        return scenes_N
    first: dict[str, int] = {}
    named = ((i, finding.scene_of_name(name, group)) for i, name in enumerate(joined.scene_names))
    pairs = [(first.setdefault(key, i), i) for i, key in named if key is not None and key != "."]
    return finding.merge(scenes_N, pairs)


def divide(
    scenes_N: Integers, false_positive_rate: float, confidence: float | None = None
) -> tuple[Integers, Integers]:
    """Return the positions of the estimation and of the ranking images, divided by scene.

    Of each block of consecutive scenes, one at random estimates. Every second or third one would be of one camera or
    cavity if images of two or three of them alternate, and the ranking images of the others.

    No scene ranks that would only lower the rate: at a rate of 5%, 59 scenes flag 3 ranks, 5% of good images on
    average, and 70 flag 3 ranks, 4.2%. The others estimate.

    Raises `InputError` for too few scenes, and for a rate or a confidence that is out of range.
    """
    count = int(scenes_N.max()) + 1
    needed = min_scenes(false_positive_rate, None)
    if count < MIN_ESTIMATION_SCENES + needed:
        subject, remedy = counted(count, "image"), ""
        if count < len(scenes_N):
            subject = f"{counted(count, 'scene')} ({counted(len(scenes_N), 'image')})"
            remedy = "; if each image shows a scene of its own, add --group image"
        raise InputError(
            "data",
            f"{subject} {'is' if count == 1 else 'are'} too few: use good images of at least "
            f"{MIN_ESTIMATION_SCENES + needed} scenes, {MIN_ESTIMATION_SCENES} to estimate and {needed} to rank at a "
            f"rate of {false_positive_rate:g}{remedy}.",
        )
    estimating = count - _ranking(count, false_positive_rate, confidence)
    is_estimating = np.zeros(count, bool)
    is_estimating[one_of_each_block(count, estimating)] = True
    is_estimating_N = is_estimating[scenes_N]
    return np.flatnonzero(is_estimating_N), np.flatnonzero(~is_estimating_N)


def _ranking(count: int, false_positive_rate: float, confidence: float | None) -> int:
    """Return how many of this many scenes rank."""
    at_most = max(count - round(ESTIMATION_SHARE * count), min_scenes(false_positive_rate, confidence))
    ranking = fewest_scenes(min(at_most, count - MIN_ESTIMATION_SCENES), false_positive_rate, confidence)
    return max(ranking, count - MAX_ESTIMATION_SCENES)


def reliable_scenes(false_positive_rate: float, confidence: float | None) -> int:
    """Return the fewest scenes of good images with which the rate of a detector is reliable."""
    needed = max(reliable_ranks(false_positive_rate), min_scenes(false_positive_rate, confidence))
    counts = range(needed + MIN_ESTIMATION_SCENES, 2 * needed + MAX_ESTIMATION_SCENES)
    return counts[bisect.bisect_left(counts, needed, key=lambda n: _ranking(n, false_positive_rate, confidence))]


def check_apart(
    taking_part: GoodImages, check: GoodImages, group: str, on_progress: OnProgress = ignore_progress
) -> None:
    """Raise `InputError` if an image shows a scene of those that have a part in a detector."""
    common_N = find_common_scenes(taking_part, check, group, on_progress)
    scenes = set(common_N[: len(taking_part)].tolist())
    names = [
        name for name, scene in zip(check.names, common_N[len(taking_part) :].tolist(), strict=True) if scene in scenes
    ]
    if names:
        alone = ", or, if each image shows a scene of its own, make a new detector with --group image"
        raise InputError(
            "check",
            f"{counted(len(names), 'image')} of {len(check)} cannot check the detector, because images of their scenes "
            f"have a part in it: remove {enumerated(names, MAX_NAMES)} from the folder, or, if these were reviewed "
            "because they had been flagged, use a folder of which no image was (the rest of this one would be flagged "
            f"too rarely){alone if group != finding.IMAGE else ''}.",
        )


def check_labels(good: GoodImages, defective: GoodImages) -> None:
    """Raise `InputError` if an image is among both, pixel by pixel: a near-duplicate may show the same part damaged."""
    digests = {*good.digests}
    names = [name for name, digest in zip(defective.names, defective.digests, strict=True) if digest in digests]
    if names:
        raise InputError(
            "defective",
            f"{counted(len(names), 'image')} of {len(defective)} defective ones {'is' if len(names) == 1 else 'are'} "
            f"among the good ones as well: remove {enumerated(names, MAX_NAMES)} from the folder, or from those of "
            "good images (on a service, delete the reviews).",
        )


@dataclass(frozen=True)
class DividedImages:
    """The good images of a detector and the reviewed ones, with their scenes, divided between both parts."""

    images: GoodImages
    """The good images, and the reviewed ones after them."""
    scenes_N: Integers
    estimating: Integers
    """Positions of the images that estimate, in order; the reviewed ones do."""
    ranking: Integers
    reviewed: int
    """Number of reviewed images."""

    @property
    def estimation_scenes(self) -> int:
        """Number of scenes that estimate."""
        return len(np.unique(self.scenes_N[self.estimating]))

    def one_of_each_ranking_scene(self) -> GoodImages:
        """Return the first image of each scene that ranks."""
        return self.images.take(self.ranking[np.unique(self.scenes_N[self.ranking], return_index=True)[1]])


@dataclass(frozen=True)
class DefectiveImages:
    """Images that should be flagged, and from which of them a detector learns."""

    images: GoodImages
    scenes_D: Integers
    are_learned_D: NDArray[np.bool_]
    """Whether none of its scene ranks, so that the score does not depend on what it ranks; the others only test it."""

    @classmethod
    def of(
        cls, divided: DividedImages, images: GoodImages | None, group: str, on_progress: OnProgress = ignore_progress
    ) -> Self:
        """Find the scenes of defective images, if there are any, as `find_common_scenes` does."""
        if images is None:
            return cls(divided.images.take([]), np.empty(0, np.int64), np.empty(0, np.bool_))
        common_N = find_common_scenes(divided.images, images, group, on_progress)
        scenes_D = common_N[len(divided.images) :]
        return cls(images, scenes_D, ~np.isin(scenes_D, common_N[divided.ranking]))


@dataclass(frozen=True)
class GoodScenes:
    """The scenes of good images, and of reviewed ones, which join those that estimate."""

    good: GoodImages
    scenes_N: Integers
    """The scene of each good image."""
    reviewed: GoodImages | None
    common_N: Integers | None
    """The scene of each image by near-duplicates and overlaps, with the reviewed ones last; None without any."""

    @classmethod
    def find(
        cls, good: GoodImages, reviewed: GoodImages | None, group: str, on_progress: OnProgress = ignore_progress
    ) -> Self:
        """Find scenes, as `find_scenes` and `find_common_scenes` do."""
        scenes_N = find_scenes(good, group, on_progress=on_progress)
        common_N = None if reviewed is None else find_common_scenes(good, reviewed, group, on_progress)
        return cls(good, scenes_N, reviewed, common_N)

    @property
    def near_duplicates(self) -> tuple[tuple[str, ...], ...]:
        """The names of good images that are one scene, for each scene of several."""
        groups: dict[int, list[str]] = {}
        for name, scene in zip(self.good.names, self.scenes_N.tolist(), strict=True):
            groups.setdefault(scene, []).append(name)
        return tuple(tuple(names) for names in groups.values() if len(names) > 1)

    def without(self, names: Set[str]) -> GoodScenes:
        """Leave out good images by name."""
        kept = np.array([i for i, name in enumerate(self.good.names) if name not in names], np.int64)
        common_N = self.common_N
        if common_N is not None:
            common_N = np.concatenate([common_N[kept], common_N[len(self.good) :]])
        return GoodScenes(self.good.take(kept), _renumber(self.scenes_N[kept]), self.reviewed, common_N)

    def divide(self, false_positive_rate: float, confidence: float | None) -> DividedImages:
        """Divide the good images, and let the reviewed ones estimate.

        Raises `InputError` as `divide` does, and `RankedScenesError`.
        """
        good, scenes_N, reviewed, common_N = self.good, self.scenes_N, self.reviewed, self.common_N
        estimating, ranking = divide(scenes_N, false_positive_rate, confidence)
        if reviewed is None or common_N is None:
            return DividedImages(good, scenes_N, estimating, ranking, 0)
        joined = good.join(reviewed)
        ranked = set(common_N[ranking].tolist())
        refused = [joined.names[i] for i in range(len(good), len(joined)) if int(common_N[i]) in ranked]
        if refused:
            raise RankedScenesError(refused)
        scene_of = {int(common_N[i]): int(scenes_N[i]) for i in estimating}
        for scene in np.unique(common_N[len(good) :]).tolist():
            scene_of.setdefault(scene, int(scenes_N.max()) + 1 + scene)
        own_N = np.array([scene_of[int(scene)] for scene in common_N[len(good) :]], np.int64)
        all_scenes_N = _renumber(np.concatenate([scenes_N, own_N]))
        all_estimating = np.concatenate([estimating, np.arange(len(good), len(joined))])
        return DividedImages(joined, all_scenes_N, all_estimating, ranking, len(reviewed))


def _renumber(scenes_N: Integers) -> Integers:
    """Number scenes from 0."""
    return np.unique(scenes_N, return_inverse=True)[1].astype(np.int64)
