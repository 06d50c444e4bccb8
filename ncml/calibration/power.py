"""Measure the power of a calibration on held-out images."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ncml.images.perturbations import ALTERATIONS, PROCESSING, Perturbation
from ncml.model import Model
from ncml.ood.calibration import Calibration
from ncml.ood.conformal import Floats
from ncml.ood.measurements import measure
from ncml.ood.power import Power
from ncml.progress import OnProgress, Progress, ignore_progress

IMAGES = 100
"""Held-out images that are judged unchanged and after each change."""
GENERATED = 50
"""Images of one colour, of random values, and that the model generates."""

ROUNDING = 1e-4
"""By how much, relatively, two scores of one image may differ between batches."""

Pixels = NDArray[np.uint8]


def measure_power(
    model: Model,
    calibration: Calibration,
    images_NHWC: Pixels,
    own_N: Floats,
    *,
    foreign: Mapping[str, Pixels] | None = None,
    batch_size: int = 32,
    on_progress: OnProgress = ignore_progress,
) -> Power:
    """Measure which shares of images the calibration flags.

    images_NHWC: ranking images as they are. own_N: the score that ranks for each of them, which is left out when the
        unchanged image is judged.
    foreign: images from elsewhere by name, beside images of one colour and of random values.
    """
    statistic = model.statistics[calibration.statistic]
    ranked, rate = calibration.ranked[calibration.statistic], calibration.false_positive_rate
    sets = {name: partial(_perturb, images_NHWC, change) for name, change in {**PROCESSING, **ALTERATIONS}.items()}
    elsewhere = {"one colour": _one_colour(images_NHWC), "random values": _random(images_NHWC), **(foreign or {})}
    total = len(images_NHWC) * (1 + len(sets)) + sum(map(len, elsewhere.values()))
    done = 0

    def score(pixels: Pixels) -> Floats:
        nonlocal done
        batches: list[Floats] = []
        for start in range(0, len(pixels), batch_size):
            columns, _ = measure(model.network, pixels[start : start + batch_size], statistic.needs)
            batches.append(statistic.compute(columns, calibration.estimates))
            done += len(batches[-1])
            on_progress(Progress("power", done, total))
        return np.concatenate(batches)

    def flagged(pixels: Pixels) -> float:
        return float((calibration.p_values(calibration.statistic, score(pixels)) <= rate).mean())

    scores_N = score(images_NHWC)
    lowered_N = scores_N * (1 - ROUNDING)  # so that an image's own score always counts before it is left out
    others_N = len(ranked) - np.searchsorted(ranked, lowered_N, side="left") - (own_N >= lowered_N)
    good = float(((1 + others_N) / len(ranked) <= rate).mean())
    shares = {name: flagged(perturb()) for name, perturb in sets.items()}
    return Power(
        images=len(images_NHWC),
        good=good,
        processed={name: shares[name] for name in PROCESSING},
        altered={name: shares[name] for name in ALTERATIONS},
        foreign={name: flagged(pixels) for name, pixels in elsewhere.items()},
    )


def generate_foreign(model: Model, on_progress: OnProgress = ignore_progress) -> dict[str, Pixels]:
    """Return images that the model generates, by name: foreign to a calibration on other images than the model's own.

    They do not stand for its training images: they are flagged much more often.
    """
    return {"images that the model generates": model.generate(GENERATED, callback=on_progress)}


def _perturb(images_NHWC: Pixels, change: Perturbation) -> Pixels:
    return np.stack([change(image, np.random.default_rng(i)) for i, image in enumerate(images_NHWC)])


def _one_colour(like_NHWC: Pixels) -> Pixels:
    _, height, width, channels = like_NHWC.shape
    colours = np.random.default_rng(0).integers(0, 256, (GENERATED, 1, 1, channels), np.uint8)
    return np.broadcast_to(colours, (GENERATED, height, width, channels)).copy()


def _random(like_NHWC: Pixels) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (GENERATED, *like_NHWC.shape[1:]), np.uint8)
