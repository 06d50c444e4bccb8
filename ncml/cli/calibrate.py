"""`ncml calibrate`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from tyro.conf import arg

from ncml import images
from ncml.cli.terminal import JsonOption, ModelOption, identity, load, print_json, progress_bar, suggestion
from ncml.errors import InputError
from ncml.images.perturbations import TOLERANCES, Tolerance
from ncml.paths import list_files
from ncml.progress import Progress

if TYPE_CHECKING:
    from ncml.model import Model

FIT, SPLIT = 2, 7
"""Of every 7 images, the first 2 estimate and the others rank: the ratio of the held-out parts."""


def calibrate(
    *,
    data: Annotated[str, arg(metavar="FOLDER|NAME")],
    model: ModelOption = "",
    unseen: bool = False,
    false_positive_rate: Annotated[float, arg(metavar="RATE")] = 0.05,
    tolerate: Annotated[str, arg(metavar="CHANGE,...", help_behavior_hint="(default: none)")] = "",
    tile: bool = False,
    tile_size: Annotated[int | None, arg(metavar="PIXELS", help_behavior_hint="(default: the model's size)")] = None,
    split: str = "train",
    limit: Annotated[int | None, arg(metavar="COUNT", help_behavior_hint="(default: all)")] = None,
    device: str = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Calibrate a model on held-out images, so that its scores include p-values and verdicts.

    If the data is the model's training data, only the two parts that training held out are used: one to estimate the
    statistics, the other for ranking. The result is written to the model folder and replaces any earlier calibration.

    Args:
        data: Folder of images, folder of parquet files, or Hub name.
        model: Name or folder of the model.
        unseen: Declare that the model was not trained on any of this data, and use all of it: of every 7 images, 2 to
            estimate and 5 for ranking.
        false_positive_rate: Share of in-distribution images that are flagged.
        tolerate: Processing that should not be flagged: jpeg, resize, or both.
        tile: Calibrate the tiles of large images; the data is a folder of good images that were not used for training.
        tile_size: Side of a tile, in pixels of the image.
        split: Split of a parquet folder or Hub dataset.
        limit: Maximum number of images for estimating, and of images for ranking.
        device: Device to compute on: cpu, cuda or cuda:N.
        as_json: Print JSON.
    """
    if limit is not None and limit < 1:
        raise InputError("limit", f"--limit must be more than 0, not {limit}.")
    tolerances: tuple[Tolerance, ...] = tuple(_parse_tolerance(name) for name in tolerate.split(",") if name)
    m = load(model, device)
    if tile:
        if tolerances:
            raise InputError(
                "tolerate", "--tolerate applies to images of the model's size only: omit --tolerate or --tile."
            )
        result = _calibrate_tiles(m, Path(data), tile_size, false_positive_rate, limit)
    else:
        result = _calibrate_images(m, data, split, unseen, tolerances, false_positive_rate, limit)
    if as_json:
        print_json({"model": identity(m)} | result)
    else:
        unit = "images by their tiles" if tile else "images"
        skipped = f"  ({result['skipped']} could not be read)" if result["skipped"] else ""
        print(f"{m.folder}: estimated on {result['n_fit']} {unit}, ranked by {result['n_rank']}{skipped}")
        threshold, smallest_p = f"{result['threshold']:.4g}", f"{result['smallest_p']:.2g}"
        print(f"{result['statistic']} above {threshold} is flagged; the smallest p is {smallest_p}")


def _calibrate_images(
    m: "Model",
    source: str,
    split: str,
    unseen: bool,
    tolerate: tuple[Tolerance, ...],
    rate: float,
    limit: int | None,
) -> dict[str, Any]:
    import torch

    from ncml.calibration import estimation
    from ncml.training import dataset

    with progress_bar() as on_progress:
        data = dataset.load(source, m.height, m.width, split=split, on_progress=on_progress)
        if unseen:
            is_fit = torch.arange(len(data)) % SPLIT < FIT
            parts = data.take(is_fit.nonzero().flatten()), data.take((~is_fit).nonzero().flatten())
        else:
            parts = data.part("calibration-fit"), data.part("calibration-rank")
        fit, rank = (part.first(limit or len(part)).images_NHWC for part in parts)
        try:
            calibration = estimation.calibrate(
                m, fit, rank, false_positive_rate=rate, tolerate=tolerate, on_progress=on_progress
            )
        except InputError as error:
            if error.field != "data" or unseen:
                raise
            raise InputError(
                "data", f"{error.detail} If the model was not trained on any of them, --unseen uses all of them."
            ) from error
    calibration.save(m.folder)
    return {
        "calibration": calibration.version,
        "statistic": calibration.statistic,
        "threshold": calibration.threshold,
        "false_positive_rate": rate,
        "n_fit": calibration.n_fit,
        "n_rank": calibration.n_rank,
        "smallest_p": calibration.smallest_p,
        "tolerate": list(tolerate),
        "skipped": len(data.inventory.unreadable),
    }


def _calibrate_tiles(m: "Model", folder: Path, side: int | None, rate: float, limit: int | None) -> dict[str, Any]:
    from ncml.calibration import tiles
    from ncml.images.tiling import TileSize

    if not folder.is_dir():
        raise InputError("data", f"{folder} is not a folder: tiles are calibrated on a folder of large good images.")
    readers: list[Callable[[], NDArray[np.uint8]]] = []
    skipped = 0
    tile = TileSize.for_model(m.height, m.width, side)
    with progress_bar() as on_progress:
        files = list(list_files([folder]))
        for index, path in enumerate(files):
            on_progress(Progress("read", index, len(files)))
            read = partial(images.open_image, path, field=str(path))
            try:
                image = read()
            except InputError:
                skipped += 1
                continue
            try:
                tile.grid_shape(*image.shape[:2])
            except InputError as error:
                raise InputError("data", f"{path}: {error.detail}") from error
            readers.append(read)
        fit = [read for i, read in enumerate(readers) if i % SPLIT < FIT][:limit]
        rank = [read for i, read in enumerate(readers) if i % SPLIT >= FIT][:limit]
        calibration = tiles.calibrate(m, fit, rank, side=side, false_positive_rate=rate, on_progress=on_progress)
    calibration.save(m.folder)
    return {
        "calibration": calibration.version,
        "statistic": "worst tile",
        "threshold": calibration.threshold,
        "false_positive_rate": rate,
        "tile": [calibration.tile.height, calibration.tile.width],
        "n_fit": calibration.n_fit,
        "n_rank": calibration.n_rank,
        "smallest_p": calibration.smallest_p,
        "skipped": skipped,
    }


def _parse_tolerance(name: str) -> Tolerance:
    for tolerance in TOLERANCES:
        if name == tolerance:
            return tolerance
    raise InputError("tolerate", f"there is no change {name!r} to tolerate{suggestion(name, list(TOLERANCES))}")
