"""Images larger than the model: scored in overlapping tiles, and judged in the views of `ncml.ood.tile_views`.

Each view ranks the image among whole good images, and the ranks have one p-value together (`ncml.ood.conformal`). Tiles
of one image are too many and too similar to be tested one by one: with a correction for their number, no defect would
be found.

Shapes: H rows and W columns of the image; R rows and C columns of tiles, T in all; B tiles of the model's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from ncml import images
from ncml.images.tiling import Box, Tiling
from ncml.limits import View
from ncml.network.ncpn import NCPN
from ncml.ood import conformal
from ncml.ood.columns import Columns
from ncml.ood.measurements import locate_peak, measure
from ncml.ood.statistics import Gaussian
from ncml.ood.tile_calibration import TileCalibration
from ncml.ood.tile_views import ViewScore, columns_of, peak_level, score_views
from ncml.progress import OnProgress, Progress, ignore_progress
from ncml.results import Scan, ViewVerdict

Pixels = NDArray[np.uint8]


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

    calibration: that of tiles; or a Gaussian of whole images as a substitute, which gives no p-value.
    side: shorter side of a tile in pixels; None: the calibration's, or the model's.
    """
    tile_calibration = calibration if isinstance(calibration, TileCalibration) else None
    gaussians: Mapping[View, Gaussian] = (
        calibration.gaussians if isinstance(calibration, TileCalibration) else {"worst_tile": calibration}
    )
    model = network.config.model
    tile = Tiling.resolve(model.height, model.width, side, tile_calibration.tile if tile_calibration else None)
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
    p_value = threshold = is_ood = is_weak = version = None
    if tile_calibration is not None:
        view = max(scores, key=lambda name: tile_calibration.excess(name, scores[name].score))
        ranks = [int(conformal.ranks(scores[name].score, tile_calibration.ranked[name])) for name in scores]
        p_value, threshold = tile_calibration.p_value(min(ranks)), tile_calibration.thresholds[view]
        is_ood = any(verdict.score > verdict.threshold for verdict in verdicts.values())
        is_weak, version = bool(tile_calibration.weakness), tile_calibration.version
    box = _box(network, image_HWC, tile, corners, view, scores[view])
    grid_RC = scores[view].tiles_T.astype(np.float32).reshape(tile.grid_shape(H, W))
    return Scan(
        view, scores[view].score, p_value, threshold, is_ood, box, tile, H, W, verdicts, is_weak, version, grid_RC
    )


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
    network: NCPN, image_HWC: Pixels, tile: Tiling, corners: list[tuple[int, int]], view: View, score: ViewScore
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
    tile: Tiling,
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
