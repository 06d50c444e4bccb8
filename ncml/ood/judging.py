"""A detector with its views: judges images at their own size.

Shapes: H rows and W columns of an image, h and w of a map.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from ncml import checkpoint
from ncml.data.good_images import check_side
from ncml.errors import ModelError
from ncml.images.tiling import Box
from ncml.ood import storage
from ncml.ood.detector_calibration import FILE, REMEDY, TENSORS, DetectorCalibration, file_digest
from ncml.ood.views.appearance import AppearanceView
from ncml.ood.views.features import FeaturesView
from ncml.ood.views.likelihood import LikelihoodView
from ncml.ood.views.view import Measurement, Pixels, Stored, View
from ncml.results import Detection, ViewDetection

VIEWS: dict[str, type[View]] = {view.kind: view for view in (FeaturesView, AppearanceView, LikelihoodView)}
"""The views by kind, in the order in which they are computed."""

BOX_SHARE = 0.5
"""Share of the way from the median of a map to its maximum from which cells belong to the box."""


class Detector:
    """A detector: its calibration, and its views on a device."""

    def __init__(self, calibration: DetectorCalibration, views: Mapping[str, View]) -> None:
        self.calibration = calibration
        self.views = views

    @classmethod
    def load(cls, folder: Path, calibration: DetectorCalibration, device: str = "cpu") -> Detector:
        """Load the views of a detector; raise `ModelError` for damaged files, or without a network that it needs."""
        path = folder / TENSORS
        if file_digest(path) != calibration.tensors:
            raise ModelError(f"{path} does not match {FILE}: copy the folder again, or {REMEDY}.")
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

    def score(self, image_HWC: Pixels) -> float:
        """Return the largest standardised score of an image."""
        return max(self.calibration.standardise(_scores(self._measure(image_HWC))).values())

    def _measure(self, image_HWC: Pixels) -> dict[str, Measurement]:
        region = self.calibration.region
        return measure(self.views, image_HWC if region is None else region.crop(image_HWC))

    def judge(self, image_HWC: Pixels) -> Detection:
        """Judge an image, uint8 [H, W, 3] at its own size; raise `InputError` for one that is too small."""
        H, W = image_HWC.shape[:2]
        calibration = self.calibration
        measurements = self._measure(image_HWC)
        standardised = calibration.standardise(_scores(measurements))
        view = max(standardised, key=lambda name: standardised[name])
        score = standardised[view]
        measurement = measurements[view]
        covered = self._covered(measurement, H, W)
        return Detection(
            view=view,
            score=score,
            p_value=calibration.p_value(score),
            threshold=calibration.threshold,
            is_ood=score > calibration.threshold,
            is_weak=calibration.is_weak,
            box=_box(measurement, covered),
            height=H,
            width=W,
            views={
                name: ViewDetection(
                    score=own.score, standardised=standardised[name], box=_box(own, self._covered(own, H, W))
                )
                for name, own in measurements.items()
            },
            at_least_as_unusual=calibration.ranks.count_at_or_above(score),
            ranking_images=calibration.n_rank,
            calibration_version=calibration.version,
            covered=covered,
            grid=np.empty((0, 0), np.float32) if measurement.map_hw is None else measurement.map_hw,
        )

    def _covered(self, measurement: Measurement, H: int, W: int) -> Box:
        """Return the part of the image that a map covers, in pixels of the whole image."""
        region = self.calibration.region
        if region is None:
            return measurement.region or Box(0, 0, W, H)
        return region.box if measurement.region is None else region.shift(measurement.region)


def measure(views: Mapping[str, View], image_HWC: Pixels) -> dict[str, Measurement]:
    """Return the scores of an image in all views; raise `InputError` for one that is too small."""
    check_side(image_HWC, "image")
    return {name: measurement for view in views.values() for name, measurement in view.measure(image_HWC).items()}


def save_views(folder: Path, views: Mapping[str, View]) -> tuple[dict[str, Mapping[str, object]], str]:
    """Write the arrays of views into a model folder; return their values by kind and the digest of the file."""
    tensors: dict[str, NDArray[np.generic]] = {}
    values: dict[str, Mapping[str, object]] = {}
    for kind, view in views.items():
        stored = view.store()
        values[kind] = stored.values
        tensors |= {f"{kind}/{name}": np.ascontiguousarray(array) for name, array in stored.tensors.items()}
    path = folder / TENSORS
    checkpoint.replace_file(path, lambda new: save_file(tensors, new))
    return values, file_digest(path)


def box_of(map_hw: NDArray[np.float32], covered: Box) -> Box:
    """Return the box around the maximum of a map: its neighbours that are more than half as far above the median."""
    h, w = map_hw.shape
    peak = np.unravel_index(int(map_hw.argmax()), map_hw.shape)
    median = float(np.median(map_hw))
    is_high_hw = map_hw > median + BOX_SHARE * (float(map_hw.max()) - median)
    region, pending = {peak}, [peak]
    while pending:
        row, column = pending.pop()
        for neighbour in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            is_inside = 0 <= neighbour[0] < h and 0 <= neighbour[1] < w
            if is_inside and neighbour not in region and is_high_hw[neighbour]:
                region.add(neighbour)
                pending.append(neighbour)
    rows, columns = [int(row) for row, _ in region], [int(column) for _, column in region]
    top, bottom = min(rows) * covered.height // h, -(-(max(rows) + 1) * covered.height // h)
    left, right = min(columns) * covered.width // w, -(-(max(columns) + 1) * covered.width // w)
    return Box(covered.left + left, covered.top + top, right - left, bottom - top)


def _box(measurement: Measurement, covered: Box) -> Box:
    return covered if measurement.map_hw is None else box_of(measurement.map_hw, covered)


def _scores(measurements: Mapping[str, Measurement]) -> dict[str, float]:
    return {name: measurement.score for name, measurement in measurements.items()}
