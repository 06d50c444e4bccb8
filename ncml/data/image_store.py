"""Decode the images of a source into memory, or into a cache on disk for later runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ncml import checkpoint, images
from ncml.data.cropping import Cropping
from ncml.data.inventory import ImageOrder, Inventory
from ncml.data.sources import Row, Source, no_images
from ncml.errors import InputError
from ncml.object_storage import AHEAD, StoragePath
from ncml.progress import OnProgress, Progress

CHUNK = 256
"""Images whose files are in memory at the same time."""

BLOCK_BYTES = 2**24
"""Number of zeros written at once to reserve disk space."""


@dataclass(frozen=True)
class DecodedImages:
    """The images of a source at one size."""

    pixels_NHWC: NDArray[np.uint8]
    labels_N: NDArray[np.int64]
    classes: tuple[str, ...]
    inventory: Inventory


@dataclass(frozen=True)
class DecodedRow:
    """One image of a source."""

    pixels_KHWC: NDArray[np.uint8]
    """The image at the model's size, or its crops."""
    size: str
    """Width x height before."""
    enlarged: bool
    """Whether it is smaller than the model's size."""
    digest: bytes
    """Digest of the whole image at the model's size."""


def decode(
    source: Source, pixels_NHWC: NDArray[np.uint8], on_progress: OnProgress, cropping: Cropping | None = None
) -> DecodedImages:
    """Decode into an array with room for each row; rows that cannot be read leave no gaps.

    cropping: how crops are cut from each image; None: whole images.
    """
    _, height, width, _ = pixels_NHWC.shape
    labels: list[int] = []
    names: list[str] = []
    unreadable, unreadable_rows = list(source.unreadable), list[int]()
    sizes: Counter[str] = Counter()
    hashes: set[bytes] = set()
    enlarged = 0
    for position, (row, decoded) in enumerate(_decode_rows(source.rows(), height, width, cropping)):
        if decoded is None:
            unreadable.append(row.name)
            unreadable_rows.append(position)
        else:
            pixels_NHWC[len(labels) : len(labels) + len(decoded.pixels_KHWC)] = decoded.pixels_KHWC
            labels += [row.label] * len(decoded.pixels_KHWC)
            names.append(row.name)
            sizes[decoded.size] += 1
            enlarged += decoded.enlarged
            hashes.add(decoded.digest)
        on_progress(Progress("read", position + 1, source.count))
    if not labels:
        raise no_images(source.name, len(unreadable))
    by_class = np.bincount(labels, minlength=len(source.classes)).tolist() if source.classes else []
    inventory = Inventory(
        files=len(names) + len(unreadable),
        sizes=sizes,
        enlarged=enlarged,
        copies=len(names) - len(hashes),
        unreadable=unreadable,
        unreadable_rows=unreadable_rows,
        classes=dict(zip(source.classes, by_class, strict=True)),
        order=ImageOrder.of(names),
    )
    return DecodedImages(pixels_NHWC[: len(labels)], np.array(labels, np.int64), source.classes, inventory)


def _decode_rows(
    rows: Iterable[Row], height: int, width: int, cropping: Cropping | None
) -> Iterator[tuple[Row, DecodedRow | None]]:
    """Yield each row in order with its image, or None; uses PyTorch's number of threads, more for a bucket."""

    def decode_row(row: Row, occurrence: int) -> DecodedRow | None:
        try:
            image = images.open_image(row.data, field="data")
        except InputError:
            return None
        H, W = image.shape[:2]
        whole = images.resize_to(image, height, width)
        pixels = [whole] if cropping is None else cropping.cut(image, row.name, occurrence, height, width)
        digest = hashlib.blake2b(whole.tobytes(), digest_size=16).digest()
        return DecodedRow(np.stack(pixels), f"{W}x{H}", height > H or width > W, digest)

    remaining, counts = iter(rows), Counter[str]()
    chunk = list(itertools.islice(remaining, CHUNK))
    waiting = AHEAD if any(isinstance(row.data, StoragePath) for row in chunk) else 1
    with ThreadPoolExecutor(max(torch.get_num_threads(), waiting)) as pool:
        while chunk:
            occurrences = list[int]()
            for row in chunk:
                occurrences.append(counts[row.name])
                counts[row.name] += 1
            yield from zip(chunk, pool.map(decode_row, chunk, occurrences), strict=True)
            chunk = list(itertools.islice(remaining, CHUNK))


class ImageCache:
    """A folder of decoded images, complete once it has its description."""

    def __init__(
        self, folder: Path, source: Source, height: int, width: int, split: str, cropping: Cropping | None = None
    ) -> None:
        self.pixels, self.labels, self.description = (
            folder / name for name in ("images.npy", "labels.npy", "description.json")
        )
        self.source, self.cropping = source, cropping
        self.shape = (source.count * (cropping.count if cropping else 1), height, width, 3)
        crops = [] if cropping is None else [cropping.tile.height, cropping.tile.width, cropping.count]
        self.identity = [source.identity, height, width, split, images.PREPROCESSING, *crops]

    def read(self) -> DecodedImages | None:
        """Map the images from the folder; return None if it is incomplete or holds other images."""
        try:
            description = json.loads(self.description.read_text())
            if description["identity"] != self.identity:
                return None
            labels_N = np.load(self.labels)
            # Mapped copy-on-write although nothing is written: PyTorch warns about read-only arrays.
            pixels_NHWC = np.load(self.pixels, mmap_mode="c")[: len(labels_N)]
            inventory = Inventory.from_json(description["inventory"])
            return DecodedImages(pixels_NHWC, labels_N, tuple(description["classes"]), inventory)
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            return None  # missing or incomplete: the images are decoded again

    def fill(self, on_progress: OnProgress) -> DecodedImages:
        """Decode into the folder, and map the images from there."""
        folder = self.pixels.parent
        folder.mkdir(parents=True, exist_ok=True)
        self.description.unlink(missing_ok=True)
        try:
            pixels_NHWC = np.lib.format.open_memmap(self.pixels, "w+", np.uint8, self.shape)
            _reserve(self.pixels, pixels_NHWC.offset)
        except OSError as error:
            size = np.prod(self.shape) / 2**30
            raise InputError(
                "out",
                f"{folder} has no room for {size:.1f} GiB of decoded images ({error.strerror}): free disk space, or "
                "choose an --out on another disk.",
            ) from error
        decoded = decode(self.source, pixels_NHWC, on_progress, self.cropping)
        np.save(self.labels, decoded.labels_N)
        description = {
            "identity": self.identity,
            "classes": decoded.classes,
            "inventory": decoded.inventory.to_json(),
        }
        checkpoint.write_json(self.description, description)
        return self.read() or decoded


def _reserve(path: Path, start: int) -> None:
    """Reserve disk space for a sparse file: a full disk is an error now, not a crash later."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        file.seek(start)  # macOS has no such call
        for offset in range(start, size, BLOCK_BYTES):
            file.write(bytes(min(BLOCK_BYTES, size - offset)))
