"""`ncml score`."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from ncml.cli.rows import Row, Skipped, Work, batches, of_pictures, of_tiles
from ncml.cli.table import Table
from ncml.cli.terminal import ClassOption, JsonOption, ModelOption, identity, load, print_json, progress_bar
from ncml.errors import InputError
from ncml.ood import conformal
from ncml.paths import list_files, printable
from ncml.progress import Progress

if TYPE_CHECKING:
    from ncml.model import Model

TEXTS = ("file", "model", "calibration", "statistic", "class", "error")
PLAIN = ("file", "bpd", "log_likelihood", "score", "p_value", "is_ood")
TILED = ("file", "score", "p_value", "is_ood", "left", "top", "width", "height", "tiles")


def score(
    files: Annotated[Positional[tuple[Path, ...]], arg(metavar="FILE|FOLDER...", help_behavior_hint="")],
    /,
    *,
    model: ModelOption = "cifar10",
    output: Annotated[Path | None, arg(aliases=("-o",), metavar="FILE", help_behavior_hint="(default: none)")] = None,
    class_: ClassOption = None,
    noise: float = 0.0,
    statistic: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: the calibration's)")] = None,
    statistics: Annotated[str, arg(metavar="NAME,...|all", help_behavior_hint="(default: none)")] = "",
    fdr: Annotated[float | None, arg(metavar="RATE", help_behavior_hint="(default: none)")] = None,
    map_: Annotated[Path | None, arg(name="map", metavar="FOLDER", help_behavior_hint="(default: none)")] = None,
    tile: bool = False,
    tile_size: Annotated[int | None, arg(metavar="PIXELS", help_behavior_hint="(default: the calibration's)")] = None,
    only_bpd: bool = False,
    device: str = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Tell how likely pictures are under a model, exactly, and whether they belong to what it was calibrated on.

    Folders are scored with all that is in them. A file that is no readable picture is skipped and counted.

    Args:
        files: Pictures, or folders of them: PNG, JPEG, WebP, BMP, TIFF or GIF.
        model: Name or folder of the model.
        output: Table to write, .csv or .parquet. The same command again goes on where it was cut off.
        class_: Condition on this class (bits/dim only; verdicts have conditions of their own).
        noise: Noise level at which to score, in grey levels (bits/dim only).
        statistic: The statistic that gives the verdict.
        statistics: Further statistics to tell, by name.
        fdr: Among all these pictures, mark those that are out-of-distribution, at most this share of them wrongly.
        map_: Folder for a heat map (PNG and npz) of each picture.
        tile: Score pictures larger than the model in overlapping tiles, and judge each by its worst one.
        tile_size: Side of a tile in pixels, where tiles are not calibrated.
        only_bpd: Bits/dim alone: one pass of the network, no verdict.
        device: Where to compute: cpu, cuda or cuda:N.
        as_json: Print JSON.
    """
    if not files:
        raise InputError("files", "no picture is named: ncml score FILE...")
    if fdr is not None:
        conformal.largest_discovery(np.empty(0), fdr)  # says at once what is wrong with a rate
    m = load(model, device)
    if tile:
        if class_ is not None or noise or statistics or statistic or only_bpd:
            raise InputError("tile", "with --tile pictures are judged by their worst tile: leave other options out.")
        names, bound, why = (), m.tiles, "tiles are not calibrated: run ncml calibrate --tile."
        judge = "worst tile"
    else:
        if tile_size is not None:
            raise InputError("tile_size", "--tile-size is for --tile; leave it out or add that.")
        names, bound, why = (
            _names(m, statistics, class_ is not None or noise > 0),
            None if only_bpd else m.calibration,
            m.uncalibrated,
        )
        judge = "" if bound is None else statistic or bound.statistic
    if fdr is not None and bound is None:
        raise InputError("fdr", f"--fdr needs p-values: {'leave --only-bpd out.' if only_bpd else why}")
    skipped = Skipped()
    asked = {"classes": class_, "noise": noise, "statistic": statistic, "statistics": names, "ood": not only_bpd}
    work = of_tiles(m, tile_size, map_, skipped) if tile else of_pictures(m, asked, map_, skipped)
    columns = TILED if tile else (*PLAIN, *names)
    told: Row
    if output is None:
        told = _in_memory(files, work, fdr, None if as_json else _shown(columns, tile))
    else:
        same = {"model": m.version[:12], "calibration": "" if bound is None else bound.version[:12], "statistic": judge}
        conditions = {"class": class_, "noise": noise, "tile_size": tile_size}
        same |= {name: str(value) for name, value in conditions.items() if value}
        told = _on_disk(output, files, work, fdr, columns, same, skipped)
    if bound is not None:
        told["false_positive_rate"] = bound.false_positive_rate
    if as_json:
        print_json({"model": identity(m), **({"uncalibrated": why} if bound is None else {}), **told})
        return
    if output is not None or told["pictures"] > 1:
        print(_summary(told), file=sys.stderr if output is None else sys.stdout)
    if bound is None and not only_bpd:
        print(f"ncml: no verdicts: {why}", file=sys.stderr)
    skipped.tell(told["skipped"])


def _names(m: "Model", statistics: str, conditional: bool) -> tuple[str, ...]:
    """The statistics to tell beside bits/dim, which are always told; "all" are those that can be computed.

    conditional: bits/dim are asked for at a noise level or of a class, and so are not those of the statistic.
    """
    from ncml.ood.statistics import select_names

    if not statistics:
        return ()
    names = select_names("all" if statistics == "all" else statistics.split(","), m.statistics)
    if conditional and statistics != "all" and "bpd" in names:
        raise InputError(
            "statistics",
            "the statistic bpd is without --class and --noise, and the column bpd with them: leave one of them out.",
        )
    judged = statistics != "all" or m.calibration is not None
    return tuple(name for name in names if name != "bpd" and (judged or not m.statistics[name].needs_estimates))


def _in_memory(files: tuple[Path, ...], work: Work, fdr: float | None, show: Callable[[Row], None] | None) -> Row:
    """Score and show; the rows and what is to be told of them."""
    paths = list(list_files(files))
    rows: list[Row] = []
    done = 0
    with progress_bar() as on_progress:
        for some in batches(paths):
            fresh = work(some)
            rows += fresh
            if show is not None and fdr is None:
                for row in fresh:
                    show(row)
            done += len(some)
            on_progress(Progress("score", done, len(paths)))
    read = [row for row in rows if "error" not in row]
    if not read:
        raise InputError("files", rows[0]["error"] if rows else _nothing_in(files))
    told: Row = {"results": read, "pictures": len(read), "skipped": len(rows) - len(read)}
    told["flagged"] = sum(bool(row.get("is_ood")) for row in read)
    if fdr is not None:
        p = np.array([row["p_value"] for row in read])
        for row, discovered in zip(read, conformal.discoveries(p, fdr).tolist(), strict=True):
            row["discovery"] = discovered
            if show is not None:
                show(row)
        told |= {"fdr": fdr, "discoveries": sum(row["discovery"] for row in read)}
    return told


def _on_disk(
    output: Path,
    files: tuple[Path, ...],
    work: Work,
    fdr: float | None,
    columns: tuple[str, ...],
    same: dict[str, str],
    skipped: Skipped,
) -> Row:
    """Write a row for every file, go on where an earlier run ended; what is to be told of the table."""
    total = sum(1 for _ in list_files(files))
    if not total:
        raise InputError("files", _nothing_in(files))
    table = Table(output, (*columns, *same, "error"), texts=TEXTS, same=same)
    paths = list_files(files)
    before = list(itertools.islice(paths, table.done - 1, table.done)) if table.done else []
    if [printable(path) for path in before] != [table.last] * bool(table.done):
        raise InputError("output", f"{table.part} was started on other files: remove it, or give another --output.")
    with progress_bar() as on_progress:
        for some in batches(paths):
            table.add(_cells(row) for row in work(some))
            table.done += len(some)
            on_progress(Progress("score", table.done, total))
    count = len(table.numbers("score" if "tiles" in columns else "bpd"))
    if not count:
        table.part.unlink()
        raise InputError("files", skipped.told[0] if skipped.told else "no picture could be read.")
    told = {"output": str(output), "pictures": count, "skipped": table.done - count}
    told["flagged"] = int(sum(table.numbers("is_ood")))
    if fdr is None:
        table.finish()
        return told
    p = np.array(table.numbers("p_value"))
    largest = conformal.largest_discovery(p, fdr)
    table.finish({"discovery": lambda row: str(int(float(row["p_value"]) <= largest)) if row["p_value"] else ""})
    return told | {"fdr": fdr, "discoveries": int((p <= largest).sum())}


def _nothing_in(files: tuple[Path, ...]) -> str:
    return f"there is no picture in {', '.join(map(str, files))}."


def _cells(row: Row) -> Row:
    return {k: int(v) if isinstance(v, bool) else "" if v is None else v for k, v in row.items()}


def _shown(columns: tuple[str, ...], tile: bool) -> Callable[[Row], None]:
    def show(row: Row) -> None:
        if "error" in row:
            return
        verdict = ""
        if row.get("p_value") is not None:
            verdict = f"  p {row['p_value']:.4f} {'OOD' if row['is_ood'] else '   '}"
        if "discovery" in row:
            verdict += " *" if row["discovery"] else "  "
        if tile:
            place = f"{row['width']}x{row['height']}+{row['left']}+{row['top']}"
            print(f"worst tile {row['score']:8.3f} at {place:20}{verdict}  {row['file']}")
        else:
            further = "".join(f"  {name} {row[name]:.6g}" for name in columns[len(PLAIN) :])
            print(f"{row['bpd']:8.4f} bits/dim  {row['log_likelihood']:12.2f} nats{verdict}{further}  {row['file']}")

    return show


def _summary(told: dict[str, Any]) -> str:
    said = f"{told['pictures']} pictures"
    if "false_positive_rate" in told:
        expected = f"{100 * told['false_positive_rate']:g}% are expected of pictures that belong"
        said += f", {told['flagged']} flagged ({expected})"
    if "discoveries" in told:
        said += f", {told['discoveries']} discoveries at a false discovery rate of {told['fdr']:g}"
    return said + (f": {told['output']}" if "output" in told else "")
