"""Moves of images to another folder, also on another file system, in which none is replaced, lost or left twice."""

import errno
import filecmp
import itertools
import shutil
from collections.abc import Iterator, Set
from pathlib import Path

from ncml.paths import sync

MTIME_S = 2.0
"""Precision of modification times on the least precise file systems."""


def unused_path(target: Path, reserved: Set[Path] = frozenset()) -> Path:
    """Return a path or, if it is reserved or there is a file already, the next one with a number. Raises `OSError`."""
    return next(path for path in _numbered(target) if path not in reserved and not path.exists())


def move_unused(path: Path, target: Path) -> Path:
    """Move a file to a path or, if there is a file already, to the next one with a number; return where it is.

    Whenever this is interrupted, no file has an incomplete content under such a name, and another call completes the
    move. In place of a link, whose own path may be relative, the file that it names is copied. One process at a time
    may do this in a folder. Raises `OSError`.
    """
    unused = unused_path(target)
    if not path.is_symlink():
        try:
            return path.rename(unused)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
    taken = itertools.takewhile(lambda other: other != unused, _numbered(target))
    copy = next((other for other in taken if _is_copy(other, path)), None)
    if copy is None:
        _copy(path, unused, target.with_name(f".{target.name}.new"))
    path.unlink()
    return copy or unused


def _numbered(target: Path) -> Iterator[Path]:
    """Yield a.png, a-1.png, a-2.png and so on."""
    yield target
    yield from (target.with_name(f"{target.stem}-{number}{target.suffix}") for number in itertools.count(1))


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
