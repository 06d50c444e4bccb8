"""Images larger than the model: scored in overlapping tiles, judged by their worst one.

A tile's score is the Mahalanobis distance of its multiscale measurements from those of tiles of good images. An image's
score is the largest of its tiles', and its p-value the rank of that among the largest scores of other good images.
(Tiles of one image are too many and too similar to be tested one by one: corrected for their number, no defect would be
found.) Memory does not grow with the number of tiles.

Shapes: H rows and W columns of the image; R rows and C columns of tiles; B tiles of the model's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncml import checkpoint, images
from ncml.config import Config
from ncml.images.tiling import Box, Scores, TileSize, blend
from ncml.network.ncpn import NCPN
from ncml.ood import conformal, storage
from ncml.ood.conformal import Floats
from ncml.ood.measurements import Columns, measure
from ncml.ood.statistics import Gaussian, build_statistics
from ncml.progress import OnProgress, Progress, ignore_progress

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Scan:
    """A large image, judged by its tiles."""

    score: float
    """The largest of the tiles' scores."""
    p_value: float | None
    """Its rank among good images; None if tiles are not calibrated."""
    threshold: float | None
    is_ood: bool | None
    box: Box
    """The tile with the largest score."""
    grid: Scores
    """The score of each tile, [R, C]."""
    height: int
    """Of the image."""
    width: int

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return self.grid.size

    @cached_property
    def map(self) -> Scores:
        """The tiles' scores blended where they overlap, [H, W]; a tile counts most at its centre."""
        _, _, width, height = self.box
        return blend(self.grid, TileSize(height, width), self.height, self.width)


def scan(
    network: NCPN,
    image_HWC: Pixels,
    calibration: TileCalibration | Gaussian,
    *,
    side: int | None = None,
    batch_size: int = 32,
    on_progress: OnProgress = ignore_progress,
) -> Scan:
    """Score an image in tiles, uint8 [H, W, 3], no side smaller than a tile.

    calibration: of tiles; or the Gaussian of whole images that tiles are measured against, without a p-value.
    side: of a tile in pixels; None is the calibration's, or the model's size.
    """
    tile_calibration = calibration if isinstance(calibration, TileCalibration) else None
    gaussian = calibration.gaussian if isinstance(calibration, TileCalibration) else calibration
    model = network.config.model
    tile = TileSize.resolve(model.height, model.width, side, tile_calibration.tile if tile_calibration else None)
    H, W = image_HWC.shape[:2]
    corners = tile.corners(H, W)
    scores, done = np.empty(len(corners)), 0
    for columns in measure_tiles(network, image_HWC, tile, corners, batch_size):
        scores_B = gaussian.distance(columns)
        scores[done : done + len(scores_B)] = scores_B
        done += len(scores_B)
        on_progress(Progress("tiles", done, len(corners)))
    worst_index = int(scores.argmax())
    worst_score, (top, left) = float(scores[worst_index]), corners[worst_index]
    p_value = threshold = is_ood = None
    if tile_calibration is not None:
        p_value = float(conformal.p_values(worst_score, tile_calibration.ranked))
        threshold = tile_calibration.threshold
        is_ood = worst_score > threshold
    grid_RC = scores.astype(np.float32).reshape(tile.grid_shape(H, W))
    return Scan(worst_score, p_value, threshold, is_ood, Box(left, top, tile.width, tile.height), grid_RC, H, W)


def measure_tiles(
    network: NCPN, image_HWC: Pixels, tile: TileSize, corners: list[tuple[int, int]], batch_size: int
) -> Iterator[Columns]:
    """Yield the multiscale measurements of the tiles at these corners, batch by batch."""
    model, names = network.config.model, build_statistics(network.config)["multiscale"].needs
    for start in range(0, len(corners), batch_size):
        tiles = [
            image_HWC[top : top + tile.height, left : left + tile.width]
            for top, left in corners[start : start + batch_size]
        ]
        tiles_BHWC = np.stack([images.resize_to(pixels, model.height, model.width) for pixels in tiles])
        yield measure(network, tiles_BHWC, names)[0]


@dataclass(frozen=True)
class TileCalibration:
    """Estimates and ranks from the tiles of good images; bound to one version of the model and of preprocessing."""

    model_version: str
    tile: TileSize
    gaussian: Gaussian
    ranked: Floats
    """The largest tile's score of each ranking image, ascending."""
    n_fit: int
    """Images whose tiles estimate the Gaussian."""
    false_positive_rate: float = 0.05
    preprocessing: str = storage.PREPROCESSING
    version: str = field(init=False)
    """SHA-256 of the content, 64 hexadecimal digits."""
    threshold: float = field(init=False)
    """An image whose worst tile scores above it is out-of-distribution at the false-positive rate."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", storage.digest(self._content()))
        object.__setattr__(self, "threshold", conformal.threshold(self.ranked, self.false_positive_rate))

    @property
    def height(self) -> int:
        """Rows of a tile."""
        return self.tile.height

    @property
    def width(self) -> int:
        """Columns of a tile."""
        return self.tile.width

    @property
    def n_rank(self) -> int:
        """Number of ranking images."""
        return len(self.ranked)

    @property
    def smallest_p(self) -> float:
        """The smallest possible p-value."""
        return 1 / (self.n_rank + 1)

    def _content(self) -> dict[str, Any]:
        return {
            "format": storage.FORMAT,
            "model_version": self.model_version,
            "preprocessing": self.preprocessing,
            "false_positive_rate": self.false_positive_rate,
            "cut": [self.tile.height, self.tile.width],
            "n_fit": self.n_fit,
            "gaussian": asdict(self.gaussian),
            "ranked": self.ranked.tolist(),
        }

    def save(self, folder: Path) -> None:
        """Write `calibration-tiles.json` into the model folder."""
        storage.write(folder / checkpoint.TILES, self._content())

    @classmethod
    def read(cls, folder: Path, model_version: str, config: Config) -> TileCalibration:
        """Read `calibration-tiles.json`; raises `ModelError` if it is missing, damaged or belongs to another model."""
        path = folder / checkpoint.TILES
        stored = storage.read(path, model_version)
        with storage.refusing_damage(path):
            height, width = map(storage.count, stored["cut"])
            if height < config.model.height or width < config.model.width:
                raise ValueError(f"tiles of {width} x {height} pixels are smaller than the model")
            return cls(
                model_version,
                TileSize(height, width),
                Gaussian.from_json(stored["gaussian"], build_statistics(config)["multiscale"].needs),
                storage.ranks(stored["ranked"]),
                storage.count(stored["n_fit"]),
                float(storage.floats(stored["false_positive_rate"])),
            )
