"""Pictures larger than the model: scored in overlapping tiles, judged by their worst one.

A tile's score is the Mahalanobis distance of the multiscale measurements from those of tiles of good pictures.
A picture's score is the largest of its tiles', and its p-value the rank of that among the largest scores of other whole
good pictures. (Tiles of one picture are too many and too much alike to be tested one by one: corrected for their
number, nothing would ever be found.) Memory does not grow with the number of tiles.

Shapes: H rows and W columns of the picture; R rows and C columns of tiles; B tiles of the model's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncml import checkpoint, images
from ncml.errors import ModelError
from ncml.images.tiling import Box, Cut, Scores, blend
from ncml.network.ncpn import NCPN
from ncml.ood import conformal, storage
from ncml.ood.conformal import Floats
from ncml.ood.statistics import Columns, Gaussian, catalogue, measure

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Scan:
    """A whole picture, judged by its tiles."""

    score: float
    """The largest of the tiles' scores."""
    p_value: float | None
    """Its rank among good pictures; None where tiles are not calibrated."""
    threshold: float | None
    is_ood: bool | None
    box: Box
    """The tile with the largest score."""
    grid: Scores
    """The score of each tile, [R, C]."""
    height: int
    """Of the picture."""
    width: int

    @property
    def tiles(self) -> int:
        """How many there are."""
        return self.grid.size

    @cached_property
    def map(self) -> Scores:
        """The tiles' scores blended where they overlap, [H, W]; a tile counts most at its centre."""
        _, _, width, height = self.box
        return blend(self.grid, Cut(height, width), self.height, self.width)


Report = Callable[[int, int], None]
"""Called with tiles done and in all."""


def scan(
    network: NCPN,
    picture_HWC: Picture,
    calibration: TileCalibration | Gaussian,
    *,
    side: int | None = None,
    batch_size: int = 32,
    report: Report | None = None,
) -> Scan:
    """Score a picture in tiles, uint8 [H, W, 3], no side smaller than a tile.

    calibration: of tiles; or the Gaussian of whole images that tiles are measured against, without a p-value.
    side: of a tile in pixels; None is the calibration's, or the model's size.
    """
    tiled = calibration if isinstance(calibration, TileCalibration) else None
    gaussian = calibration.gaussian if isinstance(calibration, TileCalibration) else calibration
    model = network.config.model
    cut = Cut.asked(model.height, model.width, side, tiled.cut if tiled else None)
    H, W = picture_HWC.shape[:2]
    corners = cut.corners(H, W)
    scores, done = np.empty(len(corners)), 0
    for columns in measured(network, picture_HWC, cut, corners, batch_size):
        some = gaussian.distance(columns)
        scores[done : done + len(some)] = some
        done += len(some)
        if report is not None:
            report(done, len(corners))
    at = int(scores.argmax())
    worst, (top, left) = float(scores[at]), corners[at]
    p = limit = flagged = None
    if tiled is not None:
        p = float(conformal.p_values(worst, tiled.ranked))
        limit = tiled.threshold
        flagged = worst > limit
    grid_RC = scores.astype(np.float32).reshape(cut.grid(H, W))
    return Scan(worst, p, limit, flagged, (left, top, cut.width, cut.height), grid_RC, H, W)


def measured(
    network: NCPN, picture_HWC: Picture, cut: Cut, corners: list[tuple[int, int]], batch_size: int
) -> Iterator[Columns]:
    """The multiscale measurements of the tiles at these corners, batch by batch."""
    model, names = network.config.model, catalogue(network.config)["multiscale"].needs
    for start in range(0, len(corners), batch_size):
        some = corners[start : start + batch_size]
        cuts = [picture_HWC[top : top + cut.height, left : left + cut.width] for top, left in some]
        tiles_BHWC = np.stack([images.fit(tile, model.height, model.width) for tile in cuts])
        yield measure(network, tiles_BHWC, names)[0]


@dataclass(frozen=True)
class TileCalibration:
    """What whole good pictures say about their tiles; bound to one version of the model and of preprocessing."""

    model_version: str
    cut: Cut
    gaussian: Gaussian
    ranked: Floats
    """The largest tile's score of each ranking picture, ascending."""
    n_fit: int
    """Pictures that gave tiles to the Gaussian."""
    false_positive_rate: float = 0.05
    preprocessing: str = storage.PREPROCESSING
    version: str = field(init=False)
    """SHA-256 of all of it, 64 hexadecimal digits."""
    threshold: float = field(init=False)
    """A picture whose worst tile scores above it is out-of-distribution at the false-positive rate."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", storage.digest(self._content()))
        object.__setattr__(self, "threshold", conformal.threshold(self.ranked, self.false_positive_rate))

    @property
    def n_rank(self) -> int:
        """Ranking pictures."""
        return len(self.ranked)

    @property
    def smallest_p(self) -> float:
        """The smallest p-value there can be."""
        return 1 / (self.n_rank + 1)

    def _content(self) -> dict[str, Any]:
        return {
            "format": storage.FORMAT,
            "model_version": self.model_version,
            "preprocessing": self.preprocessing,
            "false_positive_rate": self.false_positive_rate,
            "cut": [self.cut.height, self.cut.width],
            "n_fit": self.n_fit,
            "gaussian": asdict(self.gaussian),
            "ranked": self.ranked.tolist(),
        }

    def save(self, folder: Path) -> None:
        """Write `calibration-tiles.json` into the model folder."""
        storage.write(folder / checkpoint.TILES, self._content())

    @classmethod
    def read(cls, folder: Path, model_version: str) -> TileCalibration:
        """Read `calibration-tiles.json`; raises `ModelError` if it is missing, damaged or for something else."""
        path = folder / checkpoint.TILES
        stored = storage.read(path, model_version)
        try:
            return cls(
                model_version,
                Cut(*stored["cut"]),
                Gaussian.from_json(stored["gaussian"]),
                np.array(stored["ranked"], np.float64),
                stored["n_fit"],
                stored["false_positive_rate"],
            )
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ModelError(f"{path} is damaged ({str(error).rstrip('.')}): {storage.REMEDY}.") from error
