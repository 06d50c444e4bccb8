"""What `ncml.Model` and the clients of a service return: scores, scans and images.

Scores and scans convert to dictionaries and tables; notebooks show all three. Does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncml.errors import InputError
from ncml.images import enlarge, format_values, grid, heat, to_html, to_html_table, to_png
from ncml.images.reading import Image, read_image
from ncml.images.tiling import Box, Scores, Tiling, blend, stretch_bands
from ncml.limits import View


@dataclass(frozen=True)
class ViewDetection:
    """An image in one view of a detector."""

    score: float
    """The score of the view, in its own unit."""
    standardised: float
    """The score in deviations of good images above their median: views have this in common."""
    part: float
    """Its part in the score of the image: weight x max(0, standardised)^2 / that score. All parts add up to it."""
    box: Box
    """The part of the image that the view points at."""


@dataclass(frozen=True)
class Detection:
    """An image of any size, judged by a detector. Box and map are those of the view with the largest part."""

    view: str
    """The view with the largest part in the score."""
    score: float
    """The sum of the parts of all views."""
    p_value: float
    """The p-value over all views: one rank among good images, or scenes of them."""
    threshold: float
    is_ood: bool
    """score > threshold."""
    is_weak: bool
    """Whether the calibration is weak."""
    box: Box
    """The part of the image that the view points at."""
    height: int
    """Height of the image in pixels."""
    width: int
    """Width of the image in pixels."""
    views: Mapping[str, ViewDetection]
    """The image in each view."""
    at_least_as_unusual: int
    """Number of the ranking images that score at least as high."""
    ranking_images: int
    """Number of ranking images."""
    calibration_version: str
    """The version of the calibration."""
    covered: Box
    """The part of the image that the map covers."""
    differences: tuple[str, ...] = ()
    """What distinguishes the image from all good ones at first sight, a clause each: its size, that it is grey, that
    the part has another size, or that it was not found."""
    grid: Scores = field(default_factory=lambda: np.empty((0, 0), np.float32), repr=False)
    """Local scores of the view, evenly spaced over `covered`; empty for a view without a map."""

    def verdict(self, calibration: str) -> Verdict:
        """Return the verdict, with the name of the calibration."""
        return Verdict(
            statistic=self.view,
            score=self.score,
            p_value=self.p_value,
            threshold=self.threshold,
            is_ood=self.is_ood,
            calibration=calibration,
            is_weak=self.is_weak,
            calibration_version=self.calibration_version,
        )

    @property
    def rarity(self) -> str:
        """How rare such a score is among good images, in words."""
        count, total = self.at_least_as_unusual, self.ranking_images
        return f"{count} of {total} good images {'is' if count == 1 else 'are'} at least as unusual"

    @cached_property
    def map(self) -> Scores:
        """The local scores at the image's size, [H, W]; 0 outside the part that is judged and without a map."""
        return np.concatenate(list(stretch_bands(self.grid, self.covered, self.height, self.width)))

    def draw(self, image: Image) -> ImageArray:
        """Return the judged image, uint8 [H, W, 3] at its own size, in grey with the map and the box.

        Raises `InputError` for an image of another size.
        """
        image_HWC = read_image(image, "image")
        if image_HWC.shape[:2] != (self.height, self.width):
            size = f"{image_HWC.shape[1]}x{image_HWC.shape[0]}"
            raise InputError(
                "image", f"the image has {size} pixels, not {self.width}x{self.height}: pass the image that was judged."
            )
        colours = heat.detection_range(self.grid, self.score, self.threshold)
        return heat.render_detection(image_HWC, self.map, colours, self.box, self.is_ood).view(ImageArray)


@dataclass(frozen=True)
class Verdict:
    """The verdict on one image."""

    statistic: str
    score: float
    p_value: float
    """Estimated share of in-distribution images that score at least as high, from ranks."""
    threshold: float
    is_ood: bool
    """score > threshold: the p-value is at most the calibrated false-positive rate or, of a detector made with a
    confidence, a cutoff below it."""
    calibration: str
    """The name of the calibration."""
    is_weak: bool
    """Whether the calibration is weak: see `Calibration.weakness`."""
    calibration_version: str
    """The version of the calibration: a digest of all that the verdict depends on."""


class Score(Mapping[str, Any]):
    """The likelihood of one image, and its verdict.

    As a mapping it has the values of `to_dict`, so that `pandas.DataFrame(scores)` is a table; pandas before release 3
    would take the fields of a dataclass instead.
    """

    def __init__(
        self,
        bpd: float,
        log_likelihood: float,
        map: NDArray[np.float32] | None = None,
        ood: Verdict | None = None,
        statistics: dict[str, float] | None = None,
        flipped_bpd: float | None = None,
        file: str | None = None,
        detection: Detection | None = None,
    ) -> None:
        self.bpd = bpd
        """Bits per dimension, exact at noise 0; lower means more likely."""
        self.log_likelihood = log_likelihood
        """Log-likelihood of the whole image in nats; at noise > 0 that of a density per grey level."""
        self.map = map
        """Bits per dimension of each pixel given those before it, [H, W]; its mean is `bpd`. None if not requested."""
        self.ood = ood
        """The verdict; None if not requested or the model is not calibrated."""
        self.statistics: dict[str, float] = statistics or {}
        """The requested statistics, by name; higher means more out-of-distribution."""
        self.flipped_bpd = flipped_bpd
        """Bits per dimension with the lowest bit of every value flipped (`sanity`)."""
        self.file = file
        """The path of the image, if it was passed as one."""
        self.detection = detection
        """The verdict of a detector in full; None if another calibration gives the verdict, or none."""

    def to_dict(self) -> dict[str, Any]:
        """Return the values in a flat dictionary with the column names of `ncml score`; the map is left out.

        `statistic`, `score`, `p_value` and `is_ood` are those of the verdict, `bpd` that of the image under its class
        and noise; the statistic of this name, which ignores both, is in `statistics` only.
        """
        columns: dict[str, Any] = {} if self.file is None else {"file": self.file}
        columns |= {"bpd": self.bpd, "log_likelihood": self.log_likelihood}
        if self.ood is not None:
            columns |= {name: getattr(self.ood, name) for name in ("statistic", "score", "p_value", "is_ood")}
        if self.detection is not None:
            columns |= self.detection.box._asdict()
        columns |= {name: value for name, value in self.statistics.items() if name not in columns}
        return columns if self.flipped_bpd is None else columns | {"flipped_bpd": self.flipped_bpd}

    def __getitem__(self, column: str) -> Any:
        return self.to_dict()[column]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())

    def __len__(self) -> int:
        return len(self.to_dict())

    def __repr__(self) -> str:
        return f"Score({', '.join(map('='.join, format_values(self.to_dict()).items()))})"

    def _repr_html_(self) -> str:
        """Return a table of the values, and the map if there is one."""
        image = "" if self.map is None else to_html(heat.render_pixel_map(self.map), "bits per dimension of each pixel")
        return to_html_table(self.to_dict()) + image


@dataclass(frozen=True)
class ViewVerdict:
    """An image in one view. A higher score and a smaller p-value mean more out-of-distribution."""

    score: float
    p_value: float
    """Its rank among good images in this view alone."""
    threshold: float


@dataclass(frozen=True)
class Scan:
    """A large image, judged by its tiles. Score, threshold, box and grid are those of one view."""

    view: View
    """The view with the largest part in the score."""
    score: float
    p_value: float | None
    """The p-value over all views; None if tiles are not calibrated."""
    threshold: float | None
    """The threshold of the view."""
    is_ood: bool | None
    """Whether the image is above the threshold of any view."""
    box: Box
    """The part that the view points at: a tile, a window of 5x5 pixels of the model's size, or the whole image."""
    tile: Tiling
    height: int
    """Height of the image in pixels."""
    width: int
    """Width of the image in pixels."""
    views: Mapping[View, ViewVerdict]
    """The image in each view; {} if tiles are not calibrated."""
    is_weak: bool | None
    """Whether the calibration is weak."""
    calibration_version: str | None = None
    """The version of the tiles' calibration; None without one."""
    grid: Scores = field(default_factory=lambda: np.empty((0, 0), np.float32))
    """The score of each tile in the view, [R, C]; empty if the map was not requested from a service."""

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return math.prod(self.tile.grid_shape(self.height, self.width))

    @cached_property
    def map(self) -> Scores:
        """The tiles' scores blended where they overlap, [H, W]; a tile's weight is largest at its centre."""
        if not self.grid.size:
            raise InputError("map", "this scan has no map: scan the image with map=True.")
        return blend(self.grid, self.tile, self.height, self.width)

    def to_dict(self) -> dict[str, Any]:
        """Return the values in a flat dictionary with the column names of `ncml score --tile`, without the grid."""
        verdict = {"view": self.view, "score": self.score, "p_value": self.p_value, "is_ood": self.is_ood}
        return verdict | self.box._asdict() | {"tiles": self.tiles}

    def __repr__(self) -> str:
        return f"Scan({', '.join(map('='.join, format_values(self.to_dict()).items()))})"

    def _repr_html_(self) -> str:
        """Return a table of the values, and the map with the box if there is one."""
        table = to_html_table(self.to_dict())
        if not self.grid.size:
            return table
        rendered = heat.render(self.map, *heat.score_range(self.map, self.threshold))
        return table + to_html(heat.frame(rendered, self.box), "scores of the tiles")


class ImageArray(np.ndarray[tuple[int, ...], np.dtype[np.uint8]]):
    """Images, uint8 [n, H, W, 3] or [H, W, 3]: an array that a notebook renders."""

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        """Return a number for a mean or a sum, as other arrays do."""
        return array[()] if return_scalar else super().__array_wrap__(array, context, return_scalar)

    def _repr_png_(self) -> bytes | None:
        """Return the images as a PNG, as a grid if there are several; None for an array that is not of images."""
        if self.dtype != np.uint8 or self.ndim not in (3, 4) or self.shape[-1] != 3 or not self.size:
            return None
        return to_png(enlarge(grid(np.asarray(self).reshape(-1, *self.shape[-3:]))))
