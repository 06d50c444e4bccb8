"""Paths: the search path of model folders, the default model, and the files of a command's arguments.

Does not import torch.
"""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from ncml.errors import InputError, ModelError, suggestion

BUNDLED_MODEL = "cifar10"
"""The name of the model that comes with this package, and that is the default."""

DETECTOR_BASE = "detector-base"
"""The name of the bundled model that only scores, on which detectors are built."""

BUNDLED = Path(__file__).resolve().parent.parent / "models"
"""The directory of the models that come with this package."""


def search_path() -> tuple[Path, ...]:
    """Return the directories that hold model folders; of two folders with the same name, the first takes precedence.

    They are those of the environment variable NCML_MODELS, separated like PATH; by default ./models and the models that
    come with this package.
    """
    directories = tuple(Path(part) for part in os.environ.get("NCML_MODELS", "").split(os.pathsep) if part)
    return directories or (Path("models"), BUNDLED)


def model_folders() -> dict[str, Path]:
    """Return every model folder on the search path, by name."""
    folders: dict[str, Path] = {}
    for directory in search_path():
        for config in sorted(directory.glob("*/config.json")):
            if not config.parent.name.startswith("."):  # it is being written
                folders.setdefault(config.parent.name, config.parent)
    return folders


def default_model(names: Iterable[str], setting: str) -> str | None:
    """Return the default model; None if there are no models. Adding a model folder does not change it.

    It is the one that `setting` (NCML_DEFAULT_MODEL) names, present or not; else the bundled model; else the first by
    name.
    """
    present = sorted(names)
    return setting or (BUNDLED_MODEL if BUNDLED_MODEL in present else next(iter(present), None))


def default_name(names: Iterable[str]) -> str | None:
    """Return the default model among these names; the environment variable NCML_DEFAULT_MODEL takes precedence."""
    return default_model(names, os.environ.get("NCML_DEFAULT_MODEL", "").partition("@")[0])


def find_model(model: str | os.PathLike[str]) -> Path:
    """Return the folder of a model by its name or path, "" for the default.

    Raises `ModelError`, with the nearest name, if there is none. A path that is not a string is not looked up by name.
    """
    if isinstance(model, os.PathLike):
        return Path(model)
    if not isinstance(model, str):
        raise ModelError(f"{model!r} is not a model: pass its name or its folder.")
    folders = model_folders()
    name = model or default_name(folders) or BUNDLED_MODEL
    folder = folders.get(name) or Path(name)
    if not folder.is_dir():
        raise ModelError(f"there is no model {name!r}{suggestion(name, list(folders))}")
    return folder


def check_output_folder(path: Path, field: str) -> None:
    """Raise `InputError` for a folder that cannot be written, or not be made."""
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(field, f"{path} cannot be written: {nearest} is not a writable folder.")


def check_space(folder: Path, size: int) -> None:
    """Raise `OSError` if the disk of a folder, which need not exist yet, has fewer free bytes than `size`."""
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(nearest).free
    if free < size:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({size:,} bytes are needed, {free:,} free)", folder)


def check_exists(path: Path) -> None:
    """Raise `InputError` for a path that does not exist."""
    if not path.exists():
        remedy = "; name standard input /dev/stdin" if str(path) == "-" else ""
        raise InputError(str(path), f"{path} cannot be read: there is no such file or folder{remedy}.")


def list_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield every file, those of a folder sorted by name, without hidden ones; holds one folder at a time in memory.

    Links to folders elsewhere are followed, each once. Raises `InputError` for a path that does not exist, and for a
    folder that cannot be read.
    """
    for path in paths:
        if path.is_dir():
            roots = [path.resolve()]
            for parent, folders, files in os.walk(path, onerror=_refuse, followlinks=True):
                names = sorted(name for name in folders if not name.startswith("."))
                folders[:] = [name for name in names if _is_new(Path(parent, name), roots)]
                yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))
        elif path.exists():
            yield path
        else:
            check_exists(path)


def _refuse(error: OSError) -> NoReturn:
    raise InputError(str(error.filename), f"{error.filename} cannot be read: {error.strerror}.") from error


def _is_new(folder: Path, roots: list[Path]) -> bool:
    """Return whether a folder is not a link, or a link out of the `roots`, to which its target is added."""
    if not folder.is_symlink():
        return True
    target = folder.resolve()
    if target.name.startswith(".") or any(target.is_relative_to(r) or r.is_relative_to(target) for r in roots):
        return False
    roots.append(target)
    return True


def printable(path: str | os.PathLike[str]) -> str:
    """Return a path as text that any output can hold: bytes that are not UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
