"""The pictures that models are evaluated on: read at the model's size, thinned evenly to a limit, or generated."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ncml import data

SEED = 2022
"""Of the pictures and flips that are drawn here."""

GENERATED = ("constant", "uniform")
"""Sets that are drawn: one colour for each picture; every value by itself."""

GENERATED_COUNT = 2000


@dataclass(frozen=True)
class Pictures:
    """A set of pictures of one size."""

    name: str
    pixels_NHWC: NDArray[np.uint8]
    labels_N: NDArray[np.int64]
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What a reader must know of them, a sentence each."""

    def __len__(self) -> int:
        return len(self.pixels_NHWC)

    @functools.cached_property
    def digest(self) -> str:
        """Of the pixels in their order."""
        return hashlib.sha256(self.pixels_NHWC.tobytes()).hexdigest()[:16]

    def thinned(self, limit: int) -> Pictures:
        """At most so many, evenly over the set, which may be sorted by class."""
        n = min(limit, len(self))
        index_N = np.arange(n) * len(self) // n
        return replace(self, pixels_NHWC=self.pixels_NHWC[index_N], labels_N=self.labels_N[index_N])


def load(
    source: str, height: int, width: int, *, split: str = "test", report: data.Report = lambda done, total: None
) -> Pictures:
    """A set by what the user calls it: constant, uniform, or NAME|FOLDER[:SPLIT] as `ncml.data` reads it.

    split: the one that is meant where the source names none; a folder of pictures has none and is read whole.
    """
    if source in GENERATED:
        return generated(source, GENERATED_COUNT, height, width)
    where, colon, named = source.rpartition(":")
    if colon and not Path(source).exists():
        source, split = where, named
    found = data.load(source, height, width, split=split, report=report)
    pixels_NHWC = found.images_NHWC.numpy()
    unreadable = len(found.inventory.unreadable)
    resized = len(found) - found.inventory.sizes[f"{width}x{height}"]
    grey = int((pixels_NHWC == pixels_NHWC[..., :1]).all((1, 2, 3)).sum())
    said = (
        (unreadable, f"{unreadable:,} files could not be read and were left out"),
        (
            resized,
            f"{resized:,} of {len(found):,} pictures had another size than {width}x{height} and were brought to it; "
            "their bits/dim are those of resized pictures, not to be compared with others' of the set",
        ),
        (
            grey > len(found) // 10,
            f"{grey:,} of {len(found):,} pictures are grey, and were read as RGB with three equal channels",
        ),
    )
    name = Path(source).name
    notes = tuple(f"{name}: {sentence}." for count, sentence in said if count)
    return Pictures(name, pixels_NHWC, found.labels_N.numpy(), found.classes, notes)


def generated(name: str, n: int, height: int, width: int) -> Pictures:
    """Draw n pictures of one random colour each (constant), or of independent random values (uniform)."""
    rng = np.random.default_rng((SEED, GENERATED.index(name)))
    shape = (n, 1, 1, 3) if name == "constant" else (n, height, width, 3)
    pixels_NHWC = np.broadcast_to(rng.integers(256, size=shape, dtype=np.uint8), (n, height, width, 3)).copy()
    return Pictures(name, pixels_NHWC, np.zeros(n, np.int64))
