"""`ncml drift`."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from tyro.conf import Positional, arg

from ncml.cli import table
from ncml.cli.earlier_rows import absolute_name, stamp
from ncml.cli.local_model import LocalModel
from ncml.cli.rows import SkippedFiles, image_scorer, score_batches
from ncml.cli.score_output import Inputs
from ncml.cli.stored_table import local_copy
from ncml.cli.terminal import (
    DeviceOption,
    JsonOption,
    LocationArgument,
    ModelOption,
    check_output_file,
    describe,
    identity,
    print_json,
    progress_bar,
)
from ncml.errors import InputError, ModelError
from ncml.paths import Location, check_exists, collect, printable
from ncml.progress import Progress

if TYPE_CHECKING:
    from ncml.ood.calibration import Calibration

COLUMNS = ("model", "calibration", "statistic", "bpd", "score", "p_value")
IDENTITY = ("file", "modified")
"""Columns that identify an image, which may be named more than once."""
CONDITIONS = ("class", "noise")
"""Columns of tables whose bits/dim are conditioned on one of these."""

Measurement = tuple[float, float, float]
"""Bits per dimension, OOD score and p-value of an image."""


def drift(
    files: Annotated[
        Positional[tuple[LocationArgument, ...]], arg(metavar="TABLE|FILE|FOLDER...", help_behavior_hint="")
    ],
    /,
    *,
    model: ModelOption = "",
    calibration: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: default)")] = None,
    alpha: Annotated[float, arg(metavar="RATE")] = 0.01,
    plot: Annotated[Path | None, arg(metavar="FILE.png", help_behavior_hint="(default: none)")] = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> int:
    """Test whether the distribution of images differs from that of the calibration. Exit status: 0: no drift, 1: drift.

    The Kolmogorov-Smirnov test of the OOD scores decides; the other figures describe the difference. Detectors have no
    such test, but the alarm of ncml watch.

    Args:
        files: Tables that ncml score --output wrote with this model and calibration, or images and folders to score.
            An image that is named more than once counts once.
        model: Name or folder of the model.
        calibration: Name of the calibration that images are compared with.
        alpha: False-positive rate of the drift test.
        plot: Write a plot of both distributions of bits/dim, and of the p-values, to this file.
        device: Device to compute on: cpu, cuda or cuda:N.
        as_json: Print JSON.
    """
    if not files:
        raise InputError("files", "nothing to compare is given: ncml drift TABLE|FOLDER...")
    for path in files:
        check_exists(path)
    from ncml.ood import drift_report

    drift_report.check_alpha(alpha)
    if plot is not None:
        _check_plot(plot, files)
    m = LocalModel(describe(model, device), device)
    reference = m.calibrations.select(calibration)
    if reference is None:
        if m.detector is not None:
            raise InputError(
                "model",
                "drift is measured by the statistics of a calibration, and a detector has none: name a model that "
                "ncml calibrate made, or use the alarm of ncml watch.",
            )
        raise ModelError(f"drift is measured relative to a calibration, but {m.missing_reason}")
    if reference.tolerate:
        raise InputError(
            "calibration",
            f"half of the ranking images of the calibration {reference.name!r} were processed, so that unprocessed "
            "images would always seem to drift: name a calibration that was made without --tolerate.",
        )
    tables = [path for path in files if path.suffix in table.SUFFIXES]
    skipped = SkippedFiles()
    images = Inputs(tuple(path for path in files if path not in tables), plot)
    counted: set[tuple[str, str]] = set()
    measurements = [
        *_read_tables(m, reference, tables, counted),
        *_score_files(m, reference, images, counted, skipped),
    ]
    if not measurements:
        paths = ", ".join(map(str, files))
        raise InputError("files", f"there is no image with a verdict in {paths}: name others, or score them again.")
    bpd, score, p_value = np.array(measurements, np.float64).T
    ranked = reference.ranked
    result = drift_report.compare(
        bpd, score, p_value, ranked["bpd"], ranked[reference.statistic], reference.false_positive_rate, alpha
    )
    if plot is not None:
        drift_report.plot(plot, bpd, p_value, ranked["bpd"], result, m.name)
    if as_json:
        print_json({"model": identity(m), "calibration": reference.version, "skipped": skipped.count} | asdict(result))
    else:
        for name, shift in (("bits/dim", result.bpd), (reference.statistic, result.score)):
            means = f"mean {shift.mean:.4g} (calibrated {shift.calibrated_mean:.4g})"
            print(f"{name:12} PSI {shift.psi:.3f}  KS {shift.ks:.3f} (p {shift.ks_p:.2g})  {means}")
        interval = f"{result.flagged_low:.1%} to {result.flagged_high:.1%}"
        print(f"{'flagged':12} {result.flagged:.1%} of {result.images} ({interval}); expected {result.expected:.1%}")
        reason = f"p {result.score.ks_p:.2g} of the KS test of {reference.statistic}, alpha {alpha:g}"
        print(f"{'drifted' if result.drifted else 'no drift found'} ({reason})")
        skipped.report(skipped.count)
    return int(result.drifted)


def _check_plot(path: Path, files: Iterable[Location]) -> None:
    """Refuse a plot that cannot be written, before images are scored; imports Matplotlib."""
    check_output_file(path, "plot", inputs=[file for file in files if isinstance(file, Path)])
    from matplotlib.figure import Figure

    if path.suffix and path.suffix[1:].lower() not in Figure().canvas.get_supported_filetypes():
        raise InputError("plot", f"{path} must end in .png, or in the suffix of another format of Matplotlib.")


def _read_tables(
    m: LocalModel, calibration: "Calibration", tables: list[Location], counted: set[tuple[str, str]]
) -> Iterator[Measurement]:
    """Yield the measurements of tables; adds the name and the modification time of each image to `counted`."""
    expected = {
        "model": m.version[:12], "calibration": calibration.version[:12], "statistic": calibration.statistic
    }  # fmt: skip
    for path in tables:
        for row in _read_rows(path):
            if not row["p_value"]:
                continue  # a file that could not be read, or one that was scored without a verdict
            for name, value in expected.items():
                if row[name] != value:
                    raise InputError(
                        "files", f"{path} has another {name} ({row[name]}, not {value}): score the images again."
                    )
            if any(row[name] for name in CONDITIONS):
                raise InputError(
                    "files",
                    f"{path} was scored with --class or --noise, but the calibration without: score the images again "
                    "without them.",
                )
            image = absolute_name(row["file"]), row["modified"]
            if row["file"] and image in counted:
                continue
            counted.add(image)
            yield _parse(path, row["bpd"]), _parse(path, row["score"]), _parse(path, row["p_value"])


def _read_rows(path: Location) -> Iterator[table.Row]:
    with local_copy(path) as copy:
        yield from table.read(copy, COLUMNS, optional=(*CONDITIONS, *IDENTITY), name=str(path))


def _parse(path: Location, cell: str) -> float:
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError("files", f"{path} has {cell!r} where a number is expected: score the images again.")
    return number


def _score_files(
    m: LocalModel, calibration: "Calibration", files: Inputs, counted: set[tuple[str, str]], skipped: SkippedFiles
) -> Iterator[Measurement]:
    """Yield the measurements of the files, each once, that are not `counted` in their present state."""
    names = {name for name, _ in counted}
    by_name = {absolute_name(printable(path)): path for path in collect(files)}
    paths = [
        path for name, path in by_name.items() if name not in names or (name, stamp(path)["modified"]) not in counted
    ]
    scorer = image_scorer(m, {"calibration": calibration.name}, None, skipped, selected=calibration)
    done = 0
    with progress_bar() as on_progress:
        for rows in score_batches(paths, scorer):
            yield from ((row["bpd"], row["score"], row["p_value"]) for row in rows if "error" not in row)
            done += len(rows)
            on_progress(Progress("score", done, len(paths)))
