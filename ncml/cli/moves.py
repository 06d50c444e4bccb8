"""Moves of images to another folder, also on another file system, in which none is replaced, lost or left twice."""

import errno
import filecmp
import hashlib
import itertools
import os
import shutil
from collections.abc import Set
from pathlib import Path

from ncml.paths import sync

MTIME_S = 2.0
"""Precision of modification times on the least precise file systems."""


def unused_path(target: Path, reserved: Set[Path] = frozenset()) -> Path:
    """Return a path or, if it is reserved or there is a file already, one with a number. Raises `OSError`.

    Of a camera that always writes one name, thousands of images have numbers: these are bisected.
    """

    def is_used(number: int) -> bool:
        path = _numbered(target, number)
        return path in reserved or path.exists()

    if not is_used(0):
        return target
    used, unused = 0, 1
    while is_used(unused):
        used, unused = unused, 2 * unused
    while unused - used > 1:
        middle = (used + unused) // 2
        used, unused = (middle, unused) if is_used(middle) else (used, middle)
    return _numbered(target, unused)


def move_unused(path: Path, target: Path) -> Path:
    """Move a file to a path or, if there is a file already, to one with a number; return where it is.

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
    names = (_numbered(target, number) for number in itertools.count())
    taken = itertools.takewhile(lambda other: other != unused, names)
    copy = next((other for other in taken if _is_copy(other, path)), None)
    if copy is None:
        digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()  # the longest names leave no room for a suffix
        _copy(path, unused, target.with_name(f".{digest[:16]}.new"))
    path.unlink()
    return copy or unused


def _numbered(target: Path, number: int) -> Path:
    """Return a.png for 0, a-1.png for 1, a-2.png for 2 and so on."""
    return target.with_name(f"{target.stem}-{number}{target.suffix}") if number else target


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
    if not other.exists():
        return False
    is_as_old = abs(other.stat().st_mtime - path.stat().st_mtime) <= MTIME_S
    return is_as_old and filecmp.cmp(other, path, shallow=False)
