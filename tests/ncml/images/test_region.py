"""A region of interest."""

import numpy as np
import pytest

from ncml.errors import InputError
from ncml.images.region import Region, parse_region
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
