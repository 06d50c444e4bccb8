"""`ncml calibrate`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
"""Of every 7 pictures that nobody trained on, the first 2 fit and the rest rank: the ratio of the held-out parts."""


def calibrate(
    *,
    data: Annotated[str, arg(metavar="FOLDER|NAME")],
    model: ModelOption = "cifar10",
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
    """Teach a model what belongs, from held-out pictures, so that its scores come with p-values and verdicts.

    Of the data that a model was trained on, the two parts that training held out are used: one fits the statistics, the
    other ranks. The result is written into the model's folder and replaces an earlier one.

    Args:
        data: Folder of pictures, folder of parquet files, or Hub name.
        model: Name or folder of the model.
        unseen: The model was not trained on any of this data: use all of it, 2 pictures of 7 to fit, 5 to rank.
        false_positive_rate: Share of pictures that belong and are nevertheless flagged.
        tolerate: Changes of processing that are not to be flagged: jpeg, resize, or both.
        tile: Calibrate whole pictures by their tiles; the data is a folder of good pictures, none of them trained on.
        tile_size: Side of a tile, in pixels of the picture.
        split: Which split of a parquet folder or Hub dataset.
        limit: Use no more than so many pictures to fit, and so many to rank.
        device: Where to compute: cpu, cuda or cuda:N.
        as_json: Print JSON.
    """
    if limit is not None and limit < 1:
        raise InputError("limit", f"--limit must be more than 0, not {limit}.")
    changes: tuple[Tolerance, ...] = tuple(_change(name) for name in tolerate.split(",") if name)
    m = load(model, device)
    if tile:
        if changes:
            raise InputError("tolerate", "--tolerate is for pictures of the model's size; leave out it or --tile.")
        told = _tiles(m, Path(data), tile_size, false_positive_rate, limit)
    else:
        told = _pictures(m, data, split, unseen, changes, false_positive_rate, limit)
    if as_json:
        print_json({"model": identity(m)} | told)
    else:
        unit = "pictures by their tiles" if tile else "pictures"
        skipped = f"  ({told['skipped']} could not be read)" if told["skipped"] else ""
        print(f"{m.folder}: fitted on {told['n_fit']} {unit}, ranked by {told['n_rank']}{skipped}")
        print(
            f"{told['statistic']} above {told['threshold']:.4g} is flagged; the smallest p is {told['smallest_p']:.2g}"
        )


def _pictures(
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
        found = dataset.load(source, m.height, m.width, split=split, on_progress=on_progress)
        if unseen:
            fits = torch.arange(len(found)) % SPLIT < FIT
            parts = found.take(fits.nonzero().flatten()), found.take((~fits).nonzero().flatten())
        else:
            parts = found.part("calibration-fit"), found.part("calibration-rank")
        fit, rank = (part.first(limit or len(part)).images_NHWC for part in parts)
        try:
            made = estimation.calibrate(
                m, fit, rank, false_positive_rate=rate, tolerate=tolerate, on_progress=on_progress
            )
        except InputError as error:
            if error.field != "data" or unseen:
                raise
            raise InputError(
                "data", f"{error.detail} If no picture was trained on, --unseen uses all of them."
            ) from error
    made.save(m.folder)
    return {
        "calibration": made.version,
        "statistic": made.statistic,
        "threshold": made.thresholds[made.statistic],
        "false_positive_rate": rate,
        "n_fit": made.n_fit,
        "n_rank": made.n_rank,
        "smallest_p": made.smallest_p,
        "tolerate": list(tolerate),
        "skipped": len(found.inventory.unreadable),
    }


def _tiles(m: "Model", folder: Path, side: int | None, rate: float, limit: int | None) -> dict[str, Any]:
    from ncml.calibration import tiles
    from ncml.images.tiling import TileSize

    if not folder.is_dir():
        raise InputError("data", f"{folder} is no folder; tiles are calibrated on a folder of whole good pictures.")
    readable: list[Callable[[], Any]] = []
    skipped = 0
    tile = TileSize.for_model(m.height, m.width, side)
    with progress_bar() as on_progress:
        files = list(list_files([folder]))
        for index, path in enumerate(files):
            on_progress(Progress("read", index, len(files)))
            opened = partial(images.open_image, path, field=str(path))
            try:
                picture = opened()
            except InputError:
                skipped += 1
                continue
            try:
                tile.grid_shape(*picture.shape[:2])
            except InputError as error:
                raise InputError("data", f"{path}: {error.detail}") from error
            readable.append(opened)
        fit = [one for i, one in enumerate(readable) if i % SPLIT < FIT][:limit]
        rank = [one for i, one in enumerate(readable) if i % SPLIT >= FIT][:limit]
        made = tiles.calibrate(m, fit, rank, side=side, false_positive_rate=rate, on_progress=on_progress)
    made.save(m.folder)
    return {
        "calibration": made.version,
        "statistic": "worst tile",
        "threshold": made.threshold,
        "false_positive_rate": rate,
        "tile": [made.tile.height, made.tile.width],
        "n_fit": made.n_fit,
        "n_rank": made.n_rank,
        "smallest_p": made.smallest_p,
        "skipped": skipped,
    }


def _change(name: str) -> Tolerance:
    for known in TOLERANCES:
        if name == known:
            return known
    raise InputError("tolerate", f"there is no change {name!r} to tolerate{suggestion(name, list(TOLERANCES))}")
