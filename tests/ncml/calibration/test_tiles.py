"""Large pictures: scores of tiles, and p-values of whole pictures."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import ncml
from ncml import checkpoint
from ncml.calibration import tiles
from ncml.calibration.estimation import calibrate
from ncml.errors import InputError, ModelError
from ncml.ood import storage
from ncml.ood.measurements import measure
from ncml.ood.tiles import TileCalibration, scan
from tests.ncml import nets


def picture(seed: int, height: int = 24, width: int = 20) -> np.ndarray:
    return nets.images(1, height, width, seed=seed).numpy()[0]


GOOD = [picture(seed) for seed in range(28)]


@pytest.fixture(scope="module")
def calibrated(model: ncml.Model, tmp_path_factory: pytest.TempPathFactory) -> ncml.Model:
    folder = tmp_path_factory.mktemp("tiles") / "loud"
    shutil.copytree(model.folder, folder)
    made = tiles.calibrate(model, [lambda p=p: p for p in GOOD[:8]], [lambda p=p: p for p in GOOD[8:]])
    made.save(folder)
    return ncml.load(folder)


def read(model: ncml.Model) -> TileCalibration:
    return TileCalibration.read(model.folder, model.version)


def test_a_scan_is_its_tiles(calibrated: ncml.Model) -> None:
    calibration, image = read(calibrated), picture(50)
    found = scan(calibrated.network, image, calibration)
    corners = calibration.tile.corners(*image.shape[:2])
    tiles_BHWC = np.stack([image[top : top + 8, left : left + 8] for top, left in corners])
    names = calibrated.statistics["multiscale"].needs
    score = calibration.gaussian.distance(measure(calibrated.network, tiles_BHWC, names)[0])
    worst = int(score.argmax())
    assert found.tiles == len(corners) == 20
    assert found.score == pytest.approx(score[worst], rel=1e-4)
    assert found.box == (corners[worst][1], corners[worst][0], 8, 8)
    assert found.grid.ravel() == pytest.approx(score, rel=1e-4)
    assert found.grid.shape == (5, 4)
    assert found.map.shape == image.shape[:2]
    assert score.min() * 0.999 <= found.map.min() <= found.map.max() <= score.max() * 1.001
    assert found.map[0, 0] == pytest.approx(score[0], rel=1e-4)  # a corner has one tile


def test_a_defect_is_found_where_it_is(calibrated: ncml.Model) -> None:
    image = picture(51, 40, 48)
    image[22:30, 30:38] = 255 * np.random.default_rng(0).integers(0, 2, (8, 8, 3))
    calibration = read(calibrated)
    found = scan(calibrated.network, image, calibration)
    left, top, width, height = found.box
    assert 22 < left < 38  # the box and the defect overlap
    assert 14 < top < 30
    assert (width, height) == (8, 8)
    assert found.is_ood
    assert found.p_value == 1 / 21
    assert found.threshold == calibration.threshold
    i, j = np.unravel_index(found.map.argmax(), found.map.shape)
    assert 18 <= i < 34
    assert 26 <= j < 42


def test_good_pictures_rank_evenly(calibrated: ncml.Model) -> None:
    calibration = read(calibrated)
    p = np.array([scan(calibrated.network, picture(seed), calibration).p_value for seed in range(100, 130)], float)
    assert 0.3 < p.mean() < 0.7
    assert (p <= 0.05).mean() < 0.3


def test_tiles_of_another_size_are_resized(model: ncml.Model) -> None:
    made = tiles.calibrate(
        model, [lambda p=p: p for p in GOOD[:8]], [lambda p=p: p for p in GOOD[8:]], side=16, batch_size=5
    )
    found = scan(model.network, picture(60), made)
    assert found.box[2:] == (16, 16)


def test_progress_is_told(calibrated: ncml.Model) -> None:
    told: list[tuple[int, int]] = []
    scan(
        calibrated.network,
        picture(1),
        read(calibrated),
        batch_size=8,
        on_progress=lambda at: told.append((at.done, at.total)),
    )
    assert told == [(8, 20), (16, 20), (20, 20)]


def test_without_any_calibration_that_is_said(model: ncml.Model) -> None:
    with pytest.raises(InputError, match="tiles cannot be scored: this model is not calibrated"):
        model.scan(picture(1))


def test_the_model_s_own_calibration_gives_a_map_but_no_verdict(model: ncml.Model, tmp_path: Path) -> None:
    shutil.copytree(model.folder, tmp_path / "loud")
    calibrate(model, nets.images(30).numpy(), nets.images(30, seed=1).numpy()).save(tmp_path / "loud")
    found = ncml.load(tmp_path / "loud").scan(picture(1))
    assert (found.p_value, found.threshold, found.is_ood) == (None, None, None)
    assert found.score > 0


def test_too_little_is_refused(model: ncml.Model) -> None:
    opened = [lambda p=p: p for p in GOOD]
    with pytest.raises(InputError, match="18 ranking images cannot support"):
        tiles.calibrate(model, opened[:3], opened[3:21])
    with pytest.raises(InputError, match="too few to estimate the statistics"):
        tiles.calibrate(model, [], opened)
    with pytest.raises(InputError, match="5 x 6 pixels is smaller than a tile of 8 x 8"):
        scan(model.network, np.zeros((6, 5, 3), np.uint8), tiles.calibrate(model, opened[:8], opened[8:]))


def test_a_calibration_of_tiles_is_bound_to_its_model(calibrated: ncml.Model, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="another version"):
        TileCalibration.read(calibrated.folder, "0" * 64)
    path = tmp_path / checkpoint.TILES
    stored = json.loads((calibrated.folder / checkpoint.TILES).read_text())
    path.write_text(json.dumps(stored | {"n_fit": 99}))
    with pytest.raises(ModelError, match="changed after it was written"):
        TileCalibration.read(tmp_path, calibrated.version)
    del stored["version"], stored["cut"]
    storage.write(path, stored)
    with pytest.raises(ModelError, match="is damaged"):
        TileCalibration.read(tmp_path, calibrated.version)
