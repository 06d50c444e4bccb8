"""Datasets: images of one size with labels, and the parts that training and calibration use.

A dataset is read once, with the preprocessing that serving uses, and kept as uint8 (`image_store.py`). It comes from a
folder or the Hugging Face Hub (`sources.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ncml.data.blocks import evenly_spaced
from ncml.data.cropping import Cropping, crops_per_image
from ncml.data.image_store import ImageCache, decode
from ncml.data.inventory import Inventory
from ncml.data.sources import Source, open_source
from ncml.images.tiling import Tiling
from ncml.limits import MIN_ESTIMATION_IMAGES
from ncml.progress import OnProgress, ignore_progress

Part = Literal["fit", "calibration-fit", "calibration-rank"]

SPLIT, SMALLEST_SPLIT = 50, 14
"""Of every 50 images, in the dataset's order, the first 2 are calibration-fit and the next 5 calibration-rank.

Of fewer than 1,200 images a larger share is held out, up to half: 7 of every `split_for` images, so that about 50
estimate and 120 rank. Of fewer than `MIN_CALIBRATED`, half would not suffice to calibrate (`POST /calibrate` needs 39).
"""

MIN_CALIBRATED = MIN_ESTIMATION_IMAGES * SMALLEST_SPLIT // 2
"""Minimum number of images of a dataset whose held-out part suffices to calibrate."""

HELD_OUT = 168
"""Images that a small dataset holds out, if that is at most half of them."""


@dataclass(frozen=True)
class Dataset:
    """Images of one size, in memory or mapped from a file."""

    store_NHWC: Tensor
    """uint8 [S, H, W, 3]: the dataset has its rows `rows_N`, or all of them."""
    labels_N: Tensor
    """int64 [N]; 0 where there are no classes."""
    classes: tuple[str, ...]
    """Class names in the order of the labels; () where the source has no classes."""
    inventory: Inventory = field(default_factory=Inventory)
    """The contents of the source."""
    rows_N: Tensor | None = None
    """int64 [N]: the position of each image in the store."""
    crops: int = 1
    """Number of consecutive images that are crops of the same one; only for a whole dataset, not for a part."""

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def images_NHWC(self) -> Tensor:
        """The images, uint8 [N, H, W, 3]; of a part, a copy in memory."""
        return self.store_NHWC if self.rows_N is None else self.store_NHWC[self.rows_N]

    @property
    def positions_N(self) -> Tensor:
        """The position of each image in the whole dataset, int64 [N]."""
        return torch.arange(len(self)) if self.rows_N is None else self.rows_N

    def take(self, index_N: Tensor) -> Dataset:
        """Return the images at these positions, without copying any."""
        rows_N = self.positions_N[index_N]
        return Dataset(self.store_NHWC, self.labels_N[index_N], self.classes, self.inventory, rows_N)

    def first(self, count: int) -> Dataset:
        """Return the first `count` images, or all."""
        return self.take(torch.arange(min(count, len(self))))

    def spread(self, count: int) -> Dataset:
        """Return `count` images evenly spaced, or all."""
        return self.take(torch.from_numpy(evenly_spaced(len(self), count)))

    def part(self, name: Part, split: int = SPLIT) -> Dataset:
        """Return one of three disjoint parts (`is_member`); the crops of an image are in the same one."""
        is_member_N = is_member(name, len(self) // self.crops, split).repeat_interleave(self.crops)
        return self.take(is_member_N.nonzero().flatten())


def load(
    source: str | Source,
    height: int,
    width: int,
    *,
    split: str = "train",
    cache_folder: Path | None = None,
    crop: int | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Dataset:
    """Read a dataset at the given size.

    source: a folder of images (with a subfolder for each class, or none), a folder of parquet files, or a Hub name; or
        what `open_source` returns for it.
    split: which split of a parquet folder or Hub dataset, if it is not opened yet.
    cache_folder: folder for the decoded images, which are then mapped instead of held in memory. Images that it already
        holds are not decoded again, unless the source has changed. Processes on the same disk can share it.
    crop: side in pixels of the random squares that are cut from each image (of the model's aspect), instead of the
        whole image; several from each, without classes.
    on_progress: counts images.
    """
    opened = open_source(source, split) if isinstance(source, str) else source
    cropping = None if crop is None else Cropping(Tiling.for_model(height, width, crop), crops_per_image(opened.count))
    if cache_folder is None:
        count = opened.count * (cropping.count if cropping else 1)
        decoded = decode(opened, np.empty((count, height, width, 3), np.uint8), on_progress, cropping)
    else:
        cache = ImageCache(cache_folder, opened, height, width, split, cropping)
        decoded = cache.read() or cache.fill(on_progress)
    pixels_NHWC, labels_N = torch.from_numpy(decoded.pixels_NHWC), torch.from_numpy(decoded.labels_N)
    if cropping is not None:
        no_class_N = torch.zeros_like(labels_N)
        return Dataset(pixels_NHWC, no_class_N, (), decoded.inventory, crops=cropping.count)
    return Dataset(pixels_NHWC, labels_N, decoded.classes, decoded.inventory)


def is_member(name: Part, count: int, split: int = SPLIT) -> Tensor:
    """Return which of `count` images belong to a part, bool [count].

    The parts of image i are disjoint: i mod `split` is 0-1 (calibration-fit), 2-6 (calibration-rank), or higher (fit).
    split: that of the model's `TrainingConfig`.
    """
    position_N = torch.arange(count) % split
    return {
        "calibration-fit": position_N < 2,
        "calibration-rank": (position_N >= 2) & (position_N < 7),
        "fit": position_N >= 7,
    }[name]


def split_for(count: int) -> int:
    """Return the `split` of a dataset with this number of images: 7 of every `split` images are held out."""
    if count < MIN_CALIBRATED:
        return SPLIT
    return max(SMALLEST_SPLIT, min(SPLIT, 7 * count // HELD_OUT))
