"""`ncml calibrate`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tyro.conf import arg

from ncml import checkpoint, images
from ncml.cli.terminal import DeviceOption, JsonOption, ModelOption, describe, identity, load, print_json, progress_bar
from ncml.data.blocks import evenly_spaced, one_of_each_block
from ncml.data.sources import DEFAULT_SPLIT, check_source, names_at, open_source
from ncml.errors import InputError, suggestion
from ncml.images.perturbations import TOLERANCES, Tolerance
from ncml.images.tiling import OVERLAP, Tiling
from ncml.object_storage import read_ahead
from ncml.ood import storage
from ncml.ood.conformal import check_rate
from ncml.ood.storage import DEFAULT_NAME
from ncml.paths import Location, check_model_name, check_output_folder, collect, list_files, parse_location, printable
from ncml.progress import Progress

if TYPE_CHECKING:
    from ncml.model import Model

Item = TypeVar("Item")


def calibrate(
    *,
    data: Annotated[str, arg(metavar="FOLDER|NAME")],
    model: ModelOption = "",
    out: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: the model's folder)")] = None,
    name: Annotated[str, arg(metavar="NAME")] = "default",
    unseen: bool = False,
    false_positive_rate: Annotated[float, arg(metavar="RATE")] = 0.05,
    tolerate: Annotated[str, arg(metavar="CHANGE,...", help_behavior_hint="(default: none)")] = "",
    tile: bool = False,
    tile_size: Annotated[int | None, arg(metavar="PIXELS", help_behavior_hint="(default: the model's size)")] = None,
    tile_overlap: Annotated[float, arg(metavar="SHARE")] = OVERLAP,
    split: Annotated[str, arg(metavar="NAME")] = DEFAULT_SPLIT,
    limit: Annotated[int | None, arg(metavar="COUNT", help_behavior_hint="(default: all)")] = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Calibrate a model on held-out images, so that its scores include p-values and verdicts.

    Without --unseen, only the two parts of the data that training held out are used: one to estimate the statistics,
    the other for ranking; tiles use all images. The result is written to the model folder and replaces any earlier
    calibration of the same name. Its power is measured: what share of good, processed, altered and foreign images it
    flags.

    Args:
        data: Folder of images (here or at s3://, gs://, hf:// or https://), folder of parquet files, or Hub name.
            Without --unseen or --tile, it is taken as the model's training data.
        model: Name or folder of the model.
        out: Write a copy of the model with this calibration to a new folder, and leave the model's own unchanged.
        name: Name of the calibration, by which requests select it; default is used if they name none.
        unseen: Declare that the model was not trained on any of this data, and use all of it: 2 of 7 images
            at random, but at least 20, for estimation, and the others for ranking. A rate of 5% needs at least 39.
        false_positive_rate: Share of good images that may be flagged, on average.
        tolerate: Processing that should not be flagged: jpeg, resize, or both.
        tile: Calibrate the tiles of large images; the data is a folder of good images that were not used for training.
        tile_size: Side of a tile, in pixels of the image.
        tile_overlap: Share of a tile that neighbours have in common, 0 to 0.75; less is faster and detects less.
        split: Split of a parquet folder or Hub dataset.
        limit: Maximum number of images for estimating, and of images for ranking, evenly spaced.
        device: Device to compute on: cpu, cuda or cuda:N.
        as_json: Print JSON.
    """
    if limit is not None and limit < 1:
        raise InputError("limit", f"--limit must be more than 0, not {limit}.")
    tolerances: tuple[Tolerance, ...] = tuple(_parse_tolerance(change) for change in tolerate.split(",") if change)
    storage.check_name(name)
    check_rate(false_positive_rate)
    if tile:
        for option, is_given in (
            ("tolerate", bool(tolerances)),
            ("name", name != DEFAULT_NAME),
            ("split", split != DEFAULT_SPLIT),
            ("unseen", unseen),
        ):
            if is_given:
                raise InputError(option, f"--{option} does not apply to tiles: omit --{option} or --tile.")
    else:
        for option, is_given in (("tile-size", tile_size is not None), ("tile-overlap", tile_overlap != OVERLAP)):
            if is_given:
                raise InputError(option, f"--{option} requires --tile: add --tile, or omit --{option}.")
    description = describe(model, device)
    folder = description.folder if out is None else out
    if out is None:
        check_output_folder(folder, "model")
    else:
        check_model_name(out)
        checkpoint.check_copy(description.folder, out)
    if not tile:
        check_source(data, split)
        storage.read_replaceable(folder / checkpoint.CALIBRATION)  # refused now rather than after the computation
    elif not parse_location(data, "data").is_dir():
        raise InputError("data", f"{data} is not a folder: tiles are calibrated on a folder of large good images.")
    tiling = Tiling.for_model(description.height, description.width, tile_size, tile_overlap)
    loaded = load(description, device)
    if tile:
        result, lines = _calibrate_tiles(
            loaded, parse_location(data, "data"), folder, tiling, false_positive_rate, limit
        )
    else:
        result, lines = _calibrate_images(
            loaded, data, folder, split, unseen, tolerances, false_positive_rate, limit, name
        )
    if as_json:
        print_json({"model": identity(loaded)} | result)
    else:
        unit = "images by their tiles" if tile else "images"
        skipped = f"  ({result['skipped']} could not be read)" if result["skipped"] else ""
        print(f"{folder}: {result['n_fit']} {unit} for estimation, {result['n_rank']} for ranking{skipped}")
        print(*lines, sep="\n")


def _calibrate_images(
    model: "Model",
    source: str,
    folder: Path,
    split: str,
    unseen: bool,
    tolerate: tuple[Tolerance, ...],
    rate: float,
    limit: int | None,
    name: str,
) -> tuple[dict[str, Any], list[str]]:
    import torch

    from ncml.calibration import descriptions, estimation
    from ncml.calibration.held_out_power import generate_foreign
    from ncml.data import dataset

    with progress_bar() as on_progress:
        opened = open_source(source, split)
        data = dataset.load(opened, model.height, model.width, on_progress=on_progress)
        if unseen:
            parts = tuple(data.take(torch.from_numpy(part_N)) for part_N in estimation.divide(len(data), rate))
        else:
            split_of = model.config.training.split
            parts = data.part("calibration-fit", split_of), data.part("calibration-rank", split_of)
        fit, rank = (part.spread(limit or len(part)) for part in parts)
        suspects: list[int] = []

        def add_suspects(stage: str, positions: list[int]) -> None:
            # Half of the images are processed at random for a tolerance, which can make them unlike the others. Without
            # --unseen, the advice to remove an image would be wrong: the held-out parts follow from the positions.
            if unseen and not tolerate:
                part = fit if stage == "fit" else rank
                suspects.extend(part.positions_N[positions].tolist())

        try:
            estimation.check_counts(len(fit), len(rank), rate)
            calibration = estimation.calibrate(
                model,
                fit.images_NHWC,
                rank.images_NHWC,
                false_positive_rate=rate,
                tolerate=tolerate,
                name=name,
                foreign=generate_foreign(model, on_progress) if unseen else None,
                on_suspicious=add_suspects,
                on_progress=on_progress,
            )
        except InputError as error:
            if error.field != "data" or unseen:
                raise
            raise InputError(
                "data", f"{error.detail} If the model was not trained on any of them, --unseen uses all of them."
            ) from error
    checkpoint.copy(model.folder, folder)
    descriptions.save(calibration, folder)
    suspicious = list(names_at(opened, data.inventory.unreadable_rows, suspects)) if suspects else []
    result = {
        "folder": str(folder),
        "name": name,
        "calibration": calibration.version,
        "statistic": calibration.statistic,
        "threshold": calibration.threshold,
        "false_positive_rate": rate,
        "n_fit": calibration.n_fit,
        "n_rank": calibration.n_rank,
        "smallest_p": calibration.smallest_p,
        "tolerate": list(tolerate),
        "skipped": len(data.inventory.unreadable),
        "power": None if calibration.power is None else calibration.power.to_json(),
        "weakness": calibration.weakness,
        "suspicious": suspicious,
    }
    lines = descriptions.describe(calibration)
    if suspicious:
        lines.append(descriptions.describe_suspects(suspicious, len(fit) + len(rank)))
    return result, lines


def _calibrate_tiles(
    model: "Model", source: Location, folder: Path, tiling: Tiling, rate: float, limit: int | None
) -> tuple[dict[str, Any], list[str]]:
    from ncml.calibration import descriptions, estimation, tile_estimation

    readers: list[tuple[Location, Callable[[], NDArray[np.uint8]]]] = []
    skipped = 0
    with progress_bar() as on_progress:
        files = collect(list_files([source]))
        for index, (path, file) in enumerate(zip(files, read_ahead(files, images.MAX_BYTES), strict=True)):
            on_progress(Progress("read", index, len(files)))
            read = partial(images.open_image, path, field=str(path))
            try:
                image = images.open_image(file, field=str(path))
            except InputError:
                skipped += 1
                continue
            try:
                tiling.grid_shape(*image.shape[:2])
            except InputError as error:
                remedy = "use a smaller --tile-size, or remove it."
                raise InputError("data", f"{path}: {error.detail.partition(': ')[0]}: {remedy}") from error
            readers.append((path, read))
        count = max(1, round(estimation.ESTIMATION_SHARE * len(readers)))
        estimates = {*one_of_each_block(len(readers), count).tolist()}
        fit = _spread([reader for i, reader in enumerate(readers) if i in estimates], limit)
        rank = _spread([reader for i, reader in enumerate(readers) if i not in estimates], limit)
        suspects: list[str] = []

        def add_suspects(stage: str, positions: list[int]) -> None:
            part = fit if stage == "fit" else rank
            suspects.extend(printable(part[position][0]) for position in positions)

        calibration = tile_estimation.calibrate(
            model,
            [read for _, read in fit],
            [read for _, read in rank],
            tiling=tiling,
            false_positive_rate=rate,
            on_suspicious=add_suspects,
            on_progress=on_progress,
        )
    checkpoint.copy(model.folder, folder)
    calibration.save(folder)
    result = {
        "calibration": calibration.version,
        "statistic": "tiles",
        "threshold": calibration.threshold,
        "thresholds": calibration.thresholds,
        "false_positive_rate": rate,
        "tile": [tiling.height, tiling.width],
        "overlap": tiling.overlap,
        "n_fit": calibration.n_fit,
        "n_rank": calibration.n_rank,
        "smallest_p": calibration.smallest_p,
        "skipped": skipped,
        "weakness": calibration.weakness,
        "suspicious": sorted(suspects),
    }
    lines = descriptions.describe_tiles(calibration)
    if suspects:
        lines.append(descriptions.describe_suspects(sorted(suspects), len(fit) + len(rank)))
    return result, lines


def _spread(items: list[Item], limit: int | None) -> list[Item]:
    """Return `limit` of the items, evenly spaced, or all."""
    return [items[i] for i in evenly_spaced(len(items), limit or len(items))]


def _parse_tolerance(name: str) -> Tolerance:
    for tolerance in TOLERANCES:
        if name == tolerance:
            return tolerance
    raise InputError("tolerate", f"there is no change {name!r} to tolerate{suggestion(name, list(TOLERANCES))}")
