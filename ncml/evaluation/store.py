"""Rows measured so far, on disk: an evaluation that was interrupted, or is asked for more, goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
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
"""The column that is kept beside those of a measurement: what each row took."""

EVERY_S = 10.0
"""How often rows are written while they are measured."""


class Store:
    """A folder of measurements, a file for each."""

    def __init__(self, folder: Path, on_progress: OnProgress) -> None:
        self.folder, self.on_progress = folder, on_progress
        self.spared = 0.0
        """Seconds that it took to measure the rows which had not to be measured again."""

    def rows(
        self,
        stage: str,
        what: Mapping[str, Any],
        n: int,
        measure: Callable[[int, int], Columns],
        *,
        chunk: int = 32,
        of: str = "",
    ) -> Columns:
        """The first n rows of a measurement, of which only those not measured before are measured now.

        stage: what the progress bar and the file are called; `of` is for the bar alone. what: JSON that decides the
        rows, such as the versions of model and data; another is another measurement. measure(start, stop): those rows.
        What was measured is written now and then, and when `measure` raises or is interrupted.
        """
        digest = hashlib.sha256(json.dumps([stage, what], sort_keys=True).encode()).hexdigest()[:16]
        path = self.folder / f"{stage.replace(' ', '_')}-{digest}.npz"
        columns = _read(path)
        done = written = _length(columns)
        if done:
            self.spared += float(columns[SECONDS][:n].sum())
        last = time.monotonic()
        try:
            while done < n:
                begun = time.monotonic()
                new = measure(done, min(done + chunk, n))
                rows = _length(new)
                new = new | {SECONDS: np.full(rows, (time.monotonic() - begun) / rows)}
                columns = {name: np.concatenate([columns[name], more]) for name, more in new.items()} if done else new
                done = _length(columns)
                self.on_progress(Progress(f"{stage} {of}".strip(), done, n))
                if time.monotonic() - last > EVERY_S:
                    self._write(path, columns)
                    written, last = done, time.monotonic()
        finally:
            if done > written:
                self._write(path, columns)
        return {name: values[:n] for name, values in columns.items() if name != SECONDS}

    def _write(self, path: Path, columns: Columns) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / ".gitignore").write_text("*\n")  # it can all be measured again

        def write(new: Path) -> None:
            with new.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **columns)

        checkpoint.replace_file(path, write)


def _length(columns: Columns) -> int:
    return len(next(iter(columns.values()))) if columns else 0


def _read(path: Path) -> Columns:
    """What is stored; nothing where there is none, or where it is damaged and has to be measured again."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            columns = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return {}
    return columns if SECONDS in columns and len({len(values) for values in columns.values()}) == 1 else {}
