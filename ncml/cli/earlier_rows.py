"""A table that an earlier run has finished: whether a run may replace it, and its rows of unchanged files.

A file is unchanged if it has the size and the modification time in the columns `bytes` and `modified` of its row. Does
not import torch.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import takewhile

from ncml.cli.table import Row, Table, column_names, read
from ncml.data.inventory import counted
from ncml.errors import InputError
from ncml.object_storage import StoragePath, is_address
from ncml.paths import Location, printable

STAMP_COLUMNS = ("bytes", "modified")

DISCOVERY = "discovery"
"""The column that a finished table may have in addition; it depends on all rows, so it is always computed."""


def stamp(path: Location) -> Row:
    """Return the cells that identify the state of a file; empty cells if it cannot be read."""
    if isinstance(path, StoragePath):
        try:
            return dict(zip(STAMP_COLUMNS, path.state(), strict=True))
        except InputError:
            return dict.fromkeys(STAMP_COLUMNS, "")
    try:
        status = path.stat()
    except OSError:
        return dict.fromkeys(STAMP_COLUMNS, "")
    seconds, nanoseconds = divmod(status.st_mtime_ns, 10**9)
    modified = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{nanoseconds:09d}Z"
    return {"bytes": str(status.st_size), "modified": modified}


def is_current(row: Row, path: Location) -> bool:
    """Return whether a row is that of a file in its present state."""
    current = stamp(path)
    return row["file"] == printable(path) and all(_equal(name, row[name], current[name]) for name in STAMP_COLUMNS)


def count_current(table: Table, paths: Iterable[Location]) -> int:
    """Return how many rows at the start of an unfinished table belong to these files in their present state."""
    return sum(1 for _ in takewhile(lambda pair: is_current(*pair), zip(table.rows(), paths, strict=False)))


def check_replaceable(table: Table, name: str, inputs: Sequence[Location]) -> None:
    """Raise `InputError` for a finished table that is not one of scores, or has rows that its replacement would lose.

    These are rows of files that are neither among the inputs nor in a folder among them; those of files that were
    deleted from such a folder may go. name: what messages call the table.
    """
    if not table.path.exists() or not table.path.stat().st_size:
        return
    remedy = "delete it, or choose another --output."
    try:
        if not {*STAMP_COLUMNS, "error"} <= {*column_names(table.path)}:
            raise InputError("output", "it lacks columns")
        paths = {absolute_name(printable(path)) for path in inputs}
        folders = tuple(f"{absolute_name(printable(path)).rstrip('/')}/" for path in inputs if path.is_dir())
        names = (row["file"] for row in read(table.path, ["file"]))
        others = [name for name in names if (path := absolute_name(name)) not in paths and not path.startswith(folders)]
    except InputError as error:
        raise InputError("output", f"{name} is not a table of ncml score: {remedy}") from error
    if others:
        rows = f"rows of {counted(len(others), 'file')} that {'is' if len(others) == 1 else 'are'} not to be scored"
        raise InputError("output", f"{name} has {rows}, such as {others[0]}: {remedy}")


def absolute_name(name: str) -> str:
    """Return the address or the absolute path of a file whose name is in a table."""
    return name if is_address(name) else os.path.abspath(name)  # noqa: PTH100 (without following links)


class EarlierRows:
    """The rows of the finished table that a run will replace; none if that is a table of something else.

    It is read once, in the order of the files: of a table whose files come in another order, only some rows are found.
    Takes some 60 bytes of memory a row.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        self._names: set[int] = set()
        self._rows: Iterator[Row] = iter(())
        try:
            names = [name for name in column_names(table.path) if name != DISCOVERY]
            if names == table.columns:
                self._names = {hash(row["file"]) for row in read(table.path, ["file"])}
                self._rows = read(table.path, table.columns)
        except (InputError, OSError):  # it is replaced, as a table of something else is
            self._names.clear()

    def find(self, path: Location) -> Row | None:
        """Return the complete row of a file that has not changed; call it for the files in their order."""
        name = printable(path)
        if hash(name) not in self._names:
            return None
        for row in self._rows:
            self._names.discard(hash(row["file"]))
            if row["file"] == name:
                return row if self._is_complete(row) and is_current(row, path) else None
        return None

    def _is_complete(self, row: Row) -> bool:
        """Return whether a row has results of this table's model, calibration and conditions."""
        constants = self._table.constants
        return not row["error"] and all(_equal(column, row[column], value) for column, value in constants.items())


def _equal(column: str, cell: str, value: str) -> bool:
    """Compare cells; those of numbers may be written differently, as 64 and 64.0 in Parquet."""
    if cell == value or not cell or not value:
        return cell == value
    try:
        return column != "modified" and float(cell) == float(value)
    except ValueError:
        return False
