"""A detector with its views: judges images at their own size.

Shapes: H rows and W columns of an image, h and w of a map.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from ncml import checkpoint
from ncml.data.good_images import check_side
from ncml.errors import ModelError
from ncml.ood import storage
from ncml.ood.detection import detect, scores_of
from ncml.ood.detector_calibration import (
    FILE,
    NEW_TENSORS,
    REMEDY,
    TENSORS,
    DetectorCalibration,
    adopt_arrays,
    file_digest,
)
from ncml.ood.views.appearance import AppearanceView
from ncml.ood.views.features import FeaturesView
from ncml.ood.views.likelihood import LikelihoodView
from ncml.ood.views.view import Measurement, Pixels, Stored, View
from ncml.results import Detection

VIEWS: dict[str, type[View]] = {view.kind: view for view in (FeaturesView, AppearanceView, LikelihoodView)}
"""The views by kind, in the order in which they are computed."""


class Detector:
    """A detector: its calibration, and its views on a device."""

    def __init__(self, calibration: DetectorCalibration, views: Mapping[str, View]) -> None:
        self.calibration = calibration
        self.views = views

    @classmethod
    def load(cls, folder: Path, calibration: DetectorCalibration, device: str = "cpu") -> Detector:
        """Load the views of a detector; raise `ModelError` for damaged files, or without a network that it needs."""
        path = _find_arrays(folder, calibration.tensors)
        views: dict[str, View] = {}
        with storage.refusing_damage(path):
            tensors = load_file(path)
            for kind, values in calibration.views.items():
                prefix = f"{kind}/"
                own = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
                if kind not in VIEWS:
                    raise ModelError(f"{folder / FILE} has the view {kind!r}, which this ncml lacks: upgrade ncml.")
                try:
                    views[kind] = VIEWS[kind].load(Stored(own, values), device=device)
                except ModelError as error:
                    raise ModelError(f"the detector {folder} cannot be used: {error}") from error
        names = [name for view in views.values() for name in view.names]
        if sorted(names) != sorted(calibration.scales):
            raise ModelError(f"{folder / FILE} is damaged (its views do not match its scales): {REMEDY}.")
        return cls(calibration, views)

    def flags(self, image_HWC: Pixels) -> bool:
        """Return whether an image is flagged; no further view is computed once the score exceeds the threshold."""
        judged_HWC = self._crop(image_HWC)
        square = 0.0
        for view in self.views.values():
            square += sum(self.calibration.squares(scores_of(view.measure(judged_HWC))).values())
            if math.sqrt(square) > self.calibration.threshold:
                return True
        return False

    def judge(self, image_HWC: Pixels) -> Detection:
        """Judge an image, uint8 [H, W, 3] at its own size; raise `InputError` for one that is too small."""
        judged_HWC = self._crop(image_HWC)
        return detect(self.calibration, measure(self.views, judged_HWC), image_HWC)

    def _crop(self, image_HWC: Pixels) -> Pixels:
        """Return the part of an image that is judged; raise `InputError` if it is too small."""
        region = self.calibration.region
        judged_HWC = image_HWC if region is None else region.crop(image_HWC)
        check_side(judged_HWC, "image")
        return judged_HWC


def measure(views: Mapping[str, View], image_HWC: Pixels) -> dict[str, Measurement]:
    """Score an image, or the judged part of it, by all views."""
    measurements: dict[str, Measurement] = {}
    for view in views.values():
        measurements |= view.measure(image_HWC)
    return measurements


def save_views(folder: Path, views: Mapping[str, View]) -> tuple[dict[str, Mapping[str, object]], str]:
    """Write the arrays of views into a model folder; return their values by kind and the digest of the file.

    They replace those of an earlier detector when `adopt_arrays` is called, after `detector.json` is written: this file
    chooses between both, so that a process that is killed leaves one detector or the other.
    """
    adopt_arrays(folder)  # those that `detector.json` names must not be overwritten
    tensors: dict[str, NDArray[np.generic]] = {}
    values: dict[str, Mapping[str, object]] = {}
    for kind, view in views.items():
        stored = view.store()
        values[kind] = stored.values
        tensors |= {f"{kind}/{name}": np.ascontiguousarray(array) for name, array in stored.tensors.items()}
    path = folder / NEW_TENSORS
    checkpoint.replace_file(path, lambda new: save_file(tensors, new))
    return values, file_digest(path)


def _find_arrays(folder: Path, digest: str) -> Path:
    """Return the file of arrays with a digest; raise `ModelError` if there is none."""
    path, new = folder / TENSORS, folder / NEW_TENSORS
    if new.is_file() and file_digest(new) == digest:  # a process was killed before it adopted them
        return new
    if file_digest(path) != digest:
        raise ModelError(f"{path} does not match {FILE}: copy the folder again, or {REMEDY}.")
    return path
