"""The pictures that models are evaluated on: read at the model's size, or generated.

A set is shuffled once, in one way, so that its first n are a fair sample of it (it may be sorted by class), and what
was measured of them counts when more are asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ncml.paths import printable
from ncml.progress import OnProgress, ignore_progress
from ncml.training import dataset

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
    digest: str
    """Of the whole set, of which these are the first."""
    notes: tuple[str, ...] = ()
    """What a reader must know of them, a sentence each."""

    def __len__(self) -> int:
        return len(self.pixels_NHWC)

    def first(self, n: int) -> Pictures:
        """The first n, or all if there are fewer."""
        return replace(self, pixels_NHWC=self.pixels_NHWC[:n])


def parted(source: str) -> tuple[str, str]:
    """A source without the split that it names, and that split; an empty one where it names none."""
    where, colon, split = source.rpartition(":")
    return (where, split) if colon and not Path(source).exists() else (source, "")


def names(sources: Iterable[str]) -> dict[str, str]:
    """What each source is called: the end of its path, as much of it as tells it from the others, and its split."""
    spelt = {source: _spellings(source) for source in sources}

    def called(source: str) -> str:
        others = {name for other, spellings in spelt.items() if other != source for name in spellings}
        return next((name for name in spelt[source] if name not in others), source)

    return {source: printable(called(source)) for source in spelt}


def _spellings(source: str) -> list[str]:
    """From the shortest to the longest."""
    where, split = parted(source)
    parts = Path(where).parts or (where,)
    return [str(Path(*parts[-depth:])) + f":{split}" * bool(split) for depth in range(1, len(parts) + 1)]


def load(
    source: str,
    height: int,
    width: int,
    *,
    split: str = "",
    name: str = "",
    on_progress: OnProgress = ignore_progress,
) -> Pictures:
    """A set by what the user calls it: constant, uniform, or NAME|FOLDER[:SPLIT] as `ncml.training.dataset` reads it.

    split: the one to read; by default that which the source names, else test. A folder of pictures has none and is read
        whole.
    name: what it is called; by default the end of its path and its split.
    """
    if source in GENERATED:
        return generated(source, GENERATED_COUNT, height, width)
    where, named = parted(source)
    found = dataset.load(where, height, width, split=split or named or "test", on_progress=on_progress)
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
    name = name or names([source])[source]
    notes = tuple(f"{name}: {sentence}." for count, sentence in said if count)
    return _shuffled(name, pixels_NHWC, notes)


def generated(name: str, n: int, height: int, width: int) -> Pictures:
    """Draw n pictures of one random colour each (constant), or of independent random values (uniform)."""
    rng = np.random.default_rng((SEED, GENERATED.index(name)))
    shape = (n, 1, 1, 3) if name == "constant" else (n, height, width, 3)
    pixels_NHWC = np.broadcast_to(rng.integers(256, size=shape, dtype=np.uint8), (n, height, width, 3)).copy()
    return _shuffled(name, pixels_NHWC)


def _shuffled(name: str, pixels_NHWC: NDArray[np.uint8], notes: tuple[str, ...] = ()) -> Pictures:
    pixels_NHWC = pixels_NHWC[np.random.default_rng(SEED).permutation(len(pixels_NHWC))]
    return Pictures(name, pixels_NHWC, hashlib.sha256(pixels_NHWC.tobytes()).hexdigest()[:16], notes)
