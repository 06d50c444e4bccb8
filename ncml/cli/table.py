"""A table of results, written row by row, so that an interrupted run can resume. Does not import torch.

Rows go to `NAME.part`; `finish` writes the table under its own name, CSV or Parquet by its suffix. A row takes 8 bytes
of memory when the table is finished, and none before.
"""

import array
import csv
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ncml.errors import InputError
from ncml.object_storage import StoragePath
from ncml.paths import Location, sync

SUFFIXES = (".csv", ".parquet")
BLOCK = 10_000
"""Rows of one write to Parquet."""

NAMING = ("file", "error")
"""Text columns whose cells begin with the name of a file, which may be anyone's choice."""
FORMULA = ("=", "+", "-", "@")
"""First characters of a cell that spreadsheets take for a formula."""
FORMULA_PATHS = tuple(f"./{character}" for character in FORMULA)

Row = dict[str, str]
AnyLocation = TypeVar("AnyLocation", Path, StoragePath)


def part_of(path: AnyLocation) -> AnyLocation:
    """Return the file that holds an unfinished table."""
    return path.with_name(path.name + ".part")


def check_suffix(path: Location) -> None:
    """Raise `InputError` for a path that has another suffix than a table."""
    if path.suffix not in SUFFIXES:
        raise InputError("output", f"{path} must end in .csv or .parquet.")


class Table:
    """One table on disk; columns that are not in `texts` hold numbers or empty cells."""

    def __init__(
        self,
        path: Path,
        columns: Sequence[str],
        *,
        texts: Iterable[str],
        constants: Mapping[str, str],
        is_endless: bool = False,
        name: str = "",
    ) -> None:
        """Create the table, or open an unfinished one.

        is_endless: rows go to the table itself, which is never finished.
        name: what messages call it; by default its path.
        constants: columns with one value in every row, such as the model; a table with other values is refused.
        Raises `InputError` for another suffix, a path that cannot be written, or an unfinished table of something else.
        """
        check_suffix(path)
        self.path, self.columns, self.texts, self.constants = path, list(columns), set(texts), dict(constants)
        self.part = path if is_endless else part_of(path)
        self.part_name = str(self.part) if not name else f"{name}.part"
        self.done, self.last = 0, ""
        """Number of rows on disk, and the first cell of the last of them."""
        try:
            if self.part.exists() and self.part.stat().st_size:
                self._resume()
            else:
                with self.part.open("w", newline="", encoding="utf-8") as file:
                    csv.writer(file).writerow(self.columns)
                sync(self.part.parent)  # the name of the file
        except OSError as error:
            raise InputError("output", f"{name or path} cannot be written: {error.strerror}.") from error

    def _resume(self) -> None:
        with self.part.open("rb+") as file:  # a run that was killed may have left half a row
            end = file.seek(0, os.SEEK_END)
            while end and not _ends_line(file, end):
                end -= 1
            file.truncate(end)
        try:
            is_this_table = self._count_rows()
        except (csv.Error, ValueError):  # not a table, or text in a column of numbers
            is_this_table = False
        if not is_this_table:
            raise InputError(
                "output",
                f"{self.part_name} was started by another command, model, calibration or release of ncml: remove it, "
                "or choose another --output.",
            )

    def _count_rows(self) -> bool:
        """Count the rows on disk; return whether they belong to this table."""
        with self.part.open(newline="", encoding="utf-8") as file:
            if next(csv.reader(file), None) != self.columns:
                return False
        for row in self.rows():
            if any(row[name] != value for name, value in self.constants.items()):
                return False
            for name in self.columns:
                if name not in self.texts:
                    float(row[name] or 0)
            self.done, self.last = self.done + 1, row[self.columns[0]]
        return True

    def rows(self) -> Iterator[Row]:
        """Yield the rows so far, as text."""
        with self.part.open(newline="", encoding="utf-8") as file:
            yield from map(_from_csv, csv.DictReader(file))

    def numbers(self, column: str) -> "array.array[float]":
        """Return one column without its empty cells, 8 bytes a row."""
        return array.array("d", (float(row[column]) for row in self.rows() if row[column]))

    def keep(self, count: int) -> None:
        """Drop all rows but the first `count`."""
        if count == self.done:
            return
        new = self.path.with_name(f".{self.part.name}.new")
        _write_csv(new, self.columns, self.texts, itertools.islice(self.rows(), count))
        sync(new)
        new.replace(self.part)
        self.done = count

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows; they are on disk when this returns, and none of them if it raises. Missing cells are empty.

        Constants replace cells of the same name: a detector's statistic is one for all rows, unlike its view.
        """
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, restval="")
        writer.writerows(_to_csv(dict(row) | self.constants) for row in rows)
        with open(self.part, "ab", buffering=0, opener=_open_existing) as file:
            end, unwritten = file.seek(0, os.SEEK_END), text.getvalue().encode()
            try:
                while unwritten:
                    unwritten = unwritten[file.write(unwritten) :]
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(end)
                raise _with_filename(error, self.part) from error

    def finish(self, computed: Mapping[str, Callable[[Row], str]] = {}) -> None:
        """Write the table under its own name, with additional number columns computed from each row."""
        new = self.path.with_name(f".{self.path.name}.new")
        write = _write_parquet if self.path.suffix == ".parquet" else _write_csv
        columns = [*self.columns, *computed]
        rows = (row | {name: compute(row) for name, compute in computed.items()} for row in self.rows())
        try:
            write(new, columns, self.texts, rows)
            sync(new)
        except OSError as error:
            raise _with_filename(error, new) from error
        new.replace(self.path)
        self.part.unlink()


def _open_existing(path: str, flags: int) -> int:
    """Open a file that exists: rows in a new one, as after a rotation, would be a table without its header."""
    return os.open(path, flags & ~os.O_CREAT)


def _with_filename(error: OSError, path: Path) -> OSError:
    """Return an error that names a file, for messages: that of a write, as to a full disk, does not."""
    return error if error.filename else OSError(error.errno, error.strerror or str(error), str(path))


def _ends_line(file: Any, end: int) -> bool:
    file.seek(end - 1)
    return file.read(1) == b"\n"


def _write_csv(path: Path, columns: list[str], _: set[str], rows: Iterable[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(map(_to_csv, rows))


def _to_csv(row: dict[str, Any]) -> dict[str, Any]:
    """Return the cells of a row in a CSV file: a file that is named like a formula gets `./`, which names the same."""
    return row | {name: f"./{row[name]}" for name in NAMING if str(row.get(name, "")).startswith(FORMULA)}


def _from_csv(row: Row) -> Row:
    """Return the row of which `_to_csv` has made these cells: no other name begins with `./`."""
    return row | {name: row[name][2:] for name in NAMING if (row.get(name) or "").startswith(FORMULA_PATHS)}


def _write_parquet(path: Path, columns: list[str], texts: set[str], rows: Iterable[Row]) -> None:
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([(n, pyarrow.string() if n in texts else pyarrow.float64()) for n in columns])
    block: list[dict[str, Any]] = []
    with parquet.ParquetWriter(path, schema) as writer:
        for row in rows:
            block.append({n: (v if n in texts else float(v)) if v else None for n, v in row.items()})
            if len(block) == BLOCK:
                writer.write_table(pyarrow.Table.from_pylist(block, schema))
                block.clear()
        writer.write_table(pyarrow.Table.from_pylist(block, schema))


def column_names(path: Path) -> list[str]:
    """Return the columns of a finished table; raises `InputError` if it is damaged, and `OSError`."""
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            return list(parquet.ParquetFile(path).schema_arrow.names)
        with path.open(newline="", encoding="utf-8") as file:
            return next(csv.reader(file), [])
    except (ValueError, csv.Error) as error:
        raise InputError("table", f"{path} is not a table.") from error


def read(path: Path, columns: Sequence[str], *, optional: Sequence[str] = (), name: str = "") -> Iterator[Row]:
    """Yield columns of a finished table, row by row, as text; raises `InputError` if it is not a table with them.

    optional: columns that a table may lack; their cells are then empty. name: what messages call it; default: its path.
    """
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            stored = parquet.ParquetFile(path)
            present = [name for name in optional if name in stored.schema_arrow.names]
            for batch in stored.iter_batches(columns=[*columns, *present]):
                for row in batch.to_pylist():
                    cells = {name: row[name] for name in columns} | {name: row.get(name) for name in optional}
                    yield {name: "" if cell is None else str(cell) for name, cell in cells.items()}
        else:
            with path.open(newline="", encoding="utf-8") as file:
                for row in map(_from_csv, csv.DictReader(file, restval="")):
                    yield {name: row[name] for name in columns} | {name: row.get(name, "") for name in optional}
    except (KeyError, ValueError, csv.Error) as error:
        raise InputError(
            "table", f"{name or path} is not a table of ncml score --output: it lacks {' or '.join(columns)}."
        ) from error
