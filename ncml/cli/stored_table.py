"""Where `ncml score` makes its table: locally, or in object storage, where objects are replaced but not appended to.

There it is made on this machine as any table. What it has so far is stored as `NAME.part`, as a whole, at the start,
every minute and when the command stops; an object is either the former or the new one. So the next run resumes, also on
another machine, and a killed one loses at most the rows of the last minute. Does not import torch.
"""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ncml import locks
from ncml.cli.table import Row, Table, check_suffix, part_of
from ncml.errors import InputError, NcmlError, StorageError
from ncml.object_storage import StoragePath, filesystems
from ncml.paths import Location
from ncml.signals import handling, interrupt

SAVE_S = 60.0
"""Interval at which an unfinished table is stored."""

UPLOAD_SHARE = 0.05
"""Share of the time that this may take."""


def check_output(output: Location) -> None:
    """Raise `InputError` for a table that cannot be written for its suffix, kind of storage or folder."""
    check_suffix(output)
    if isinstance(output, StoragePath) and not output.is_writable:
        raise InputError("output", f"{output} cannot be written: use s3://, gs:// or a file of this machine.")
    if isinstance(output, Path) and not output.parent.is_dir():
        raise InputError("output", f"{output} cannot be written: make the folder {output.parent} first.")


@contextlib.contextmanager
def open_table(
    output: Location, columns: Sequence[str], *, texts: Iterable[str], constants: Mapping[str, str]
) -> Generator[Table]:
    """Yield a table as `Table` opens it; one in object storage is stored at the end, unless its `part` is gone."""
    if isinstance(output, Path):
        with _locked(output):
            yield Table(output, columns, texts=texts, constants=constants)
        return
    folder = Path(tempfile.mkdtemp(prefix="ncml-"))
    try:
        table = StoredTable(output, folder, columns, texts=texts, constants=constants)
        with handling(interrupt):
            try:
                yield table
            except BaseException:
                table.save_rows()
                raise
    except StorageError as error:
        part = folder / f"{output.name}.part"
        if part.exists() or part.with_name(output.name).exists():
            raise StorageError(f"{error} The rows so far are in {folder}.") from error
        raise
    except BaseException:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


@contextlib.contextmanager
def _locked(output: Path) -> Generator[None]:
    """Refuse a table that another process of this machine writes, by a lock on a file beside it."""
    lock = output.with_name(f".{output.name}.lock")
    refusal = InputError("output", f"another ncml score writes {output}: wait for it, or choose another --output.")
    try:
        file, _ = locks.acquire(lock, refusal)
    except OSError as error:
        raise InputError("output", f"{output} cannot be written: {error.strerror}.") from error
    with file:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextlib.contextmanager
def local_copy(table: Location) -> Generator[Path]:
    """Yield a table on this machine: a temporary copy of one in object storage."""
    if isinstance(table, Path):
        yield table
        return
    with tempfile.TemporaryDirectory(prefix="ncml-") as folder:
        copy = Path(folder, table.name)
        table.download(copy)
        yield copy


class StoredTable(Table):
    """A table that is made in a folder of this machine and stored as an object."""

    def __init__(
        self,
        output: StoragePath,
        folder: Path,
        columns: Sequence[str],
        *,
        texts: Iterable[str],
        constants: Mapping[str, str],
    ) -> None:
        """Create the table, or fetch an unfinished or finished one; raises as `Table`, and if it cannot be stored."""
        self._url, self._part_url = output.url, f"{output}.part"
        path = folder / output.name
        is_resumed = filesystems.download(self._part_url, part_of(path))
        filesystems.download(self._url, path)
        super().__init__(path, columns, texts=texts, constants=constants, name=str(output))
        self._next_save = time.monotonic() + SAVE_S
        if not is_resumed:
            self._save()  # shows before the images are judged that it can be stored

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows as `Table.add` does, and store the table from time to time."""
        super().add(rows)
        if time.monotonic() >= self._next_save:
            self._save()

    def finish(self, computed: Mapping[str, Callable[[Row], str]] = {}) -> None:
        """Store the table under its own name, as `Table.finish` writes it."""
        super().finish(computed)
        filesystems.upload(self.path, self._url)
        filesystems.remove(self._part_url)

    def save_rows(self) -> None:
        """Store the unfinished table, or remove it if it has no rows."""
        if self.part.exists():
            self._save()
        else:
            with contextlib.suppress(NcmlError):  # the error that ended the command matters more
                filesystems.remove(self._part_url)

    def _save(self) -> None:
        began = time.monotonic()
        filesystems.upload(self.part, self._part_url)
        ended = time.monotonic()
        self._next_save = ended + max(SAVE_S, (ended - began) / UPLOAD_SHARE)
