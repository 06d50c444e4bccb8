"""Files that a command is given: files as they are named, folders with all that is in them. Knows no torch."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ncml.errors import InputError


def listed(paths: Iterable[Path]) -> Iterator[Path]:
    """Every file, those of a folder in the order of their names; hidden ones are left out. Holds one folder at a time.

    Raises `InputError` for a path that does not exist.
    """
    for path in paths:
        if path.is_dir():
            yield from _inside(path)
        elif path.exists():
            yield path
        else:
            raise InputError(str(path), f"{path} cannot be read: there is no such file or folder.")


def text_of(path: str | os.PathLike[str]) -> str:
    """A path as it is told and written, which any file can hold: what is not UTF-8 in its name stands as an escape."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _inside(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))
