"""A region of interest: the only part of images of one size that is judged. Does not import torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ncml.errors import InputError
from ncml.images.tiling import Box


@dataclass(frozen=True)
class Region:
    """A part of images of one size."""

    box: Box
    height: int
    """Height of the images in pixels."""
    width: int
    """Width of the images in pixels."""

    def __post_init__(self) -> None:
        """Raise `InputError` for a box that is empty or not inside the images."""
        left, top, width, height = self.box
        is_inside = left >= 0 and top >= 0 and left + width <= self.width and top + height <= self.height
        if not is_inside or min(width, height) < 1:
            raise InputError(
                "region",
                f"the region {left},{top},{width},{height} is not inside the images of {self.width}x{self.height} "
                "pixels: name x, y, width and height in pixels of the original images.",
            )

    def crop(self, image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the region of an image, uint8 [H, W, 3]; raise `InputError` for an image of another size."""
        height, width = image_HWC.shape[:2]
        if (height, width) != (self.height, self.width):
            raise InputError(
                "image",
                f"an image of {width}x{height} pixels cannot be judged in a region of images of "
                f"{self.width}x{self.height}: bring it to that size, or make a detector without a region.",
            )
        left, top, box_width, box_height = self.box
        return image_HWC[top : top + box_height, left : left + box_width]

    def shift(self, box: Box) -> Box:
        """Return a box of the cropped image in pixels of the whole image."""
        return Box(self.box.left + box.left, self.box.top + box.top, box.width, box.height)

    def to_json(self) -> list[int]:
        """Return the box, the width and the height as plain data."""
        return [*self.box, self.width, self.height]

    @classmethod
    def from_json(cls, stored: Any) -> Self:
        """Rebuild the result of `to_json`; raises TypeError or ValueError if it is damaged."""
        left, top, box_width, box_height, width, height = stored
        if not all(type(number) is int for number in stored):
            raise TypeError("its region is not of whole numbers")
        try:
            return cls(Box(left, top, box_width, box_height), height, width)
        except InputError as error:
            raise ValueError("its region is not inside the images") from error


def parse_region(text: str) -> Box:
    """Return the box of `x,y,width,height`; raise `InputError` for another form."""
    match = re.fullmatch(r"(\d+),(\d+),(\d+),(\d+)", text)
    if match is None:
        raise InputError("region", f"--region {text!r} is not x,y,width,height in pixels, such as 100,50,640,480.")
    left, top, width, height = map(int, match.groups())
    return Box(left, top, width, height)
