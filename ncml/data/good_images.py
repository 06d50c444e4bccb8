"""A folder of good images for a detector: opened once to count and compare them, then when they are needed.

Shapes: N images, F features of a thumbnail. Does not import torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ncml import images
from ncml.data import scenes as finding
from ncml.data.overlaps import Points, find_points
from ncml.data.scenes import Integers, Pixels
from ncml.errors import InputError
from ncml.images.perturbations import rounded
from ncml.object_storage import read_ahead
from ncml.paths import Location, printable, relative_to
from ncml.progress import OnProgress, Progress, ignore_progress

Reader = Callable[[], Pixels]
"""Opens an image: uint8 [H, W, 3] at its own size."""

MIN_SIDE = 32
"""Pixels of the shorter side of an image that can be judged; less leaves nothing to compare."""
MAX_ASPECT = 64
"""Ratio of the sides of an image that can be judged: views enlarge images of few rows, so those of a line of pixels
would take all memory."""

MAX_BRIGHTNESS = 0.5
"""Share by which images are made brighter or darker at most."""


class GoodImage(NamedTuple):
    """What is known of a good image, which is opened again when it is needed."""

    name: str
    """Path relative to its folder, with forward slashes, as text that any output can hold."""
    scene_name: str
    """Name that can state its scene: that of its file where it comes from, also if it is not UTF-8."""
    path: Location
    shape: tuple[int, int]
    """Height and width."""
    is_grey: bool
    """Whether its three channels are equal."""
    digest: str
    thumbnail_F: NDArray[np.float64]
    points: Points | None
    """Points by which overlapping images are found; None if they were not sought."""


@dataclass(frozen=True)
class GoodImages:
    """Good images that are opened when they are needed."""

    images: tuple[GoodImage, ...]
    unreadable: tuple[str, ...] = ()
    """Why each of the other files is not used, in a sentence that names it."""
    brightness: float = 0.0
    """Readers change the brightness of each image by a random factor from 1 / (1 + this) to 1 + this."""

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The name of each."""
        return tuple(image.name for image in self.images)

    @functools.cached_property
    def scene_names(self) -> tuple[str, ...]:
        """The name of each that can state its scene."""
        return tuple(image.scene_name for image in self.images)

    @functools.cached_property
    def digests(self) -> tuple[str, ...]:
        """The digest of each."""
        return tuple(image.digest for image in self.images)

    @property
    def thumbnails_NF(self) -> NDArray[np.float64]:
        """The thumbnails."""
        return np.stack([image.thumbnail_F for image in self.images])

    @property
    def points(self) -> list[Points] | None:
        """The points of each; None if those of any were not sought."""
        points = [image.points for image in self.images if image.points is not None]
        return points if len(points) == len(self) else None

    def __len__(self) -> int:
        return len(self.images)

    def reader(self, index: int) -> Reader:
        """Return a function that opens an image."""
        image = self.images[index]
        if not self.brightness:
            return lambda: images.open_image(image.path, field=image.name)
        rng = np.random.default_rng(int(image.digest, 16))  # an image has the same factor in any folder
        factor = (1 + self.brightness) ** rng.uniform(-1, 1)
        return lambda: rounded(factor * images.open_image(image.path, field=image.name))

    def readers(self, indices: Sequence[int] | Integers) -> list[Reader]:
        """Return a function for each of these images."""
        return [self.reader(int(index)) for index in indices]

    @property
    def all(self) -> range:
        """The indices of all images."""
        return range(len(self))

    def distinct(self) -> GoodImages:
        """Return the images without repetitions, in their order: of equal ones the first."""
        return self.take(np.sort(np.unique(self.digests, return_index=True)[1]))

    def join(self, others: GoodImages) -> GoodImages:
        """Return these images and others, in this order."""
        return replace(self, images=self.images + others.images, unreadable=self.unreadable + others.unreadable)

    def take(self, indices: Sequence[int] | Integers) -> GoodImages:
        """Return some of the images."""
        return replace(self, images=tuple(self.images[index] for index in indices))


def open_folder(
    folder: Location,
    paths: Sequence[Location],
    on_progress: OnProgress = ignore_progress,
    *,
    seeks_points: bool = True,
) -> GoodImages:
    """Open the images of a folder once, to count and compare them.

    seeks_points: whether overlapping images may be looked for, which takes two thirds of the time.

    Raises `InputError` if none can be judged.
    """
    opened: list[GoodImage] = []
    unreadable: list[str] = []
    for done, (path, file) in enumerate(zip(paths, read_ahead(paths, images.MAX_BYTES), strict=True)):
        scene_name = relative_to(path, folder).as_posix()
        name = printable(scene_name)
        try:
            image_HWC = images.open_image(file, field=name)
            check_side(image_HWC, name)
        except InputError as error:
            unreadable.append(str(error))
        else:
            shape, is_grey = (image_HWC.shape[0], image_HWC.shape[1]), images.is_grey(image_HWC)
            digest, thumbnail_F = finding.digest(image_HWC), finding.thumbnail(image_HWC)
            points = find_points(image_HWC) if seeks_points else None
            opened.append(GoodImage(name, scene_name, path, shape, is_grey, digest, thumbnail_F, points))
        on_progress(Progress("read", done + 1, len(paths)))
    if not opened:
        reason = f"; the first file: {unreadable[0]}" if unreadable else ": name a folder of good images."
        raise InputError("data", f"{folder} contains no image that can be judged{reason}")
    return GoodImages(tuple(opened), tuple(unreadable))


def check_brightness(brightness: float) -> None:
    """Raise `InputError` for a share by which images cannot be made brighter or darker."""
    if not 0 <= brightness <= MAX_BRIGHTNESS:
        raise InputError(
            "tolerate_brightness",
            f"the tolerated change of brightness must be between 0 and {100 * MAX_BRIGHTNESS:g}%, not "
            f"{100 * brightness:g}%: where light differs more, use good images of each light.",
        )


def check_side(image_HWC: NDArray[np.uint8], field: str) -> None:
    """Raise `InputError` for an image that is too small or too narrow to be judged."""
    H, W = image_HWC.shape[:2]
    if min(H, W) < MIN_SIDE:
        raise InputError(
            field, f"{field} has {W}x{H} pixels, and a detector needs {MIN_SIDE} on each side: use a larger image."
        )
    if max(H, W) > MAX_ASPECT * min(H, W):
        raise InputError(
            field,
            f"{field} has {W}x{H} pixels; a detector judges at most {MAX_ASPECT} times as many on one side as on "
            "the other: cut the image into parts.",
        )
