"""Paths: the search path of model folders, the default model, and the files of a command's arguments.

Does not import torch.
"""

import errno
import itertools
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import NoReturn, TypeAlias

from ncml.errors import InputError, ModelError, suggestion
from ncml.object_storage import StoragePath, is_address

Location: TypeAlias = Path | StoragePath
"""A file or a folder of this machine, or in object storage."""

MAX_MODEL_NAME = 200
"""Characters of a model folder's name: as many as a job may name."""

MODEL_NAME_RULE = (
    f"a model's name has at most {MAX_MODEL_NAME} printable characters, none of them @, and does not begin with a dot"
)
"""What `is_servable` requires."""

MAX_FILES = 2_000_000
"""Files whose names may be in memory at the same time."""

BUNDLED_MODEL = "cifar10"
"""The name of the model that comes with this package, and that is the default."""

DETECTOR_BASE = "detector-base"
"""The name of the bundled model that only scores, on which detectors are built."""

BUNDLED = Path(__file__).resolve().parent.parent / "models"
"""The directory of the models in the clone; an install without -e, as in the containers, has none."""


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


def is_servable(name: str) -> bool:
    """Return whether a folder with this name can be served: requests write name@version, hidden ones are incomplete."""
    return name.isprintable() and "@" not in name and not name.startswith(".") and len(name) <= MAX_MODEL_NAME


def check_model_name(out: Path) -> None:
    """Raise `InputError` for a folder of a new model, the option `out`, that no service would serve."""
    if not is_servable(out.resolve().name):
        raise InputError("out", f"--out {printable(out)} cannot be served: {MODEL_NAME_RULE}; choose another name.")


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


def find_detector_base() -> Path:
    """Return the folder of the model on which detectors are built: the clone's, or else the one on the search path.

    Raises `ModelError` if there is none.
    """
    folder = BUNDLED / DETECTOR_BASE
    if not (folder / "config.json").is_file():
        folder = model_folders().get(DETECTOR_BASE)
    if folder is None:
        raise ModelError(
            f"detectors need the model {DETECTOR_BASE!r}, which is missing: copy models/{DETECTOR_BASE} of the clone "
            "of ncml into ./models, or into a directory that NCML_MODELS names"
        )
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


def parse_location(text: str, field: str = "path") -> Location:
    """Return the path that a text names: a URL is one in object storage. Raises `InputError` for an unsupported URL."""
    if not is_address(text):
        return Path(text)
    path = StoragePath.parse(text)
    path.check(field)
    return path


def check_exists(path: Location) -> None:
    """Raise `InputError` for a path that does not exist."""
    if isinstance(path, StoragePath):
        path.is_dir()  # raises
    elif not path.exists():
        remedy = "; name standard input /dev/stdin" if str(path) == "-" else ""
        raise InputError(str(path), f"{path} cannot be read: there is no such file or folder{remedy}.")


def list_files(paths: Iterable[Location]) -> Iterator[Location]:
    """Yield every file, those of a folder sorted by name, without hidden ones; holds one folder at a time in memory.

    Links to folders elsewhere are followed, each once. Raises `InputError` for a path that does not exist, and for a
    folder that cannot be read.
    """
    for path in paths:
        if isinstance(path, StoragePath):
            yield from path.list_files() if path.is_dir() else [path]
        else:
            yield from list_local_files(path)


def list_local_files(path: Path) -> Iterator[Path]:
    """Yield the files of a path of this machine as `list_files` does."""
    if not path.is_dir():
        check_exists(path)
        yield path
        return
    roots = [path.resolve()]
    for parent, folders, files in os.walk(path, onerror=_refuse, followlinks=True):
        names = sorted(name for name in folders if not name.startswith("."))
        folders[:] = [name for name in names if _is_new(Path(parent, name), roots)]
        visible = (Path(parent, name) for name in sorted(files) if not name.startswith("."))
        yield from (path for path in visible if not path.is_fifo())  # one without a writer never ends


def sorted_files(folder: Location) -> Sequence[Location]:
    """Return the files of a folder, sorted by the parts of their paths; a copy of a folder has the same order.

    Raises `InputError` as `list_files`, and for a folder in object storage as `collect`.
    """
    if isinstance(folder, Path):
        return sorted(path for path in list_local_files(folder) if path.is_file())
    return sorted(path for path in collect(list_files([folder])) if isinstance(path, StoragePath))


def collect(files: Iterable[Location]) -> list[Location]:
    """Return files as a list; raises `InputError` for more than `MAX_FILES`."""
    collected = list(itertools.islice(files, MAX_FILES + 1))
    if len(collected) > MAX_FILES:
        raise InputError("files", f"there are more than {MAX_FILES:,} files, as {collected[0]}: name fewer folders.")
    return collected


def relative_to(path: Location, folder: Location) -> PurePath:
    """Return the part of a file's path below a folder that contains it; both are of one kind."""
    if isinstance(path, StoragePath):
        assert isinstance(folder, StoragePath)
        return path.relative_to(folder)
    assert isinstance(folder, Path)
    return path.relative_to(folder)


def size_of(path: Location) -> int:
    """Return the size of a file in bytes; 0 if storage does not report it."""
    return int(path.state()[0] or 0) if isinstance(path, StoragePath) else path.stat().st_size


def copy_file(source: Location, target: Path) -> None:
    """Copy the contents of a file to this machine."""
    if isinstance(source, StoragePath):
        source.download(target)
    else:
        shutil.copyfile(source, target)


def sync(path: Path) -> None:
    """Return when the contents of a file or folder are on the disk, where they outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def printable(path: str | os.PathLike[str] | StoragePath) -> str:
    """Return a path as text that any output can hold, with escapes for bytes that are not UTF-8 and for controls."""
    return escape_controls(os.fsencode(str(path)).decode("utf-8", "backslashreplace"))


def escape_controls(text: str) -> str:
    """Return a text with escapes for control characters.

    In a terminal, the name of a file or the answer of a server could otherwise forge lines and change what is shown.
    """
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: "".join(f"\\x{byte:02x}" for byte in match[0].encode()), text)


def printed_path(text: str) -> Path:
    """Return the path of this machine that `printable` has written; the text itself if no such file exists."""
    path = Path(os.fsdecode(re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes([int(match[1], 16)]), text.encode())))
    return path if path.exists() else Path(text)
