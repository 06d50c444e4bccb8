"""Overlaps: crops of one photograph are one scene, images of parts that look alike are not."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from ncml.calibration.adapting import adapt
from ncml.calibration.division import find_scenes
from ncml.data import scenes
from ncml.data.good_images import GoodImages, open_folder
from ncml.data.overlaps import find_points, overlapping
from tests.detectors import good_image
from tests.ncml import nets


def photograph(seed: int, height: int = 220, width: int = 300) -> np.ndarray:
    """Return an image of one part, at the same place in all, under the noise of a camera."""
    rng = np.random.default_rng(seed)
    image_HWC = np.kron(good_image(0, height // 2, width // 2), np.ones((2, 2, 1))) / 2
    return (image_HWC + rng.normal(40, 3, image_HWC.shape)).clip(0, 255).astype(np.uint8)


def crops(image_HWC: np.ndarray, count: int, seed: int) -> Iterable[np.ndarray]:
    rng = np.random.default_rng(seed)
    height, width = image_HWC.shape[:2]
    for _ in range(count):
        top, left = rng.integers(1, height // 10), rng.integers(1, width // 10)
        yield image_HWC[top : top + height * 9 // 10, left : left + width * 9 // 10]


def test_shifted_crops_are_one_scene() -> None:
    images = [crop for seed in range(6) for crop in crops(photograph(seed), 5, seed)]
    pairs = overlapping([find_points(image) for image in images])
    labels_N = scenes.merge(np.arange(len(images)), pairs)
    np.testing.assert_array_equal(labels_N, np.repeat(np.arange(6), 5))


def test_images_of_parts_at_one_place_or_shifted_are_scenes_of_their_own() -> None:
    images = [photograph(seed) for seed in range(12)]
    images += [crop for seed in range(12, 18) for crop in crops(photograph(seed), 1, seed)]
    assert overlapping([find_points(image) for image in images]) == []


def test_images_without_noise_at_one_place_are_scenes_of_their_own() -> None:
    """Renderings of a part are equal apart from where they differ."""
    base = photograph(0)
    images = []
    for seed in range(4):
        images.append(base.copy())
        images[-1][20 * seed : 20 * seed + 20, :40] = 0
    assert overlapping([find_points(image) for image in images]) == []


def test_windows_of_one_size_in_images_of_several_sizes_overlap() -> None:
    image = np.random.default_rng(0).integers(0, 256, (900, 1000, 3)).astype(np.uint8)
    points = [find_points(image), find_points(image[100:860, 60:940])]
    assert all(own.height == own.width == 640 for own in points)
    assert overlapping(points) == [(0, 1)]


def test_even_images_have_no_points() -> None:
    images = [np.full((64, 64, 3), level, np.uint8) for level in (10, 10, 200)]
    assert [len(find_points(image).keys_P) for image in images] == [0, 0, 0]


def test_scenes_are_merged_along_pairs() -> None:
    labels_N = scenes.merge(np.array([0, 1, 1, 2, 3, 4]), [(0, 1), (4, 5)])
    assert labels_N.tolist() == [0, 0, 0, 1, 2, 2]


@pytest.mark.parametrize(
    ("options", "sought"),
    [
        ({}, {"data": True}),
        ({"group": "image", "check": "check"}, {"data": False, "check": False}),
        ({"group": "([0-9]+)"}, {"data": False}),
        ({"group": "([0-9]+)", "reviewed": "reviewed"}, {"data": True, "reviewed": True}),
        ({"group": "([0-9]+)", "defective": "defective"}, {"data": True, "defective": True}),
    ],
)
def test_points_are_sought_only_in_images_that_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], sought: dict[str, bool]
) -> None:
    class Opened(Exception):
        """All folders are open."""

    sought_in: dict[str, bool] = {}

    def open_and_note(folder: Path, *arguments: Any, **keywords: Any) -> GoodImages:
        opened = open_folder(folder, *arguments, **keywords)
        sought_in[folder.name] = opened.points is not None
        return opened

    def stop(*_: object) -> NoReturn:
        raise Opened

    monkeypatch.setattr("ncml.calibration.adapting.open_folder", open_and_note)
    monkeypatch.setattr("ncml.model.load", stop)
    for name in sought:
        nets.save_images(tmp_path / name, np.zeros((1, 40, 40, 3), np.uint8))
    paths = {name: value if name == "group" else tmp_path / value for name, value in options.items()}
    with pytest.raises(Opened):
        adapt(tmp_path / "data", out=tmp_path / "out", **paths)  # pyright: ignore
    assert sought_in == sought


def test_images_opened_without_points_are_not_searched_for_overlaps(tmp_path: Path) -> None:
    nets.save_images(tmp_path, np.arange(2 * 4800, dtype=np.uint8).reshape(2, 40, 40, 3))
    images = open_folder(tmp_path, sorted(tmp_path.iterdir()), seeks_points=False)
    assert len(find_scenes(images.join(images).take([0, 1]), "image")) == 2
    with pytest.raises(ValueError, match="without their points"):
        find_scenes(images)
