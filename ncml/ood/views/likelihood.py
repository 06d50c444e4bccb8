"""The view `likelihood`: how surprising an image's pixels are to a small network, at its own and at halved sizes.

A network without attention gives every pixel its bits/dim in one pass (`likelihood_maps`). Three scores, each the
largest over the scales, which are standardised by good images:

- `likelihood_mean`: Mahalanobis distance of the image's mean bits/dim and of their variation, fine and coarse, at all
  scales together. It finds processing: blur, noise, compression.
- `likelihood_window`: the largest Mahalanobis distance of a window's mean and deviation. It finds changes of a region.
- `likelihood_peak`: the largest mean of 5x5 pixels, minus that of the image. It finds small marks on even ground. A few
  good images have peaks far above the others', so excesses above 0 count by the logarithm of 1 plus themselves.

Large images are halved first, as often as the good ones, and much larger ones further. Small images are enlarged to
the smallest size at which they can be measured.

The network's weights are stored with the view, so that it does not depend on another model folder.

Shapes: N images, S scales, M measurements, R and C rows and columns of windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ncml import checkpoint
from ncml.config import Config
from ncml.errors import InputError, ModelError
from ncml.images.resizing import Resize
from ncml.network.ncpn import NCPN
from ncml.ood.conformal import Floats
from ncml.ood.views.extremes import largest_excess, typical
from ncml.ood.views.gaussian import ShrunkenGaussian
from ncml.ood.views.likelihood_maps import NOISE, bits_map, halved, measure_windows, scales_of
from ncml.ood.views.view import Estimated, Measurement, Pixels, Reader, Stored
from ncml.paths import find_detector_base
from ncml.progress import OnProgress, Progress

MAX_SCALES = 4
"""The first size, and at most three halvings."""
MOST_PIXELS = 2**18
"""Pixels of the first size of good images at most, 512x512: the time of an image grows with them."""
MOST_JUDGED_PIXELS = 4 * MOST_PIXELS
"""Pixels of the first size of a judged image, unless its smallest size would then be too small for a window."""
STEP = 8
"""Pixels between neighbouring windows, whose side is the model's."""
CELL = 8
"""Pixels of a cell of the map of `likelihood_peak`."""
PEAK_SIDE = 5
"""Side of the squares whose mean is a peak."""
BLOCK = 4
"""Side of the blocks whose means vary coarsely."""
MIN_DEVIATION = 1e-3
"""Smallest standard deviation of a measurement, in bits/dim or in their logarithm."""
NAMES = ("likelihood_mean", "likelihood_window", "likelihood_peak")


@dataclass(frozen=True)
class ScaleMeasurements:
    """An image at one scale."""

    whole_M: Floats
    """Mean bits/dim, and the logarithm of their deviation over pixels and over means of 4x4."""
    windows_RC2: Floats
    """Mean bits/dim of each window, and the logarithm of their deviation over its pixels."""
    peak: float
    peak_hw: NDArray[np.float32]
    """The largest excess in each cell."""


class WindowSums(NamedTuple):
    """Sums over windows, which add up over images."""

    number: float
    sum_M: Floats
    products_MM: Floats

    @classmethod
    def of(cls, windows_RC2: Floats) -> Self:
        """Sum over an image."""
        values_NM = windows_RC2.reshape(-1, 2)
        return cls(float(len(values_NM)), values_NM.sum(0), values_NM.T @ values_NM)


@dataclass(frozen=True)
class LikelihoodView:
    """Gaussians of the bits/dim of good images, and the network that computes them."""

    kind: ClassVar[str] = "likelihood"

    network: NCPN
    whole: ShrunkenGaussian
    """Of the measurements of the whole image at all scales."""
    windows: tuple[ShrunkenGaussian, ...]
    """Of a window, by scale."""
    typical_KS2: Floats
    """Mean and deviation over good images of the largest distance of a window and of the peak, by scale."""
    halvings: int
    """How often an image is halved before it is measured."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the scores."""
        return NAMES

    @property
    def scales(self) -> int:
        """At how many sizes an image is judged."""
        return len(self.windows)

    @property
    def description(self) -> str:
        """The sizes, in one sentence."""
        fractions = [2**halvings for halvings in range(self.halvings, self.halvings + self.scales)]
        sizes = ["full" if fraction == 1 else f"1/{fraction}" for fraction in fractions]
        return f"the likelihood of pixels is compared at {', '.join(sizes)} size"

    @classmethod
    def estimate(
        cls,
        readers: Sequence[Reader],
        scenes_N: NDArray[np.int64],
        *,
        device: str,
        on_progress: OnProgress,
        network: NCPN | None = None,
    ) -> Estimated:
        """Estimate the Gaussians. network: one without attention; None: that of the bundled base of detectors."""
        network = network or checkpoint.load(find_detector_base(), device)[0].requires_grad_(False)
        _check(network)
        height, width = readers[0]().shape[:2]
        halvings = _halvings(height, width)
        scales = min(MAX_SCALES, scales_of(height >> halvings, width >> halvings, window_side(network)))
        if not scales:
            raise InputError(
                "data",
                f"images must have at least {window_side(network)} pixels in each direction: leave smaller ones out.",
            )
        rows: list[list[ScaleMeasurements]] = []
        for reader in readers:
            rows.append(_measure(network, reader(), halvings, scales))
            on_progress(Progress("likelihood", len(rows), len(readers)))
        whole_NM = np.stack([_whole(row) for row in rows])
        sums = [[WindowSums.of(measurements.windows_RC2) for measurements in row] for row in rows]
        own_whole_N, own_NKS = np.empty(len(rows)), np.empty((len(rows), 2, scales))
        for scene in np.unique(scenes_N):
            is_own_N = scenes_N == scene
            others = [row for row, is_own in zip(sums, is_own_N, strict=True) if not is_own]
            gaussians = _window_gaussians(others)
            whole = ShrunkenGaussian.estimate(whole_NM[~is_own_N], MIN_DEVIATION)
            for index in np.flatnonzero(is_own_N):
                own_whole_N[index] = whole.distance(whole_NM[index])
                own_NKS[index] = _extremes(rows[index], gaussians)
        window_N, peak_N = (largest_excess(own_NS, scenes_N, MIN_DEVIATION) for own_NS in own_NKS.swapaxes(0, 1))
        view = cls(
            network,
            ShrunkenGaussian.estimate(whole_NM, MIN_DEVIATION),
            _window_gaussians(sums),
            typical(own_NKS, MIN_DEVIATION),
            halvings,
        )
        # A peak is the most surprising pixels of an image, whatever other images are like.
        own_scores = (own_whole_N, window_N, compressed(peak_N))
        return Estimated(view, dict(zip(NAMES, own_scores, strict=True)), only_scaled=NAMES[2:])

    def measure(self, image_HWC: Pixels) -> dict[str, Measurement]:
        """Score an image."""
        row = _measure(self.network, image_HWC, self.halvings, self.scales)
        standard_KS = _standardise(_extremes(row, self.windows), self.typical_KS2)
        window_scale, peak_scale = standard_KS.argmax(1)
        distances_RC = torch.from_numpy(self.windows[window_scale].distance(row[window_scale].windows_RC2))
        window_map_hw = spread(distances_RC, window_side(self.network)).float().numpy()
        return {
            NAMES[0]: Measurement(float(self.whole.distance(_whole(row)))),
            NAMES[1]: Measurement(float(standard_KS[0].max()), window_map_hw),
            NAMES[2]: Measurement(float(compressed(standard_KS[1].max())), row[peak_scale].peak_hw),
        }

    def store(self) -> Stored:
        """Return the Gaussians, and the network with its configuration."""
        tensors: dict[str, NDArray[np.float32]] = {"typical": self.typical_KS2.astype(np.float32)}
        for name, gaussian in (("whole", self.whole), *((f"window{i}", g) for i, g in enumerate(self.windows))):
            tensors |= gaussian.store(name)
        for name, weight in self.network.state_dict().items():
            tensors[f"network.{name}"] = weight.float().cpu().contiguous().numpy()
        values = {
            "config": self.network.config.to_json(),
            "precision": "fp32",
            "noise": NOISE,
            "scales": self.scales,
            "halvings": self.halvings,
        }
        return Stored(tensors, values)

    @classmethod
    def load(cls, stored: Stored, *, device: str) -> Self:
        """Read the Gaussians and build the network."""
        values, tensors = stored.values, stored.tensors
        if values["precision"] != "fp32" or values["noise"] != NOISE:
            raise ModelError(
                f"its view of the likelihood was made in {values['precision']} at {values['noise']} grey levels of "
                "noise, which this ncml does not compute: make the detector again with ncml adapt"
            )
        network = NCPN(Config.from_json(values["config"]))
        _check(network)
        prefix = "network."
        weights = {
            name.removeprefix(prefix): torch.from_numpy(np.array(array, np.float32))
            for name, array in tensors.items()
            if name.startswith(prefix)
        }
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError("its weights do not match its configuration") from error
        network = network.to(device).eval().requires_grad_(False).channels_last()
        scales = int(values["scales"])
        typical_KS2 = np.asarray(tensors["typical"], float)
        if typical_KS2.shape != (2, scales, 2):
            raise ValueError("its typical values have another shape")
        windows = tuple(ShrunkenGaussian.load(tensors, f"window{index}", 2) for index in range(scales))
        whole = ShrunkenGaussian.load(tensors, "whole", 3 * scales)
        return cls(network, whole, windows, typical_KS2, int(values["halvings"]))


def _check(network: NCPN) -> None:
    if any(level.attention for level in network.config.model.levels):
        raise ModelError("its network has attention, and the view of the likelihood needs one without: choose another.")


def window_side(network: NCPN) -> int:
    """Return the side of windows in pixels."""
    return min(network.config.model.height, network.config.model.width)


def _halvings(height: int, width: int) -> int:
    """Return how often images of a size are halved before they are measured."""
    halvings = 0
    while (height >> halvings) * (width >> halvings) > MOST_PIXELS:
        halvings += 1
    return halvings


def _measure(network: NCPN, image_HWC: Pixels, halvings: int, scales: int) -> list[ScaleMeasurements]:
    """Measure an image at its first size, after some halvings, and at halved ones."""
    height, width = image_HWC.shape[:2]
    side = window_side(network)
    height, width = first_size(height, width, side, halvings + scales)
    image_HWC = Resize(height, width, "BICUBIC")(image_HWC)
    for _ in range(judged_halvings(height, width, side, halvings, scales)):
        image_HWC = halved(image_HWC)
    row: list[ScaleMeasurements] = []
    for _ in range(scales):
        measured = measure_bits(bits_map(network, image_HWC), side)
        whole_M, windows_RC2 = measured.whole_M.cpu().numpy(), measured.windows_RC2.cpu().numpy()
        row.append(ScaleMeasurements(whole_M, windows_RC2, float(measured.peak), measured.peak_hw.cpu().numpy()))
        image_HWC = halved(image_HWC)
    return row


def first_size(height: int, width: int, side: int, sizes: int) -> tuple[int, int]:
    """Return the height and width from which an image is halved, until it has been seen at this many sizes."""
    least = side * 2 ** (sizes - 1)
    if min(height, width) >= least:
        return height, width
    return max(least, round(least * height / width)), max(least, round(least * width / height))


def judged_halvings(height: int, width: int, side: int, halvings: int, scales: int) -> int:
    """Return how often a judged image of a first size is halved: at least as often as good images."""
    largest = scales_of(height, width, side) - scales
    while halvings < largest and (height >> halvings) * (width >> halvings) > MOST_JUDGED_PIXELS:
        halvings += 1
    return halvings


class MeasuredBits(NamedTuple):
    """`ScaleMeasurements` as tensors."""

    whole_M: Tensor
    windows_RC2: Tensor
    peak: Tensor
    peak_hw: Tensor


def measure_bits(bits_HW: Tensor, side: int) -> MeasuredBits:
    """Measure the bits/dim of an image at one scale, for windows of `side` pixels."""
    double_HW = bits_HW.double()
    excess_HW = F.avg_pool2d((double_HW - double_HW.mean()).float()[None], PEAK_SIDE, 1)[0]
    cells = F.max_pool2d(excess_HW[None], CELL, ceil_mode=True)[0]
    blocks_HW = F.avg_pool2d(bits_HW[None], BLOCK).double()
    deviations = [torch.log(values.std(correction=0) + 1e-3) for values in (double_HW, blocks_HW)]
    whole_M = torch.stack([double_HW.mean(), *deviations])
    return MeasuredBits(whole_M, measure_windows(bits_HW, side, STEP), excess_HW.max().double(), cells)


def _whole(row: Sequence[ScaleMeasurements]) -> Floats:
    return np.concatenate([measurements.whole_M for measurements in row])


def _window_gaussians(sums_NS: Sequence[Sequence[WindowSums]]) -> tuple[ShrunkenGaussian, ...]:
    """Return the Gaussian of the windows of all images, by scale."""
    gaussians: list[ShrunkenGaussian] = []
    for sums_N in zip(*sums_NS, strict=True):
        count, sum_M, products_MM = (np.stack(own).sum(0) for own in zip(*sums_N, strict=True))
        mean_M = sum_M / count
        covariance_MM = products_MM / count - np.outer(mean_M, mean_M)
        deviation_M = np.sqrt(np.maximum(np.diag(covariance_MM), MIN_DEVIATION**2))
        correlation_MM = covariance_MM / np.outer(deviation_M, deviation_M)
        precision_MM = np.linalg.inv(correlation_MM + MIN_DEVIATION * np.eye(len(mean_M)))
        parts = (np.asarray(part, np.float64) for part in (mean_M, deviation_M, precision_MM))
        gaussians.append(ShrunkenGaussian(*parts))
    return tuple(gaussians)


def _extremes(row: Sequence[ScaleMeasurements], gaussians: Sequence[ShrunkenGaussian]) -> Floats:
    """Return the largest distance of a window, and the peak, by scale: [2, S]."""
    distances_S = [
        float(gaussian.distance(measurements.windows_RC2).max())
        for measurements, gaussian in zip(row, gaussians, strict=True)
    ]
    return np.array([distances_S, [measurements.peak for measurements in row]])


def compressed(excess_N: Floats) -> Floats:
    """Return log(1 + excess) of excesses above 0, and the others as they are."""
    return np.log1p(np.maximum(excess_N, 0)) + np.minimum(excess_N, 0)


def _standardise(extremes_KS: Floats, typical_KS2: Floats) -> Floats:
    return (extremes_KS - typical_KS2[..., 0]) / typical_KS2[..., 1]


def spread(values_RC: Tensor, side: int) -> Tensor:
    """Return the mean over the windows that cover each cell; windows have this side and are a cell apart."""
    cells = side // STEP
    values = F.pad(values_RC[None, None], (cells - 1,) * 4)
    counts = F.pad(torch.ones_like(values_RC)[None, None], (cells - 1,) * 4)
    return (F.avg_pool2d(values, cells, 1) / F.avg_pool2d(counts, cells, 1))[0, 0]
