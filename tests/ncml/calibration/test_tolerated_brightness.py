"""Detectors that tolerate another brightness than that of the good images."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ncml
from ncml.calibration import descriptions
from ncml.calibration.detector import make_detector
from ncml.calibration.updating import update_detector
from ncml.data.good_images import GoodImages, open_folder
from ncml.errors import InputError
from ncml.images.perturbations import rounded
from ncml.ood.detector_calibration import DetectorCalibration
from tests.detectors import good_image, save_parts, use_small_scale


@pytest.fixture(scope="module", autouse=True)
def _small_scale() -> Iterator[None]:
    """Judge without features, which take most of the time."""
    patch = pytest.MonkeyPatch()
    use_small_scale(patch)
    patch.setattr("ncml.network.efficientnet.is_available", lambda: False)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> GoodImages:
    folder = tmp_path_factory.mktemp("good")
    save_parts(folder, 40)
    return open_folder(folder, sorted(folder.iterdir()))


def count_flagged(folder: Path, factor: float) -> int:
    """Return how many of 20 fresh good images are flagged, which are brighter by a factor."""
    scores = ncml.load(folder).score([rounded(factor * good_image(seed)) for seed in range(100, 120)])
    return sum(score.ood is not None and score.ood.is_ood for score in scores)


def test_images_in_another_light_are_not_flagged_and_updates_keep_that(
    model: ncml.Model, good: GoodImages, tmp_path: Path
) -> None:
    plain, tolerant = (
        make_detector(
            model, good, tmp_path / name, brightness=brightness, group="image", power_images=0, keep_images=True
        )
        for name, brightness in (("plain", 0.0), ("tolerant", 0.2))
    )
    for factor in (0.85, 1.15):
        assert count_flagged(plain.folder, factor) >= 18
        assert count_flagged(tolerant.folder, factor) <= 4
    assert count_flagged(tolerant.folder, 1.8) == 20
    assert tolerant.calibration.brightness == 0.2
    assert "made for images up to 20% brighter or darker than the good ones" in descriptions.describe_detector(tolerant)
    stored = DetectorCalibration.read(tolerant.folder, model.version)
    assert (stored.brightness, stored.version) == (0.2, tolerant.calibration.version)
    updated = update_detector(ncml.load(tolerant.folder), good.take([0]), tmp_path / "updated", power_images=0)
    assert updated.made.calibration.brightness == 0.2


def test_an_image_has_one_random_factor(good: GoodImages) -> None:
    changed, expected = replace(good, brightness=0.5), [reader() for reader in good.readers(good.all)]
    factors = []
    for index, image_HWC in enumerate(expected):
        is_unclipped = (image_HWC > 20) & (image_HWC < 160)
        own_HWC = changed.take([index]).join(good).reader(0)()
        np.testing.assert_array_equal(own_HWC, changed.reader(index)())
        factors.append(np.median(own_HWC[is_unclipped] / image_HWC[is_unclipped]))
    assert 1 / 1.5 <= min(factors) < 0.8
    assert 1.25 < max(factors) <= 1.5
    assert len(set(np.round(factors, 3))) > 30


@pytest.mark.parametrize("brightness", [-0.1, 0.6, float("nan")])
def test_a_brightness_that_cannot_be_tolerated_is_refused(
    model: ncml.Model, good: GoodImages, tmp_path: Path, brightness: float
) -> None:
    with pytest.raises(InputError, match="must be between 0 and 50%, not"):
        make_detector(model, good, tmp_path / "d", brightness=brightness)
    assert not list(tmp_path.iterdir())
