"""Sources of images: a folder of images, here or in object storage, one of parquet files, or a Hugging Face dataset."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ncml.data.inventory import counted
from ncml.errors import InputError
from ncml.images import SUFFIXES
from ncml.object_storage import StoragePath, is_address
from ncml.paths import Location, list_files, parse_location, printable, relative_to, sorted_files


@dataclass(frozen=True)
class Row:
    """One image before it is decoded."""

    name: str
    data: bytes | Location
    label: int


@dataclass(frozen=True)
class Source:
    """A dataset before it is decoded."""

    name: str
    count: int
    classes: tuple[str, ...]
    """Class names in the order of the labels; () where the source has no classes."""
    rows: Callable[[], Iterable[Row]]
    """Yields all rows, starting with the first each time it is called."""
    identity: str
    """A digest that changes when the images do."""
    unreadable: tuple[str, ...] = ()
    """Files that cannot be images."""


DEFAULT_SPLIT = "train"

SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))
"""Names of folders that hold the parts of a dataset rather than its classes."""


def check_source(name: str, split: str = DEFAULT_SPLIT, *, is_training: bool = False) -> None:
    """Raise InputError for a name that is neither a folder of images nor a dataset of the Hub; imports no torch.

    Also for another split of a folder of images than the default, because it has none.

    is_training: whether a model is trained on the images, for which those of a test part must not be among them.
    """
    files = _list_source(name)
    if files is not None:
        classes = _divide(parse_location(name), files)[2]
        if is_training and len(classes) > 1 and SPLITS.issuperset(map(str.lower, classes)):
            raise InputError(
                "data",
                f"{name} has the folders {' and '.join(classes)}, which are parts of a data set rather than classes: "
                "name the one to train on.",
            )
        if split != DEFAULT_SPLIT:
            raise InputError("split", f"{name} is a folder of images, which has no split {split!r}: omit the split.")


def open_source(name: str, split: str) -> Source:
    """Open a source; raise InputError if it has no such split, or no images."""
    files = _list_source(name)
    source = _open_dataset(name, split) if files is None else _open_image_folder(parse_location(name), files)
    if not source.count:
        raise no_images(name, len(source.unreadable))
    return source


def readable_rows(source: Source, unreadable_rows: Collection[int]) -> Iterable[Row]:
    """Yield the rows of a source that its dataset contains, without those at unreadable positions."""
    skipped = set(unreadable_rows)
    return (row for position, row in enumerate(source.rows()) if position not in skipped)


def names_at(source: Source, unreadable_rows: Collection[int], positions: Collection[int]) -> Iterable[str]:
    """Yield the names of the images at these positions of a source's dataset, in order."""
    selected = set(positions)
    rows = readable_rows(source, unreadable_rows)
    return (row.name for position, row in enumerate(rows) if position in selected)


def is_image_folder(name: str) -> bool:
    """Return whether a source is a folder of images: it has no splits, and its images are ordered by class."""
    folder = parse_location(name, "data")
    if isinstance(folder, StoragePath):
        return True
    return folder.is_dir() and _has_no_parquet(list_files([folder]))


def is_hub_dataset(name: str) -> bool:
    """Return whether a source is a dataset of the Hugging Face Hub, rather than a folder."""
    return not is_address(name) and not Path(name).is_dir()


def _has_no_parquet(files: Iterable[Location]) -> bool:
    return not any(path.suffix == ".parquet" for path in files)


def no_images(name: str, unreadable_count: int) -> InputError:
    """Return the error for a source without a readable image."""
    detail = f"{name!r} contains no readable image ({count_unreadable(unreadable_count)}): name a folder of images."
    return InputError("data", detail)


def count_unreadable(count: int) -> str:
    """Return a clause with the number of files that could not be read."""
    return f"{counted(count, 'file')} could not be read"


def _list_source(name: str) -> Sequence[Location] | None:
    """Return the files of a folder of images, and None for a dataset; raise InputError for anything else."""
    folder = parse_location(name, "data")
    if folder.is_file():
        raise InputError("data", f"{name} is a file; name its folder instead.")
    if not folder.is_dir():
        _check_hub_dataset(name)
        return None
    files = sorted_files(folder)
    if not files:
        raise no_images(name, 0)
    if _has_no_parquet(files):
        return files
    if isinstance(folder, StoragePath):
        raise InputError(
            "data", f"{name} contains parquet files, which are read from a folder of this machine: copy it."
        )
    return None


def _divide(folder: Location, files: Sequence[Location]) -> tuple[list[Location], list[Location], list[str]]:
    """Return the files that may be images, the other files, and the names of the class folders."""
    classes = sorted({relative.parts[0] for path in files if len((relative := relative_to(path, folder)).parts) > 1})
    outside = [path for path in files if path.parent == folder] if classes else []
    if any(path.suffix.lower() in SUFFIXES for path in outside):
        raise InputError("data", f"{folder} has images both in class folders and outside them; use one of the two.")
    return [path for path in files if path.parent != folder or not classes], outside, classes


def _open_image_folder(folder: Location, files: Sequence[Location]) -> Source:
    inside, outside, classes = _divide(folder, files)
    index = {name: i for i, name in enumerate(classes)}

    def rows() -> Iterable[Row]:
        for path in inside:
            relative = relative_to(path, folder)
            yield Row(printable(relative), path, index[relative.parts[0]] if classes else 0)

    class_names = tuple(printable(name) for name in classes)
    return Source(
        str(folder),
        len(inside),
        class_names,
        rows,
        _digest(files),
        tuple(printable(path.name) for path in outside),
    )


def _digest(files: Sequence[Location]) -> str:
    """Return a digest of files by name, size and time of change."""
    sha = hashlib.sha256()
    for path in files:
        if isinstance(path, StoragePath):
            sha.update("\0".join((str(path), *path.state(), "\n")).encode())
            continue
        stat = path.stat()
        sha.update(os.fsencode(path) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return sha.hexdigest()


def _open_dataset(name: str, split: str) -> Source:
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import datasets

    try:
        splits = cast(dict[str, Any], datasets.load_dataset(name))
    except Exception as error:  # the library raises its own, the Hub's and the operating system's errors
        raise InputError("data", f"the dataset {name!r} cannot be loaded: {error}") from error
    if split not in splits:
        raise InputError("data", f"{name!r} has no split {split!r}, only {', '.join(splits)}.")
    table = splits[split]
    column_names = [column for column in ("img", "image", *table.features) if column in table.features]
    image = next((column for column in column_names if isinstance(table.features[column], datasets.Image)), None)
    if image is None:
        raise InputError("data", f"{name!r} has no column of images, only {', '.join(table.features)}.")
    label = next((column for column in ("label", "labels", "fine_label") if column in table.features), None)
    labels, classes = _read_labels(name, table, label) if label else ([0] * len(table), ())
    encoded = table.cast_column(image, datasets.Image(decode=False))

    def rows() -> Iterable[Row]:
        for i, (row, label) in enumerate(zip(encoded, labels, strict=True)):
            cell = row[image] or {}
            yield Row(cell.get("path") or f"row {i}", _file_of(cell), label)

    # The library's fingerprint of a table depends on the names, sizes and times of its files.
    return Source(name, len(table), classes, rows, str(table._fingerprint))


def _file_of(cell: dict[str, Any]) -> bytes | Path:
    """Return the file of an image's cell; of an empty cell nothing, which is not an image."""
    return cell.get("bytes") or (Path(cell["path"]) if cell.get("path") else b"")


@functools.cache
def _check_hub_dataset(name: str) -> None:
    """Raise InputError for a dataset that the Hub does not have: loading would retry for half a minute first.

    Each name is checked once: hours after the train split, the test split is loaded from the cache.
    """
    import huggingface_hub
    from huggingface_hub import errors

    no_folder = f"there is no folder {name!r}"
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)
    except errors.OfflineModeIsEnabled:
        pass  # the Hub's cache may hold a copy
    except errors.HFValidationError as error:
        raise InputError("data", f"{no_folder}, and no dataset on the Hugging Face Hub can have that name.") from error
    except errors.HfHubHTTPError as error:
        raise InputError("data", f"{no_folder}, and the Hugging Face Hub refuses that name: {error}") from error
    except Exception as error:  # any error of the HTTP client in use
        offline = "with HF_HUB_OFFLINE=1 a copy in its cache is used"
        raise InputError(
            "data", f"{no_folder}, and the Hugging Face Hub cannot be reached ({error}); {offline}."
        ) from error


def _read_labels(source: str, table: Any, column: str) -> tuple[list[int], tuple[str, ...]]:
    """Return class indices and names: the names that the dataset gives, or else its distinct labels, sorted."""
    values = list(table[column])
    try:
        distinct = set(values)
    except TypeError as error:  # lists and records
        raise InputError(
            "data", f"{source!r} has several values in a {column}; keep one for each image, or remove that column."
        ) from error
    names = getattr(table.features[column], "names", None)
    index = {value: i for i, value in enumerate(range(len(names)) if names else sorted(distinct - {None}))}
    if not index.keys() >= distinct:
        raise InputError("data", f"{source!r} has images without a {column}; remove those images, or that column.")
    return [index[value] for value in values], tuple(names or map(str, index))
