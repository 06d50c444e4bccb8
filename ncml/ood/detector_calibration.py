"""A detector's calibration, without the networks and banks of its views. Does not import torch.

A detector judges an image at its own size by several views (`ncml.ood.views`). Each score of a view is standardised by
the estimation images: z = (s - median) / deviation, where the deviation is that of a normal distribution with the same
mean excess over the median. The score of the image is the root of the sum over views of weight x max(0, z)^2, with
weights that are learned from altered estimation images and from defective images (`ncml.ood.weights`; that of known
defects is fixed): what is ordinary in one view does not make up for what is unusual in another. This function is fixed
before a ranking image is looked at. Its values are ranked once (`ncml.ood.scene_ranks`), so the p-value is valid for
any number of views.

`detector.json` holds the calibration, `detector.safetensors` the arrays of the views, and `detector.jpg` examples of
what it finds and misses.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ncml import checkpoint
from ncml.errors import InputError, ModelError
from ncml.images.decoding import is_grey
from ncml.images.region import Region
from ncml.limits import DETECTOR
from ncml.ood import conformal, storage
from ncml.ood.conformal import Floats
from ncml.ood.detector_power import DetectorPower
from ncml.ood.power import explain_few
from ncml.ood.scene_ranks import SceneRanks, cutoff, flagged_ranks, rate_bound

NAME, STATISTIC = DETECTOR, "weighted views"
FORMAT = 7
FILE, TENSORS, NEW_TENSORS = checkpoint.DETECTOR, checkpoint.DETECTOR_ARRAYS, checkpoint.NEW_DETECTOR_ARRAYS
REMEDY = "make the detector again with ncml adapt"
BOUND_CONFIDENCE = 0.95
"""Confidence of the bound of the rate that is reported."""
MIN_DEVIATION = 1e-6
CLIP = 10.0
"""Excesses over the median count as at most this many times their own median: an outlier does not hide a view."""
HIGH_THRESHOLD = 15.0
"""Threshold from which a detector is weak unless its power is measured; measured ones are 2 to 9."""
NORMAL_EXCESS = 0.7979
"""Mean excess over the median of the upper half of a standard normal distribution."""


@dataclass(frozen=True)
class Scale:
    """How a score of a view is standardised, and its weight in the score of an image."""

    median: float
    """The median of good images, which is 0 when standardised."""
    deviation: float
    weight: float = 1.0

    @classmethod
    def estimate(cls, scores_N: Floats, least_deviation: float = MIN_DEVIATION) -> Self:
        """Estimate from the scores of good images, with weight 1. least_deviation: in units of the score."""
        median = float(np.median(scores_N))
        deviation = max(least_deviation, abs(median) * MIN_DEVIATION)
        excess = scores_N[scores_N > median] - median
        if len(excess):
            clipped = np.minimum(excess, CLIP * np.median(excess))
            deviation = max(deviation, float(clipped.mean()) / NORMAL_EXCESS)
        return cls(median, deviation)

    def standardise(self, score: float) -> float:
        """Return the standardised score."""
        return (score - self.median) / self.deviation

    def square(self, score: float) -> float:
        """Return what the score adds to the square of that of the image."""
        excess = max(0.0, self.standardise(score))
        return self.weight * excess * excess


@dataclass(frozen=True)
class DetectorCalibration:
    """How a detector turns the scores of its views into a p-value."""

    name: ClassVar[str] = NAME
    statistic: ClassVar[str] = STATISTIC
    """What is ranked."""

    model_version: str
    """The version of the model in the folder."""
    scales: Mapping[str, Scale]
    """By score of a view."""
    ranks: SceneRanks
    """The scores of the ranking images."""
    n_fit: int
    """Number of estimation images."""
    estimation_scenes: int
    false_positive_rate: float
    confidence: float | None
    """The probability with which the rate of this very calibration is at most the false-positive rate; None: it is so
    on average."""
    views: Mapping[str, Mapping[str, Any]]
    """The values of each stored view, by kind."""
    tensors: str
    """SHA-256 of the file of the views' arrays."""
    descriptions: Mapping[str, str]
    """At which size each view judges, a sentence by kind."""
    notes: tuple[str, ...] = ()
    """What should be known about the good images, a sentence each."""
    sizes: Mapping[str, int] | None = None
    """Number of good images by width x height."""
    grey_images: int = 0
    """Number of good images whose channels are equal."""
    region: Region | None = None
    """The only part of an image that is judged; None: all of it."""
    brightness: float = 0.0
    """Share by which good images may be brighter or darker than those that it was made from."""
    learned_defective: int = 0
    """Number of defective images from which the detector has learned."""
    power: DetectorPower | None = None

    @property
    def n_rank(self) -> int:
        """Number of ranking images."""
        return len(self.ranks.scores_N)

    @property
    def smallest_p(self) -> float:
        """The smallest possible p-value."""
        return 1 / (self.ranks.scenes + 1)

    @functools.cached_property
    def cutoff(self) -> float:
        """The p-value at or below which an image is flagged."""
        return cutoff(self.ranks.scenes, self.false_positive_rate, self.confidence)

    @functools.cached_property
    def threshold(self) -> float:
        """The score above which an image is flagged."""
        return self.ranks.threshold(self.cutoff)

    @property
    def rate_bound(self) -> float:
        """The share of good images that this very calibration flags at most, with a confidence of 95%."""
        scenes = self.ranks.scenes
        return rate_bound(flagged_ranks(scenes, self.cutoff), scenes, BOUND_CONFIDENCE)

    @property
    def weakness(self) -> str:
        """Why the calibration is weak, in a clause; "" if it is not."""
        if few := explain_few(self.ranks.scenes, self.false_positive_rate, "scenes"):
            return few
        if self.power is not None:
            return self.power.weakness
        if self.threshold > HIGH_THRESHOLD:
            return f"its threshold, {self.threshold:.0f}, is far above most good images, which hides most defects"
        return ""

    @property
    def is_weak(self) -> bool:
        """Whether the calibration is weak."""
        return bool(self.weakness)

    @functools.cached_property
    def version(self) -> str:
        """SHA-256 of the content, 64 hexadecimal digits."""
        return storage.digest(self._content())

    @property
    def aligns(self) -> bool:
        """Whether parts are brought to one position before they are compared."""
        return bool(self.views.get("features", {}).get("aligned"))

    def squares(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Return what each view adds to the square of the score of the image.

        Raises `InputError` for one that is not finite: NaN is above no other, so its image would pass for a good one.
        """
        for name, score in scores.items():
            if not math.isfinite(score):
                remedy = "save it again as PNG, or compute on another device"
                raise InputError("image", f"image has a score {name} that is not finite: {remedy}.")
        return {name: self.scales[name].square(score) for name, score in scores.items()}

    def differences(self, image_HWC: NDArray[np.uint8]) -> tuple[str, ...]:
        """Return what distinguishes an image from all good ones at first sight: its size, and whether it is grey.

        Another size says little if further good images are expected to have new ones more often than they are flagged;
        the expected share is that of the sizes seen once (Good, 1953).
        """
        if not self.sizes:
            return ()
        images = sum(self.sizes.values())
        differences: list[str] = []
        size = f"{image_HWC.shape[1]}x{image_HWC.shape[0]}"
        seen_once = sum(number == 1 for number in self.sizes.values())
        if size not in self.sizes and seen_once <= self.false_positive_rate * images:
            usual, _ = max(self.sizes.items(), key=lambda item: item[1])
            differences.append(f"no good image has its size, {size}; most have {usual}")
        if self.grey_images == 0 and is_grey(image_HWC):
            differences.append("it is grey, and no good image is")
        if self.grey_images == images and not is_grey(image_HWC):
            differences.append("it has colours, and good images are grey")
        return tuple(differences)

    def p_value(self, score: float) -> float:
        """Return the p-value of an image with this score."""
        return float(self.ranks.p_values(score))

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "name": NAME,
            "model_version": self.model_version,
            "preprocessing": storage.PREPROCESSING,
            "false_positive_rate": self.false_positive_rate,
            "confidence": self.confidence,
            "estimation": [self.n_fit, self.estimation_scenes],
            "scales": {name: [scale.median, scale.deviation, scale.weight] for name, scale in self.scales.items()},
            "ranked": self.ranks.scores_N.tolist(),
            "scenes": self.ranks.scenes_N.tolist(),
            "views": {kind: dict(values) for kind, values in self.views.items()},
            "tensors": self.tensors,
            "descriptions": dict(self.descriptions),
            "notes": list(self.notes),
            "sizes": dict(self.sizes or {}),
            "grey_images": self.grey_images,
            "region": self.region and self.region.to_json(),
            # Detectors had none of these before.
            **({"brightness": self.brightness} if self.brightness else {}),
            **({"learned_defective": self.learned_defective} if self.learned_defective else {}),
        }

    def save(self, folder: Path) -> None:
        """Write `detector.json` into the model folder; the arrays must be there already."""
        unsigned = {} if self.power is None else {"power": self.power.to_json()}
        storage.write(folder / FILE, self._content(), unsigned)

    @classmethod
    def read(cls, folder: Path, model_version: str) -> DetectorCalibration:
        """Read `detector.json`; raise `ModelError` if it is damaged, of a newer format or of another model."""
        path = folder / FILE
        return cls.from_json(checkpoint.read_json(path, checkpoint.MAX_CALIBRATION_BYTES), path, model_version)

    @classmethod
    def from_json(cls, stored: dict[str, Any], path: Path, model_version: str) -> DetectorCalibration:
        """Rebuild what `save` wrote into a file, which errors name; raise `ModelError` as `read` does."""
        number = stored.get("format")
        if type(number) is int and number > FORMAT:
            raise storage.NewerFormat(f"{path} has format {number}, newer than {FORMAT}: upgrade ncml.")
        try:
            content = storage.check(path, stored, model_version, expected_format=FORMAT)
        except ModelError as error:
            raise ModelError(str(error).replace(storage.REMEDY, REMEDY)) from error
        with storage.refusing_damage(path):
            scores_N = storage.ranks(content["ranked"])
            scenes_N = storage.floats(content["scenes"], len(scores_N)).astype(np.int64)
            numbers = np.unique(scenes_N)
            if not np.array_equal(numbers, np.arange(len(numbers))):
                raise ValueError("its scenes are not numbered from 0")
            scales = {
                str(name): Scale(*storage.floats(values, 3).tolist()) for name, values in content["scales"].items()
            }
            if any(scale.deviation <= 0 or scale.weight < 0 for scale in scales.values()):
                raise ValueError("a deviation is not positive, or a weight is negative")
            if not any(scale.weight for scale in scales.values()):
                raise ValueError("no view has a weight")
            rate, confidence = float(storage.floats(content["false_positive_rate"])), content["confidence"]
            conformal.check_rate(rate)
            images, scenes = map(storage.count, content["estimation"])
            power = stored.get("power")
            calibration = cls(
                model_version,
                scales,
                SceneRanks(scores_N, scenes_N),
                images,
                scenes,
                rate,
                None if confidence is None else float(storage.floats(confidence)),
                {str(kind): dict(values) for kind, values in content["views"].items()},
                str(content["tensors"]),
                {str(kind): str(text) for kind, text in content["descriptions"].items()},
                tuple(map(str, content["notes"])),
                {str(size): storage.count(number) for size, number in content["sizes"].items()},
                storage.count(content["grey_images"], 0),
                None if content["region"] is None else Region.from_json(content["region"]),
                float(storage.floats(content.get("brightness", 0.0))),
                storage.count(content.get("learned_defective", 0), 0),
                None if power is None else DetectorPower.from_json(power),
            )
            _ = calibration.threshold  # fails for impossible values
            return calibration


def read_if_present(folder: Path, model_version: str) -> DetectorCalibration | None:
    """Return the calibration of a detector, if the folder is one. Raises `ModelError` if it cannot be used."""
    return DetectorCalibration.read(folder, model_version) if (folder / FILE).is_file() else None


def adopt_arrays(folder: Path) -> None:
    """Put the new arrays of a detector in place of the earlier ones if `detector.json` names them, else delete them.

    A process that was killed before it did so has left them.
    """
    new = folder / NEW_TENSORS
    if not new.is_file():
        return
    named = None
    with contextlib.suppress(ModelError):  # a missing or damaged `detector.json` names none
        named = checkpoint.read_json(folder / FILE, checkpoint.MAX_CALIBRATION_BYTES).get("tensors")
    if named == file_digest(new):
        new.replace(folder / TENSORS)
    else:
        new.unlink()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits; raise `ModelError` if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): {REMEDY}.") from error
