"""A region of interest."""

import base64
import json
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ncml.errors import InputError
from ncml.images.region import Region, parse_region, read_region
from ncml.images.tiling import Box


def test_a_region_is_cut_from_images_and_boxes_return_to_their_pixels() -> None:
    region = Region(parse_region("10,20,30,40"), height=100, width=80)
    image = np.zeros((100, 80, 3), np.uint8)
    image[25, 13] = 255
    cut = region.crop(image)
    assert cut.shape == (40, 30, 3)
    assert (cut[5, 3] == 255).all()
    assert region.shift(Box(3, 5, 1, 1)) == Box(13, 25, 1, 1)
    assert Region.from_json(region.to_json()) == region


@pytest.mark.parametrize("text", ["10,20,71,40", "10,61,30,40", "0,0,0,10", "80,0,1,1"])
def test_a_region_outside_the_image_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"the region {text} is not inside the images of 80x100 pixels") as error:
        Region(parse_region(text), height=100, width=80)
    assert error.value.field == "region"


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4,5", "-1,2,3,4", "a,b,c,d", "1.5,2,3,4"])
def test_what_is_no_region_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not x,y,width,height in pixels"):
        parse_region(text)


def test_images_of_another_size_are_refused() -> None:
    region = Region(Box(0, 0, 40, 40), height=100, width=80)
    with pytest.raises(InputError, match="60x100 pixels cannot be judged in a region of images of 80x100"):
        region.crop(np.zeros((100, 60, 3), np.uint8))


def test_what_lies_beside_a_mask_is_alike_in_all_images() -> None:
    mask_HW = np.zeros((100, 80), bool)
    mask_HW[20:60, 10:40] = True
    mask_HW[40:60, 40:70] = True
    region = Region.of_mask(mask_HW)
    assert region.box == Box(10, 20, 60, 40)
    assert np.array_equal(region.judged_HW, mask_HW[20:60, 10:70])
    cuts = [region.crop(np.full((100, 80, 3), level, np.uint8)) for level in (30, 200)]
    assert all((cut[region.judged_HW] == level).all() for cut, level in zip(cuts, (30, 200), strict=True))
    assert np.array_equal(cuts[0][~region.judged_HW], cuts[1][~region.judged_HW])
    assert Region.from_json(json.loads(json.dumps(region.to_json()))) == region
    assert region.rectangle() == Box(10, 20, 30, 40)
    assert np.array_equal(region.named, mask_HW)


def test_a_mask_that_is_larger_than_its_box_is_refused_before_it_is_decompressed() -> None:
    mask_HW = np.zeros((100, 80), bool)
    mask_HW[::2] = True
    *numbers, _ = Region.of_mask(mask_HW).to_json()
    bomb = base64.b64encode(zlib.compress(bytes(2**26))).decode()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="does not fit the images"):
            Region.from_json([*numbers, bomb])
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    with pytest.raises(ValueError, match="larger than any image"):
        Region.from_json([0, 0, 10**6, 10**6, 10**6, 10**6, bomb])


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_rectangle_of_a_mask_is_that_of_brute_force(seed: int) -> None:
    mask_HW = np.random.default_rng(seed).random((7, 9)) < 0.8
    mask_HW[0, 0] = mask_HW[-1, -1] = True
    best = Region.of_mask(mask_HW).rectangle()
    assert mask_HW[best.top : best.top + best.height, best.left : best.left + best.width].all()
    areas = [
        (bottom - top) * (right - left)
        for top in range(7)
        for bottom in range(top + 1, 8)
        for left in range(9)
        for right in range(left + 1, 10)
        if mask_HW[top:bottom, left:right].all()
    ]
    assert best.width * best.height == max(areas)


def test_a_mask_that_covers_its_box_is_that_box(tmp_path: Path) -> None:
    mask_HW = np.zeros((100, 80), np.uint8)
    mask_HW[20:60, 10:40] = 255
    Image.fromarray(mask_HW).save(tmp_path / "mask.png")
    mask = read_region(str(tmp_path / "mask.png"))
    assert isinstance(mask, np.ndarray)
    assert read_region("10,20,30,40") == Box(10, 20, 30, 40)
    assert Region.of_mask(mask) == Region(Box(10, 20, 30, 40), 100, 80)


def test_a_mask_that_is_white_on_a_transparent_ground_is_refused(tmp_path: Path) -> None:
    mask_HW2 = np.full((100, 80, 2), 255, np.uint8)
    mask_HW2[:50, :, 1] = 0
    Image.fromarray(mask_HW2, "LA").save(tmp_path / "mask.png")
    mask = read_region(str(tmp_path / "mask.png"))
    assert isinstance(mask, np.ndarray)
    with pytest.raises(InputError, match=r"the mask has no dark pixel \(transparent ones are light\)"):
        Region.of_mask(mask)


def test_an_empty_mask_and_a_damaged_one_are_refused() -> None:
    with pytest.raises(InputError, match="the mask has no light pixel"):
        Region.of_mask(np.zeros((10, 10), bool))
    mask_HW = np.eye(40, dtype=bool)
    stored = Region.of_mask(mask_HW).to_json()
    with pytest.raises(ValueError, match="damaged"):
        Region.from_json([*stored[:6], "AAAA"])
    for index, number in ((0, -1), (1, -1), (2, 39)):
        with pytest.raises(ValueError, match="region"):
            Region.from_json([*stored[:index], number, *stored[index + 1 :]])
