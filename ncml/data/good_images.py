"""A folder of good images for a detector: opened once to count and compare them, then when they are needed.

Does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class GoodImages:
    """Good images that are opened when they are needed."""

    names: tuple[str, ...]
    """Paths relative to their folder, with forward slashes, as text that any output can hold."""
    scene_names: tuple[str, ...]
    """Names that can state the scene of each: those of its file where it comes from, also if they are not UTF-8."""
    paths: tuple[Location, ...]
    shapes: tuple[tuple[int, int], ...]
    """Height and width of each."""
    are_grey: tuple[bool, ...]
    """Whether the three channels of each are equal."""
    digests: tuple[str, ...]
    thumbnails: np.ndarray
    """[N, side, side]."""
    points: tuple[Points, ...] | None
    """Points by which overlapping images are found; None if they were not sought."""
    unreadable: tuple[str, ...] = ()
    """Why each of the other files is not used, in a sentence that names it."""
    brightness: float = 0.0
    """Readers change the brightness of each image by a random factor from 1 / (1 + this) to 1 + this."""

    def __len__(self) -> int:
        return len(self.paths)

    def reader(self, index: int) -> Reader:
        """Return a function that opens an image."""
        path, name = self.paths[index], self.names[index]
        if not self.brightness:
            return lambda: images.open_image(path, field=name)
        rng = np.random.default_rng(int(self.digests[index], 16))  # an image has the same factor in any folder
        factor = (1 + self.brightness) ** rng.uniform(-1, 1)
        return lambda: rounded(factor * images.open_image(path, field=name))

    def readers(self, indices: Sequence[int] | Integers) -> list[Reader]:
        """Return a function for each of these images."""
        return [self.reader(int(index)) for index in indices]

    @property
    def all(self) -> range:
        """The indices of all images."""
        return range(len(self))

    def distinct(self) -> GoodImages:
        """Return the images without repetitions: of equal ones the first."""
        return self.take(list({digest: index for index, digest in reversed([*enumerate(self.digests)])}.values())[::-1])

    def join(self, others: GoodImages) -> GoodImages:
        """Return these images and others, in this order."""
        return GoodImages(
            self.names + others.names,
            self.scene_names + others.scene_names,
            self.paths + others.paths,
            self.shapes + others.shapes,
            self.are_grey + others.are_grey,
            self.digests + others.digests,
            np.concatenate([self.thumbnails, others.thumbnails]),
            None if self.points is None or others.points is None else self.points + others.points,
            self.unreadable + others.unreadable,
            self.brightness,
        )

    def take(self, indices: Sequence[int] | Integers) -> GoodImages:
        """Return some of the images."""
        selected = [int(index) for index in indices]
        return GoodImages(
            tuple(self.names[i] for i in selected),
            tuple(self.scene_names[i] for i in selected),
            tuple(self.paths[i] for i in selected),
            tuple(self.shapes[i] for i in selected),
            tuple(self.are_grey[i] for i in selected),
            tuple(self.digests[i] for i in selected),
            self.thumbnails[selected],
            None if self.points is None else tuple(self.points[i] for i in selected),
            self.unreadable,
            self.brightness,
        )


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
    names: list[str] = []
    scene_names: list[str] = []
    kept: list[Location] = []
    shapes: list[tuple[int, int]] = []
    are_grey: list[bool] = []
    digests: list[str] = []
    thumbnails: list[np.ndarray] = []
    points: list[Points] = []
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
            names.append(name)
            scene_names.append(scene_name)
            kept.append(path)
            shapes.append((image_HWC.shape[0], image_HWC.shape[1]))
            are_grey.append(images.is_grey(image_HWC))
            digests.append(finding.digest(image_HWC))
            thumbnails.append(finding.thumbnail(image_HWC))
            if seeks_points:
                points.append(find_points(image_HWC))
        on_progress(Progress("read", done + 1, len(paths)))
    if not kept:
        reason = f"; the first file: {unreadable[0]}" if unreadable else ": name a folder of good images."
        raise InputError("data", f"{folder} contains no image that can be judged{reason}")
    return GoodImages(
        tuple(names),
        tuple(scene_names),
        tuple(kept),
        tuple(shapes),
        tuple(are_grey),
        tuple(digests),
        np.stack(thumbnails),
        tuple(points) if seeks_points else None,
        tuple(unreadable),
    )


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
