"""Examples of what a detector finds and misses: a sheet of pictures, and where each lies on it.

Of each alteration at each size, the first image that is found and the first that is missed are shown. Where a part
changes, a window around it with marks at its corners; where the whole image does, the whole or a window of it, of which
the left half is unaltered. The sheet is stored beside the detector, with at most `MAX_SHEET_BYTES`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ncml.images.alterations import Alteration, Altered
from ncml.images.tiling import Box
from ncml.limits import MAX_SHEET_BYTES
from ncml.ood.detector_power import Picture, worst_first
from ncml.ood.views.view import Pixels

SIDE = 144
"""Pixels of the sides of a picture."""
MARGIN, HEADING, CAPTION = 8, 24, 32
"""Pixels between pictures, and heights of the line above those of one kind and of the two below a picture."""
SURROUNDINGS = 2.5
"""Sides of the window around a change, in those of the change; at least `SIDE` pixels."""
FINE = ("blur", "noise", "JPEG")
"""Changes of the whole image that are seen only at full scale: a window of them is shown."""
QUALITIES = (88, 80, 70, 60, 40, 20)
"""JPEG qualities of the sheet, of which the first that is small enough is used."""
INK, ALARM = (32, 32, 36), (190, 24, 24)


class PowerPictures:
    """Collects the examples while the power is measured."""

    def __init__(self) -> None:
        self._pictures: dict[tuple[str, str, bool], Image.Image] = {}

    def add(self, alteration: Alteration, is_found: bool, image_HWC: Pixels, altered: Altered, region: Box) -> None:
        """Keep an example, unless there is one of this alteration that is found, or missed, alike.

        image_HWC: the image before it was altered. region: the part that the detector judges.
        """
        key = alteration.kind, alteration.size, is_found
        if key not in self._pictures:
            self._pictures[key] = _picture(alteration, image_HWC, altered, region)

    def sheet(self, shares: Mapping[str, Mapping[str, float]]) -> tuple[bytes, tuple[Picture, ...]]:
        """Return the sheet as a JPEG, and its pictures: the worst kinds first, of one size missed ones first.

        Without examples, both are empty.
        """
        if not self._pictures:
            return b"", ()
        kinds = [
            (kind, [key for size in shares[kind] for key in ((kind, size, False), (kind, size, True))])
            for kind in worst_first(shares)
        ]
        rows = [(kind, [key for key in keys if key in self._pictures]) for kind, keys in kinds]
        columns = max(len(keys) for _, keys in rows)
        row_height = HEADING + SIDE + CAPTION + MARGIN
        size = columns * (SIDE + MARGIN) + MARGIN, len(rows) * row_height + MARGIN
        sheet = Image.new("RGB", size, "white")
        draw, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(15), ImageFont.load_default(11)
        pictures: list[Picture] = []
        for row, (kind, keys) in enumerate(rows):
            top = row * row_height + MARGIN
            draw.text((MARGIN, top), kind, INK, font)
            for column, key in enumerate(keys):
                _, size_name, is_found = key
                left = column * (SIDE + MARGIN) + MARGIN
                picture = self._pictures[key]
                box = Box(left, top + HEADING, picture.width, picture.height)
                sheet.paste(picture, (box.left, box.top))
                share = f"{shares[kind][size_name]:.0%} found"
                below = top + HEADING + SIDE + 2
                draw.text((left, below), size_name, INK, small)
                draw.text((left, below + 14), f"found ({share})" if is_found else f"MISSED ({share})",
                          INK if is_found else ALARM, small)  # fmt: skip
                pictures.append(Picture(kind, size_name, is_found, box))
        return _jpeg(sheet), tuple(pictures)


def _picture(alteration: Alteration, image_HWC: Pixels, altered: Altered, region: Box) -> Image.Image:
    """Return the picture of an example, at most `SIDE` pixels wide and high."""
    box = altered.box
    if box is not None:
        side = max(SIDE, round(SURROUNDINGS * max(box.width, box.height)))
        return _marked(altered.image_HWC, _window(image_HWC, box, side), box)
    shown_HWC = altered.image_HWC.copy()
    window = _window(image_HWC, region, SIDE) if alteration.kind in FINE else Box(0, 0, *image_HWC.shape[1::-1])
    middle = window.left + window.width // 2
    shown_HWC[:, :middle] = image_HWC[:, :middle]
    return _reduced(shown_HWC, window)


def _window(image_HWC: Pixels, box: Box, side: int) -> Box:
    """Return a square around the middle of a box, or what of it fits into the image."""
    height, width = image_HWC.shape[:2]
    across, down = min(side, width), min(side, height)
    left = min(max(box.left + (box.width - across) // 2, 0), width - across)
    top = min(max(box.top + (box.height - down) // 2, 0), height - down)
    return Box(left, top, across, down)


def _reduced(image_HWC: Pixels, window: Box) -> Image.Image:
    left, top, width, height = window
    picture = Image.fromarray(np.ascontiguousarray(image_HWC[top : top + height, left : left + width]))
    picture.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    return picture


def _marked(image_HWC: Pixels, window: Box, box: Box) -> Image.Image:
    """Return a window with marks outside the corners of a box."""
    picture = _reduced(image_HWC, window)
    scale = picture.width / window.width
    left, top = (box.left - window.left) * scale - 5, (box.top - window.top) * scale - 5
    right, bottom = left + box.width * scale + 9, top + box.height * scale + 9
    draw = ImageDraw.Draw(picture)
    for x, along in ((left, 7), (right, -7)):
        for y, down in ((top, 7), (bottom, -7)):
            for colour, width in (("black", 3), ("white", 1)):
                draw.line([(x + along, y), (x, y), (x, y + down)], colour, width)
    return picture


def _jpeg(sheet: Image.Image) -> bytes:
    """Return the sheet as a JPEG of the best quality with at most `MAX_SHEET_BYTES`."""
    encoded = b""
    for quality in QUALITIES:
        buffer = io.BytesIO()
        sheet.save(buffer, "JPEG", quality=quality, subsampling=0)
        encoded = buffer.getvalue()
        if len(encoded) <= MAX_SHEET_BYTES:
            break
    return encoded
