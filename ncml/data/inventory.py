"""The contents of a dataset, reported before a run starts. Does not import torch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ncml.errors import InputError, enumerated

MAX_NAMES = 3
"""Maximum number of sizes or files that a line lists; the others are counted."""

MAX_CLASS_NAMES = 12
"""Maximum number of classes that a line lists."""

MIN_CLASS_IMAGES = 50
"""Minimum number of images from which a model can learn a class."""


@dataclass(frozen=True)
class ImageOrder:
    """What the split of a dataset depends on: an image is held out for its position."""

    count: int = 0
    names: str = ""
    """Digest of the names in order; the folder may move."""

    @classmethod
    def of(cls, names: Sequence[str]) -> ImageOrder:
        """Return the order of images with these names."""
        return cls(len(names), hashlib.sha256("\0".join(names).encode()).hexdigest())

    def check(self, now: ImageOrder) -> None:
        """Raise `InputError` if a run that began with these images would now be split differently."""
        if self != now:
            change = f"{self.count:,} then, {now.count:,} now" if self.count != now.count else "their names differ"
            raise InputError(
                "data",
                f"the images changed since the run began ({change}), so the held-out parts are no longer the same: "
                "restore the images, or start a new run.",
            )


@dataclass
class Inventory:
    """Counts made while images are read."""

    files: int = 0
    """Images, and files that are not images."""
    sizes: Counter[str] = field(default_factory=Counter)
    """Images by width x height before preprocessing."""
    enlarged: int = 0
    """Images smaller than the model's size."""
    copies: int = 0
    """Images equal to an earlier one at the model's size, pixel by pixel."""
    unreadable: list[str] = field(default_factory=list)
    """Names of files that could not be read."""
    unreadable_rows: list[int] = field(default_factory=list)
    """Positions of those of them that the source takes for images; their names need not be unique."""
    classes: dict[str, int] = field(default_factory=dict)
    """Images of each class."""
    order: ImageOrder = ImageOrder()

    @property
    def images(self) -> int:
        """Number of images that could be read."""
        return self.files - len(self.unreadable)

    def to_json(self) -> dict[str, Any]:
        """Return the inventory as plain JSON values."""
        return vars(self) | {"order": asdict(self.order)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Inventory:
        """Read the result of `to_json`; raise KeyError for that of an earlier version, which lacks a field."""
        sizes, order, rows = Counter(value["sizes"]), ImageOrder(**value["order"]), value["unreadable_rows"]
        return replace(cls(**value), sizes=sizes, order=order, unreadable_rows=rows)

    def lines(self, height: int, width: int, crops: int = 1, *, published: bool = False) -> list[str]:
        """Return the report for a model of this size, a sentence per line; with several `crops`, for random crops.

        published: for the model card, which lists the classes itself. File names are private.
        """
        sizes = [f"{size} ({count:,})" for size, count in self.sizes.most_common()]
        lines = [f"{counted(self.images, 'image')}, of {enumerated(sizes, MAX_NAMES)}"]
        if crops > 1:
            lines.append(f"{crops} random crops of each are resized to {width}x{height}")
        elif self.sizes.keys() != {f"{width}x{height}"}:
            lines.append(f"each is cropped to its centre and resized to {width}x{height}")
        if self.enlarged:
            lines.append(f"{self.enlarged:,} smaller than that: enlarged, so the model learns them blurred")
        if crops == 1 and not published:
            lines += self._class_lines()
        if self.copies:
            lines.append(
                f"{counted(self.copies, 'image')} identical to an earlier one: held-out figures may be too good"
            )
        if self.unreadable:
            names = "" if published else f": {enumerated(self.unreadable, MAX_NAMES)}"
            lines.append(f"{counted(len(self.unreadable), 'unreadable file')} left out{names}")
        return lines

    def _class_lines(self) -> list[str]:
        if not self.classes:
            return ["no classes (make a subfolder for each to have them)"]
        by_count = sorted(self.classes.items(), key=lambda item: -item[1])
        classes = [f"{name} ({count:,})" for name, count in by_count]
        lines = [f"{counted(len(classes), 'class', 'classes')}: {enumerated(classes, MAX_CLASS_NAMES)}"]
        small_classes = [f"{name} ({count})" for name, count in by_count if count < MIN_CLASS_IMAGES]
        if small_classes:
            lines.append(f"too few images to learn by class: {enumerated(small_classes, MAX_NAMES)}")
        return lines


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Format a count with its noun: 1 image, 2,000 images."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
