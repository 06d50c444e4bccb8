"""`ncml drift`."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from tyro.conf import Positional, arg

from ncml.cli import table
from ncml.cli.rows import Skipped, batches, of_pictures
from ncml.cli.terminal import JsonOption, ModelOption, identity, load, print_json, progress_bar
from ncml.errors import InputError, ModelError
from ncml.paths import list_files
from ncml.progress import Progress

if TYPE_CHECKING:
    from ncml.model import Model

COLUMNS = ("model", "calibration", "statistic", "bpd", "score", "p_value")
CONDITIONS = ("class", "noise")
"""Columns of tables whose bits/dim were asked for under one of these."""

Scored = tuple[float, float, float]
"""Bits per dimension, score and p-value of an image."""


def drift(
    files: Annotated[Positional[tuple[Path, ...]], arg(metavar="TABLE|FILE|FOLDER...", help_behavior_hint="")],
    /,
    *,
    model: ModelOption = "cifar10",
    alpha: float = 0.01,
    plot: Annotated[Path | None, arg(metavar="FILE.png", help_behavior_hint="(default: none)")] = None,
    device: str = "cpu",
    as_json: JsonOption = False,
) -> int:
    """Tell whether pictures have moved away from those that the model was calibrated on. Exit status: 0 no, 1 yes.

    Args:
        files: Tables that ncml score --output wrote with this model and calibration, or pictures and folders to score.
        model: Name or folder of the model.
        alpha: How often drift may be told where there is none.
        plot: Draw both distributions of bits/dim, and the p-values, to this file.
        device: Where to compute: cpu, cuda or cuda:N.
        as_json: Print JSON.
    """
    if not files:
        raise InputError("files", "nothing to compare is named: ncml drift TABLE|FOLDER...")
    from ncml.ood import drift as measure

    m = load(model, device)
    if m.calibration is None:
        raise ModelError(f"drift is measured against a calibration, but {m.uncalibrated}")
    tables = [path for path in files if path.suffix in table.SUFFIXES]
    skipped = Skipped()
    rows = [*_stored(m, tables), *_scored(m, [path for path in files if path not in tables], skipped)]
    if not rows:
        raise InputError("files", f"there is no scored picture in {', '.join(map(str, files))}.")
    bpd, score, p_value = np.array(rows, np.float64).T
    ranked = m.calibration.ranked
    compared = measure.compare(
        bpd, score, p_value, ranked["bpd"], ranked[m.calibration.statistic], m.calibration.false_positive_rate, alpha
    )
    if plot is not None:
        measure.plot(plot, bpd, p_value, ranked["bpd"], compared, m.name)
    if as_json:
        calibration = m.calibration.version
        print_json({"model": identity(m), "calibration": calibration, "skipped": skipped.count} | asdict(compared))
    else:
        for name, shift in (("bits/dim", compared.bpd), (m.calibration.statistic, compared.score)):
            moved = f"mean {shift.mean:.4g} (calibrated {shift.calibrated_mean:.4g})"
            print(f"{name:12} PSI {shift.psi:.3f}  KS {shift.ks:.3f} (p {shift.ks_p:.2g})  {moved}")
        interval = f"{compared.flagged_low:.1%} to {compared.flagged_high:.1%}"
        print(
            f"{'flagged':12} {compared.flagged:.1%} of {compared.images} ({interval}); expected {compared.expected:.1%}"
        )
        print("drifted" if compared.drifted else "no drift found")
        skipped.tell(skipped.count)
    return int(compared.drifted)


def _stored(m: "Model", tables: list[Path]) -> Iterator[Scored]:
    wanted = (m.version[:12], m.calibration.version[:12], m.calibration.statistic) if m.calibration else ()
    for path in tables:
        for row in table.read(path, COLUMNS, also=CONDITIONS):
            if not row["p_value"]:
                continue  # a file that could not be read
            if (row["model"], row["calibration"], row["statistic"]) != wanted:
                raise InputError("files", f"{path} was scored by another model, calibration or statistic.")
            if any(row[name] for name in CONDITIONS):
                raise InputError(
                    "files",
                    f"{path} was scored with --class or --noise, and calibrated bits/dim are without: score the "
                    "pictures without them.",
                )
            yield _number(path, row["bpd"]), _number(path, row["score"]), _number(path, row["p_value"])


def _number(path: Path, cell: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(cell)):
            return number
    raise InputError("files", f"{path} has {cell!r} where a number belongs: score the pictures anew.")


def _scored(m: "Model", pictures: list[Path], skipped: Skipped) -> Iterator[Scored]:
    paths = list(list_files(pictures))
    work = of_pictures(m, {}, None, skipped)
    done = 0
    with progress_bar() as on_progress:
        for some in batches(paths):
            yield from ((row["bpd"], row["score"], row["p_value"]) for row in work(some) if "error" not in row)
            done += len(some)
            on_progress(Progress("score", done, len(paths)))
