"""The view `appearance`: brightness, contrast and colour, of the whole image and on a coarse grid.

Two scores, each the Mahalanobis distance from a Gaussian of good images: `appearance` of the whole image, and
`appearance_grid` of the cells of a grid, which finds a shadow or a tint of one side. Does not import torch.

Shapes: N estimation images, M measurements, R and C rows and columns of the grid.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ncml.images.resizing import Resize
from ncml.ood.conformal import Floats
from ncml.ood.views.gaussian import ShrunkenGaussian
from ncml.ood.views.view import Estimated, Measurement, Pixels, Reader, Stored
from ncml.progress import OnProgress, Progress

SIDE = 128
"""Pixels of the longer side to which an image is reduced; finer detail belongs to other views."""
GRID = 4
"""Rows and columns of the grid."""
MIN_DEVIATION = 0.25
"""Smallest standard deviation of a measurement, in grey levels: images are rounded to whole ones."""


@dataclass(frozen=True)
class AppearanceView:
    """Gaussians of the appearance of good images."""

    kind: ClassVar[str] = "appearance"

    gaussians: dict[str, ShrunkenGaussian]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the scores."""
        return tuple(self.gaussians)

    @property
    def description(self) -> str:
        """What is measured, in one sentence."""
        return f"brightness, contrast and colour are compared as a whole and in {GRID}x{GRID} cells"

    @classmethod
    def estimate(
        cls, readers: Sequence[Reader], scenes_N: NDArray[np.int64], *, device: str, on_progress: OnProgress
    ) -> Estimated:
        """Estimate the Gaussians; `device` is not used."""
        rows: list[dict[str, Floats]] = []
        for reader in readers:
            rows.append(_measure(reader()))
            on_progress(Progress("appearance", len(rows), len(readers)))
        values = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        view = cls({name: ShrunkenGaussian.estimate(values_NM, MIN_DEVIATION) for name, values_NM in values.items()})
        scores = {name: np.empty(len(rows)) for name in values}
        for scene in np.unique(scenes_N):
            is_own_N = scenes_N == scene
            for name, values_NM in values.items():
                gaussian = ShrunkenGaussian.estimate(values_NM[~is_own_N], MIN_DEVIATION)
                scores[name][is_own_N] = gaussian.distance(values_NM[is_own_N])
        return Estimated(view, scores)

    def measure(self, image_HWC: Pixels) -> dict[str, Measurement]:
        """Score an image by its appearance."""
        values = _measure(image_HWC)
        scores = {name: float(gaussian.distance(values[name])) for name, gaussian in self.gaussians.items()}
        grid = self.gaussians["appearance_grid"]
        deviations_M = np.abs(values["appearance_grid"] - grid.mean_M) / grid.deviation_M
        map_RC = deviations_M.reshape(GRID, GRID, -1).max(2).astype(np.float32)
        return {
            "appearance": Measurement(scores["appearance"]),
            "appearance_grid": Measurement(scores["appearance_grid"], map_RC),
        }

    def store(self) -> Stored:
        """Return the Gaussians."""
        tensors: dict[str, NDArray[np.float32]] = {}
        for name, gaussian in self.gaussians.items():
            tensors |= gaussian.store(name)
        return Stored(tensors, {"grid": GRID})

    @classmethod
    def load(cls, stored: Stored, *, device: str) -> Self:
        """Read the Gaussians."""
        if stored.values["grid"] != GRID:
            raise ValueError(f"its grid is not {GRID}x{GRID}")
        expected = {name: len(values_M) for name, values_M in _measure(np.zeros((SIDE, SIDE, 3), np.uint8)).items()}
        return cls({name: ShrunkenGaussian.load(stored.tensors, name, M) for name, M in expected.items()})


@functools.lru_cache
def resizes(height: int, width: int) -> tuple[Resize, ...]:
    """Return what reduces an image to `SIDE`, as Pillow's thumbnail does, with at least one pixel for each cell."""
    probe = Image.new("1", (width, height))
    probe.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    steps = (Resize(probe.height, probe.width, "BOX", reducing_gap=2.0),)
    if min(probe.size) >= GRID:
        return steps
    return (*steps, Resize(max(GRID, probe.height), max(GRID, probe.width), "BOX"))


def _measure(image_HWC: Pixels) -> dict[str, Floats]:
    """Return the measurements of an image in grey levels: brightness, contrast, colour and its contrast."""
    for step in resizes(image_HWC.shape[0], image_HWC.shape[1]):
        image_HWC = step(image_HWC)
    rgb_HWC = image_HWC.astype(np.float64)
    brightness_HW = rgb_HWC @ np.array([0.299, 0.587, 0.114])
    blue_HW, red_HW = rgb_HWC[..., 2] - brightness_HW, rgb_HWC[..., 0] - brightness_HW
    planes_KHW = np.stack([brightness_HW, blue_HW, red_HW])
    H, W = brightness_HW.shape
    rows, columns = (np.arange(GRID + 1) * side // GRID for side in (H, W))
    cells = [
        planes_KHW[:, top:bottom, left:right]
        for top, bottom in itertools.pairwise(rows)
        for left, right in itertools.pairwise(columns)
    ]
    return {
        "appearance": np.concatenate([planes_KHW.mean((1, 2)), planes_KHW.std((1, 2))]),
        "appearance_grid": np.concatenate([[*cell.mean((1, 2)), cell[0].std()] for cell in cells]),
    }
