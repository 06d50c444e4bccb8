"""Overlapping images: crops of one photograph, which show one scene from shifted windows.

A crop that is stored without loss has the pixels of its photograph. So the points whose surroundings are compared are
chosen by content alone: local maxima of the Laplacian, which sensor noise spreads over the whole image. Two images
overlap if most of the points in the part that they share have equal surroundings at one displacement. Photographs of
different parts never do, however alike the parts are, because each has its own noise; and images of one position (no
displacement) are not linked here, so that noiseless renderings of aligned parts stay apart. Crops that were compressed
with loss, and frames of a video, are not found.

Shapes: P points of an image.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image

WINDOW = 640
"""Rows and columns in the middle of an image in which points are sought."""
RADIUS = 12
"""A point has the largest Laplacian among the pixels this near, in rows and columns."""
SURROUNDINGS = 4
"""Pixels on each side of a point that are compared."""
MIN_POINTS = 16
"""Equal points of two overlapping images, at least."""
MIN_SHARE = 0.6
"""Share of the points in the common part that are equal, at least."""
NEXT = 16
"""Images with an equal point, with which an image is compared: links of a large scene are transitive."""


@dataclass(frozen=True)
class Points:
    """Distinctive points of an image."""

    keys_P: NDArray[np.uint64]
    """Digests of their surroundings."""
    rows_P: NDArray[np.int64]
    columns_P: NDArray[np.int64]
    height: int
    """Rows of the window in which they were sought."""
    width: int


def find_points(image_HWC: NDArray[np.uint8]) -> Points:
    """Return the points of an image whose surroundings occur once in it."""
    H, W = image_HWC.shape[:2]
    height, width = min(H, WINDOW), min(W, WINDOW)
    top, left = (H - height) // 2, (W - width) // 2
    window_HWC = np.ascontiguousarray(image_HWC[top : top + height, left : left + width])
    grey_HW = np.asarray(Image.fromarray(window_HWC).convert("L"))
    levels_HW = grey_HW.astype(np.int32)
    laplacian_HW = np.zeros((height, width), np.int32)
    laplacian_HW[1:-1, 1:-1] = 9 * levels_HW[1:-1, 1:-1] - sliding_window_view(levels_HW, (3, 3)).sum((2, 3))
    is_point_HW = (laplacian_HW > 0) & (laplacian_HW == _largest_near(laplacian_HW))
    edge = SURROUNDINGS
    is_point_HW[:edge] = is_point_HW[-edge:] = is_point_HW[:, :edge] = is_point_HW[:, -edge:] = False
    rows_P, columns_P = np.nonzero(is_point_HW)
    side = 2 * edge + 1
    patches = sliding_window_view(grey_HW, (side, side))
    places = zip(rows_P.tolist(), columns_P.tolist(), strict=True)
    digests = [blake2b(patches[row - edge, column - edge].tobytes(), digest_size=8).digest() for row, column in places]
    keys_P, kept_P, counts_P = np.unique(
        np.frombuffer(b"".join(digests), np.uint64), return_index=True, return_counts=True
    )
    once_P = kept_P[counts_P == 1]
    return Points(keys_P[counts_P == 1], rows_P[once_P], columns_P[once_P], height, width)


def overlapping(points: Sequence[Points]) -> list[tuple[int, int]]:
    """Return pairs of images that overlap; of a large scene, enough of them to connect it."""
    images_of: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for image, own in enumerate(points):
        for index, key in enumerate(own.keys_P.tolist()):
            images_of[key].append((image, index))
    displacements: defaultdict[tuple[int, int], Counter[tuple[int, int]]] = defaultdict(Counter)
    for places in images_of.values():
        for position, (first, i) in enumerate(places):
            for second, j in places[position + 1 : position + 1 + NEXT]:
                down = int(points[first].rows_P[i] - points[second].rows_P[j])
                right = int(points[first].columns_P[i] - points[second].columns_P[j])
                displacements[first, second][down, right] += 1
    pairs: list[tuple[int, int]] = []
    for (first, second), counts in displacements.items():
        (displacement, count) = counts.most_common(1)[0]
        if displacement == (0, 0) or count < MIN_POINTS:
            continue
        common = min(_inside(points[first], points[second], displacement, 1),
                     _inside(points[second], points[first], displacement, -1))  # fmt: skip
        if count >= MIN_SHARE * common:
            pairs.append((first, second))
    return pairs


def _inside(own: Points, other: Points, displacement: tuple[int, int], sign: int) -> int:
    """Return how many points lie in the other image's window, far enough from its edges to be points there as well."""
    down, right = (sign * part for part in displacement)
    rows_P, columns_P = own.rows_P - down, own.columns_P - right
    is_inside_P = (rows_P >= RADIUS) & (rows_P < other.height - RADIUS)
    is_inside_P &= (columns_P >= RADIUS) & (columns_P < other.width - RADIUS)
    is_inside_P &= (own.rows_P >= RADIUS) & (own.rows_P < own.height - RADIUS)
    is_inside_P &= (own.columns_P >= RADIUS) & (own.columns_P < own.width - RADIUS)
    return int(is_inside_P.sum())


def _largest_near(values_HW: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the largest value at most `RADIUS` rows and columns away, by maxima over windows that double."""
    length = 2 * RADIUS + 1
    for axis in (0, 1):
        padding = [(0, 0), (0, 0)]
        padding[axis] = (RADIUS, RADIUS)
        largest = np.moveaxis(np.pad(values_HW, padding), axis, 0)
        covered = 1
        while covered < length:
            step = min(covered, length - covered)
            largest = np.maximum(largest[:-step], largest[step:])
            covered += step
        values_HW = np.moveaxis(largest, 0, axis)
    return values_HW
