"""The sets of images that models are evaluated on: read at the model's size, or generated.

A set is shuffled once, with a fixed seed, so that its first n images are a fair sample (files may be sorted by class),
and their measurements remain valid when more are requested.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ncml.data.sources import count_unreadable, is_image_folder
from ncml.errors import InputError
from ncml.images import is_grey
from ncml.object_storage import is_address
from ncml.paths import printable
from ncml.progress import OnProgress, ignore_progress

SEED = 2022
"""Seed of shuffling, generated images and flips."""

GENERATED = ("constant", "uniform")
"""Generated sets: one colour for each image; every value independent."""

GENERATED_COUNT = 2000


@dataclass(frozen=True)
class ImageSet:
    """Images of one size."""

    name: str
    pixels_NHWC: NDArray[np.uint8]
    digest: str
    """Digest of the whole set, of which these are the first images."""
    notes: tuple[str, ...] = ()
    """Remarks for the reader of the report, one sentence each."""
    labels_N: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """Index of each image's class; empty for a set without classes."""
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels_NHWC)

    def first(self, n: int) -> ImageSet:
        """Return the first n images, or all if there are fewer."""
        return replace(self, pixels_NHWC=self.pixels_NHWC[:n], labels_N=self.labels_N[:n])


def split_source(source: str) -> tuple[str, str]:
    """Separate a source from the split that it names; the split is empty if it names none, as a URL does."""
    location, colon, split = source.rpartition(":")
    names_split = colon and not is_address(source) and not Path(source).exists()
    return (location, split) if names_split else (source, "")


def has_test_split(source: str) -> bool:
    """Return whether `load` reads a test split of a source; a folder of images has no splits."""
    location, split = split_source(source)
    return source in GENERATED or (split != "train" and not is_image_folder(location))


def name_sources(sources: Iterable[str]) -> dict[str, str]:
    """Name each source by the shortest end of its path that is unique among them, and its split."""
    candidates = {source: _candidate_names(source) for source in sources}

    def unique_name(source: str) -> str:
        taken = {name for other, names in candidates.items() if other != source for name in names}
        return next((name for name in candidates[source] if name not in taken), source)

    return {source: printable(unique_name(source)) for source in candidates}


def _candidate_names(source: str) -> list[str]:
    """Return the ends of a source's path from the shortest to the longest."""
    location, split = split_source(source)
    parts = Path(location).parts or (location,)
    return [str(Path(*parts[-depth:])) + f":{split}" * bool(split) for depth in range(1, len(parts) + 1)]


def load(
    source: str,
    height: int,
    width: int,
    *,
    split: str = "",
    name: str = "",
    on_progress: OnProgress = ignore_progress,
) -> ImageSet:
    """Load a set: constant, uniform, or NAME|FOLDER[:SPLIT] as `ncml.data.dataset` reads it.

    split: the split to read; by default that of the source, else test. A folder of images has none and is read whole.
    name: the name of the set; by default the end of its path and its split.
    """
    if source in GENERATED:
        return generate(source, GENERATED_COUNT, height, width)
    from ncml.data import dataset  # which imports torch

    location, source_split = split_source(source)
    if source_split and is_image_folder(location):
        raise InputError("data", f"{location} is a folder of images, which has no splits: omit :{source_split}.")
    images = dataset.load(location, height, width, split=split or source_split or "test", on_progress=on_progress)
    pixels_NHWC = images.images_NHWC.numpy()
    unreadable = len(images.inventory.unreadable)
    resized = len(images) - images.inventory.sizes[f"{width}x{height}"]
    grey = sum(map(is_grey, pixels_NHWC))
    remarks = (
        (unreadable, f"{count_unreadable(unreadable)} and {'was' if unreadable == 1 else 'were'} left out"),
        (
            resized,
            f"{resized:,} of {len(images):,} images had another size than {width}x{height} and were resized to it; "
            "their bits/dim are those of resized images and not comparable with published ones of the set",
        ),
        (
            grey > len(images) // 10,
            f"{grey:,} of {len(images):,} images are grey, and were read as RGB with three equal channels",
        ),
    )
    name = name or name_sources([source])[source]
    notes = tuple(f"{name}: {remark}." for applies, remark in remarks if applies)
    shuffled = _shuffle(name, pixels_NHWC, notes)
    if not images.classes:
        return shuffled
    return replace(shuffled, labels_N=images.labels_N.numpy()[_order(len(images))], classes=images.classes)


def generate(name: str, n: int, height: int, width: int) -> ImageSet:
    """Generate n images of one random colour each (constant), or of independent random values (uniform)."""
    rng = np.random.default_rng((SEED, GENERATED.index(name)))
    shape = (n, 1, 1, 3) if name == "constant" else (n, height, width, 3)
    pixels_NHWC = np.broadcast_to(rng.integers(256, size=shape, dtype=np.uint8), (n, height, width, 3)).copy()
    return _shuffle(name, pixels_NHWC)


def _shuffle(name: str, pixels_NHWC: NDArray[np.uint8], notes: tuple[str, ...] = ()) -> ImageSet:
    pixels_NHWC = pixels_NHWC[_order(len(pixels_NHWC))]
    return ImageSet(name, pixels_NHWC, hashlib.sha256(pixels_NHWC.data).hexdigest()[:16], notes)


def _order(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(SEED).permutation(count)
