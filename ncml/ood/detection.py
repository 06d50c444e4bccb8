"""A detector's verdict on an image that its views have measured. Does not import torch.

Shapes: H rows and W columns of an image, h and w of a map.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ncml.images.tiling import Box
from ncml.ood.detector_calibration import DetectorCalibration
from ncml.ood.views.view import Measurement
from ncml.results import Detection, ViewDetection

LOST = "the part was not found in it"
"""What distinguishes an image that could not be brought to the position of good ones."""
MIN_SIZE_DIFFERENCE = 0.05
"""Relative difference from the sizes that the part has in good images, from which it is reported."""
BOX_SHARE = 0.5
"""Share of the way from the median of a map to its maximum from which cells belong to the box."""


def detect(
    calibration: DetectorCalibration, measurements: Mapping[str, Measurement], image_HWC: NDArray[np.uint8]
) -> Detection:
    """Judge an image by its measurements, which are those of the judged region if there is one."""
    H, W = image_HWC.shape[:2]
    squares = calibration.squares(scores_of(measurements))
    standardised = {name: calibration.scales[name].standardise(own.score) for name, own in measurements.items()}
    view = max(squares, key=lambda name: (squares[name], standardised[name]))  # all squares may be 0
    score = math.sqrt(sum(squares.values()))
    measurement = measurements[view]
    part_differences = dict.fromkeys(part_difference(own.relative_size) for own in measurements.values())
    covered = Box(0, 0, W, H) if calibration.region is None else calibration.region.box
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
                score=own.score,
                standardised=standardised[name],
                part=squares[name] / score if score else 0.0,
                box=_box(own, covered),
            )
            for name, own in measurements.items()
        },
        at_least_as_unusual=calibration.ranks.count_at_or_above(score),
        ranking_images=calibration.n_rank,
        calibration_version=calibration.version,
        covered=covered,
        differences=(*calibration.differences(image_HWC), *filter(None, part_differences)),
        grid=np.empty((0, 0), np.float32) if measurement.map_hw is None else measurement.map_hw,
    )


def part_difference(relative_size: float | None) -> str:
    """Return what distinguishes a part of this size (`Measurement.relative_size`) from good ones; "" if nothing."""
    if relative_size is None:
        return LOST
    change = relative_size - 1
    if abs(change) < MIN_SIZE_DIFFERENCE:
        return ""
    return f"the part is {abs(change):.0%} {'larger' if change > 0 else 'smaller'} than in good images"


def scores_of(measurements: Mapping[str, Measurement]) -> dict[str, float]:
    """Return the score of each view."""
    return {name: measurement.score for name, measurement in measurements.items()}


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
