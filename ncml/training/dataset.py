"""Datasets: a Hub name, a local folder of parquet files, or a folder of pictures with a subfolder for each class.

Everything is decoded once and kept as uint8. Every picture goes through the preprocessing that serving uses.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncml import checkpoint, images
from ncml.errors import InputError
from ncml.paths import list_files, printable
from ncml.progress import OnProgress, Progress, ignore_progress
from ncml.training.inventory import Inventory

Part = Literal["fit", "calibration-fit", "calibration-rank"]

SPLIT = 50
"""Of every 50 pictures, in the dataset's order, the first 2 are calibration-fit and the next 5 calibration-rank."""

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"))
"""Names of pictures end like this; only used to tell a stray picture from a stray file."""

AT_ONCE = 256
"""Pictures whose files are in memory at once."""

ZEROS = 2**24
"""Bytes written at once to take room on the disk."""


@dataclass(frozen=True)
class Dataset:
    """Pictures of one size, in memory or mapped from a file."""

    store_NHWC: Tensor
    """uint8 [S, H, W, 3]: of these the dataset is `rows_N`, or all."""
    labels_N: Tensor
    """int64 [N]; 0 where there are no classes."""
    classes: tuple[str, ...]
    """Class names in the order of the labels; () where the source has no classes."""
    inventory: Inventory = field(default_factory=Inventory)
    """What the source was found to hold."""
    rows_N: Tensor | None = None
    """int64 [N]: where in the store each picture lies."""

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def images_NHWC(self) -> Tensor:
        """The pictures, uint8 [N, H, W, 3]; of a part, a copy in memory."""
        return self.store_NHWC if self.rows_N is None else self.store_NHWC[self.rows_N]

    def take(self, index_N: Tensor) -> Dataset:
        """The pictures at these positions, none of which is copied."""
        rows_N = index_N if self.rows_N is None else self.rows_N[index_N]
        return Dataset(self.store_NHWC, self.labels_N[index_N], self.classes, self.inventory, rows_N)

    def first(self, count: int) -> Dataset:
        """The first so many pictures."""
        return self.take(torch.arange(min(count, len(self))))

    def spread(self, count: int) -> Dataset:
        """So many pictures evenly spaced, or all."""
        n = min(count, len(self))
        return self.take(torch.arange(n) * len(self) // max(1, n))

    def part(self, name: Part) -> Dataset:
        """One of three disjoint parts by position i in the dataset's order: i mod 50 is 0-1, 2-6, or the rest (fit)."""
        position = torch.arange(len(self)) % SPLIT
        chosen = {
            "calibration-fit": position < 2,
            "calibration-rank": (position >= 2) & (position < 7),
            "fit": position >= 7,
        }[name]
        return self.take(chosen.nonzero().flatten())


def load(
    source: str,
    height: int,
    width: int,
    *,
    split: str = "train",
    keep: Path | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Dataset:
    """Read a dataset at the given size.

    source: a folder of pictures (with a subfolder for each class, or none), a folder of parquet files, or a Hub name.
    split: which split of a parquet folder or Hub dataset.
    keep: folder for the decoded pictures, which are then mapped instead of held in memory; what it holds already is
        used, unless the source has changed. Processes that share a disk share it, once one of them has filled it.
    on_progress: counts images.
    """
    folder = Path(source)
    if folder.is_file():
        raise InputError("data", f"{source} is a file; give the folder that it is in.")
    if is_image_folder(source):
        found = _from_image_folder(folder)
    else:
        found = _from_datasets(source, split)
    if not found.count:
        raise _nothing_in(found, found.unreadable)
    if keep is None:
        pixels_NHWC = np.empty((found.count, height, width, 3), np.uint8)
        return _decode(found, pixels_NHWC, on_progress)
    kept = _Kept(keep, [found.identity, height, width, split, images.PREPROCESSING])
    return kept.dataset() or kept.fill(found, height, width, on_progress)


def is_image_folder(source: str) -> bool:
    """Whether a source is a folder of pictures: it has no splits, and its pictures come class by class."""
    folder = Path(source)
    return folder.is_dir() and not any(path.suffix == ".parquet" for path in list_files([folder]))


@dataclass(frozen=True)
class _Row:
    name: str
    data: bytes | Path
    label: int


@dataclass(frozen=True)
class _Source:
    """A dataset before it is decoded."""

    name: str
    count: int
    classes: tuple[str, ...]
    rows: Iterable[_Row]
    identity: str
    """Another one when the pictures are others."""
    unreadable: tuple[str, ...] = ()
    """Files that cannot be pictures."""


def _from_image_folder(folder: Path) -> _Source:
    files = sorted(path for path in list_files([folder]) if path.is_file())
    classes = sorted({path.relative_to(folder).parts[0] for path in files if path.parent != folder})
    outside = [path for path in files if path.parent == folder] if classes else []
    if any(path.suffix.lower() in SUFFIXES for path in outside):
        raise InputError("data", f"{folder} has pictures both in class folders and outside them; use one of the two.")
    index = {name: i for i, name in enumerate(classes)}
    inside = [path for path in files if path.parent != folder] if classes else files
    rows = (
        _Row(printable(path.relative_to(folder)), path, index[path.relative_to(folder).parts[0]] if classes else 0)
        for path in inside
    )
    names, strays = (tuple(map(printable, some)) for some in (classes, (path.name for path in outside)))
    return _Source(str(folder), len(inside), names, rows, _listing(files), strays)


def _listing(files: Sequence[Path]) -> str:
    """A digest of files by name, size and time of change."""
    sha = hashlib.sha256()
    for path in files:
        stat = path.stat()
        sha.update(os.fsencode(path) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return sha.hexdigest()


def _from_datasets(source: str, split: str) -> _Source:
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import datasets

    if not Path(source).is_dir():
        _ask_hub(source)
    try:
        found = cast(dict[str, Any], datasets.load_dataset(source))
    except Exception as error:  # the library raises its own, the Hub's and the operating system's errors
        raise InputError("data", f"the dataset {source!r} cannot be loaded: {error}") from error
    if split not in found:
        raise InputError("data", f"{source!r} has no split {split!r}, only {', '.join(found)}.")
    table = found[split]
    picture = _column(source, table.features, ("img", "image"), datasets.Image, "picture")
    label = next((name for name in ("label", "labels", "fine_label") if name in table.features), None)
    labels, classes = _labels(source, table, label) if label else ([0] * len(table), ())
    raw = table.cast_column(picture, datasets.Image(decode=False))
    rows = (
        _Row((cell or {}).get("path") or f"row {i}", _file(cell or {}), label)
        for i, (cell, label) in enumerate(zip((row[picture] for row in raw), labels, strict=True))
    )
    # The library's fingerprint of a table follows the names, sizes and times of its files.
    return _Source(source, len(table), classes, rows, str(table._fingerprint))


def _file(cell: dict[str, Any]) -> bytes | Path:
    """The file of a picture's cell; of an empty cell nothing, which is no picture."""
    return cell.get("bytes") or (Path(cell["path"]) if cell.get("path") else b"")


@functools.cache
def _ask_hub(name: str) -> None:
    """Refuse what the Hub cannot give, after asking it once: loading would retry for half a minute first.

    A name that it gave is not asked for again: a test split comes out of the cache, hours after the train split.
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
    except Exception as error:  # whatever the HTTP client in use raises
        offline = "with HF_HUB_OFFLINE=1 a copy in its cache is used"
        raise InputError(
            "data", f"{no_folder}, and the Hugging Face Hub cannot be reached ({error}); {offline}."
        ) from error


def _labels(source: str, table: Any, label: str) -> tuple[list[int], tuple[str, ...]]:
    """Class indices and names: the names that the dataset gives, or else its distinct labels in their order."""
    values = list(table[label])
    try:
        distinct = set(values)
    except TypeError as error:  # lists and records
        raise InputError(
            "data", f"{source!r} has several values in a {label}; give each picture one, or drop that column."
        ) from error
    names = getattr(table.features[label], "names", None)
    index = {value: i for i, value in enumerate(range(len(names)) if names else sorted(distinct - {None}))}
    if not index.keys() >= distinct:
        raise InputError("data", f"{source!r} has pictures without a {label}; leave them out, or drop that column.")
    return [index[value] for value in values], tuple(names or map(str, index))


def _column(source: str, features: Any, names: tuple[str, ...], kind: type, what: str) -> str:
    for name in (*names, *features):
        if name in features and isinstance(features[name], kind):
            return name
    raise InputError("data", f"{source!r} has no column of {what}s, only {', '.join(features)}.")


def _take_room(path: Path, start: int) -> None:
    """Give a file of holes its blocks: a full disk is an error now, and a crash once the pages are written."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        file.seek(start)  # macOS has no such call
        for at in range(start, size, ZEROS):
            file.write(bytes(min(ZEROS, size - at)))


def _decode(source: _Source, pixels_NHWC: NDArray[np.uint8], on_progress: OnProgress) -> Dataset:
    """Decode into an array with a place for each row; those that cannot be read leave none empty between others."""
    count, height, width, _ = pixels_NHWC.shape
    labels: list[int] = []
    unreadable = list(source.unreadable)
    sizes: Counter[str] = Counter()
    seen: set[bytes] = set()
    enlarged = 0
    for row, decoded in _decoded(source.rows, height, width):
        if decoded is None:
            unreadable.append(row.name)
        else:
            picture, (rows, columns) = decoded
            pixels_NHWC[len(labels)] = picture
            labels.append(row.label)
            sizes[f"{columns}x{rows}"] += 1
            enlarged += rows < height or columns < width
            seen.add(hashlib.blake2b(picture.tobytes(), digest_size=16).digest())
        done = len(labels) + len(unreadable) - len(source.unreadable)
        if done % AT_ONCE == 0:
            on_progress(Progress("read", done, count))
    if not labels:
        raise InputError(
            "data", f"{source.name!r} holds no readable picture ({len(unreadable)} files could not be read)."
        )
    by_class = np.bincount(labels, minlength=len(source.classes)).tolist() if source.classes else []
    inventory = Inventory(
        files=len(labels) + len(unreadable),
        sizes=sizes,
        enlarged=enlarged,
        copies=len(labels) - len(seen),
        unreadable=unreadable,
        classes=dict(zip(source.classes, by_class, strict=bool(source.classes))),
    )
    return Dataset(torch.from_numpy(pixels_NHWC[: len(labels)]), torch.tensor(labels), source.classes, inventory)


def _nothing_in(source: _Source, unreadable: Sequence[str]) -> InputError:
    some = f"{len(unreadable)} files could not be read"
    return InputError("data", f"{source.name!r} holds no readable picture ({some}).")


def _decoded(
    rows: Iterable[_Row], height: int, width: int
) -> Iterator[tuple[_Row, tuple[NDArray[np.uint8], tuple[int, ...]] | None]]:
    """Each row in order, with its picture and the size that it had, or None; by as many threads as PyTorch has."""

    def decode(row: _Row) -> tuple[NDArray[np.uint8], tuple[int, ...]] | None:
        try:
            picture = images.open_image(row.data, field="data")
        except InputError:
            return None
        return images.resize_to(picture, height, width), picture.shape[:2]

    rows = iter(rows)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        while some := list(itertools.islice(rows, AT_ONCE)):
            yield from zip(some, pool.map(decode, some), strict=True)


class _Kept:
    """A folder that holds decoded pictures, whole once it has its description."""

    def __init__(self, folder: Path, identity: Sequence[object]) -> None:
        self.pixels, self.labels, self.description = (
            folder / name for name in ("pictures.npy", "labels.npy", "description.json")
        )
        self.identity = json.loads(json.dumps(identity))

    def dataset(self) -> Dataset | None:
        """What the folder holds, if it is this dataset."""
        try:
            found = json.loads(self.description.read_text())
            if found["identity"] != self.identity:
                return None
            labels_N = torch.from_numpy(np.load(self.labels))
            # Copy on write, and nothing writes: PyTorch warns of arrays that it may not write to.
            pixels_NHWC = np.load(self.pixels, mmap_mode="c")[: len(labels_N)]
            inventory = Inventory.from_json(found["inventory"])
            return Dataset(torch.from_numpy(pixels_NHWC), labels_N, tuple(found["classes"]), inventory)
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            return None  # nothing there, or not whole: it is decoded anew

    def fill(self, source: _Source, height: int, width: int, on_progress: OnProgress) -> Dataset:
        """Decode into the folder, and map it from there."""
        self.pixels.parent.mkdir(parents=True, exist_ok=True)
        self.description.unlink(missing_ok=True)
        try:
            shape = (source.count, height, width, 3)
            pixels_NHWC = np.lib.format.open_memmap(self.pixels, "w+", np.uint8, shape)
            _take_room(self.pixels, pixels_NHWC.offset)
        except OSError as error:
            size = source.count * height * width * 3 / 2**30
            raise InputError(
                "out",
                f"{self.pixels.parent} has no room for {size:.1f} GiB of decoded pictures ({error.strerror}): "
                "free some, or give --out on another disk.",
            ) from error
        found = _decode(source, pixels_NHWC, on_progress)
        np.save(self.labels, found.labels_N.numpy())
        described = {"identity": self.identity, "classes": found.classes, "inventory": found.inventory.to_json()}
        checkpoint.write_json(self.description, described)
        return self.dataset() or found
