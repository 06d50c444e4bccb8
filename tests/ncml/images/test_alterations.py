"""Alterations of images at their own size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ncml.errors import InputError
from ncml.images.alterations import ALTERATIONS, CONTRAST, SIZES, STAIN_CONTRAST, Alteration
from ncml.images.tiling import Box

BY_NAME = {alteration.name: alteration for alteration in ALTERATIONS}
LOCAL = [alteration for alteration in ALTERATIONS if alteration.is_local]


def image(seed: int = 0, height: int = 240, width: int = 320) -> np.ndarray:
    """Return an image with structure everywhere, away from black and white."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(70, 186, (height // 16 + 1, width // 16 + 1, 3))
    smooth = coarse.repeat(16, 0).repeat(16, 1)[:height, :width]
    return (smooth + rng.integers(-9, 10, smooth.shape)).astype(np.uint8)


def even(level: int, height: int = 240, width: int = 320) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def ids(alteration: Alteration) -> str:
    return alteration.name


@pytest.mark.parametrize("alteration", ALTERATIONS, ids=ids)
def test_an_altered_image_is_a_function_of_image_seed_and_other_image(alteration: Alteration) -> None:
    original, other = image(0), image(1)
    kept = original.copy()
    altered = alteration.apply(original, 5, other_HWC=other)
    assert altered.image_HWC.dtype == np.uint8
    assert altered.image_HWC.shape == original.shape
    assert np.array_equal(original, kept)
    assert not np.array_equal(altered.image_HWC, original)
    again = alteration.apply(original, 5, other_HWC=other)
    assert np.array_equal(altered.image_HWC, again.image_HWC)
    assert altered.box == again.box


@pytest.mark.parametrize("alteration", LOCAL, ids=ids)
def test_a_local_one_changes_a_box_of_the_stated_size_in_the_region(alteration: Alteration) -> None:
    region = Box(60, 30, 224, 206)
    for seed in range(5):
        altered = alteration.apply(image(seed), seed, other_HWC=image(9), region=region)
        box = altered.box
        assert box is not None
        assert 0 < max(box.width, box.height) <= alteration.extent
        assert region.left <= box.left
        assert box.left + box.width <= region.left + region.width
        assert region.top <= box.top
        assert box.top + box.height <= region.top + region.height
        assert Box.around((image(seed) != altered.image_HWC).any(2)) == box


@pytest.mark.parametrize("alteration", LOCAL, ids=ids)
def test_its_place_depends_on_the_seed(alteration: Alteration) -> None:
    boxes = {alteration.apply(image(), seed, other_HWC=image(1)).box for seed in range(6)}
    assert len(boxes) > 1


@pytest.mark.parametrize("alteration", [a for a in ALTERATIONS if not a.is_local], ids=ids)
def test_processing_concerns_the_whole_image(alteration: Alteration) -> None:
    altered = alteration.apply(image(), 0)
    assert altered.box is None
    box = Box.around((image() != altered.image_HWC).any(2))
    assert box.width > 300
    assert box.height > 220


@pytest.mark.parametrize(("level", "sign"), [(200, -1), (60, 1)])
def test_marks_have_the_stated_size_and_contrast(level: int, sign: int) -> None:
    for radius in (2, 6, 16):
        altered = BY_NAME[f"spot, radius {radius} pixels"].apply(even(level), 3)
        difference = altered.image_HWC.astype(int) - level
        assert set(np.unique(difference)) <= set(range(0, sign * CONTRAST + sign, sign))
        assert difference.flat[np.abs(difference).argmax()] == sign * CONTRAST
        assert abs(np.abs(difference[..., 0]).sum() / CONTRAST - np.pi * radius**2) < 0.08 * np.pi * radius**2
    for width, length in ((1, 20), (2, 50), (3, 100)):
        name = f"scratch, {width} pixel{'s' * (width > 1)} wide, {length} long"
        difference = BY_NAME[name].apply(even(level), 3).image_HWC.astype(int) - level
        area = length * width - (1 - np.pi / 4) * width**2
        assert abs(np.abs(difference[..., 0]).sum() / CONTRAST - area) < 0.1 * area
    for radius in (8, 20, 50):
        difference = BY_NAME[f"stain, radius {radius} pixels"].apply(even(level), 3).image_HWC.astype(int) - level
        assert difference.flat[np.abs(difference).argmax()] == sign * STAIN_CONTRAST


def test_a_pit_is_dark_on_one_side_and_light_on_the_other() -> None:
    difference = BY_NAME["pit, radius 16 pixels"].apply(even(128), 0).image_HWC.astype(int) - 128
    assert -CONTRAST <= difference.min() < -0.8 * CONTRAST
    assert 0.8 * CONTRAST < difference.max() <= CONTRAST
    assert abs(difference.sum()) < 0.02 * np.abs(difference).sum()


def test_a_part_is_missing_where_there_was_one() -> None:
    original = even(90, 130, 130)
    original[55:75, 55:75] = 200
    for seed in range(3):
        altered = BY_NAME["missing part, 60 pixels wide"].apply(original, seed)
        assert (altered.image_HWC == 90).all()
        assert altered.box == Box(55, 55, 20, 20)


@pytest.mark.parametrize("distance", [2, 5, 12])
def test_a_moved_part_keeps_its_content(distance: int) -> None:
    for seed in range(4):
        original = image(seed)
        altered, box = BY_NAME[f"moved part, by {distance} pixels"].apply(original, seed)
        assert box is not None
        assert box.width * box.height > 40 * 30
        middle = [
            slice(start + 14, start + size - 14) for start, size in ((box.top, box.height), (box.left, box.width))
        ]
        shifted = [np.roll(original, shift, (0, 1)) for shift in itertools.product((0, distance, -distance), repeat=2)]
        assert any(np.array_equal(altered[*middle], candidate[*middle]) for candidate in shifted[1:])


def test_a_pasted_patch_comes_from_the_other_image() -> None:
    altered = BY_NAME["pasted patch, 20 pixels wide"].apply(image(), 0, other_HWC=even(7))
    assert (altered.image_HWC == 7).all(2).sum() == 400


def test_a_patch_of_an_image_that_is_too_small_comes_from_the_image_itself() -> None:
    alteration = next(own for own in ALTERATIONS if own.name == "pasted patch, 50 pixels wide")
    image_HWC = np.random.default_rng(0).integers(0, 256, (120, 120, 3), np.uint8)
    altered, expected = (alteration.apply(image_HWC, 1, other_HWC=own) for own in (image_HWC[:40], None))
    np.testing.assert_array_equal(altered.image_HWC, expected.image_HWC)


def test_each_kind_has_its_sizes_in_a_row() -> None:
    kinds = [alteration.kind for alteration in ALTERATIONS]
    assert kinds == [kind for kind in dict.fromkeys(kinds) for _ in range(SIZES)]


def test_sizes_grow_and_names_differ() -> None:
    assert len(BY_NAME) == len(ALTERATIONS) == 42
    for _kind, group in itertools.groupby(ALTERATIONS, key=lambda alteration: alteration.kind):
        alterations = list(group)
        assert len(alterations) == 3
        errors = [
            np.mean(
                [
                    np.abs(a.apply(image(s), s, other_HWC=image(8)).image_HWC.astype(int) - image(s)).sum()
                    for s in range(3)
                ]
            )
            for a in alterations
        ]
        assert errors == sorted(errors)


def test_an_image_that_is_too_small_is_refused() -> None:
    alteration = BY_NAME["stain, radius 50 pixels"]
    assert not alteration.fits(201, 400)
    assert alteration.fits(202, 202)
    with pytest.raises(InputError, match="needs 202 pixels in each direction, and there are 150 x 300"):
        alteration.apply(image(), 0, region=Box(0, 0, 150, 300))
    assert BY_NAME["JPEG, quality 75"].fits(8, 8)
