"""`ncml score`."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from ncml import checkpoint
from ncml.cli.local_model import LocalModel
from ncml.cli.remote_model import REQUESTS, RemoteModel, check_options, connect
from ncml.cli.rows import Row, Scorer, SkippedFiles, image_scorer, tile_scorer
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
    print_status,
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
    others = {
        "class": class_ is not None, "noise": noise, "statistics": statistics, "statistic": statistic,
        "calibration": calibration, "only-bpd": only_bpd,
    }  # fmt: skip
    if tile and any(others.values()):
        names = " and ".join(f"--{name}" for name, value in others.items() if value)
        raise InputError(
            "tile", f"--tile takes the verdict from the tiles and cannot be combined with {names}: omit them."
        )
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
        skipped = SkippedFiles()
        if tile:
            plan = _plan_tiles(m, tile_size, map_, skipped)
        else:
            conditions = {"classes": class_, "noise": noise}
            plan = plan_images(m, conditions, calibration, statistic, statistics, only_bpd, map_, skipped)
        selected = plan.calibration
        if fdr is not None and selected is None:
            remedy = "omit --only-bpd." if only_bpd else plan.missing_reason
            raise InputError("fdr", f"--fdr needs p-values: {remedy}")
        summary: Row
        if output is None:
            show = None if as_json else partial(print_row, statistics=plan.statistics)
            summary = score_in_memory(inputs, plan.scorer, fdr, show)
        else:
            options = {"class": class_, "noise": noise, "tile_size": tile_size}
            constants = {
                "model": m.version[:12],
                "calibration": "" if selected is None else selected.version[:12],
                "statistic": plan.deciding,
            } | {name: str(value) for name, value in options.items() if value}
            summary = score_to_table(output, inputs, plan.scorer, fdr, plan.columns, constants, skipped)
    if selected is not None:
        summary["false_positive_rate"] = selected.false_positive_rate
        if (confidence := getattr(selected, "confidence", None)) is not None:
            summary["confidence"] = confidence
        if fdr is not None and (limit := explain_fdr(summary, selected.smallest_p)):
            summary["fdr_limit"] = limit
    if as_json:
        facts = {"uncalibrated": plan.missing_reason} if selected is None and not only_bpd else plan.facts
        print_json({"model": identity(m)} | facts | summary)
        return
    if output is not None or summary["images"] > 1 or plan.threshold is not None:
        show_summary = print_status if output is None else print
        show_summary(format_summary(summary, plan.threshold))
    if selected is None and not only_bpd:
        print_status(f"ncml: no verdicts: {plan.missing_reason}")
    if local is not None and not model and "calibration" in plan.facts and selected is not local.detector:
        _mention_detectors(local)
    where = "-o FILE or --json lists all" if output is None else f"the column error of {output} lists all"
    skipped.report(summary["skipped"], where)
    if "weakness" in plan.facts:
        print_status(f"ncml: the calibration is weak: {plan.facts['weakness']}.")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How images are scored, and where their verdicts come from."""

    scorer: Scorer
    columns: tuple[str, ...]
    """Of the table of results."""
    calibration: Any
    """That of the verdicts, of images, of tiles or of a detector; None: there are none."""
    missing_reason: str
    """Why there are none."""
    deciding: str
    """Name of the statistic that decides; "" for none."""
    facts: dict[str, Any]
    """What JSON reports of the calibration."""
    statistics: tuple[str, ...] = ()
    """Names of additional statistics."""
    threshold: float | None = None
    """Of the scores that are printed; None: they are not."""


def _plan_tiles(m: LocalModel | RemoteModel, tile_size: int | None, maps: Path | None, skipped: SkippedFiles) -> Plan:
    """Plan to judge images by their tiles."""
    tiles = m.tiles
    where = " where the model is served" if isinstance(m, RemoteModel) else ""
    return Plan(
        scorer=tile_scorer(m, tile_size, maps, skipped, concurrency=_concurrency(m)),
        columns=TILE_COLUMNS,
        calibration=tiles,
        missing_reason=f"tiles are not calibrated: run ncml calibrate --tile{where}.",
        deciding="tiles",
        facts={"weakness": tiles.weakness} if tiles is not None and tiles.weakness else {},
    )


def plan_images(
    m: LocalModel | RemoteModel,
    conditions: dict[str, Any],
    calibration: str | None,
    statistic: str | None,
    statistics: str,
    only_bpd: bool,
    maps: Path | None,
    skipped: SkippedFiles,
) -> Plan:
    """Plan to judge images at the model's size, or by a detector at their own.

    conditions: the class and the noise level of bits/dim.
    """
    own_size = not only_bpd and m.judges(calibration, statistic)
    selected: Any = m.detector
    if not own_size:
        selected = None if only_bpd else m.calibrations.select(calibration)
    names = _additional_statistics(m, None if own_size else selected, statistics, conditional=any(conditions.values()))
    arguments = conditions | {
        "calibration": calibration,
        "statistic": statistic,
        "statistics": names,
        "ood": not only_bpd,
    }
    if isinstance(m, LocalModel):
        m.check(arguments)
    facts: dict[str, Any] = {}
    if selected is not None:
        facts = {"calibration": selected.name} | ({"weakness": selected.weakness} if selected.is_weak else {})
    return Plan(
        scorer=image_scorer(
            m, arguments, maps, skipped, selected=selected, concurrency=_concurrency(m), own_size=own_size
        ),
        columns=(*(DETECTOR_COLUMNS if own_size else IMAGE_COLUMNS), *names),
        calibration=selected,
        missing_reason=m.missing_reason,
        deciding="" if selected is None else statistic or selected.statistic,
        facts=facts,
        statistics=names,
        threshold=selected.threshold if own_size and selected is not None else None,
    )


def _concurrency(m: LocalModel | RemoteModel) -> int:
    """Return the number of batches in progress: several keep all workers of a service busy."""
    return REQUESTS if isinstance(m, RemoteModel) else 1


def _mention_detectors(m: LocalModel) -> None:
    """Name the detectors that could have judged instead of the default model, which images were reduced for."""
    names = [name for name, folder in model_folders().items() if (folder / checkpoint.DETECTOR).is_file()]
    if names:
        judged = f"{m.name} judged the images at {m.width}x{m.height} pixels"
        print_status(f"ncml: {judged}; detectors judge them at their own size: --model {' or '.join(names)}")


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
            "the statistic bpd ignores --class and --noise, which the column bpd uses: omit bpd from --statistics, or "
            "omit --class and --noise.",
        )
    return tuple(name for name in names if name != "bpd")
