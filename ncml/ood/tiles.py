"""Images larger than the model: scored in overlapping tiles, and judged in the views of `ncml.ood.views`.

Each view has its own conformal rank, that of the image among whole good images, and the ranks have one p-value together
(`ncml.ood.conformal`). Tiles of one image are too many and too similar to be tested one by one: corrected for their
number, no defect would be found.

Shapes: H rows and W columns of the image; R rows and C columns of tiles, T in all; B tiles of the model's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncml import images
from ncml.images import heat
from ncml.images.tiling import Box, Scores, TileSize, blend
from ncml.limits import View
from ncml.network.ncpn import NCPN
from ncml.ood import conformal
from ncml.ood.columns import Columns
from ncml.ood.measurements import locate_peak, measure
from ncml.ood.statistics import Gaussian
from ncml.ood.tile_calibration import TileCalibration
from ncml.ood.views import ViewScore, columns_of, peak_level, score_views
from ncml.progress import OnProgress, Progress, ignore_progress

Pixels = NDArray[np.uint8]


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
    """The view in which the image lies furthest beyond good ones."""
    score: float
    p_value: float | None
    """Of all views together; None if tiles are not calibrated."""
    threshold: float | None
    """Of the view."""
    is_ood: bool | None
    """Whether the image is above the threshold of any view."""
    box: Box
    """The part that the view points at: a tile, a window of 5x5 pixels of the model's size, or the whole image."""
    grid: Scores
    """The score of each tile in the view, [R, C]."""
    tile: TileSize
    height: int
    """Of the image."""
    width: int
    views: Mapping[View, ViewVerdict]
    """The image in each view; {} if tiles are not calibrated."""
    is_weak: bool | None
    """Whether the calibration is weak."""

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return self.grid.size

    @cached_property
    def map(self) -> Scores:
        """The tiles' scores blended where they overlap, [H, W]; a tile counts most at its centre."""
        return blend(self.grid, self.tile, self.height, self.width)

    def to_dict(self) -> dict[str, Any]:
        """Return the values in a flat dictionary with the column names of `ncml score --tile`, without the grid."""
        verdict = {"view": self.view, "score": self.score, "p_value": self.p_value, "is_ood": self.is_ood}
        return verdict | self.box._asdict() | {"tiles": self.tiles}

    def __repr__(self) -> str:
        return f"Scan({', '.join(map('='.join, images.format_values(self.to_dict()).items()))})"

    def _repr_html_(self) -> str:
        """Return a table of the values, and the map with the box."""
        rendered = heat.render(self.map, *heat.score_range(self.map, self.threshold))
        return images.to_html_table(self.to_dict()) + images.to_html(
            heat.frame(rendered, self.box), "scores of the tiles"
        )


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
    gaussians: Mapping[View, Gaussian] = (
        calibration.gaussians if isinstance(calibration, TileCalibration) else {"worst_tile": calibration}
    )
    model = network.config.model
    tile = TileSize.resolve(model.height, model.width, side, tile_calibration.tile if tile_calibration else None)
    H, W = image_HWC.shape[:2]
    corners = tile.corners(H, W)
    names = columns_of(network.config, tile_calibration.views if tile_calibration else ["worst_tile"])
    batches: list[Columns] = []
    done = 0
    for columns in measure_tiles(network, image_HWC, tile, corners, names.values(), batch_size):
        batches.append(columns)
        done += min(batch_size, len(corners) - done)
        on_progress(Progress("tiles", done, len(corners)))
    scores = score_views(concatenate(batches), names, gaussians)
    verdicts = _judge(scores, tile_calibration)
    view: View = "worst_tile"
    p_value = threshold = is_ood = is_weak = None
    if tile_calibration is not None:
        view = max(scores, key=lambda name: tile_calibration.excess(name, scores[name].score))
        ranks = [int(conformal.ranks(scores[name].score, tile_calibration.ranked[name])) for name in scores]
        p_value, threshold = tile_calibration.p_value(min(ranks)), tile_calibration.thresholds[view]
        is_ood = any(verdict.score > verdict.threshold for verdict in verdicts.values())
        is_weak = bool(tile_calibration.weakness)
    box = _box(network, image_HWC, tile, corners, view, scores[view])
    grid_RC = scores[view].tiles_T.astype(np.float32).reshape(tile.grid_shape(H, W))
    return Scan(view, scores[view].score, p_value, threshold, is_ood, box, grid_RC, tile, H, W, verdicts, is_weak)


def _judge(scores: Mapping[View, ViewScore], calibration: TileCalibration | None) -> dict[View, ViewVerdict]:
    if calibration is None:
        return {}
    return {
        view: ViewVerdict(
            score=view_score.score,
            p_value=float(conformal.p_values(view_score.score, calibration.ranked[view])),
            threshold=calibration.thresholds[view],
        )
        for view, view_score in scores.items()
    }


def _box(
    network: NCPN, image_HWC: Pixels, tile: TileSize, corners: list[tuple[int, int]], view: View, score: ViewScore
) -> Box:
    """Return the part of the image that a view points at."""
    H, W = image_HWC.shape[:2]
    if view == "mean":
        return Box(0, 0, W, H)
    top, left = corners[int(score.tiles_T.argmax())]
    if view != "peak":
        return Box(left, top, tile.width, tile.height)
    model = network.config.model
    tile_HWC = images.resize_to(image_HWC[top : top + tile.height, left : left + tile.width], model.height, model.width)
    row, column, window = locate_peak(network, tile_HWC, peak_level(network.config))
    scale_y, scale_x = tile.height / model.height, tile.width / model.width
    y, x = top + round(row * scale_y), left + round(column * scale_x)
    return Box(x, y, min(round(window * scale_x), W - x), min(round(window * scale_y), H - y))


def concatenate(batches: list[Columns]) -> Columns:
    """Return measurements of several batches as one."""
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def measure_tiles(
    network: NCPN,
    image_HWC: Pixels,
    tile: TileSize,
    corners: list[tuple[int, int]],
    names: Iterable[Iterable[str]],
    batch_size: int,
) -> Iterator[Columns]:
    """Yield the measurements of the tiles at these corners that several views need, batch by batch."""
    model = network.config.model
    all_names = list(dict.fromkeys(name for view_names in names for name in view_names))
    for start in range(0, len(corners), batch_size):
        tiles = [
            image_HWC[top : top + tile.height, left : left + tile.width]
            for top, left in corners[start : start + batch_size]
        ]
        tiles_BHWC = np.stack([images.resize_to(pixels, model.height, model.width) for pixels in tiles])
        yield measure(network, tiles_BHWC, all_names)[0]
