"""Measurements on disk, a row for each image: an interrupted or extended evaluation resumes from them."""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncml import checkpoint
from ncml.progress import OnProgress, Progress

Columns = dict[str, NDArray[Any]]
"""Arrays of one length: a row for each image."""

SECONDS = "seconds"
"""The column of the time that each row took, stored with those of the measurement."""

WRITE_INTERVAL_S = 10.0
"""Time between writes while rows are measured."""


class MeasurementCache:
    """A folder of measurements, a file for each."""

    def __init__(self, folder: Path, on_progress: OnProgress) -> None:
        self.folder, self.on_progress = folder, on_progress
        self.saved_seconds = 0.0
        """Measuring time of the rows that earlier evaluations measured, and this one has used."""
        self._used_rows: dict[Path, int] = {}
        """Rows of each file that this evaluation has used, or measured itself."""

    def rows(
        self,
        stage: str,
        key: Mapping[str, Any],
        n: int,
        measure: Callable[[int, int], Columns],
        *,
        chunk: int = 32,
        subject: str = "",
    ) -> Columns:
        """Return the first n rows of a measurement, measuring only those that are not on disk.

        stage: name of the progress bar and the file; `subject` is added to the bar's. key: JSON that determines the
        rows, such as the versions of model and data. measure(start, stop): those rows.
        Rows are written every few seconds, and when `measure` raises or is interrupted.
        """
        digest = hashlib.sha256(json.dumps([stage, key], sort_keys=True).encode()).hexdigest()[:16]
        path = self.folder / f"{stage.replace(' ', '_')}-{digest}.npz"
        columns = _read(path)
        done = written = _length(columns)
        if done:
            self.saved_seconds += float(columns[SECONDS][self._used_rows.get(path, 0) : n].sum())
        last_write = time.monotonic()
        try:
            while done < n:
                start = time.monotonic()
                new = measure(done, min(done + chunk, n))
                count = _length(new)
                new = new | {SECONDS: np.full(count, (time.monotonic() - start) / count)}
                columns = {name: np.concatenate([columns[name], rows]) for name, rows in new.items()} if done else new
                done = _length(columns)
                self.on_progress(Progress(f"{stage} {subject}".strip(), done, n))
                if time.monotonic() - last_write > WRITE_INTERVAL_S:
                    self._write(path, columns)
                    written, last_write = done, time.monotonic()
        finally:
            if done > written:
                self._write(path, columns)
            self._used_rows[path] = max(self._used_rows.get(path, 0), min(n, done))
        return {name: values[:n] for name, values in columns.items() if name != SECONDS}

    def _write(self, path: Path, columns: Columns) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / ".gitignore").write_text("*\n")  # the measurements can be repeated

        def write(new: Path) -> None:
            with new.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **columns)

        checkpoint.replace_file(path, write)


def _length(columns: Columns) -> int:
    return len(next(iter(columns.values()))) if columns else 0


def _read(path: Path) -> Columns:
    """Return the stored columns; none if the file is missing, or damaged and to be measured again."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            columns = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        return {}
    return columns if SECONDS in columns and len({len(values) for values in columns.values()}) == 1 else {}
