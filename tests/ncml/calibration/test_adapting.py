"""`ncml.adapt`, the Python form of `ncml adapt`; tests/flow/commands/test_adapt.py has the command's options."""

import logging
from pathlib import Path

import pytest

import ncml
from ncml.calibration.adapting import AdaptedDetector
from ncml.errors import InputError
from ncml.progress import Progress
from tests.detectors import good_image, save_parts, use_small_scale, without_disc


@pytest.fixture(autouse=True)
def _small_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_scale(monkeypatch)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    folder = tmp_path / "good"
    folder.mkdir()
    save_parts(folder, 40)
    return folder


def test_a_detector_is_made_reported_and_loaded(
    model: ncml.Model, good: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (good / "damaged.png").write_bytes(b"no image")
    out, calibrated, stages = tmp_path / "detector", list[AdaptedDetector](), set[str]()

    def note(progress: Progress) -> None:
        stages.add(progress.stage)

    with caplog.at_level(logging.WARNING):
        adapted = ncml.adapt(
            good, out=out, model=str(model.folder), power=False, on_calibrated=calibrated.append, callback=note
        )
    assert any("skipped: damaged.png" in message for message in caplog.messages)
    assert {"features", "likelihood"} <= stages
    assert str(adapted).splitlines() == repr(adapted).splitlines() == adapted.report
    assert adapted.to_dict()["n_rank"] == 19
    assert adapted.report[0] == f"{out}: 21 images for estimation, 19 images for ranking"
    assert calibrated[0].report == adapted.report  # with power=False, nothing follows the calibration
    assert adapted.report[1] in (out / "card.md").read_text()
    usual, missing = ncml.load(out).score([good_image(1000), without_disc(1001)])
    assert usual.ood is not None
    assert missing.ood is not None
    assert (usual.ood.is_ood, missing.ood.is_ood) == (False, True)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"reviewed": "nowhere"}, "reviewed"),
        ({"false_positive_rate": 2.0}, "false_positive_rate"),
        ({"update": "cifar10", "confidence": 0.95}, "update"),
        ({"region": "1,2"}, "region"),
        ({"region": (0, 0, 32, 32)}, "region"),
        ({"region": Path("nowhere.png")}, "region"),
        ({"reviewed": ["a.png"]}, "reviewed"),
        ({"out": None}, "out"),
        ({"false_positive_rate": "0.05"}, "false_positive_rate"),
        ({"confidence": "0.95"}, "confidence"),
        ({"group": None}, "group"),
        ({"leave_out": True}, "leave_out"),
        ({"tolerate_brightness": "10"}, "tolerate_brightness"),
        ({"tolerate_brightness": 60}, "tolerate_brightness"),
    ],
)
def test_wrong_options_are_refused_by_name_before_the_model_is_loaded(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], field: str
) -> None:
    monkeypatch.setattr("ncml.model.load", lambda *_: pytest.fail("it loads the model"))
    with pytest.raises(InputError) as raised:
        ncml.adapt(good, **{"out": tmp_path / "detector", **options})  # pyright: ignore[reportArgumentType]
    assert raised.value.field == field


@pytest.mark.parametrize(
    ("data", "message"),
    [(None, "a folder of good images is missing"), (["a.png"], "data must be a folder of good images, not")],
)
def test_good_images_that_are_no_folder_are_refused(tmp_path: Path, data: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        ncml.adapt(data, out=tmp_path / "detector")  # pyright: ignore[reportArgumentType]
    assert raised.value.field == "data"


def test_an_update_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name a folder of flagged images that are good, or --defective ones"):
        ncml.adapt(update="part", out=tmp_path / "detector")
