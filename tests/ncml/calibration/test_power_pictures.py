"""Pictures of what a detector finds and misses: which are kept, what they show, and the sheet."""

import io

import numpy as np
from PIL import Image

from ncml.calibration.power_pictures import SIDE, PowerPictures
from ncml.images.alterations import ALTERATIONS
from ncml.images.tiling import Box
from ncml.limits import MAX_SHEET_BYTES
from ncml.ood.detector_power import Picture

REGION = Box(0, 0, 400, 300)
RNG = np.random.default_rng(0)
GROUND = np.full((300, 400, 3), 120, np.uint8)


def named(name: str):
    return next(alteration for alteration in ALTERATIONS if alteration.name.startswith(name))


def cut(sheet: bytes, picture: Picture) -> np.ndarray:
    pixels_HWC = np.asarray(Image.open(io.BytesIO(sheet)), int)
    left, top, width, height = picture.box
    return pixels_HWC[top : top + height, left : left + width]


def test_the_first_of_each_outcome_is_shown_missed_ones_and_the_worst_kinds_first() -> None:
    pictures = PowerPictures()
    spot, stain = named("spot"), named("stain")
    for level, is_found in ((60, True), (90, False), (200, True)):
        image = np.full((300, 400, 3), level, np.uint8)
        pictures.add(spot, is_found, image, spot.apply(image, 0), REGION)
    pictures.add(stain, False, GROUND, stain.apply(GROUND, 0), REGION)
    sheet, shown = pictures.sheet({"spot": {spot.size: 0.67}, "stain": {stain.size: 0.0}})
    assert [(picture.kind, picture.is_found) for picture in shown] == [
        ("stain", False),
        ("spot", False),
        ("spot", True),
    ]
    assert [round(float(np.median(cut(sheet, picture)))) for picture in shown] == [120, 90, 60]


def test_a_local_change_is_in_the_middle_between_marks() -> None:
    pictures = PowerPictures()
    spot = named("spot, radius 6")
    pictures.add(spot, False, GROUND, spot.apply(GROUND, 3, region=Box(120, 100, 100, 100)), REGION)
    sheet, [shown] = pictures.sheet({"spot": {spot.size: 0.0}})
    picture = cut(sheet, shown)
    assert picture.shape == (SIDE, SIDE, 3)
    changed = np.abs(picture - 120).max(2) > 20
    rows, columns = np.nonzero(changed)
    assert abs(rows.mean() - SIDE / 2) < 3
    assert abs(columns.mean() - SIDE / 2) < 3
    assert np.ptp(rows) > 13  # the marks surround a spot 13 pixels wide
    assert picture[changed].max() > 220


def test_the_left_half_of_an_image_that_changes_as_a_whole_is_unaltered() -> None:
    pictures = PowerPictures()
    brighter = named("brightness, 40")
    pictures.add(brighter, True, GROUND, brighter.apply(GROUND, 0), REGION)
    sheet, [shown] = pictures.sheet({"brightness": {brighter.size: 1.0}})
    picture = cut(sheet, shown)
    assert picture.shape == (SIDE * 3 // 4, SIDE, 3)
    assert abs(picture[:, : SIDE // 2 - 2].mean() - 120) < 2
    assert abs(abs(picture[:, SIDE // 2 + 2 :].mean() - 120) - 48) < 2


def test_the_sheet_is_bounded_even_for_images_that_compress_badly() -> None:
    pictures = PowerPictures()
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    shares: dict[str, dict[str, float]] = {}
    for alteration in ALTERATIONS:
        shares.setdefault(alteration.kind, {})[alteration.size] = 0.5
        for is_found in (False, True):
            pictures.add(alteration, is_found, image, alteration.apply(image, 0), REGION)
    sheet, shown = pictures.sheet(shares)
    assert len(shown) == 2 * len(ALTERATIONS)
    assert len(sheet) <= MAX_SHEET_BYTES


def test_without_examples_there_is_no_sheet() -> None:
    assert PowerPictures().sheet({}) == (b"", ())
