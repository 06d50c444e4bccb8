"""Calibrations are bound to a model and preprocessing, and their verdicts keep the false-positive rate."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL.Image import Resampling

import ncml
from ncml import checkpoint
from ncml.calibration import held_out_power
from ncml.calibration.estimation import calibrate
from ncml.errors import InputError
from ncml.images import perturbations
from ncml.ood import storage
from ncml.ood.calibration import Calibration
from ncml.ood.measurements import measure
from tests.ncml import nets
from tests.ncml.nets import FIT, NEW, RANK

ODD = 255 * np.random.default_rng(0).integers(0, 2, (4, 8, 8, 3), np.uint8)


def test_verdicts_are_ranks_among_the_ranking_images(calibrated: ncml.Model, calibration: Calibration) -> None:
    own = np.sort([s.statistics["multiscale_corr"] for s in calibrated.score(RANK, statistics=["multiscale_corr"])])
    assert calibration.ranked["multiscale_corr"] == pytest.approx(own, rel=1e-3)
    for score in calibrated.score(np.concatenate([NEW, ODD])):
        verdict = score.ood
        assert verdict is not None
        assert (verdict.statistic, verdict.calibration) == ("multiscale_corr", "default")
        assert verdict.p_value == (1 + (calibration.ranked["multiscale_corr"] >= verdict.score).sum()) / 61
        assert verdict.is_ood == (verdict.p_value <= 0.05) == (verdict.score > verdict.threshold)
        assert score.statistics == {}
    assert all(s.ood is not None and s.ood.is_ood and s.ood.p_value == 1 / 61 for s in calibrated.score(ODD))
    assert calibration.smallest_p == 1 / 61


def test_the_false_positive_rate_is_kept(calibrated: ncml.Model) -> None:
    fresh = nets.images(200, seed=9).numpy()
    flagged = [s.ood.is_ood for s in calibrated.score(fresh) if s.ood is not None]
    assert len(flagged) == 200
    assert 0.005 < np.mean(flagged) < 0.15  # 60 ranking images: the rate itself is random


def test_a_verdict_has_its_own_conditions(calibrated: ncml.Model) -> None:
    plain, other = calibrated.score(NEW), calibrated.score(NEW, classes="a", noise=3.0)
    assert [s.ood for s in plain] == [s.ood for s in other]
    assert all(a.bpd != b.bpd for a, b in zip(plain, other, strict=True))
    assert [s.bpd for s in other] == [s.bpd for s in calibrated.score(NEW, classes="a", noise=3.0, ood=False)]


def test_another_statistic_can_give_the_verdict(calibrated: ncml.Model, calibration: Calibration) -> None:
    (score,) = calibrated.score(NEW[0], statistic="llr", statistics=["bpd"])
    assert score.ood is not None
    assert (score.ood.statistic, score.ood.threshold) == ("llr", calibration.thresholds["llr"])
    assert score.statistics == {"bpd": pytest.approx(score.bpd)}
    assert calibrated.score(NEW[0], ood=False)[0].ood is None


def test_flipped_bits_are_scored(model: ncml.Model) -> None:
    flipped = model.score(NEW ^ np.uint8(1))
    for score, other in zip(model.score(NEW, sanity=True, classes="a"), flipped, strict=True):
        assert score.flipped_bpd == pytest.approx(other.bpd, rel=1e-6)
    assert model.score(NEW)[0].flipped_bpd is None


def test_progress_is_reported(model: ncml.Model) -> None:
    reports: list[tuple[int, int]] = []
    model.score(NEW, batch_size=4, callback=lambda at: reports.append((at.done, at.total)))
    assert reports == [(4, 6), (6, 6)]


def test_without_a_calibration_there_is_no_verdict(model: ncml.Model) -> None:
    assert model.calibration is None
    (score,) = model.score(NEW[0], statistics="all")
    assert score.ood is None
    assert "llr" in score.statistics
    assert score.statistics.keys().isdisjoint({"typicality", "multiscale"})
    for arguments in ({"statistic": "bpd"}, {"statistics": ["multiscale"]}):
        with pytest.raises(InputError, match="not calibrated: run ncml calibrate"):
            model.score(NEW, **arguments)


def test_a_calibration_is_read_as_it_was_written(calibrated: ncml.Model, calibration: Calibration) -> None:
    read = calibrated.calibration
    assert read is not None
    assert read.version == calibration.version
    assert len(read.version) == 64
    assert read.thresholds == calibration.thresholds
    assert (read.n_fit, read.n_rank, read.statistic, read.false_positive_rate) == (30, 60, "multiscale_corr", 0.05)
    assert read.preprocessing == "centre-crop-bicubic v1"
    for name in ("bpd", "multiscale"):
        histogram = read.histograms[name]
        assert sum(histogram.counts) == 60
        assert len(histogram.edges) == len(histogram.counts) + 1


def test_progress_of_a_calibration_is_reported(model: ncml.Model) -> None:
    reports: list[tuple[str, int, int]] = []
    calibrate(
        model,
        FIT,
        RANK,
        power_images=2,
        batch_size=40,
        on_progress=lambda at: reports.append((at.stage, at.done, at.total)),
    )
    assert reports[:3] == [("fit", 30, 30), ("rank", 40, 60), ("rank", 60, 60)]
    total = 2 * 11 + 2 * held_out_power.GENERATED  # after each of eleven changes; one colour and random values
    assert reports[3] == ("power", 2, total)
    assert reports[-1] == ("power", total, total)


def test_too_few_images_are_refused(model: ncml.Model) -> None:
    with pytest.raises(InputError, match="18 ranking images cannot support a false-positive rate of"):
        calibrate(model, FIT, RANK[:18])
    assert calibrate(model, FIT, RANK[:19], power_images=0).smallest_p == 0.05
    with pytest.raises(InputError, match="19 images are too few to estimate the statistics: use at least 20"):
        calibrate(model, FIT[:19], RANK)
    with pytest.raises(InputError, match="0 images are too few"):
        calibrate(model, FIT[:0], RANK)


def edited(folder: Path, **changed: object) -> None:
    path = folder / checkpoint.CALIBRATION
    stored = json.loads(path.read_text())
    stored["calibrations"]["default"] |= changed
    path.write_text(json.dumps(stored))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_version": "0" * 64}, "another version of this model"),
        ({"preprocessing": "stretch v9"}, "under the preprocessing 'stretch v9'"),
        ({"format": 9}, "format 9"),
        ({"false_positive_rate": 0.5}, "changed after it was written"),
        ({"ranked": {}}, "changed after it was written"),
    ],
)
def test_a_calibration_of_another_model_is_not_used(calibrated: ncml.Model, changed: dict, message: str) -> None:
    edited(calibrated.folder, **changed)
    model = ncml.load(calibrated.folder)
    assert model.calibration is None
    assert message in model.missing_reason
    assert "calibrate the model again" in model.missing_reason
    assert model.score(NEW)[0].ood is None
    with pytest.raises(InputError, match=message):
        model.score(NEW, calibration="default")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"version": 3}',
        '{"format": 1, "ranked": {}}',
        '{"format": 2}',
        '{"format": 2, "calibrations": [3]}',
        '{"format": 2, "calibrations": {"default": 3}}',
    ],
)
def test_a_damaged_calibration_is_reported(calibrated: ncml.Model, content: str) -> None:
    (calibrated.folder / checkpoint.CALIBRATION).write_text(content)
    model = ncml.load(calibrated.folder)
    assert model.calibration is None
    assert str(calibrated.folder) in model.missing_reason


@pytest.mark.parametrize(("part", "name"), [("ranked", "multiscale_corr"), ("gaussians", "multiscale_corr")])
def test_a_calibration_with_a_valid_digest_but_missing_members_is_damaged(
    calibrated: ncml.Model, part: str, name: str
) -> None:
    path = calibrated.folder / checkpoint.CALIBRATION
    stored = json.loads(path.read_text())
    entry = stored["calibrations"]["default"]
    del entry["version"], entry["power"], (entry | entry["fit"])[part][name]
    entry["version"] = storage.digest(entry)
    path.write_text(json.dumps(stored))
    assert "is damaged" in ncml.load(calibrated.folder).missing_reason


def test_new_weights_leave_no_old_calibration(calibrated: ncml.Model) -> None:
    checkpoint.save(calibrated.folder, nets.network(nets.config(), dtype=torch.float32, seed=1))
    assert not (calibrated.folder / checkpoint.CALIBRATION).exists()
    assert ncml.load(calibrated.folder).missing_reason == "this model is not calibrated: run ncml calibrate."


def test_tolerated_processing_has_lower_scores(model: ncml.Model) -> None:
    """Resizing removes strong noise: resized images score lower if the calibration tolerates resizing."""
    rng = np.random.default_rng(5)
    noisy = [perturbations.noise(40)(p, rng) for p in nets.images(180, seed=11).numpy()]
    fit, rank, new = np.stack(noisy[:60]), np.stack(noisy[60:120]), noisy[120:]
    smooth = np.stack([perturbations.resample(0.6, Resampling.BOX, Resampling.BICUBIC)(p, rng) for p in new])
    columns = measure(model.network, smooth, model.statistics["multiscale"].needs)[0]
    p = {}
    for tolerate in ((), ("resize",)):
        made = calibrate(model, fit, rank, tolerate=tolerate, power_images=0)
        assert made.tolerate == tolerate
        in_other_batches = calibrate(model, fit, rank, tolerate=tolerate, power_images=0, batch_size=7)
        assert in_other_batches.estimates.typical_bpd == pytest.approx(made.estimates.typical_bpd, rel=1e-5)
        p[tolerate] = made.p_values(
            "multiscale", model.statistics["multiscale"].compute(columns, made.estimates)
        ).mean()
    assert p[("resize",)] > 1.5 * p[()]


def test_calibrations_are_selected_by_name(calibrated: ncml.Model, calibration: Calibration) -> None:
    other = calibrate(calibrated, FIT, RANK[:40], name="other", power_images=0)
    other.save(calibrated.folder)
    model = ncml.load(calibrated.folder)
    assert list(model.calibrations.by_name) == ["default", "other"]
    assert model.calibration is not None
    assert model.calibration.version == calibration.version
    plain, named, selected = (model.score(NEW, calibration=name) for name in (None, "default", "other"))
    assert plain == named
    for score, verdict in zip(selected, other.verdicts(other.statistic, _scores(model, "other")), strict=True):
        assert score.ood == verdict
        assert verdict.calibration == "other"
    with pytest.raises(InputError, match="no calibration 'tolerant': choose from default, other"):
        model.score(NEW, calibration="tolerant")


def _scores(model: ncml.Model, name: str) -> np.ndarray:
    statistic = "multiscale_corr"
    scores = model.score(NEW, calibration=name, statistics=[statistic])
    return np.array([score.statistics[statistic] for score in scores])


def test_a_calibration_of_another_model_leaves_the_file(calibrated: ncml.Model, calibration: Calibration) -> None:
    replace(calibration, name="stale", model_version="0" * 64).save(calibrated.folder)
    assert ncml.load(calibrated.folder).calibrations.by_name == {}
    calibration.save(calibrated.folder)
    stored = json.loads((calibrated.folder / checkpoint.CALIBRATION).read_text())
    assert stored["calibrations"].keys() == {"default"}


def test_without_a_default_calibration_another_must_be_named(calibrated: ncml.Model, calibration: Calibration) -> None:
    (calibrated.folder / checkpoint.CALIBRATION).unlink()
    replace(calibration, name="other").save(calibrated.folder)
    model = ncml.load(calibrated.folder)
    assert model.score(NEW)[0].ood is None
    assert model.missing_reason == "this model has no default calibration: choose from other."
    assert model.score(NEW, calibration="other")[0].ood is not None


def test_calibrations_of_a_newer_version_are_not_replaced(calibrated: ncml.Model, calibration: Calibration) -> None:
    path = calibrated.folder / checkpoint.CALIBRATION
    newer = path.read_text().replace('"format": 2', '"format": 3', 1)
    path.write_text(newer)
    with pytest.raises(ncml.ModelError, match="has format 3, newer than 2: upgrade ncml"):
        replace(calibration, name="other").save(calibrated.folder)
    assert path.read_text() == newer
    path.write_text("{damaged")
    calibration.save(calibrated.folder)
    assert list(ncml.load(calibrated.folder).calibrations.by_name) == ["default"]


@pytest.mark.parametrize("name", ["", "a b", "../up", "-x", "x" * 41])
def test_the_name_of_a_calibration_is_checked(calibrated: ncml.Model, calibration: Calibration, name: str) -> None:
    with pytest.raises(InputError, match="a calibration's name must be 1 to 40"):
        replace(calibration, name=name).save(calibrated.folder)


def test_calibrations_too_large_to_be_read_are_not_written(
    calibrated: ncml.Model, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = calibrated.folder / checkpoint.CALIBRATION
    before = path.read_bytes()
    monkeypatch.setattr(checkpoint, "MAX_CALIBRATION_BYTES", len(before) + 1000)
    with pytest.raises(InputError, match=r"calibrate on fewer images \(--limit\)"):
        replace(calibration, name="second").save(calibrated.folder)
    assert path.read_bytes() == before


def test_statistics_that_a_calibration_lacks_cannot_be_judged(calibrated: ncml.Model, calibration: Calibration) -> None:
    """Those of a later version of ncml are missing from calibrations that were made before."""
    ranked = {name: scores for name, scores in calibration.ranked.items() if name not in ("multiscale_corr", "fast")}
    replace(calibration, statistic="multiscale", ranked=ranked).save(calibrated.folder)
    model = ncml.load(calibrated.folder)
    (score,) = model.score(NEW[0], statistics="all")
    assert score.ood is not None
    assert (score.ood.statistic, score.ood.threshold) == ("multiscale", calibration.thresholds["multiscale"])
    assert score.statistics.keys() == ranked.keys()
    with pytest.raises(InputError, match="the calibration default does not have fast: calibrate the model"):
        model.score(NEW[0], statistic="fast")
    replace(calibration, name="new").save(calibrated.folder)
    assert list(ncml.load(calibrated.folder).calibrations.by_name) == ["default", "new"]
