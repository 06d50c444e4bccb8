"""`ncml score`."""

import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from ncml import checkpoint
from ncml.cli.local_model import LocalModel
from ncml.cli.remote_model import REQUESTS, RemoteModel, check_options, connect
from ncml.cli.rows import Row, SkippedFiles, image_scorer, tile_scorer
from ncml.cli.score_output import Inputs, explain_fdr, format_summary, print_row, score_in_memory, score_to_table
from ncml.cli.terminal import (
    CalibrationOption,
    ClassOption,
    DeviceOption,
    JsonOption,
    LocationArgument,
    ModelOption,
    describe,
    identity,
    print_json,
)
from ncml.errors import InputError
from ncml.ood import conformal
from ncml.paths import check_exists, model_folders

IMAGE_COLUMNS = ("file", "bpd", "log_likelihood", "score", "p_value", "is_ood")
DETECTOR_COLUMNS = (*IMAGE_COLUMNS, "view", "left", "top", "width", "height", "rarity", "differences")
TILE_COLUMNS = ("file", "view", "score", "p_value", "is_ood", "left", "top", "width", "height", "tiles")


def score(
    files: Annotated[Positional[tuple[LocationArgument, ...]], arg(metavar="FILE|FOLDER...", help_behavior_hint="")],
    /,
    *,
    model: ModelOption = "",
    output: Annotated[
        LocationArgument | None, arg(aliases=("-o",), metavar="FILE", help_behavior_hint="(default: none)")
    ] = None,
    class_: ClassOption = None,
    noise: Annotated[float, arg(metavar="LEVELS")] = 0.0,
    calibration: CalibrationOption = None,
    statistic: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: the calibration's)")] = None,
    statistics: Annotated[str, arg(metavar="NAME,...|all", help_behavior_hint="(default: none)")] = "",
    fdr: Annotated[float | None, arg(metavar="RATE", help_behavior_hint="(default: none)")] = None,
    map_: Annotated[Path | None, arg(name="map", metavar="FOLDER", help_behavior_hint="(default: none)")] = None,
    tile: bool = False,
    tile_size: Annotated[int | None, arg(metavar="PIXELS", help_behavior_hint="(default: the calibration's)")] = None,
    only_bpd: bool = False,
    device: DeviceOption = "cpu",
    server: Annotated[str, arg(metavar="URL", help_behavior_hint="(default: none)")] = "",
    api_key: Annotated[str, arg(metavar="KEY", help_behavior_hint="(default: NCML_API_KEY)")] = "",
    as_json: JsonOption = False,
) -> None:
    """Compute exact likelihoods and out-of-distribution verdicts for images.

    Folders are searched recursively. Files that are not readable images are skipped and counted.

    Args:
        files: Images, or folders of images: PNG, JPEG, WebP, BMP, TIFF or GIF; here or at s3://, gs://, hf://, https://.
        model: Name or folder of the model.
        output: Table to write, .csv or .parquet, here or at s3:// or gs://. Re-running the same command resumes where
            it stopped.
        class_: Class to condition on (bits/dim only; verdicts use the conditions of the calibration).
        noise: Noise level in grey levels (bits/dim only).
        calibration: Name of the calibration that decides the verdict.
        statistic: Statistic that decides the verdict.
        statistics: Names of additional statistics to print.
        fdr: Mark the images that are out-of-distribution at this false discovery rate among all scored images.
        map_: Folder for a heat map (PNG and npz) of each image; it must not contain the images, and is not scored.
        tile: Split images larger than the model into overlapping tiles; the worst tile, the mean of all and small
            peaks decide the verdict together.
        tile_size: Side of a tile in pixels; only for a model whose tiles are not calibrated.
        only_bpd: Compute bits/dim only: one pass of the network, no verdict.
        device: Device to compute on: cpu, cuda or cuda:N.
        server: Address of a service that computes the scores with all of its workers, in place of this machine.
        api_key: API key for that service.
        as_json: Print JSON; without --output it contains all results and the errors of skipped files.
    """
    if not files:
        raise InputError("files", "no image is given: ncml score FILE...")
    if fdr is not None:
        conformal.largest_discovery(np.empty(0), fdr)  # reports an invalid rate before images are scored
    others = {"class": class_ is not None, "noise": noise, "statistics": statistics, "statistic": statistic}
    others |= {"calibration": calibration, "only-bpd": only_bpd}
    if tile and (given := [f"--{name}" for name, is_given in others.items() if is_given]):
        options = " and ".join(given)
        detail = f"--tile takes the verdict from the tiles and cannot be combined with {options}: omit them."
        raise InputError("tile", detail)
    if only_bpd and (statistic or statistics or calibration):
        remedy = "omit it, or omit --statistic, --statistics and --calibration."
        raise InputError("only_bpd", f"--only-bpd computes bits/dim and no statistic or verdict: {remedy}")
    if tile_size is not None and not tile:
        raise InputError("tile_size", "--tile-size requires --tile: add --tile, or omit --tile-size.")
    check_options(server, api_key, device)
    if map_ is not None and map_.exists() and not map_.is_dir():
        raise InputError("map", f"--map {map_} is not a folder: name one for the heat maps.")
    for path in files:
        check_exists(path)
        if map_ is not None and isinstance(path, Path) and path.resolve().is_relative_to(map_.resolve()):
            raise InputError("map", f"--map {map_} contains {path}: name another folder for the heat maps.")
    inputs = Inputs(files, output, map_)
    local = None if server else LocalModel(describe(model, device), device)
    with nullcontext(local) if local else connect(server, api_key, model) as m:
        concurrency = REQUESTS if server else 1
        skipped = SkippedFiles()
        threshold: float | None = None  # of scores that are printed
        facts: dict[str, Any]
        if tile:
            columns, verdict_statistic = TILE_COLUMNS, "tiles"
            selected, missing_reason = m.tiles, "tiles are not calibrated: run ncml calibrate --tile."
            scorer = tile_scorer(m, tile_size, map_, skipped, concurrency=concurrency)
            facts = {"weakness": selected.weakness} if selected is not None and selected.weakness else {}
            names = ()
        else:
            own_size = not only_bpd and m.judges(calibration, statistic)
            if own_size:
                selected, missing_reason = m.detector, ""
                threshold = selected and selected.threshold
            else:
                selected, missing_reason = None if only_bpd else m.calibrations.select(calibration), m.missing_reason
            names = _additional_statistics(
                m, None if own_size else selected, statistics, conditional=class_ is not None or noise > 0
            )
            columns, verdict_statistic = (*(DETECTOR_COLUMNS if own_size else IMAGE_COLUMNS), *names), ""
            arguments = {
                "classes": class_,
                "noise": noise,
                "calibration": calibration,
                "statistic": statistic,
                "statistics": names,
                "ood": not only_bpd,
            }
            if local is not None:
                local.check(arguments)
            scorer = image_scorer(m, arguments, map_, skipped, concurrency=concurrency, own_size=own_size)
            facts = {}
            if selected is not None:
                verdict_statistic = statistic or selected.statistic
                facts = {"calibration": selected.name} | ({"weakness": selected.weakness} if selected.is_weak else {})
        if fdr is not None and selected is None:
            remedy = "omit --only-bpd." if only_bpd else missing_reason
            raise InputError("fdr", f"--fdr needs p-values: {remedy}")
        summary: Row
        if output is None:
            show = None if as_json else partial(print_row, statistics=names)
            summary = score_in_memory(inputs, scorer, fdr, show)
        else:
            conditions = {"class": class_, "noise": noise, "tile_size": tile_size}
            constants = {
                "model": m.version[:12],
                "calibration": "" if selected is None else selected.version[:12],
                "statistic": verdict_statistic,
            } | {name: str(value) for name, value in conditions.items() if value}
            summary = score_to_table(output, inputs, scorer, fdr, columns, constants, skipped)
    if selected is not None:
        summary["false_positive_rate"] = selected.false_positive_rate
        if (confidence := getattr(selected, "confidence", None)) is not None:
            summary["confidence"] = confidence
        if fdr is not None and (limit := explain_fdr(summary, selected.smallest_p)):
            summary["fdr_limit"] = limit
    if as_json:
        if selected is None and not only_bpd:
            facts = {"uncalibrated": missing_reason}
        print_json({"model": identity(m)} | facts | summary)
        return
    if output is not None or summary["images"] > 1 or threshold is not None:
        print(format_summary(summary, threshold), file=sys.stderr if output is None else sys.stdout)
    if selected is None and not only_bpd:
        print(f"ncml: no verdicts: {missing_reason}", file=sys.stderr)
    if local is not None and not model and "calibration" in facts and selected is not local.detector:
        _mention_detectors(local)
    where = "-o FILE or --json lists all" if output is None else f"the column error of {output} lists all"
    skipped.report(summary["skipped"], where)
    if "weakness" in facts:
        print(f"ncml: the calibration is weak: {facts['weakness']}.", file=sys.stderr)


def _mention_detectors(m: LocalModel) -> None:
    """Name the detectors that could have judged instead of the default model, which images were reduced for."""
    names = [name for name, folder in model_folders().items() if (folder / checkpoint.DETECTOR).is_file()]
    if names:
        judged = f"{m.name} judged the images at {m.width}x{m.height} pixels"
        print(f"ncml: {judged}; detectors judge them at their own size: --model {' or '.join(names)}", file=sys.stderr)


def _additional_statistics(
    m: LocalModel | RemoteModel, calibration: Any, statistics: str, *, conditional: bool
) -> tuple[str, ...]:
    """Return the names of the statistics other than bits/dim, which are always computed; "all": every available one.

    conditional: bits/dim are conditioned on a class or a noise level, and so differ from the statistic bpd.
    """
    if not statistics:
        return ()
    everything = statistics == "all"
    names = m.statistic_names(calibration, statistics)
    if conditional and not everything and "bpd" in names:
        raise InputError(
            "statistics",
            "the statistic bpd ignores --class and --noise, and the column bpd uses them: omit one of them.",
        )
    return tuple(name for name in names if name != "bpd")
