"""Which altered and defective images the views and their weights are learned from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from PIL import Image

from ncml.calibration import view_estimation
from ncml.calibration.division import DefectiveImages, GoodScenes
from ncml.calibration.view_estimation import measure_altered, measure_images
from ncml.data.good_images import GoodImages, open_folder
from ncml.errors import InputError
from ncml.images.alterations import ALTERATIONS
from ncml.images.region import Region
from ncml.images.tiling import Box
from ncml.ood.views.appearance import AppearanceView
from ncml.ood.views.features import FeaturesView
from ncml.ood.views.view import Measurement, Pixels, View
from ncml.progress import OnProgress, ignore_progress
from tests.detectors import use_small_scale


class Recording:
    """A view that keeps what it measures."""

    def __init__(self, score: float = 1.0) -> None:
        self.score = score
        self.images: list[Pixels] = []

    def measure(self, image_HWC: Pixels) -> dict[str, Measurement]:
        self.images.append(image_HWC)
        return {"recorded": Measurement(self.score)}


def measure(
    view: Recording, images: GoodImages, region: Region | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    return measure_altered({"recording": cast(View, view)}, images, region, ignore_progress)


def write(folder: Path, count: int, sizes: tuple[tuple[int, int], ...]) -> GoodImages:
    """Write images of random values, of several sizes in turn."""
    folder.mkdir()
    for seed in range(count):
        height, width = sizes[seed % len(sizes)]
        pixels_HWC = np.random.default_rng(seed).integers(80, 160, (height, width, 3), np.uint8)
        Image.fromarray(pixels_HWC).save(folder / f"{seed:02}.png")
    return open_folder(folder, sorted(folder.iterdir()), seeks_points=False)


def test_every_alteration_that_fits_is_applied_to_one_image(tmp_path: Path) -> None:
    images, view = write(tmp_path / "good", 12, ((120, 40), (120, 120))), Recording()
    altered, are_processed_M = measure(view, images)
    assert altered["recorded"].shape == are_processed_M.shape == (len(view.images),)
    assert are_processed_M.sum() == sum(not alteration.is_local for alteration in ALTERATIONS)
    assert len(view.images) < len(ALTERATIONS)  # some are too large for the narrow images
    originals = [reader() for reader in images.readers(images.all)]
    for image_HWC in view.images:
        assert not any(np.array_equal(image_HWC, original_HWC) for original_HWC in originals)


def test_marks_lie_in_the_region(tmp_path: Path) -> None:
    images, view = write(tmp_path / "good", 12, ((160, 200),)), Recording()
    region = Region(Box(20, 10, 130, 125), 160, 200)
    _, are_processed_M = measure(view, images, region)
    crops = [region.crop(reader()) for reader in images.readers(images.all)]
    for image_HWC, is_processed in zip(view.images, are_processed_M, strict=True):
        changed = [(image_HWC != crop_HWC).any(2).mean() for crop_HWC in crops]
        assert min(changed) > 0
        if not is_processed:
            assert min(changed) < 0.7  # of one crop, a part is changed


def test_an_altered_image_without_a_finite_score_is_named(tmp_path: Path) -> None:
    images = write(tmp_path / "good", 12, ((160, 200),))
    with pytest.raises(InputError, match=r"the score recorded of 40 images is not finite: leave out 00.png \(scr"):
        measure(Recording(np.nan), images)


def test_altered_images_are_neither_ranking_nor_reviewed_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = write(tmp_path / "good", 40, ((96, 96),))
    (tmp_path / "flagged").mkdir()
    for seed in range(3):
        pixels_HWC = np.random.default_rng(100 + seed).integers(0, 256, (96, 96, 3), np.uint8)
        Image.fromarray(pixels_HWC).save(tmp_path / "flagged" / f"reviewed{seed}.png")
    reviewed = open_folder(tmp_path / "flagged", sorted((tmp_path / "flagged").iterdir()), seeks_points=False)
    divided = GoodScenes.find(good, reviewed, "image").divide(0.05, None)
    altered: list[str] = []

    def record(views: Mapping[str, View], images: GoodImages, region: Region | None, on_progress: OnProgress) -> object:
        altered.extend(images.names)
        return measure_altered(views, images, region, on_progress)

    monkeypatch.setattr(view_estimation, "measure_altered", record)
    monkeypatch.setattr(view_estimation, "VIEWS", {"appearance": AppearanceView})
    measure_images(
        divided,
        DefectiveImages.of(divided, None, "image"),
        region=None,
        align=True,
        brightness=0.0,
        device="cpu",
        on_message=lambda line: None,
        on_progress=ignore_progress,
    )
    assert altered == [good.names[i] for i in divided.estimating.tolist() if i < len(good)]
    assert not set(altered) & {divided.images.names[i] for i in divided.ranking.tolist()}


def test_defective_images_from_which_a_view_has_learned_are_scored_as_if_it_had_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of four shows a scene that ranks, so nothing is learned from it."""
    use_small_scale(monkeypatch)
    monkeypatch.setattr(view_estimation, "VIEWS", {"features": FeaturesView})
    good = write(tmp_path / "good", 40, ((96, 96),))
    divided = GoodScenes.find(good, None, "image").divide(0.05, None)
    defective = write(tmp_path / "bad", 4, ((64, 96),))
    learned_D = np.array([True, False, True, True])
    views, scores, _ = measure_images(
        divided,
        DefectiveImages(defective, np.array([50, int(divided.scenes_N[divided.ranking[0]]), 51, 52]), learned_D),
        region=None,
        align=True,
        brightness=0.0,
        device="cpu",
        on_message=lambda line: None,
        on_progress=ignore_progress,
    )
    own_D, seen_D = scores.defective["known_defects"], np.empty(4)
    for i, reader in enumerate(defective.readers(defective.all)):
        seen_D[i] = views["features"].measure(reader())["known_defects"].score
    assert own_D[1] == seen_D[1]
    assert (own_D[learned_D] < seen_D[learned_D]).all()
