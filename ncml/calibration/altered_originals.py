"""Measure the power of a detector on altered good images, in their own pixels, and show examples."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np

from ncml.calibration.good_scores import is_flagged
from ncml.calibration.power_pictures import PowerPictures
from ncml.data.blocks import one_of_each_block
from ncml.data.good_images import GoodImages
from ncml.images.alterations import ALTERATIONS
from ncml.images.tiling import Box
from ncml.ood.detector_power import DetectorPower
from ncml.ood.judging import Detector
from ncml.ood.views.view import Pixels
from ncml.progress import OnProgress, Progress, StopMeasuring, ignore_progress

POWER_IMAGES = 20
"""Number of ranking images that are altered, enough to distinguish nine of ten from half."""


def measure_power(
    detector: Detector,
    good: GoodImages,
    *,
    count: int = POWER_IMAGES,
    on_progress: OnProgress = ignore_progress,
) -> tuple[DetectorPower, bytes] | None:
    """Return the shares of altered images that are flagged, and a sheet of examples, a JPEG.

    If `on_progress` raises `StopMeasuring`, they are those of the alterations so far, or None before the first image
    has been altered in all ways.

    good: ranking images of different scenes, of which `count` are taken, spread over their order; none of them
        estimated the views. An image that is too small for an alteration is left out of it. Marks and parts lie in the
        region that the detector judges.

    Raises `InputError` with the name of an altered image that cannot be judged.
    """
    count = min(count, len(good))
    selected = good.take(one_of_each_block(len(good), count).tolist())
    readers = selected.readers(selected.all)
    flagged: dict[str, dict[str, list[bool]]] = {}
    pictures = PowerPictures()
    foreign: dict[str, list[bool]] = {"one colour": [], "random values": []}
    total, steps, complete = count * (len(ALTERATIONS) + len(foreign)), itertools.count(1), 0

    def judge_altered(name: str, seed: int, image_HWC: Pixels, other_HWC: Pixels) -> None:
        height, width = image_HWC.shape[:2]
        region = detector.calibration.region
        box = Box(0, 0, width, height) if region is None else region.rectangle()
        for alteration in ALTERATIONS:
            if alteration.fits(box.height, box.width):
                altered = alteration.apply(image_HWC, seed, other_HWC=other_HWC, region=box)
                finds = is_flagged(detector, altered.image_HWC, f"{name} ({alteration.name})")
                pictures.add(alteration, finds, image_HWC, altered, box)
                flagged.setdefault(alteration.kind, {}).setdefault(alteration.size, []).append(finds)
            on_progress(Progress("power", next(steps), total))
        for kind, foreign_HWC in _foreign(image_HWC, seed).items():
            foreign[kind].append(is_flagged(detector, foreign_HWC, f"{name} ({kind})"))
            on_progress(Progress("power", next(steps), total))

    first_HWC = other_HWC = readers[0]()
    with contextlib.suppress(StopMeasuring):
        for seed, name in enumerate(selected.names):
            image_HWC, other_HWC = other_HWC, first_HWC if seed + 1 == count else readers[seed + 1]()
            judge_altered(name, seed, image_HWC, other_HWC)
            complete += 1
    if not complete:
        return None
    power = DetectorPower(
        complete,
        {kind: {size: float(np.mean(results)) for size, results in sizes.items()} for kind, sizes in flagged.items()},
        {kind: float(np.mean(results)) for kind, results in foreign.items()},
    )
    sheet, shown = pictures.sheet(power.shares)
    return power.with_pictures(sheet, shown), sheet


def _foreign(like_HWC: Pixels, seed: int) -> dict[str, Pixels]:
    rng = np.random.default_rng(seed)
    colour = np.broadcast_to(rng.integers(0, 256, (1, 1, 3), np.uint8), like_HWC.shape).copy()
    return {"one colour": colour, "random values": rng.integers(0, 256, like_HWC.shape, np.uint8)}
