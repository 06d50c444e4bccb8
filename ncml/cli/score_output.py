"""The output of `ncml score`: lines on the terminal, rows in memory for JSON, or a table on disk.

`ncml drift` and `ncml watch` print and count their rows in the same way.
"""

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from os.path import realpath
from pathlib import Path

import numpy as np

from ncml.cli.earlier_rows import DISCOVERY, STAMP_COLUMNS, EarlierRows, check_replaceable, count_current, stamp
from ncml.cli.rows import Row, Scorer, SkippedFiles, score_batches
from ncml.cli.stored_table import check_output, open_table
from ncml.cli.table import Table, part_of
from ncml.cli.terminal import progress_bar
from ncml.data.inventory import counted
from ncml.errors import InputError, NcmlError
from ncml.object_storage import StoragePath
from ncml.ood import conformal
from ncml.paths import Location, collect, escape_controls, list_files, printable
from ncml.progress import Progress

TEXT_COLUMNS = (
    "file",
    "view",
    "rarity",
    "differences",
    "modified",
    "moved_to",
    "model",
    "calibration",
    "statistic",
    "class",
    "error",
)


@dataclass(frozen=True)
class Inputs:
    """The files of a command, except those that it writes itself: the table, and everything in the folder of maps."""

    paths: tuple[Location, ...]
    output: Location | None = None
    maps: Path | None = None

    def __iter__(self) -> Iterator[Location]:
        tables = (
            [realpath(path) for path in (self.output, part_of(self.output))] if isinstance(self.output, Path) else []
        )
        objects = (self.output, part_of(self.output)) if isinstance(self.output, StoragePath) else ()
        maps = None if self.maps is None else realpath(self.maps)
        for path in list_files(self.paths):
            if isinstance(path, StoragePath):
                if path not in objects:
                    yield path
                continue
            real = realpath(path)  # unlike `Path.resolve`, also of a symbolic link to itself
            if real not in tables and not (maps and Path(real).is_relative_to(maps)):
                yield path


def score_in_memory(
    files: Inputs,
    scorer: Scorer,
    fdr: float | None,
    show: Callable[[Row], None] | None,
) -> Row:
    """Score files and show each row; returns the rows and their summary."""
    paths = collect(files)
    rows: list[Row] = []
    with _file_progress(scorer, len(paths)) as show_done:
        for batch_rows in score_batches(paths, scorer):
            rows += batch_rows
            if show is not None and fdr is None:
                for row in batch_rows:
                    show(row)
            show_done(len(rows))
    readable = [row for row in rows if "error" not in row]
    if not readable:
        raise InputError("files", rows[0]["error"] if rows else _no_image_in(files))
    errors = [row for row in rows if "error" in row]
    summary: Row = {"results": readable, "images": len(readable), "skipped": len(errors), "errors": errors}
    summary["flagged"] = sum(bool(row.get("is_ood")) for row in readable)
    if fdr is not None:
        p = np.array([row["p_value"] for row in readable])
        for row, is_discovery in zip(readable, conformal.discoveries(p, fdr).tolist(), strict=True):
            row["discovery"] = is_discovery
            if show is not None:
                show(row)
        summary |= {"fdr": fdr, "discoveries": sum(row["discovery"] for row in readable)}
    return summary


def score_to_table(
    output: Location,
    files: Inputs,
    scorer: Scorer,
    fdr: float | None,
    columns: tuple[str, ...],
    constants: dict[str, str],
    skipped: SkippedFiles,
) -> Row:
    """Write a row for every file, resuming an interrupted run; returns the table's summary.

    Rows of a finished table are kept for files that have not changed, unless heat maps are to be written as well.
    Raises `InputError` for a file at `output` that its replacement would lose (`check_replaceable`).
    """
    check_output(output)
    total = _count(files)
    if not total:
        raise InputError("files", _no_image_in(files))
    names = (*columns, *STAMP_COLUMNS, *constants, "error")
    with open_table(output, names, texts=TEXT_COLUMNS, constants=constants) as table:
        try:
            check_replaceable(table, str(output), files.paths)
        except (InputError, OSError):
            if not table.done:
                table.part.unlink()
            raise
        return _fill(table, files, scorer, fdr, skipped, total) | {"output": str(output)}


def _fill(table: Table, files: Inputs, scorer: Scorer, fdr: float | None, skipped: SkippedFiles, total: int) -> Row:
    """Write the rows that a table lacks, and finish it; returns its summary."""
    last_done = list(itertools.islice(files, table.done - 1, table.done)) if table.done else []
    if [printable(path) for path in last_done] != [table.last] * bool(table.done):
        raise InputError(
            "output", f"{table.part_name} was started on other files: remove it, or choose another --output."
        )
    table.keep(count_current(table, files))
    paths = itertools.islice(files, table.done, None)
    earlier = None if files.maps else EarlierRows(table)
    kept = 0

    def begin(path: Location) -> Row:
        row = earlier.find(path) if earlier else None
        nonlocal kept
        kept += row is not None
        return row or stamp(path)  # before the file is read, so that the next run notices a later change

    try:
        with _file_progress(scorer, total, table.done) as show_done:
            for rows in score_batches(paths, scorer, begin):
                table.add(to_cells(row) for row in rows)
                table.done += len(rows)
                show_done(table.done)
    except NcmlError:
        if not table.done:
            table.part.unlink()
        raise
    count = len(table.numbers("score" if "tiles" in table.columns else "bpd"))
    if not count:
        table.part.unlink()
        raise InputError("files", skipped.messages[0] if skipped.messages else "no image could be read.")
    summary: Row = {"images": count, "kept": kept, "skipped": table.done - count}
    summary["flagged"] = int(sum(table.numbers("is_ood")))
    if fdr is None:
        table.finish()
        return summary
    p = np.array(table.numbers("p_value"))
    largest = conformal.largest_discovery(p, fdr)
    table.finish({DISCOVERY: lambda row: str(int(float(row["p_value"]) <= largest)) if row["p_value"] else ""})
    return summary | {"fdr": fdr, "discoveries": int((p <= largest).sum())}


@contextlib.contextmanager
def _file_progress(scorer: Scorer, total: int, done: int = 0) -> Generator[Callable[[int], None]]:
    """Yield a function that shows how many of the files are done, beside the tiles of the current one.

    Of a single file, the tiles alone are shown.
    """
    with progress_bar() as on_progress:

        def show_done(count: int) -> None:
            nonlocal done
            done = count
            if total > 1:
                on_progress(Progress("score", done, total))

        def show_tiles(tiles: Progress) -> None:
            note = f"{tiles.stage} {tiles.done}/{tiles.total}"
            on_progress(tiles if total == 1 else Progress("score", done, total, note))

        scorer.on_progress = show_tiles
        yield show_done


def _count(files: Inputs) -> int:
    """Return the number of files, and show progress, because listing a large bucket takes minutes."""
    count = 0
    with progress_bar() as on_progress:
        for count, _ in enumerate(files, 1):
            if count % 1000 == 0:
                on_progress(Progress("list", count, 0))
    return count


def _no_image_in(files: Inputs) -> str:
    return f"there is no image in {', '.join(map(str, files.paths))}."


def to_cells(row: Row) -> Row:
    """Return the cells of a table for the results of a file: verdicts as 0 or 1, and nothing for None."""
    return {k: int(v) if isinstance(v, bool) else "" if v is None else v for k, v in row.items()}


def print_row(row: Row, statistics: tuple[str, ...]) -> None:
    """Print the line of an image, with these statistics beside its verdict; nothing for an unreadable file."""
    if "error" in row:
        return
    verdict = ""
    if row.get("p_value") is not None:
        verdict = f"  p {row['p_value']:.4f} {'OOD' if row['is_ood'] else '   '}"
    if "discovery" in row:
        verdict += " *" if row["discovery"] else "  "
    if "rarity" in row:
        position = f"{row['width']}x{row['height']}+{row['left']}+{row['top']}"
        values = "".join(f"  {name} {row[name]:.6g}" for name in statistics)
        view = escape_controls(row["view"].replace("_", " "))
        remarks = escape_controls("; ".join(filter(None, (row["rarity"], row["differences"]))))
        print(f"{view:17} {row['score']:7.2f} at {position:20}{verdict}{values}  {row['file']}  ({remarks})")
    elif "tiles" in row:
        position = f"{row['width']}x{row['height']}+{row['left']}+{row['top']}"
        view = escape_controls(row["view"].replace("_", " "))
        print(f"{view:10} {row['score']:8.3f} at {position:20}{verdict}  {row['file']}")
    else:
        values = "".join(f"  {name} {row[name]:.6g}" for name in statistics)
        print(f"{row['bpd']:8.4f} bits/dim  {row['log_likelihood']:12.2f} nats{verdict}{values}  {row['file']}")


def format_summary(summary: Row, threshold: float | None = None) -> str:
    """Format the number of images, and of those that are flagged or discovered. threshold: that of a detector."""
    text = counted(summary["images"], "image")
    if summary.get("kept"):
        text += f", {summary['kept']:,} of them unchanged since the table was written"
    if "false_positive_rate" in summary:
        above, population = "", "in-distribution"
        if threshold is not None:
            above, population = f" by scores above {threshold:.2f}", "good"
        expected = f"at most {100 * summary['false_positive_rate']:g}% of {population} images are expected to be"
        text += f", {summary['flagged']} flagged{above} ({expected})"
    if "discoveries" in summary:
        discoveries = counted(summary["discoveries"], "discovery", "discoveries")
        text += f", {discoveries} at a false discovery rate of {summary['fdr']:g}"
        text += summary.get("fdr_limit", "")
    return text + (f": {summary['output']}" if "output" in summary else "")


def explain_fdr(summary: Row, smallest_p: float) -> str:
    """Explain why no image is a discovery although some are flagged, if that is for lack of ranks; "" otherwise."""
    count, rate = summary["images"], summary["fdr"]
    needed = conformal.min_discoveries(count, smallest_p, rate)
    if summary["discoveries"] or needed <= 1 or needed <= min(count, summary["flagged"]):
        return ""
    if needed > count:
        return f" (unreachable: p >= {smallest_p:.2g} is above the rate; calibrate with more ranking images)"
    return f" (at p >= {smallest_p:.2g} at least {needed} of these images would have to be flagged)"
