"""Drift: its test, its statistics and its plot."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from ncml.errors import InputError
from ncml.ood import conformal, drift_report

RNG = np.random.default_rng(0)
RANKED_BPD, RANKED = (conformal.rank_scores(RNG.normal(*moments, 1000)) for moments in ((3.5, 0.5), (3, 1)))


def compared(n: int, shift: float, alpha: float = 0.01, seed: int = 1) -> drift_report.Drift:
    rng = np.random.default_rng(seed)
    bpd, score = rng.normal(3.5, 0.5, n), rng.normal(3 + shift, 1, n)
    p = conformal.p_values(score, RANKED)
    return drift_report.compare(bpd, score, p, RANKED_BPD, RANKED, 0.05, alpha)


def test_false_positives_are_no_more_frequent_than_alpha() -> None:
    assert sum(compared(200, 0.0, alpha=0.05, seed=seed).drifted for seed in range(100)) <= 5


def test_repeated_images_are_no_drift() -> None:
    """A fifth of the scored and of the ranking images are one frame."""
    drifted = 0
    for seed in range(50):
        rng = np.random.default_rng(seed)
        scored, ranking = (np.where(rng.random(n) < 0.2, 3.14159265, rng.normal(3, 1, n)) for n in (200, 500))
        ranked = conformal.rank_scores(ranking)
        p = conformal.p_values(scored, ranked)
        drifted += drift_report.compare(scored, scored, p, ranked, ranked, 0.05, 0.01).drifted
    assert drifted <= 2


@pytest.mark.parametrize("shift", [-1.0, 0.7, 2.0])
def test_a_shift_is_detected(shift: float) -> None:
    result = compared(300, shift)
    assert result.drifted
    assert result.score.mean - result.score.calibrated_mean == pytest.approx(shift, abs=0.2)
    assert result.bpd.psi < 0.1 < result.score.psi


@pytest.mark.parametrize("shift", [0.0, 0.15, 0.2, 0.3])
def test_drift_is_decided_by_the_kolmogorov_smirnov_test_of_scores(shift: float) -> None:
    for alpha in (0.001, 0.01, 0.1):
        for seed in range(5):
            result = compared(200, shift, alpha=alpha, seed=seed)
            assert result.drifted == (result.score.ks_p < alpha)


def test_statistics_equal_those_of_scipy() -> None:
    result = compared(250, 0.5)
    rng = np.random.default_rng(1)
    bpd = rng.normal(3.5, 0.5, 250)
    assert result.bpd.ks == pytest.approx(stats.ks_2samp(conformal.round_scores(bpd), RANKED_BPD).statistic)
    wilson = stats.binomtest(round(result.flagged * 250), 250).proportion_ci(0.95, "wilson")
    assert (result.flagged_low, result.flagged_high) == pytest.approx((wilson.low, wilson.high), abs=1e-4)


def test_stability_equals_its_definition() -> None:
    ranked = np.arange(1000.0)
    assert drift_report.stability(ranked, ranked) == pytest.approx(0, abs=1e-12)
    lower_half = drift_report.stability(np.arange(500.0), ranked)
    p, q = 100.5 / 1005, np.repeat([100.5 / 505, 0.5 / 505], 5)
    assert lower_half == pytest.approx(((q - p) * np.log(q / p)).sum(), rel=0.01)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(InputError, match="drift needs at least 20 scored images, not 19"):
        compared(19, 0)
    with pytest.raises(InputError, match="alpha must be more than 0"):
        compared(100, 0, alpha=0)


def test_the_plot_is_an_image(tmp_path: Path) -> None:
    result = compared(100, 1.0)
    rng = np.random.default_rng(0)
    bpd = rng.normal(3, 1, 100)
    drift_report.plot(tmp_path / "d.png", bpd, rng.uniform(size=100), RANKED_BPD, result, "a model")
    pixels = np.asarray(Image.open(tmp_path / "d.png"))
    assert pixels.shape[1] == 1200
    assert pixels.std() > 10
    with pytest.raises(InputError, match="cannot be written"):
        drift_report.plot(tmp_path / "no" / "d.png", bpd, bpd, RANKED_BPD, result, "a model")
