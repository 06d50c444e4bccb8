"""Calibrate a folder of good images: the one place where a detector is assembled.

1. Find the scenes, and divide them between estimation and ranking.
2. Estimate the views on the estimation images, standardise their scores, and weight them by what they find in altered
   estimation images and in defective images, if there are any.
3. Rank the scores of the ranking images; the views are those that will be loaded from the folder.
4. Measure the power on altered ranking images.

Shapes: N good images.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ncml import checkpoint
from ncml.calibration.altered_originals import POWER_IMAGES, measure_power
from ncml.calibration.division import DefectiveImages, DividedImages, GoodScenes, check_apart, check_labels
from ncml.calibration.good_image_notes import describe_good_images
from ncml.calibration.good_scores import is_flagged
from ncml.calibration.view_estimation import measure_images, region_readers
from ncml.data import kept_images
from ncml.data import scenes as finding
from ncml.data.good_images import MIN_SIDE, GoodImages, check_brightness
from ncml.errors import InputError
from ncml.images.alterations import ALTERATIONS
from ncml.images.region import Region
from ncml.images.tiling import Box
from ncml.model import Model
from ncml.network import efficientnet
from ncml.ood.detector_calibration import DetectorCalibration, Scale, adopt_arrays
from ncml.ood.judging import Detector, save_views
from ncml.ood.scene_ranks import cutoff
from ncml.ood.views import patches
from ncml.paths import check_space, find_detector_base, printable
from ncml.progress import OnProgress, Progress, ignore_progress

DETECTOR_BYTES = 128 * 2**20
"""Space for what a detector adds to a copy of the model, mostly the patches by place."""
JUDGING_PASSES, ESTIMATION_PASSES = 6, 10
"""Time to judge an image, and to estimate the views from one, in passes of the feature network."""
SUSPICIOUS = 6.0
"""Standardised score from which an image is shown as unlike the others."""
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
    """The score of the image."""
    view: str


@dataclass(frozen=True)
class Reviews:
    """What became of images that were flagged although they are good, of defective ones and of others that are good."""

    images: int
    still_flagged: int
    """How many the images of other scenes would not keep from being flagged again."""
    defective: int
    learned: int
    """From how many of the defective images the detector has learned."""
    are_found: tuple[bool, ...]
    """Whether each defective image is flagged by what is learned without it (`GoodScores.are_found`)."""
    checked: int
    flagged: int
    """How many of the good images that have no part in the detector are flagged."""

    @property
    def found(self) -> int:
        """How many of the defective images are flagged, each by what is learned without it."""
        return sum(self.are_found)


@dataclass(frozen=True)
class MadeDetector:
    """A detector in a model folder, and what was found about its good images."""

    folder: Path
    calibration: DetectorCalibration
    near_duplicates: tuple[tuple[str, ...], ...]
    """Names of images that are one scene, for each scene of several."""
    suspects: tuple[Suspect, ...]
    left_out: tuple[str, ...]
    threshold_with_suspects: float | None
    """The threshold before suspects were left out; None if none were."""
    threshold_without_suspects: float | None
    """The threshold if suspects did not rank, with the same views and scales; None if none ranks, or too few others."""
    reviews: Reviews
    images_to_check: tuple[str, ...]
    """Lines that name the images that its notes count."""

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
    brightness: float = 0.0,
    device: str = "cpu",
    on_estimate: Callable[[float], object] = lambda seconds: None,
    on_calibrated: Callable[[MadeDetector], object] = lambda made: None,
    on_message: Callable[[str], None] = lambda line: None,
    on_progress: OnProgress = ignore_progress,
) -> MadeDetector:
    """Make a detector from good images, in a folder that becomes a copy of the model unless it is one.

    confidence: the probability with which the rate of this very calibration is at most the false-positive rate.
    leave_out: whether suspects are left out of both parts, and the detector is made again without them.
    reviewed: images that a detector flagged although they are good. They estimate and never rank, so that the rate
        holds, and the scales are those of the other images, except of scores that images change by nothing else.
    defective: images that should be flagged. The view of known defects and the weights are learned from them, but from
        none that shows a scene of ranking images, so that the rate holds; and they test the detector. None is among the
        good ones.
    check: further good images, which only test it; they show no scene of the others.
    keep_images: whether the folder keeps copies of the good, reviewed and defective images, so that the detector can be
        updated.
    power_images: number of ranking images that are altered to measure the power; 0 does not measure it.
    region: the only part of the images that is judged, in pixels, or a mask [H, W]; all images must then have one size.
    align: whether parts may be brought to one position before they are compared, if good images agree better so.
    brightness: share by which further good images may be brighter or darker, up to `MAX_BRIGHTNESS`. The brightness of
        the good and the reviewed images is changed by random factors from 1 / (1 + this) to 1 + this.
    on_estimate: called with the seconds that the detector will take without its power, before it is computed; what it
        raises ends the call.
    on_calibrated: called with the detector once it is in its folder, before its power is measured.

    Raises `InputError` for too few images or scenes, for images or a region that cannot be judged, and for a detector
    that another process makes in the folder meanwhile, which stays; `OSError` for a disk without space for the
    detector, before anything is computed. A `KeyboardInterrupt` while the power is measured says that the detector is
    complete without it; `StopMeasuring` of `on_progress` ends that measurement.
    """
    checkpoint.check_copy(model.folder, folder)
    check_brightness(brightness)
    find_detector_base()  # before minutes of computing: the last view needs it
    former = checkpoint.detector_version(folder)
    taking_part = good if reviewed is None else good.join(reviewed)
    if defective is not None:
        check_labels(taking_part if check is None else taking_part.join(check), defective)
    if check is not None:
        check_apart(taking_part if defective is None else taking_part.join(defective), check, group, on_progress)
    tests = [images for images in (defective, check) if images is not None]
    judged = None if region is None else _region(functools.reduce(GoodImages.join, tests, taking_part), region)
    kept_bytes = kept_images.kept_bytes(good, reviewed, defective) if keep_images else 0
    check_space(folder, checkpoint.copy_bytes(model.folder) + DETECTOR_BYTES + kept_bytes)
    scenes = GoodScenes.find(good, reviewed, group, on_progress)
    duplicates = scenes.near_duplicates
    divided = scenes.divide(false_positive_rate, confidence)
    learned = DefectiveImages.of(divided, defective, group, on_progress)
    example_HWC = region_readers(divided.images, divided.estimating[:1], judged)[0]()
    if efficientnet.is_available():
        pass_seconds = patches.pass_seconds(example_HWC, device)
        calibrating = _calibration_seconds(pass_seconds, divided, len(learned.images))
        on_estimate(calibrating)
        on_message(_describe_time(calibrating, pass_seconds, divided, power_images))
    started = time.monotonic()
    measure = functools.partial(
        measure_images,
        region=judged,
        align=align,
        brightness=brightness,
        device=device,
        on_message=on_message,
        on_progress=on_progress,
    )
    views, scores, lost = measure(divided, learned)
    suspects = _suspects(good, scores.combined_N[: len(good)], scores.leading_views_N)
    without = scores.threshold_without({suspect.position for suspect in suspects}, false_positive_rate, confidence)
    before = None
    left_out: tuple[str, ...] = ()
    if leave_out and suspects:
        before = scores.ranks.threshold(cutoff(scores.ranks.scenes, false_positive_rate, confidence))
        names = {suspect.name for suspect in suspects[: max(1, int(MAX_SUSPICIOUS_SHARE * len(good)))]}
        left_out = tuple(name for name in good.names if name in names)
        scenes = scenes.without(names)
        divided = scenes.divide(false_positive_rate, confidence)
        learned = DefectiveImages.of(divided, defective, group, on_progress)
        views, scores, lost = measure(divided, learned)
    if checkpoint.detector_version(folder) != former:  # its images are not among these, so replacing it would lose them
        raise _made_meanwhile(folder, "made while this one was measured")
    levels = len(np.unique(example_HWC))
    notes = describe_good_images(divided.images, judged, brightness, views, duplicates, lost, levels)
    with _replacing(folder) as written:
        checkpoint.copy(model.folder, written)
        if keep_images:  # while an earlier detector is whole: a kill leaves it with its images or with these
            kept_images.keep(written, scenes.good, reviewed, defective, group)
        else:
            kept_images.discard(written)
        values, digest = save_views(written, views)
        calibration = DetectorCalibration(
            model.version,
            scores.scales,
            scores.ranks,
            len(divided.estimating),
            divided.estimation_scenes,
            false_positive_rate,
            confidence,
            values,
            digest,
            {kind: view.description for kind, view in views.items()},
            notes=notes.stored,
            sizes=Counter(f"{image.shape[1]}x{image.shape[0]}" for image in divided.images.images),
            grey_images=sum(image.is_grey for image in divided.images.images),
            region=judged,
            brightness=brightness,
            learned_defective=int(learned.are_learned_D.sum()),
        )
        calibration.save(written)
        adopt_arrays(written)
        (written / checkpoint.DETECTOR_PICTURES).unlink(missing_ok=True)
    detector = Detector(calibration, views)
    reviews = Reviews(  # before minutes of measuring the power: one of the images that test may be refused
        divided.reviewed,
        scores.count_flagged_again(calibration.cutoff),
        len(learned.images),
        calibration.learned_defective,
        tuple(scores.are_found(calibration.cutoff).tolist()),
        *count_flagged(detector, check, on_progress),
    )
    made = MadeDetector(
        folder, calibration, duplicates, tuple(suspects), left_out, before, without, reviews, notes.images_to_check
    )
    on_calibrated(made)
    if not power_images:
        return made
    on_message(f"the detector is calibrated after {time.monotonic() - started:.0f} s; its power is measured next")
    return _with_power(made, detector, divided.one_of_each_ranking_scene(), power_images, on_progress)


def _with_power(
    made: MadeDetector, detector: Detector, images: GoodImages, count: int, on_progress: OnProgress
) -> MadeDetector:
    """Measure the power of a detector on ranking images, and add it to its folder.

    count: how many of them are altered at most.
    """
    folder, calibration = made.folder, made.calibration
    try:
        measured = measure_power(detector, images, count=count, on_progress=on_progress)
    except KeyboardInterrupt as stop:
        message = f"stopped: {printable(folder)} is complete without its power, which was not measured"
        raise KeyboardInterrupt(message) from stop
    if measured is None:
        return made
    power, sheet = measured
    if checkpoint.detector_version(folder) != calibration.version:
        raise _made_meanwhile(folder, "made while the power of this one was measured")
    if power.sheet:
        checkpoint.replace_file(folder / checkpoint.DETECTOR_PICTURES, lambda new: new.write_bytes(sheet))
    made = replace(made, calibration=replace(calibration, power=power))
    made.calibration.save(folder)
    return made


def _made_meanwhile(folder: Path, when: str) -> InputError:
    """Return the error for a detector that another process has made in the folder."""
    reason = f"{printable(folder)} holds another detector, {when}"
    return InputError("out", f"{reason}: make each in its own folder, or run this again.")


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


def count_flagged(
    detector: Detector, images: GoodImages | None, on_progress: OnProgress = ignore_progress
) -> tuple[int, int]:
    """Return the number of images, and how many of them a detector flags; `InputError` names one without a score."""
    if images is None:
        return 0, 0
    flagged = 0
    for done, (name, reader) in enumerate(zip(images.names, images.readers(images.all), strict=True)):
        flagged += is_flagged(detector, reader(), name)
        on_progress(Progress("test", done + 1, len(images)))
    return len(images), flagged


def _region(good: GoodImages, named: Box | NDArray[np.bool_]) -> Region:
    """Return a region of good images; raise `InputError` if they have several sizes, or it is outside or too small."""
    shape, *other_shapes = {image.shape for image in good.images}
    if other_shapes:
        raise InputError("region", "a region needs images of one size: bring them to one, or omit --region.")
    if isinstance(named, Box):
        region = Region(named, *shape)
    elif named.shape == shape:
        region = Region.of_mask(named)
    else:
        (height, width), (own_height, own_width) = shape, named.shape
        raise InputError(
            "region",
            f"the mask of {own_width}x{own_height} pixels does not have the size of the images, {width}x{height}: "
            "draw it at that size.",
        )
    if min(region.box.width, region.box.height) < MIN_SIDE:
        raise InputError("region", f"a region must have at least {MIN_SIDE} pixels on each side: name a larger one.")
    return region


def _calibration_seconds(pass_seconds: float, divided: DividedImages, defective: int) -> float:
    """Return an estimate of the time to the calibration from that of one pass."""
    judging = len(divided.ranking) + len(ALTERATIONS) + 2 * defective  # which are learned from before they are judged
    return pass_seconds * (ESTIMATION_PASSES * len(divided.estimating) + JUDGING_PASSES * judging)


def _describe_time(calibrating: float, pass_seconds: float, divided: DividedImages, power_images: int) -> str:
    """Return a line with the time to the calibration, and an estimate of that to the power."""
    line = f"about {calibrating:.0f} s until the detector is calibrated"
    if power_images:
        measuring = pass_seconds * JUDGING_PASSES * min(power_images, len(divided.ranking)) * len(ALTERATIONS)
        line += f", and {measuring:.0f} s more to measure its power"
    return line


def _suspects(good: GoodImages, scores_N: np.ndarray, views_N: list[str]) -> list[Suspect]:
    """Return the images that are unlike the others, the most unlike first."""
    typical = Scale.estimate(scores_N)
    order = np.argsort(-scores_N)
    return [
        Suspect(good.names[i], good.images[i].path, i, float(scores_N[i]), views_N[i])
        for i in order.tolist()
        if typical.standardise(float(scores_N[i])) > SUSPICIOUS
    ]
