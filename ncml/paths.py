"""Where model folders are looked for, and the files that a command is given. Knows no torch."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ncml.errors import InputError


def search_path() -> tuple[Path, ...]:
    """Directories that hold model folders; where a name occurs twice, the earlier directory counts.

    Those that the environment variable NCML_MODELS names, separated like PATH; without it ./models and then the
    models that came with this package.
    """
    named = tuple(Path(part) for part in os.environ.get("NCML_MODELS", "").split(os.pathsep) if part)
    return named or (Path("models"), Path(__file__).resolve().parent.parent / "models")


def model_folders() -> dict[str, Path]:
    """Every model folder on the search path, by name."""
    folders: dict[str, Path] = {}
    for directory in search_path():
        for config in sorted(directory.glob("*/config.json")):
            folders.setdefault(config.parent.name, config.parent)
    return folders


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
