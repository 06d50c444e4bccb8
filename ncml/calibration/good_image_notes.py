"""Notes of a detector on its good images: how they agree, and what should be checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from ncml.data import scenes as finding
from ncml.data.good_images import MAX_ASPECT, MIN_SIDE, GoodImages
from ncml.data.inventory import counted
from ncml.errors import enumerated
from ncml.images.region import Region
from ncml.ood.views import patches
from ncml.ood.views.features import FeaturesView
from ncml.ood.views.view import View

SAME_VIEW = 0.7
"""Grey levels by which small copies of images differ at most if they show nothing but one scene."""
MAX_NAMES = 10
"""Images in a line at most: those in which the part was not found, and those of another aspect ratio."""
MAX_OTHER_SHARE = 0.25
"""Share of the images whose aspect ratio is not the usual one, up to which they are counted and named."""
FEW_LEVELS = 32
"""Distinct values of an image up to which its samples may not use the whole range."""


class GoodImageNotes(NamedTuple):
    """What should be known about the good images of a detector."""

    stored: tuple[str, ...]
    """Kept in its folder, which may be published: they count images, but name none."""
    images_to_check: tuple[str, ...]
    """Lines that name the images that are counted."""


def describe_good_images(
    good: GoodImages,
    region: Region | None,
    brightness: float,
    views: dict[str, View],
    duplicates: Sequence[Sequence[str]],
    lost: Sequence[str],
    levels: int,
) -> GoodImageNotes:
    """Describe good images. levels: number of distinct values of one of them."""
    notes: list[str] = []
    to_check: list[str] = []
    if region is not None:
        left, top, width, height = region.box
        shown = "" if region.mask is None else "what the mask shows in "
        notes.append(f"of each image, only {shown}the region {left},{top},{width},{height} is judged")
    if brightness:
        notes.append(f"made for images up to {brightness:.0%} brighter or darker than the good ones")
    features = views.get(FeaturesView.kind)
    if features is None:
        notes.append("made without the view of features, because its package was not installed")
    elif isinstance(features, FeaturesView):
        if features.agreement is None:
            (width, height), others = _other_shapes(good)
            shapes = f" ({len(others)} of {len(good)} do not have that of {width}x{height})" if others else ""
            to_check += [f"of another aspect ratio: {enumerated(others, MAX_NAMES)}"] if others else []
            notes.append(
                f"the good images differ in aspect ratio{shapes}, so patches are not compared by place: missing parts "
                "are found less often"
            )
        elif "places" in features.names:
            position = "as they are"
            if features.template is not None:
                largest = (
                    f"the largest part is {features.template.largest_to_smallest:.2f} times as large as the smallest"
                )
                position = f"once they are brought to one position; {largest}"
            notes.append(f"the good images agree by {features.agreement:.2f} at the same place, {position}")
        else:
            notes.append(
                f"the good images agree by only {features.agreement:.2f} at the same place, so patches are compared "
                "anywhere: missing parts are found less often"
            )
    if lost:
        notes.append(f"the part was not found in {counted(len(lost), 'image')}: check them")
        to_check.append(f"the part was not found in {enumerated(lost, MAX_NAMES)}")
    if duplicates:
        images_in = sum(map(len, duplicates))
        notes.append(f"{images_in} near-duplicates or overlapping images are {counted(len(duplicates), 'scene')}")
    if good.unreadable:
        notes.append(
            f"{counted(len(good.unreadable), 'file')} could not be read, or had less than {MIN_SIDE} pixels on a side "
            f"or an aspect ratio above {MAX_ASPECT}"
        )
    if levels <= FEW_LEVELS:
        notes.append(
            f"an image has only {levels} of 256 levels: of 16-bit samples the high byte is used, so multiply those of "
            "12 bits by 16 before you save them"
        )
    if finding.variation(good.thumbnails_NF) < SAME_VIEW:
        notes.append(
            "the good images hardly differ: if they show one part several times, the rate does not hold for other "
            "parts, so use images of several parts"
        )
    return GoodImageNotes(tuple(notes), tuple(to_check))


def _other_shapes(good: GoodImages) -> tuple[tuple[int, int], list[str]]:
    """Return the usual width and height, and the names of the images of another aspect ratio if they are few."""
    (height, width), _ = Counter(image.shape for image in good.images).most_common(1)[0]
    others = [image.name for image in good.images if patches.common_shape([image.shape, (height, width)]) is None]
    return (width, height), others if len(others) <= MAX_OTHER_SHARE * len(good) else []
