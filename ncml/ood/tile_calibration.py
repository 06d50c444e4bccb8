"""A calibration of tiles: Gaussians and ranks from large good images, for the views of `ncml.ood.tile_views`.

Bound to one version of the model and of preprocessing; `ncml.calibration.tile_estimation` creates it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ncml import checkpoint
from ncml.checkpoint import Description
from ncml.config import Config
from ncml.images.tiling import Tiling
from ncml.limits import VIEWS, View
from ncml.ood import conformal, storage
from ncml.ood.conformal import Floats, Integers
from ncml.ood.power import explain_few
from ncml.ood.statistics import Gaussian
from ncml.ood.tile_views import STATISTICS, columns_of

FORMAT = 3
"""Formats 1 and 2 do not state the overlap of tiles, and format 1 has only the view `worst_tile`."""


@dataclass(frozen=True)
class TileCalibration:
    """Estimates and ranks from the tiles of good images; bound to one version of the model and of preprocessing."""

    model_version: str
    tile: Tiling
    gaussians: Mapping[View, Gaussian]
    """The Gaussian of each view that has one."""
    ranked: Mapping[View, Floats]
    """The ranking images' scores in each view, ascending."""
    smallest_ranks: Integers
    """The ranking images' smallest ranks over the views, ascending (`conformal.smallest_ranks`)."""
    n_fit: int
    """Number of images for estimation, including those that were not used because they are unlike the others."""
    false_positive_rate: float = 0.05

    @property
    def height(self) -> int:
        """Rows of a tile."""
        return self.tile.height

    @property
    def width(self) -> int:
        """Columns of a tile."""
        return self.tile.width

    @property
    def overlap(self) -> float:
        """Share of a tile that neighbours have in common."""
        return self.tile.overlap

    @property
    def views(self) -> tuple[View, ...]:
        """The views that determine the verdict."""
        return tuple(self.ranked)

    @property
    def n_rank(self) -> int:
        """Number of ranking images."""
        return len(self.smallest_ranks)

    @property
    def smallest_p(self) -> float:
        """The smallest possible p-value."""
        return self.p_value(1)

    @property
    def weakness(self) -> str:
        """Why the calibration is weak, in a clause; "" if it is not."""
        return explain_few(self.n_rank, self.false_positive_rate)

    @functools.cached_property
    def thresholds(self) -> dict[View, float]:
        """Thresholds by view: an image that scores above any is out-of-distribution at the false-positive rate."""
        rank = conformal.largest_rank(len(self.views), self.smallest_ranks, self.false_positive_rate)
        return {view: float(scores[self.n_rank - rank]) for view, scores in self.ranked.items()}

    @property
    def threshold(self) -> float:
        """The threshold of the first view, `worst_tile`."""
        return self.thresholds[self.views[0]]

    @functools.cached_property
    def version(self) -> str:
        """SHA-256 of the content, 64 hexadecimal digits."""
        return storage.digest(self._content())

    def p_value(self, rank: int) -> float:
        """Return the p-value of an image from its smallest rank over the views."""
        return conformal.combined_p_value(rank, len(self.views), self.smallest_ranks)

    def excess(self, view: View, score: float) -> float:
        """Return how far a score lies above those of good images: 0 at their median, 1 at the threshold."""
        median, threshold = float(np.median(self.ranked[view])), self.thresholds[view]
        return (score - median) / max(threshold - median, 1e-12)

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model_version": self.model_version,
            "preprocessing": storage.PREPROCESSING,
            "false_positive_rate": self.false_positive_rate,
            "cut": [self.tile.height, self.tile.width],
            "overlap": self.tile.overlap,
            "n_fit": self.n_fit,
            "gaussians": {view: asdict(gaussian) for view, gaussian in self.gaussians.items()},
            "ranked": {view: scores.tolist() for view, scores in self.ranked.items()},
            "smallest_ranks": self.smallest_ranks.tolist(),
        }

    def save(self, folder: Path) -> None:
        """Write `calibration-tiles.json` into the model folder."""
        storage.write(folder / checkpoint.TILES, self._content())

    @classmethod
    def read(cls, folder: Path, model_version: str, config: Config) -> TileCalibration:
        """Read `calibration-tiles.json`; raises `ModelError` if it is missing, damaged or belongs to another model."""
        path = folder / checkpoint.TILES
        stored = storage.read(path, model_version, expected_format=FORMAT)
        with storage.refusing_damage(path):
            gaussians, stored_ranks = stored["gaussians"], stored["ranked"]
            ranked: dict[View, Floats] = {v: storage.ranks(stored_ranks[v]) for v in VIEWS if v in stored_ranks}
            smallest_ranks = storage.floats(stored["smallest_ranks"], -1).astype(np.int64)
            height, width = map(storage.count, stored["cut"])
            if height < config.model.height or width < config.model.width:
                raise ValueError(f"tiles of {width} x {height} pixels are smaller than the model")
            rate = float(storage.floats(stored["false_positive_rate"]))
            conformal.check_rate(rate)
            if not ranked or any(len(scores) != len(smallest_ranks) for scores in ranked.values()):
                raise ValueError("the views do not rank the same images")
            names = columns_of(config, ranked)
            calibration = cls(
                model_version,
                Tiling(height, width, float(storage.floats(stored["overlap"]))),
                {view: Gaussian.from_json(gaussians[view], names[view]) for view in ranked if view in STATISTICS},
                ranked,
                np.sort(smallest_ranks),
                storage.count(stored["n_fit"]),
                rate,
            )
            _ = calibration.thresholds  # fails for impossible values
            return calibration


def views_for(ranking_count: int, false_positive_rate: float) -> tuple[View, ...]:
    """Return the views that this number of ranking images supports; raises `InputError` if it supports none."""
    conformal.threshold(np.zeros(ranking_count), false_positive_rate)
    return VIEWS[: math.floor(false_positive_rate * (ranking_count + 1) + 1e-9)]


def read_if_present(model: Description) -> TileCalibration | None:
    """Return the calibration of a model's tiles, if there is one. Raises `ModelError` if it cannot be used."""
    exists = (model.folder / checkpoint.TILES).is_file()
    return TileCalibration.read(model.folder, model.version, model.config) if exists else None
