"""Large images: scores of tiles, and p-values of images by their worst tile."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ncml
from ncml import checkpoint
from ncml.calibration import tile_estimation
from ncml.calibration.estimation import calibrate
from ncml.errors import InputError, ModelError
from ncml.images.tiling import Tiling
from ncml.ood import storage
from ncml.ood.columns import Columns
from ncml.ood.measurements import measure
from ncml.ood.tile_calibration import TileCalibration
from ncml.ood.tiles import scan
from tests.ncml import nets


def image_of(seed: int, height: int = 24, width: int = 20) -> np.ndarray:
    return nets.images(1, height, width, seed=seed).numpy()[0]


GOOD = [image_of(seed) for seed in range(28)]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> ncml.Model:
    """A model that detects the defect below; larger random weights, such as those of `model`, need a lucky seed."""
    folder = tmp_path_factory.mktemp("tiles") / "quiet"
    checkpoint.save(folder, nets.network(nets.config(), dtype=torch.float32, seed=3, spread=0.08))
    model = ncml.load(folder)
    made = tile_estimation.calibrate(model, [lambda p=p: p for p in GOOD[:8]], [lambda p=p: p for p in GOOD[8:]])
    made.save(folder)
    return ncml.load(folder)


def read(model: ncml.Model) -> TileCalibration:
    return TileCalibration.read(model.folder, model.version, model.config)


def test_a_scan_has_the_scores_of_its_tiles(calibrated: ncml.Model) -> None:
    calibration, image = read(calibrated), image_of(50)
    result = scan(calibrated.network, image, calibration)
    corners = calibration.tile.corners(*image.shape[:2])
    tiles_BHWC = np.stack([image[top : top + 8, left : left + 8] for top, left in corners])
    names = calibrated.statistics["multiscale"].needs
    score = calibration.gaussians["worst_tile"].distance(measure(calibrated.network, tiles_BHWC, names)[0])
    worst = int(score.argmax())
    assert result.tiles == len(corners) == 20
    assert result.score == pytest.approx(score[worst], rel=1e-4)
    assert result.box == (corners[worst][1], corners[worst][0], 8, 8)
    assert result.grid.ravel() == pytest.approx(score, rel=1e-4)
    assert result.grid.shape == (5, 4)
    assert result.map.shape == image.shape[:2]
    assert score.min() * 0.999 <= result.map.min() <= result.map.max() <= score.max() * 1.001
    assert result.map[0, 0] == pytest.approx(score[0], rel=1e-4)  # a corner has one tile


def test_a_defect_is_located(calibrated: ncml.Model) -> None:
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


def test_good_images_have_uniform_ranks(calibrated: ncml.Model) -> None:
    calibration = read(calibrated)
    p = np.array([scan(calibrated.network, image_of(seed), calibration).p_value for seed in range(100, 130)], float)
    assert 0.3 < p.mean() < 0.7
    assert (p <= 0.05).mean() < 0.3


def test_tiles_of_another_size_are_resized(model: ncml.Model) -> None:
    made = tile_estimation.calibrate(
        model, [lambda p=p: p for p in GOOD[:8]], [lambda p=p: p for p in GOOD[8:]], tiling=Tiling(16, 16), batch_size=5
    )
    result = scan(model.network, image_of(60), made)
    assert result.box[2:] == (16, 16)


def striped(seed: int, height: int = 24, width: int = 24) -> np.ndarray:
    """Return a smooth good image: a slow wave of grey with slight noise."""
    rng = np.random.default_rng(seed)
    wave = 120 + 25 * np.sin(np.arange(width) / 5 + rng.uniform(0, 6))[None, :, None]
    return (wave + rng.normal(0, 4, (height, width, 3))).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def three_views(calibrated: ncml.Model) -> TileCalibration:
    good = [striped(seed) for seed in range(80)]
    return tile_estimation.calibrate(calibrated, [lambda p=p: p for p in good[:21]], [lambda p=p: p for p in good[21:]])


def test_each_view_finds_its_defect(calibrated: ncml.Model, three_views: TileCalibration) -> None:
    assert three_views.views == ("worst_tile", "mean", "peak")
    spot = striped(200)
    spot[10:13, 14:17] = 255 * np.random.default_rng(0).integers(0, 2, (3, 3, 3))
    small = scan(calibrated.network, spot, three_views)
    assert small.is_ood
    assert small.views["peak"].score > small.views["peak"].threshold
    faded = (120 + (striped(201) - 120.0) * 0.4).clip(0, 255).astype(np.uint8)
    whole = scan(calibrated.network, faded, three_views)
    assert whole.is_ood
    assert whole.views["mean"].score > whole.views["mean"].threshold
    assert (whole.view, whole.box) == ("mean", (0, 0, 24, 24))
    assert whole.grid.mean() == pytest.approx(whole.score, rel=1e-5)  # the tiles' shares


def test_the_box_of_a_peak_is_its_window(calibrated: ncml.Model, three_views: TileCalibration) -> None:
    image = striped(202)
    image[4:9, 15:20] = 255 * np.random.default_rng(1).integers(0, 2, (5, 5, 3))
    peaks = replace(three_views, ranked={"peak": three_views.ranked["peak"]}, gaussians={})
    result = scan(calibrated.network, image, peaks)
    assert result.view == "peak"
    left, top, width, height = result.box
    assert (width, height) == (5, 5)
    assert 15 - width < left < 15 + 5  # it overlaps the defect
    assert 4 - height < top < 4 + 5
    assert result.score == pytest.approx(result.grid.max(), rel=1e-5)


def test_the_ranks_of_good_images_have_one_p_value(calibrated: ncml.Model, three_views: TileCalibration) -> None:
    results = [scan(calibrated.network, striped(seed), three_views) for seed in range(300, 340)]
    for result in results:
        smallest = min(verdict.p_value for verdict in result.views.values())
        assert smallest <= result.p_value <= min(1, 3 * smallest) + 1e-9
        assert result.is_ood == (result.p_value <= 0.05)
        assert result.is_ood == any(verdict.score > verdict.threshold for verdict in result.views.values())
        assert (result.score, result.threshold) == (
            result.views[result.view].score,
            result.views[result.view].threshold,
        )
        assert result.is_weak
        assert result.calibration_version == three_views.version
    assert sum(bool(result.is_ood) for result in results) <= 7  # 2 expected


def test_fewer_ranks_support_fewer_views(calibrated: ncml.Model) -> None:
    good = [lambda seed=seed: striped(seed, 16, 16) for seed in range(43)]
    for count, views in ((38, ("worst_tile",)), (39, ("worst_tile", "mean"))):
        made = tile_estimation.calibrate(calibrated, good[-4:], good[:count])
        assert made.views == views
        assert made.smallest_p <= 0.05


def test_a_calibration_of_a_former_format_is_refused_with_the_remedy(calibrated: ncml.Model, tmp_path: Path) -> None:
    content = json.loads((calibrated.folder / checkpoint.TILES).read_text()) | {"format": 2}
    storage.write(tmp_path / checkpoint.TILES, content)
    with pytest.raises(ModelError, match=r"has format 2, not 3: calibrate the model again\.$"):
        TileCalibration.read(tmp_path, calibrated.version, calibrated.config)


def test_tiles_that_overlap_less_are_fewer(calibrated: ncml.Model, tmp_path: Path) -> None:
    """The calibration decides: scans use its tiles, also after it was read."""
    good = [lambda p=p: p for p in GOOD]
    tile_estimation.calibrate(calibrated, good[:8], good[8:], tiling=Tiling(8, 8, overlap=0)).save(tmp_path)
    read_again = TileCalibration.read(tmp_path, calibrated.version, calibrated.config)
    assert read_again.tile == Tiling(8, 8, overlap=0)
    assert scan(calibrated.network, GOOD[8], read_again).grid.shape == (3, 3)
    assert scan(calibrated.network, GOOD[8], read(calibrated)).grid.shape == (5, 4)


def test_estimation_takes_tiles_from_the_whole_image(calibrated: ncml.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fifth of 5 x 5 tiles would be of one column."""
    monkeypatch.setattr(tile_estimation, "MAX_FIT_TILES", 8 * 5)
    columns: list[int] = []
    original = tile_estimation.measure_tiles

    def measure_tiles(network, image_HWC, tile, corners, *args):
        if len(corners) == 5:
            columns.extend(left for _, left in corners)
        return original(network, image_HWC, tile, corners, *args)

    monkeypatch.setattr(tile_estimation, "measure_tiles", measure_tiles)
    square = [lambda p=p: np.concatenate([p, p[:, :4]], 1) for p in GOOD]
    tile_estimation.calibrate(calibrated, square[:8], square[8:])
    assert set(columns) == {0, 4, 8, 12, 16}


def test_a_calibration_of_three_views_is_read_as_it_was_saved(
    calibrated: ncml.Model, three_views: TileCalibration, tmp_path: Path
) -> None:
    three_views.save(tmp_path)
    again = TileCalibration.read(tmp_path, calibrated.version, calibrated.config)
    assert again.version == three_views.version
    assert again.thresholds == three_views.thresholds
    image = striped(400)
    assert scan(calibrated.network, image, again).p_value == scan(calibrated.network, image, three_views).p_value


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
    with pytest.raises(InputError, match=r"tiles cannot be scored: .* run ncml calibrate --tile"):
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
        tile_estimation.calibrate(model, opened[:3], opened[3:21])
    for few, words in ((opened[:0], "0 tiles of 0 images"), ([lambda: GOOD[0][:12, :12]] * 2, "8 tiles of 2 images")):
        with pytest.raises(InputError, match=f"{words} are too few to estimate the statistics: use more images"):
            tile_estimation.calibrate(model, few, opened)
    with pytest.raises(InputError, match="5 x 6 pixels is smaller than a tile of 8 x 8"):
        scan(model.network, np.zeros((6, 5, 3), np.uint8), tile_estimation.calibrate(model, opened[:8], opened[8:]))


def test_measurements_that_are_not_finite_are_refused(model: ncml.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not saved: the file could not be read again."""
    measured = tile_estimation.concatenate

    def concatenate(parts: list[Columns]) -> Columns:
        return {name: np.append(values[1:], np.inf) for name, values in measured(parts).items()}

    monkeypatch.setattr(tile_estimation, "concatenate", concatenate)
    opened = [lambda p=p: p for p in GOOD]
    with pytest.raises(ModelError, match="bits_0 of an image is not finite; train the model again"):
        tile_estimation.calibrate(model, opened[:8], opened[8:])


def test_a_calibration_of_tiles_is_bound_to_its_model(calibrated: ncml.Model, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="another version"):
        TileCalibration.read(calibrated.folder, "0" * 64, calibrated.config)
    path = tmp_path / checkpoint.TILES
    stored = json.loads((calibrated.folder / checkpoint.TILES).read_text())
    path.write_text(json.dumps(stored | {"n_fit": 99}))
    with pytest.raises(ModelError, match="changed after it was written"):
        TileCalibration.read(tmp_path, calibrated.version, calibrated.config)
    del stored["version"]
    for damage in ({"cut": None}, {"overlap": 0.9}, {"false_positive_rate": 1.0}):
        storage.write(path, stored | damage)
        with pytest.raises(ModelError, match="is damaged"):
            TileCalibration.read(tmp_path, calibrated.version, calibrated.config)
