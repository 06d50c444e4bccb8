"""Statistics by their equations, calibration that is bound to what it was made for, and verdicts that keep a rate."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL.Image import Resampling
from scipy import stats

import ncml
from ncml import changes, checkpoint, ood
from ncml.config import maximum_likelihood
from ncml.errors import InputError, ModelError
from ncml.likelihood import from_uint8, log_prob
from ncml.noise import process
from tests.ncml import nets

D = 8 * 8 * 3
FIT, RANK, NEW = (nets.pictures(n, seed=seed).numpy() for n, seed in ((30, 1), (60, 2), (6, 3)))
ODD = 255 * np.random.default_rng(0).integers(0, 2, (4, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def calibration(model: ncml.Model) -> ood.Calibration:
    return ood.calibrate(model, FIT, RANK)


@pytest.fixture
def calibrated(model: ncml.Model, calibration: ood.Calibration, tmp_path: Path) -> ncml.Model:
    folder = tmp_path / "loud"
    shutil.copytree(model.folder, folder)
    calibration.save(folder)
    return ncml.load(folder)


def by_hand(model: ncml.Model, level: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats [B] and the whole score [B, 3, H, W] of NEW at a noise level, in the plainest way."""
    t = process(model.config.noise).time_of(level)
    t_B = torch.full((len(NEW),), t)
    x = from_uint8(torch.from_numpy(NEW)) * process(model.config.noise).alpha(t_B)[:, None, None, None]
    x.requires_grad_()
    density = log_prob(x, model.network(x, t_B), torch.zeros(len(NEW), dtype=torch.bool)).sum()
    (s,) = torch.autograd.grad(density, x)
    with torch.no_grad():
        nats = log_prob(x, model.network(x, t_B), t_B == 0).sum((1, 2))
    return nats, s


def test_statistics_are_their_equations(calibrated: ncml.Model, calibration: ood.Calibration) -> None:
    scores = calibrated.score(NEW, statistics="all")
    found = {name: np.array([s.statistics[name] for s in scores]) for name in scores[0].statistics}
    levels = ood.levels(calibrated.config)
    assert levels == (0.0, 2.5, 10.0)
    assert list(found) == [
        "bpd", "typicality", "complexity", "llr", "score_norm_0", "score_norm_2.5", "score_norm_10", "ncml_grad",
        "multiscale",
    ]  # fmt: skip
    nats, norms = {}, {}
    for level in levels:
        nats_B, s_BCHW = by_hand(calibrated, level)
        nats[level], norms[level] = nats_B.numpy(), s_BCHW.flatten(1).norm(dim=1).numpy()
    bits = {level: -value / math.log(2) / D for level, value in nats.items()}
    assert found["bpd"] == pytest.approx(bits[0.0], rel=1e-5)
    mean = np.mean([s.bpd for s in calibrated.score(FIT)])
    assert found["typicality"] == pytest.approx(abs(bits[0.0] - mean), rel=1e-4, abs=1e-5)
    assert found["complexity"] == pytest.approx(bits[0.0] - [ood.png_bits(p) for p in NEW], rel=1e-5, abs=1e-5)
    assert found["llr"] == pytest.approx(bits[0.0] - bits[10.0], rel=1e-4, abs=1e-5)
    for level in levels:
        assert found[f"score_norm_{level:g}"] == pytest.approx(np.log(norms[level]), rel=1e-4)
    assert found["ncml_grad"] == pytest.approx(-(nats[0.0] + np.log(norms[0.0])), rel=1e-5)
    assert (found["multiscale"] > 0).all()


def test_the_direct_score_is_the_score_through_the_target_alone(model: ncml.Model) -> None:
    """By finite differences: move one value, keep the parameters that the others were given."""
    seen = ood.look(model.network, NEW[:1], 0.0, ["direct"])
    x = from_uint8(torch.from_numpy(NEW[:1]))
    zero = torch.zeros(1, dtype=torch.bool)
    with torch.no_grad():
        parameters = model.network(x, torch.zeros(1)).double()
    total, step = 0.0, 1e-6
    for channel in range(3):
        moved = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
        moved[:, channel] = step
        up, down = (log_prob(x.double() + sign * moved, parameters, zero) for sign in (1, -1))
        total += float((((up - down) / (2 * step)) ** 2).sum())
    assert float(seen.measured["direct"][0]) == pytest.approx(math.log(math.sqrt(total)), rel=1e-4)


def test_spreads_are_those_of_the_map(model: ncml.Model) -> None:
    seen = ood.look(model.network, NEW, 0.0, ["fine", "coarse"])
    nats = seen.log_prob_BHW.double().numpy()
    assert np.exp(seen.measured["fine"].numpy()) - 1e-3 == pytest.approx(nats.std((1, 2)), rel=1e-6)
    blocks = nats.reshape(-1, 2, 4, 2, 4).mean((2, 4))
    assert np.exp(seen.measured["coarse"].numpy()) - 1e-3 == pytest.approx(blocks.std((1, 2)), rel=1e-5)


def test_the_gaussian_s_distances_are_chi() -> None:
    """Distances of data that is Gaussian with known mean and covariance: chi of as many degrees as columns."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(5, 5))

    def drawn(n: int) -> dict[str, np.ndarray]:
        return dict(zip("abcde", (rng.normal(size=(n, 5)) @ mix + 3).T, strict=True))

    gaussian = ood.Gaussian.fitted(drawn(20_000))
    distance = gaussian.distance(drawn(5_000))
    assert stats.kstest(distance, stats.chi(5).cdf).pvalue > 0.001
    at_mean = gaussian.distance({name: np.array([mean]) for name, mean in zip("abcde", gaussian.mean, strict=True)})
    assert at_mean.tolist() == [0]


def test_columns_that_never_vary_do_no_harm() -> None:
    gaussian = ood.Gaussian.fitted({"a": np.arange(30.0), "b": np.full(30, 2.0)})
    assert np.isfinite(gaussian.distance({"a": np.array([3.0]), "b": np.array([2.0])})).all()


def test_a_score_does_not_depend_on_its_batch(calibrated: ncml.Model) -> None:
    together = calibrated.score(NEW, statistics="all")
    alone = calibrated.score(NEW, statistics="all", batch_size=1)
    for a, b in zip(together, alone, strict=True):
        assert a.statistics == pytest.approx(b.statistics, rel=1e-4, abs=1e-5)
        assert a.ood is not None
        assert b.ood is not None
        assert a.ood.p_value == b.ood.p_value


def test_verdicts_are_ranks_among_the_ranking_images(calibrated: ncml.Model, calibration: ood.Calibration) -> None:
    own = np.sort([s.statistics["multiscale"] for s in calibrated.score(RANK, statistics=["multiscale"])])
    assert calibration.ranked["multiscale"] == pytest.approx(own, rel=1e-3)
    for score in calibrated.score(np.concatenate([NEW, ODD])):
        verdict = score.ood
        assert verdict is not None
        assert verdict.statistic == "multiscale"
        assert verdict.p_value == (1 + (calibration.ranked["multiscale"] >= verdict.score).sum()) / 61
        assert verdict.is_ood == (verdict.p_value <= 0.05) == (verdict.score > verdict.threshold)
        assert score.statistics == {}
    assert all(s.ood is not None and s.ood.is_ood and s.ood.p_value == 1 / 61 for s in calibrated.score(ODD))
    assert calibration.smallest_p == 1 / 61


def test_the_false_positive_rate_is_kept(calibrated: ncml.Model) -> None:
    fresh = nets.pictures(200, seed=9).numpy()
    flagged = [s.ood.is_ood for s in calibrated.score(fresh) if s.ood is not None]
    assert len(flagged) == 200
    assert 0.005 < np.mean(flagged) < 0.15  # 60 ranking images: the rate itself is random


def test_a_verdict_has_its_own_conditions(calibrated: ncml.Model) -> None:
    plain, other = calibrated.score(NEW), calibrated.score(NEW, classes="a", noise=3.0)
    assert [s.ood for s in plain] == [s.ood for s in other]
    assert all(a.bpd != b.bpd for a, b in zip(plain, other, strict=True))
    assert [s.bpd for s in other] == [s.bpd for s in calibrated.score(NEW, classes="a", noise=3.0, ood=False)]


def test_another_statistic_may_judge(calibrated: ncml.Model, calibration: ood.Calibration) -> None:
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


def test_progress_is_told(model: ncml.Model) -> None:
    told: list[tuple[int, int]] = []
    model.score(NEW, batch_size=4, callback=lambda done, total: told.append((done, total)))
    assert told == [(4, 6), (6, 6)]


def test_without_a_calibration_that_is_said(model: ncml.Model) -> None:
    assert model.calibration is None
    (score,) = model.score(NEW[0], statistics="all")
    assert score.ood is None
    assert "llr" in score.statistics
    assert score.statistics.keys().isdisjoint({"typicality", "multiscale"})
    for asked in ({"statistic": "bpd"}, {"statistics": ["multiscale"]}):
        with pytest.raises(InputError, match="not calibrated: run ncml calibrate"):
            model.score(NEW, **asked)


def test_an_unknown_statistic_is_named(calibrated: ncml.Model) -> None:
    for asked in ({"statistic": "odd"}, {"statistics": ["odd"]}):
        with pytest.raises(InputError, match="no statistic 'odd': choose from bpd, typicality"):
            calibrated.score(NEW, **asked)


def test_maximum_likelihood_is_judged_at_t_0_alone(tmp_path: Path) -> None:
    network = nets.network(maximum_likelihood(nets.config()), dtype=torch.float32)
    checkpoint.save(tmp_path / "mle", network)
    model = ncml.load(tmp_path / "mle")
    assert "llr" not in model.statistics
    assert model.statistics["multiscale"].needs == ("bits_0", "direct_0", "fine_0", "coarse_0")
    found = ood.calibrate(model, FIT, RANK)
    assert found.thresholds.keys() == model.statistics.keys()


def test_a_calibration_is_read_as_it_was_written(calibrated: ncml.Model, calibration: ood.Calibration) -> None:
    read = calibrated.calibration
    assert read is not None
    assert read.version == calibration.version
    assert len(read.version) == 64
    assert read.thresholds == calibration.thresholds
    assert (read.n_fit, read.n_rank, read.statistic, read.false_positive_rate) == (30, 60, "multiscale", 0.05)
    assert read.preprocessing == "centre-crop-bicubic v1"
    for name in ("bpd", "multiscale"):
        histogram = read.histograms[name]
        assert sum(histogram.counts) == 60
        assert len(histogram.edges) == len(histogram.counts) + 1


def test_progress_of_a_calibration_is_told(model: ncml.Model) -> None:
    told: list[tuple[str, int, int]] = []
    ood.calibrate(model, FIT, RANK, batch_size=40, bar=lambda stage, done, total, _: told.append((stage, done, total)))
    assert told == [("fit", 30, 30), ("rank", 40, 60), ("rank", 60, 60)]


def test_too_few_images_are_refused(model: ncml.Model) -> None:
    with pytest.raises(InputError, match="18 ranking images cannot support a false-positive rate of"):
        ood.calibrate(model, FIT, RANK[:18])
    assert ood.calibrate(model, FIT, RANK[:19]).smallest_p == 0.05
    with pytest.raises(InputError, match="19 images cannot fit the statistics: give at least 20"):
        ood.calibrate(model, FIT[:19], RANK)
    with pytest.raises(InputError, match="0 images cannot fit"):
        ood.calibrate(model, FIT[:0], RANK)


def edited(folder: Path, **changed: object) -> None:
    path = folder / checkpoint.CALIBRATION
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_version": "0" * 64}, "another version of this model"),
        ({"preprocessing": "stretch v9"}, "under the preprocessing 'stretch v9'"),
        ({"format": 9}, "format 9"),
        ({"false_positive_rate": 0.5}, "changed after it was written"),
        ({"ranked": {}}, "changed after it was written"),
    ],
)
def test_a_calibration_for_something_else_is_not_used(calibrated: ncml.Model, changed: dict, said: str) -> None:
    edited(calibrated.folder, **changed)
    model = ncml.load(calibrated.folder)
    assert model.calibration is None
    assert said in model.uncalibrated
    assert "calibrate the model again" in model.uncalibrated
    assert model.score(NEW)[0].ood is None
    with pytest.raises(ModelError, match=said):
        ood.Calibration.read(calibrated.folder, calibrated.version, calibrated.config)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"version": 3}'])
def test_a_damaged_calibration_is_said(calibrated: ncml.Model, content: str) -> None:
    (calibrated.folder / checkpoint.CALIBRATION).write_text(content)
    model = ncml.load(calibrated.folder)
    assert model.calibration is None
    assert str(calibrated.folder) in model.uncalibrated


def test_a_well_signed_calibration_that_lacks_something_is_damaged(calibrated: ncml.Model) -> None:
    path = calibrated.folder / checkpoint.CALIBRATION
    stored = json.loads(path.read_text())
    del stored["version"], stored["ranked"]["llr"]
    ood.write_bound(path, stored)
    assert "is damaged" in ncml.load(calibrated.folder).uncalibrated


def test_new_weights_leave_no_old_calibration(calibrated: ncml.Model) -> None:
    checkpoint.save(calibrated.folder, nets.network(nets.config(), dtype=torch.float32, seed=1))
    assert not (calibrated.folder / checkpoint.CALIBRATION).exists()
    assert ncml.load(calibrated.folder).uncalibrated == "this model is not calibrated: run ncml calibrate."


def test_what_is_tolerated_is_less_surprising(model: ncml.Model) -> None:
    """Strong noise is what resizing removes: resized images belong more where calibration has seen such."""
    rng = np.random.default_rng(5)
    noisy = [changes.noise(40)(p, rng) for p in nets.pictures(180, seed=11).numpy()]
    fit, rank, new = np.stack(noisy[:60]), np.stack(noisy[60:120]), noisy[120:]
    smooth = np.stack([changes.resample(0.6, Resampling.BOX, Resampling.BICUBIC)(p, rng) for p in new])
    columns = ood.measure(model.network, smooth, model.statistics["multiscale"].needs)[0]
    p = {}
    for tolerate in ((), ("resize",)):
        made = ood.calibrate(model, fit, rank, tolerate=tolerate)
        assert made.tolerate == tolerate
        p[tolerate] = made.p_values("multiscale", model.statistics["multiscale"].of(columns, made.fit)).mean()
    assert p[("resize",)] > 1.5 * p[()]
