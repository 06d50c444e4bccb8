"""A region of interest: the only part of images of one size that is judged. Does not import torch."""

from __future__ import annotations

import base64
import os
import re
import reprlib
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ncml.errors import InputError
from ncml.images.decoding import MAX_PIXELS, open_image
from ncml.images.tiling import Box

OUTSIDE = 128
"""Grey level of pixels beside a mask: alike in all images, so that they decide nothing."""


@dataclass(frozen=True)
class Region:
    """A part of images of one size."""

    box: Box
    height: int
    """Height of the images in pixels."""
    width: int
    """Width of the images in pixels."""
    mask: bytes | None = None
    """Which pixels of the box are judged, packed bits in rows; None: all."""

    @classmethod
    def of_mask(cls, mask_HW: NDArray[np.bool_]) -> Self:
        """Return the region of a mask of the images' size; raise `InputError` if it judges nothing or everything."""
        if not mask_HW.any():
            raise InputError("region", "the mask has no light pixel: make light what is judged, and the rest dark.")
        if mask_HW.all():
            raise InputError(
                "region",
                "the mask has no dark pixel (transparent ones are light): darken what is not judged, or omit --region.",
            )
        box = Box.around(mask_HW)
        own_HW = mask_HW[box.top : box.top + box.height, box.left : box.left + box.width]
        return cls(box, mask_HW.shape[0], mask_HW.shape[1], None if own_HW.all() else np.packbits(own_HW).tobytes())

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
        if self.mask is not None and len(self.mask) != -(-width * height // 8):
            raise InputError("region", "the mask does not have the size of its box: name it again.")

    def crop(self, image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the region of an image, uint8 [H, W, 3]; raise `InputError` for an image of another size."""
        height, width = image_HWC.shape[:2]
        if (height, width) != (self.height, self.width):
            raise InputError(
                "image",
                f"image of {width}x{height} pixels cannot be judged in a region of images of "
                f"{self.width}x{self.height}: bring it to that size, or make a detector without a region.",
            )
        left, top, box_width, box_height = self.box
        cut_HWC = image_HWC[top : top + box_height, left : left + box_width]
        if self.mask is None:
            return cut_HWC
        return np.where(self.judged_HW[..., None], cut_HWC, np.uint8(OUTSIDE))

    @property
    def judged_HW(self) -> NDArray[np.bool_]:
        """Which pixels of the box are judged."""
        shape = self.box.height, self.box.width
        if self.mask is None:
            return np.ones(shape, bool)
        bits = np.unpackbits(np.frombuffer(self.mask, np.uint8), count=shape[0] * shape[1])
        return bits.reshape(shape).astype(bool)

    @property
    def named(self) -> Box | NDArray[np.bool_]:
        """What a region is made of: a box, or a mask of the images' size."""
        if self.mask is None:
            return self.box
        mask_HW = np.zeros((self.height, self.width), bool)
        left, top, width, height = self.box
        mask_HW[top : top + height, left : left + width] = self.judged_HW
        return mask_HW

    def rectangle(self) -> Box:
        """Return the largest rectangle in which every pixel is judged, in pixels of the whole image."""
        if self.mask is None:
            return self.box
        best = Box(0, 0, 0, 0)
        heights_W = np.zeros(self.box.width, int)
        for bottom, row_W in enumerate(self.judged_HW, 1):
            heights_W = np.where(row_W, heights_W + 1, 0)
            open_columns: list[tuple[int, int]] = []  # left edge and height of rectangles that may still grow
            for right, height in enumerate([*heights_W.tolist(), 0]):
                left = right
                while open_columns and open_columns[-1][1] >= height:
                    left, own = open_columns.pop()
                    if own * (right - left) > best.width * best.height:
                        best = Box(left, bottom - own, right - left, own)
                open_columns.append((left, height))
        return self.shift(best)

    def shift(self, box: Box) -> Box:
        """Return a box of the cropped image in pixels of the whole image."""
        return Box(self.box.left + box.left, self.box.top + box.top, box.width, box.height)

    def to_json(self) -> list[int | str]:
        """Return the box, the width and the height, and the mask if there is one, as plain data."""
        stored: list[int | str] = [*self.box, self.width, self.height]
        return stored if self.mask is None else [*stored, base64.b64encode(zlib.compress(self.mask)).decode()]

    @classmethod
    def from_json(cls, stored: Any) -> Self:
        """Rebuild the result of `to_json`; raises TypeError or ValueError if it is damaged."""
        left, top, box_width, box_height, width, height, *masks = stored
        if not all(type(number) is int for number in stored[:6]) or len(masks) > 1:
            raise TypeError("its region is not of whole numbers")
        try:
            region = cls(Box(left, top, box_width, box_height), height, width)
            if not masks:
                return region
            if box_width * box_height > MAX_PIXELS:
                raise ValueError("its mask is larger than any image that is judged")
            # One byte more than the mask has, so that a longer one is refused before it is decompressed.
            mask = zlib.decompressobj().decompress(base64.b64decode(masks[0]), -(-box_width * box_height // 8) + 1)
            return replace(region, mask=mask)
        except zlib.error as error:
            raise ValueError("its mask is damaged") from error
        except InputError as error:
            raise ValueError("its region or its mask does not fit the images") from error


def parse_region(text: str) -> Box:
    """Return the box of `x,y,width,height`; raise `InputError` for another form."""
    match = re.fullmatch(r"(\d+),(\d+),(\d+),(\d+)", text)
    if match is None:
        raise InputError(
            "region",
            f"--region {text!r} is not x,y,width,height in pixels, such as 100,50,640,480, and not the file of a mask.",
        )
    left, top, width, height = map(int, match.groups())
    return Box(left, top, width, height)


def read_region(region: str | os.PathLike[str]) -> Box | NDArray[np.bool_]:
    """Return the light pixels of a mask if this is the path of an image, [H, W]; else the box of `parse_region`."""
    if not isinstance(region, str | os.PathLike):
        shown = reprlib.repr(region)
        raise InputError("region", f"a region must be a text such as '100,50,640,480' or a mask's path, not {shown}.")
    path = Path(region)
    return open_image(path, field="region").mean(2) > 127.5 if path.is_file() else parse_region(os.fspath(region))
