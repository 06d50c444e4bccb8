"""The images of parts that `benchmarks/parts.py` measures with."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from benchmarks import part_images
from ncml.calibration.division import RankedScenesError
from ncml.data.good_images import GoodImages


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


def test_images_are_reused_only_for_the_options_that_they_were_rendered_with(tmp_path: Path) -> None:
    options = {"training": 2, "good": 1, "defective": 0, "foreign_images": 0}
    folder = part_images.reuse_or_write_folders(tmp_path, "sheet", **options, seed=1)
    states = {path: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")}
    assert part_images.reuse_or_write_folders(tmp_path, "sheet", **options, seed=1) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")} == states
    for others in ({"seed": 2}, {"seed": 1, "training": 3}, {"seed": 1, "foreign_images": 1}):
        with pytest.raises(SystemExit, match="sheet has images of other options: name another folder with --images"):
            part_images.reuse_or_write_folders(tmp_path, "sheet", **(options | others))


def test_folders_have_the_layout_of_mvtec_ad(tmp_path: Path) -> None:
    folder = part_images.write_folders(tmp_path, "sheet", training=2, good=1, defective=1, foreign_images=3)
    assert len(list((folder / "train" / "good").iterdir())) == 2
    assert {path.name for path in (folder / "test").iterdir()} == {"good", "foreign", *part_images.SURFACE_MARKS}
    truth = json.loads((folder / "truth.json").read_text())
    assert len(truth) == len(part_images.SURFACE_MARKS)
    left, top, right, bottom = truth["test/spot/0000.png"]["box"]
    mask = np.asarray(Image.open(folder / "ground_truth" / "spot" / "0000.png"))
    assert mask[top:bottom, left:right].sum() == mask.sum() > 0


def test_the_benchmark_of_reviews_leaves_out_what_an_update_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(part_images.__file__).parents[1])
    reviews = importlib.import_module("reviews")
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for i, path in enumerate(paths):
        Image.fromarray(np.full((40, 40, 3), 60 * i, np.uint8)).save(path)
    learned: list[tuple[str, ...]] = []

    def update(_model: object, images: GoodImages, *_: object, **__: object) -> SimpleNamespace:
        refused = [name for name in images.names if name in ("a.png", "c.png")]
        if refused:
            raise RankedScenesError(refused)
        learned.append(images.names)
        return SimpleNamespace(made="a detector")

    monkeypatch.setattr(reviews, "update_detector", update)
    monkeypatch.setattr(reviews.ncml, "load", lambda folder: folder)
    assert reviews.update(tmp_path, paths, tmp_path / "out") == ("a detector", 2)
    assert learned == [("b.png",)]
    assert reviews.update(tmp_path, paths[:1], tmp_path / "out") == (None, 1)
