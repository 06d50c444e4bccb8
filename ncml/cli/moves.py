"""Moves of images to another folder, also on another file system, in which none is replaced, lost or left twice."""

import errno
import filecmp
import shutil
from pathlib import Path

from ncml.paths import sync

MTIME_S = 2.0
"""Precision of modification times on the least precise file systems."""


def move_unused(path: Path, target: Path) -> None:
    """Move a file to a path or, if there is a file already, to the next one with a number.

    Whenever this is interrupted, no file has an incomplete content under such a name, and another call completes the
    move. One process at a time may do this in a folder. Raises `OSError`.
    """
    taken: list[Path] = []
    unused = target
    while unused.exists():
        taken.append(unused)
        unused = target.with_name(f"{target.stem}-{len(taken)}{target.suffix}")
    try:
        path.rename(unused)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        if not any(_is_copy(other, path) for other in taken):
            _copy(path, unused, target.with_name(f".{target.name}.new"))
        path.unlink()


def _copy(path: Path, target: Path, new: Path) -> None:
    """Copy a file under another name, which a killed process may have left, and rename it when it is on the disk."""
    try:
        shutil.copy2(path, new)
        sync(new)
        new.rename(target)
        sync(target.parent)
    finally:
        new.unlink(missing_ok=True)


def _is_copy(other: Path, path: Path) -> bool:
    """Return whether a file is the copy of another that an interrupted move has left."""
    is_as_old = abs(other.stat().st_mtime - path.stat().st_mtime) <= MTIME_S
    return is_as_old and filecmp.cmp(other, path, shallow=False)
