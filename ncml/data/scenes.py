"""Scenes of good images: near-duplicates, which must not count as independent images.

Bursts, frames of a video, crops and copies of one image show one scene. Without names for the scenes, images form one
scene whose thumbnails are far closer to each other than to any other image; `ncml.data.overlaps` finds crops. The
limits are relative, because good images of one part are alike. So bursts of one fixed part cannot be told from images
of several such parts, nor a folder of one scene from one of images that are alike, except for equal images; names
(`scenes_by_name`) can.

Shapes: N images, F features of a descriptor.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ncml.data.blocks import evenly_spaced
from ncml.errors import InputError
from ncml.progress import OnProgress, Progress, ignore_progress

Pixels = NDArray[np.uint8]
Integers = NDArray[np.int64]

AUTO, IMAGE, FOLDER = "auto", "image", "folder"
"""Ways to find scenes: by near-duplicates, every image its own, or every subfolder one; anything else is a pattern."""
LINKED = 0.3
"""Near-duplicates are closer than this share of the median distance of two images."""
GAP = 3.0
"""Another image is at least this many times as far from near-duplicates as they are from each other."""
MOST_COMPARED = 1000
"""Images whose distances give the median, at most."""
SIDE = 32
"""Pixels of a side of a thumbnail."""

MAX_SHARE = 1 / 8
"""Share of the images that near-duplicates of one scene are at most: larger groups are kinds of good images."""


def check_group(group: str) -> None:
    """Raise `InputError` for a way to find scenes that is neither a word nor a pattern with a group."""
    if group in (AUTO, IMAGE, FOLDER):
        return
    if not isinstance(group, str):
        raise InputError("group", f"--group must be a text, not {group!r}.")
    try:
        groups = re.compile(group).groups
    except re.error as error:
        raise InputError("group", f"--group {group!r} is not a valid pattern: {error}.") from error
    if groups != 1:
        detail = f"--group {group!r} must be {AUTO}, {IMAGE}, {FOLDER}, or a pattern with one group in parentheses"
        raise InputError("group", f"{detail}, such as '(.*)_[0-9]+'.")


def are_compared(group: str, has_others: bool) -> bool:
    """Return whether the pixels of images have a part in finding their scenes.

    has_others: whether there are reviewed or checking images, whose names need not state scenes.
    """
    return group == AUTO or (has_others and group != IMAGE)


def scenes_by_name(names: Sequence[str], group: str) -> Integers:
    """Return the scene of each image from its name, relative to the folder of images.

    Raises `InputError` for a pattern that does not match a name.
    """
    if group == IMAGE:
        return np.arange(len(names))
    keys: list[str] = []
    for name in names:
        key = scene_of_name(name, group)
        if key is None:
            raise InputError("group", f"--group {group!r} does not match {name}: use a pattern that matches all names.")
        keys.append(key)
    return number(keys)


def scene_of_name(name: str, group: str) -> str | None:
    """Return the scene that the name of an image states, by its subfolder or a pattern; None if it states none."""
    if group == FOLDER:
        return str(PurePosixPath(name).parent)
    match = re.search(group, name)
    return None if match is None else match[1]


def thumbnail(image_HWC: Pixels) -> NDArray[np.float64]:
    """Return the grey levels of a small copy of an image, [F]: the descriptor without a network."""
    grey = Image.fromarray(image_HWC).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(grey, np.float64).ravel()


def variation(thumbnails_NF: NDArray[np.float64]) -> float:
    """Return by how many grey levels images differ at one place, apart from their brightness: the median place."""
    centred_NF = thumbnails_NF - thumbnails_NF.mean(1, keepdims=True)
    return float(np.median(centred_NF.std(0)))


def digest(image_HWC: Pixels) -> str:
    """Return a digest of an image, equal for equal images."""
    return hashlib.blake2b(image_HWC.tobytes() + str(image_HWC.shape).encode(), digest_size=16).hexdigest()


def near_duplicates(
    descriptors_NF: NDArray[np.floating[Any]],
    digests: Sequence[str],
    original_count: int | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Integers:
    """Return the scene of each image: near-duplicates and equal images are one scene.

    Images are merged from the nearest pair on (single linkage). A group is one scene if its largest merge is less than
    `LINKED` of the median distance, another image is at least `GAP` times as far, and it has at most `MAX_SHARE` of the
    images; of nested groups, the largest.

    original_count: number of the first images, of which a group that has some of them may have that share, however
        many of the others it has: ten new photographs of one known part are one scene with it. None: all.
    """
    x_NF = np.asarray(descriptors_NF, np.float64)
    labels_N = number(list(digests))
    count = len(labels_N)
    limit = LINKED * _median_distance(x_NF, labels_N)
    scenes_N = np.arange(count)
    groups = {i: [i] for i in range(count)}
    group_of, height_of = list(range(count)), dict.fromkeys(range(count), 0.0)
    for height, first, second in [*_spanning_tree(x_NF, labels_N, on_progress), (np.inf, 0, 0)]:
        for group in {group_of[first], group_of[second]}:
            members, inside = groups[group], height_of[group]
            is_near = inside < limit and height >= GAP * inside and _share(members, count, original_count) <= MAX_SHARE
            if len(members) > 1 and (inside == 0 or is_near):
                scenes_N[members] = members[0]
        if first != second:
            kept, merged = group_of[first], group_of[second]
            for member in groups[merged]:
                group_of[member] = kept
            groups[kept] += groups.pop(merged)
            height_of[kept] = height
    return np.unique(scenes_N, return_inverse=True)[1].astype(np.int64)


def _share(members: Sequence[int], count: int, original_count: int | None) -> float:
    """Return the share of the images that are in a group: of the original ones, if it has some of them."""
    if original_count is not None and (own := sum(member < original_count for member in members)):
        return own / original_count
    return len(members) / count


def merge(scenes_N: Integers, pairs: Iterable[tuple[int, int]]) -> Integers:
    """Return the scene of each image if those of these pairs of images are one."""
    scenes_N = scenes_N.copy()
    for first, second in pairs:
        scenes_N[scenes_N == scenes_N[second]] = scenes_N[first]
    return number(scenes_N.tolist())


def _distances(x_NF: NDArray[np.float64], labels_N: Integers, index: int) -> NDArray[np.float64]:
    """Return the distances of an image from all, 0 to equal ones, [N]: a matrix of all pairs would take gigabytes."""
    squared_N = ((x_NF - x_NF[index]) ** 2).sum(1)
    return np.where(labels_N == labels_N[index], 0.0, np.sqrt(squared_N))


def _median_distance(x_NF: NDArray[np.float64], labels_N: Integers) -> float:
    """Return the median distance of two images, of at most `MOST_COMPARED` evenly spaced ones; 0 for a single image."""
    selected = evenly_spaced(len(x_NF), MOST_COMPARED)
    x_NF, labels_N = x_NF[selected], labels_N[selected]
    rows = [_distances(x_NF, labels_N, index)[index + 1 :] for index in range(len(x_NF) - 1)]
    return float(np.median(np.concatenate(rows))) if rows else 0.0


def _spanning_tree(
    x_NF: NDArray[np.float64], labels_N: Integers, on_progress: OnProgress
) -> list[tuple[float, int, int]]:
    """Return the edges of the smallest spanning tree, the shortest first."""
    count = len(x_NF)
    nearest_N, from_N = _distances(x_NF, labels_N, 0), np.zeros(count, np.int64)
    is_inside_N = np.zeros(count, bool)
    is_inside_N[0] = True
    edges: list[tuple[float, int, int]] = []
    for done in range(1, count):
        new = int(np.where(is_inside_N, np.inf, nearest_N).argmin())
        edges.append((float(nearest_N[new]), int(from_N[new]), new))
        is_inside_N[new] = True
        distances_N = _distances(x_NF, labels_N, new)
        is_nearer_N = distances_N < nearest_N
        nearest_N[is_nearer_N], from_N[is_nearer_N] = distances_N[is_nearer_N], new
        on_progress(Progress("find scenes", done + 1, count))
    return sorted(edges)


def fold_scenes(scenes_N: Integers, folds: int) -> Integers:
    """Return the fold of each image, numbered from 0: one scene each if there are at most `folds`."""
    return np.unique(scenes_N, return_inverse=True)[1] % folds


def members(groups_N: Integers) -> list[list[int]]:
    """Return the positions of the images of each group, such as a scene or a fold, in ascending order of both."""
    return [np.flatnonzero(groups_N == group).tolist() for group in np.unique(groups_N)]


def number(keys: Sequence[str] | Sequence[int]) -> Integers:
    """Number distinct keys in the order of their first occurrence."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys], np.int64)
