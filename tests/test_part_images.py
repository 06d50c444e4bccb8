"""The images of parts that `benchmarks/parts.py` measures with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import part_images


@pytest.mark.parametrize("kind", ["washer", "tile"])
def test_an_image_is_a_function_of_its_kind_number_defect_and_seed(kind: str) -> None:
    image = part_images.render(kind, 3, defect="scratch").image_HWC
    assert np.array_equal(image, part_images.render(kind, 3, defect="scratch").image_HWC)
    for other in (
        part_images.render(kind, 4, defect="scratch"),
        part_images.render(kind, 3, defect="spot"),
        part_images.render(kind, 3, defect="scratch", seed=1),
    ):
        assert not np.array_equal(image, other.image_HWC)


@pytest.mark.parametrize("variation", part_images.VARIATIONS)
def test_a_variation_changes_a_good_image(variation: str) -> None:
    rendered = part_images.render("washer", 3, variation=variation)
    assert rendered.defect is None
    assert not rendered.mask_HW.any()
    assert np.array_equal(rendered.image_HWC, part_images.render("washer", 3, variation=variation).image_HWC)
    change = np.abs(rendered.image_HWC.astype(int) - part_images.render("washer", 3).image_HWC).max(2)
    assert (change > part_images.VISIBLE).sum() > part_images.VISIBLE_PIXELS


@pytest.mark.parametrize("kind", ["connector", "blister"])
def test_a_missing_feature_changes_only_its_surroundings(kind: str) -> None:
    rendered = part_images.render(kind, 0, defect="missing")
    rows, columns = np.nonzero(rendered.mask_HW)
    height, width = rendered.mask_HW.shape
    assert np.ptp(rows) < height / 5
    assert np.ptp(columns) < width / 5
    assert rendered.contrast > part_images.VISIBLE / 3


def test_kinds_for_choosing_and_kinds_to_report_have_parts_and_surfaces() -> None:
    halves = [[kind for kind in part_images.KINDS.values() if kind.for_choice is choice] for choice in (True, False)]
    assert min(map(len, halves)) >= 5
    for kinds in halves:
        assert {bool(kind.features) for kind in kinds} == {True, False}


def test_folders_have_the_layout_of_mvtec_ad(tmp_path: Path) -> None:
    folder = part_images.write_folders(tmp_path, "sheet", training=2, good=1, defective=1, foreign_images=3)
    assert len(list((folder / "train" / "good").iterdir())) == 2
    assert {path.name for path in (folder / "test").iterdir()} == {"good", "foreign", *part_images.SURFACE_MARKS}
    truth = json.loads((folder / "truth.json").read_text())
    assert len(truth) == len(part_images.SURFACE_MARKS)
    left, top, right, bottom = truth["test/spot/0000.png"]["box"]
    mask = np.asarray(Image.open(folder / "ground_truth" / "spot" / "0000.png"))
    assert mask[top:bottom, left:right].sum() == mask.sum() > 0
