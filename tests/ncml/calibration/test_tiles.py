"""Large images: scores of tiles, and p-values of images by their worst tile."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import ncml
from ncml import checkpoint
from ncml.calibration import tiles
from ncml.calibration.estimation import calibrate
from ncml.errors import InputError, ModelError
from ncml.ood import storage
from ncml.ood.measurements import measure
from ncml.ood.tiles import TileCalibration, scan
from tests.ncml import nets


def image_of(seed: int, height: int = 24, width: int = 20) -> np.ndarray:
    return nets.images(1, height, width, seed=seed).numpy()[0]


GOOD = [image_of(seed) for seed in range(28)]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> ncml.Model:
    """A model that finds the defect below; larger random weights, as those of `model`, find it with some seeds only."""
    folder = tmp_path_factory.mktemp("tiles") / "quiet"
    checkpoint.save(folder, nets.network(nets.config(), dtype=torch.float32, seed=3, spread=0.08))
    model = ncml.load(folder)
    made = tiles.calibrate(model, [lambda p=p: p for p in GOOD[:8]], [lambda p=p: p for p in GOOD[8:]])
    made.save(folder)
    return ncml.load(folder)


def read(model: ncml.Model) -> TileCalibration:
    return TileCalibration.read(model.folder, model.version, model.config)


def test_a_scan_is_its_tiles(calibrated: ncml.Model) -> None:
    calibration, image = read(calibrated), image_of(50)
    result = scan(calibrated.network, image, calibration)
    corners = calibration.tile.corners(*image.shape[:2])
    tiles_BHWC = np.stack([image[top : top + 8, left : left + 8] for top, left in corners])
    names = calibrated.statistics["multiscale"].needs
    score = calibration.gaussian.distance(measure(calibrated.network, tiles_BHWC, names)[0])
    worst = int(score.argmax())
    assert result.tiles == len(corners) == 20
    assert result.score == pytest.approx(score[worst], rel=1e-4)
    assert result.box == (corners[worst][1], corners[worst][0], 8, 8)
    assert result.grid.ravel() == pytest.approx(score, rel=1e-4)
    assert result.grid.shape == (5, 4)
    assert result.map.shape == image.shape[:2]
    assert score.min() * 0.999 <= result.map.min() <= result.map.max() <= score.max() * 1.001
    assert result.map[0, 0] == pytest.approx(score[0], rel=1e-4)  # a corner has one tile


def test_a_defect_is_found_where_it_is(calibrated: ncml.Model) -> None:
    image = image_of(51, 40, 48)
    image[22:30, 30:38] = 255 * np.random.default_rng(0).integers(0, 2, (8, 8, 3))
    calibration = read(calibrated)
    result = scan(calibrated.network, image, calibration)
    left, top, width, height = result.box
    assert 22 < left < 38  # the box and the defect overlap
    assert 14 < top < 30
    assert (width, height) == (8, 8)
    assert result.is_ood
    assert result.p_value == 1 / 21
    assert result.threshold == calibration.threshold
    i, j = np.unravel_index(result.map.argmax(), result.map.shape)
    assert 18 <= i < 34
    assert 26 <= j < 42


def test_good_images_rank_evenly(calibrated: ncml.Model) -> None:
    calibration = read(calibrated)
    p = np.array([scan(calibrated.network, image_of(seed), calibration).p_value for seed in range(100, 130)], float)
    assert 0.3 < p.mean() < 0.7
    assert (p <= 0.05).mean() < 0.3


def test_tiles_of_another_size_are_resized(model: ncml.Model) -> None:
    made = tiles.calibrate(
        model, [lambda p=p: p for p in GOOD[:8]], [lambda p=p: p for p in GOOD[8:]], side=16, batch_size=5
    )
    result = scan(model.network, image_of(60), made)
    assert result.box[2:] == (16, 16)


def test_progress_is_reported(calibrated: ncml.Model) -> None:
    reports: list[tuple[int, int]] = []
    scan(
        calibrated.network,
        image_of(1),
        read(calibrated),
        batch_size=8,
        on_progress=lambda at: reports.append((at.done, at.total)),
    )
    assert reports == [(8, 20), (16, 20), (20, 20)]


def test_without_any_calibration_tiles_are_refused(model: ncml.Model) -> None:
    with pytest.raises(InputError, match="tiles cannot be scored: this model is not calibrated"):
        model.scan(image_of(1))


def test_the_model_s_own_calibration_gives_a_map_but_no_verdict(model: ncml.Model, tmp_path: Path) -> None:
    shutil.copytree(model.folder, tmp_path / "loud")
    calibrate(model, nets.images(30).numpy(), nets.images(30, seed=1).numpy()).save(tmp_path / "loud")
    result = ncml.load(tmp_path / "loud").scan(image_of(1))
    assert (result.p_value, result.threshold, result.is_ood) == (None, None, None)
    assert result.score > 0


def test_too_few_images_are_refused(model: ncml.Model) -> None:
    opened = [lambda p=p: p for p in GOOD]
    with pytest.raises(InputError, match="18 ranking images cannot support"):
        tiles.calibrate(model, opened[:3], opened[3:21])
    with pytest.raises(InputError, match="too few to estimate the statistics"):
        tiles.calibrate(model, [], opened)
    with pytest.raises(InputError, match="5 x 6 pixels is smaller than a tile of 8 x 8"):
        scan(model.network, np.zeros((6, 5, 3), np.uint8), tiles.calibrate(model, opened[:8], opened[8:]))


def test_a_calibration_of_tiles_is_bound_to_its_model(calibrated: ncml.Model, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="another version"):
        TileCalibration.read(calibrated.folder, "0" * 64, calibrated.config)
    path = tmp_path / checkpoint.TILES
    stored = json.loads((calibrated.folder / checkpoint.TILES).read_text())
    path.write_text(json.dumps(stored | {"n_fit": 99}))
    with pytest.raises(ModelError, match="changed after it was written"):
        TileCalibration.read(tmp_path, calibrated.version, calibrated.config)
    del stored["version"], stored["cut"]
    storage.write(path, stored)
    with pytest.raises(ModelError, match="is damaged"):
        TileCalibration.read(tmp_path, calibrated.version, calibrated.config)
