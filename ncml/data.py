"""Datasets: a Hub name, a local folder of parquet files, or a folder of pictures with a subfolder for each class.

Everything is decoded once and kept as uint8. Every picture goes through the preprocessing that serving uses.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from ncml import images
from ncml.errors import InputError, NotAnImage, TooLarge

Part = Literal["fit", "calibration-fit", "calibration-rank"]

SPLIT = 50
"""Of every 50 pictures, in the dataset's order, the first 2 are calibration-fit and the next 5 calibration-rank."""

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Dataset:
    """Pictures of one size in memory."""

    images_NHWC: Tensor
    """uint8 [N, H, W, 3]."""
    labels_N: Tensor
    """int64 [N]; 0 where there are no classes."""
    classes: tuple[str, ...]
    """Class names in the order of the labels; () where the source has no classes."""
    skipped: int = 0
    """Pictures that could not be read."""
    resized: int = 0
    """Pictures that had another size."""

    def __len__(self) -> int:
        return len(self.images_NHWC)

    def first(self, count: int) -> Dataset:
        """The first so many pictures."""
        return Dataset(self.images_NHWC[:count], self.labels_N[:count], self.classes, self.skipped, self.resized)

    def part(self, name: Part) -> Dataset:
        """One of three disjoint parts by position i in the dataset's order: i mod 50 is 0-1, 2-6, or the rest (fit)."""
        position = torch.arange(len(self)) % SPLIT
        chosen = {
            "calibration-fit": position < 2,
            "calibration-rank": (position >= 2) & (position < 7),
            "fit": position >= 7,
        }[name]
        return Dataset(self.images_NHWC[chosen], self.labels_N[chosen], self.classes, self.skipped, self.resized)


def load(source: str, height: int, width: int, *, split: str = "train", report: Report | None = None) -> Dataset:
    """Read a dataset at the given size.

    source: a folder of pictures (with a subfolder for each class, or none), a folder of parquet files, or a Hub name.
    split: which split of a parquet folder or Hub dataset.
    report: called with pictures done and in all.
    """
    folder = Path(source)
    if folder.is_file():
        raise InputError("data", f"{source} is a file; give the folder that it is in.")
    if folder.is_dir() and not any(folder.rglob("*.parquet")):
        return _from_pictures(folder, height, width, report)
    return _from_datasets(source, height, width, split, report)


def _from_pictures(folder: Path, height: int, width: int, report: Report | None) -> Dataset:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    classes = tuple(sorted({path.relative_to(folder).parts[0] for path in files if path.parent != folder}))
    if classes and any(path.parent == folder for path in files):
        raise InputError("data", f"{folder} has pictures both in class folders and outside them; use one of the two.")
    index = {name: i for i, name in enumerate(classes)}
    rows = ((path, index[path.relative_to(folder).parts[0]] if classes else 0) for path in files)
    return _decode(str(folder), rows, len(files), classes, height, width, report)


def _from_datasets(source: str, height: int, width: int, split: str, report: Report | None) -> Dataset:
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
    rows = ((row[picture]["bytes"] or row[picture]["path"], value) for row, value in zip(raw, labels, strict=True))
    return _decode(source, rows, len(table), classes, height, width, report)


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
    names = getattr(table.features[label], "names", None)
    index = {value: i for i, value in enumerate(range(len(names)) if names else sorted(set(values) - {None}))}
    if not index.keys() >= set(values):
        raise InputError("data", f"{source!r} has pictures without a {label}; leave them out, or drop that column.")
    return [index[value] for value in values], tuple(names or map(str, index))


def _column(source: str, features: Any, names: tuple[str, ...], kind: type, what: str) -> str:
    for name in (*names, *features):
        if name in features and isinstance(features[name], kind):
            return name
    raise InputError("data", f"{source!r} has no column of {what}s, only {', '.join(features)}.")


def _decode(
    source: str,
    rows: Iterable[tuple[Any, int]],
    count: int,
    classes: tuple[str, ...],
    height: int,
    width: int,
    report: Report | None,
) -> Dataset:
    pixels = np.empty((count, height, width, 3), np.uint8)
    labels = np.empty(count, np.int64)
    kept = skipped = resized = 0
    for data, label in rows:
        try:
            picture = images.open_image(data, field="data")
            pixels[kept] = images.fit(picture, height, width)
        except (NotAnImage, TooLarge):
            skipped += 1
        else:
            labels[kept] = label
            resized += picture.shape[:2] != (height, width)
            kept += 1
        if report is not None and (kept + skipped) % 256 == 0:
            report(kept + skipped, count)
    if not kept:
        raise InputError("data", f"{source!r} holds no readable picture ({skipped} files could not be read).")
    return Dataset(torch.from_numpy(pixels[:kept]), torch.from_numpy(labels[:kept]), classes, skipped, resized)
