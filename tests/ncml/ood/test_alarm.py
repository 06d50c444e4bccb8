"""The alarm on a stream of verdicts: its bound against scipy, its error rates by simulation."""

import numpy as np
import pytest
from scipy import stats

from ncml.ood import conformal
from ncml.ood.alarm import RESTART, FlaggedRateAlarm, alarm_of

RANKS, RATE = 5_000, 0.05


def true_rates(streams: int, rng: np.random.Generator) -> np.ndarray:
    """Simulate calibrations, and return the share of in-distribution images that each flags."""
    thresholds = [conformal.threshold(np.sort(rng.normal(size=RANKS)), RATE) for _ in range(streams)]
    return stats.norm.sf(thresholds)


def first_alarms(rates_SP: np.ndarray, lengths: list[int], rng: np.random.Generator, ranks: int = RANKS) -> np.ndarray:
    """Return the image at which each of S streams has its first alarm; 0 for none.

    rates_SP: the share of flagged images of each stream, in each of P phases of these lengths.
    """
    alarm = FlaggedRateAlarm(ranks, RATE)
    first_S = np.zeros(len(rates_SP), int)
    for phase, length in enumerate(lengths):
        for _ in range(length):
            evidence = alarm.update(rng.random(len(rates_SP)) < rates_SP[:, phase])
            first_S[(first_S == 0) & (evidence >= alarm.limit)] = alarm.images
    return first_S


@pytest.mark.parametrize(("n", "rate"), [(19, 0.05), (60, 0.05), (5_000, 0.05), (999, 0.01), (100, 0.3)])
@pytest.mark.parametrize("alpha", [0.01, 0.2])
def test_the_rate_that_it_allows_is_the_quantile_of_a_beta_distribution(n: int, rate: float, alpha: float) -> None:
    above = int(rate * (n + 1) + 1e-9) - 1
    allowed = FlaggedRateAlarm(n, rate, alpha=alpha).null_rate
    assert allowed == pytest.approx(stats.beta(above + 1, n - above).isf(alpha / 2))


def test_a_rise_from_5_to_10_percent_is_noticed_within_500_images() -> None:
    rng = np.random.default_rng(0)
    first = first_alarms(np.full((300, 1), 0.1), [3_000], rng)
    assert (first > 0).mean() > 0.99
    assert np.median(first) <= 500


def test_a_rise_after_a_quiet_stream_is_noticed() -> None:
    rng = np.random.default_rng(1)
    first = first_alarms(np.tile([0.05, 0.1], (100, 1)), [5_000, 3_000], rng)
    assert (first > 5_000).mean() > 0.95
    assert np.median(first) - 5_000 <= 1_500


@pytest.mark.parametrize(("ranks", "low", "high"), [(1_000, 0.97, 1.0), (429, 0.6, 0.75), (100, 0.0, 0.0)])
def test_fewer_ranks_notice_a_rise_later_or_never(ranks: int, low: float, high: float) -> None:
    """docs/ood-method.md has these shares of streams, within 6,000 images."""
    first = first_alarms(np.full((300, 1), 0.1), [6_000], np.random.default_rng(0), ranks)
    assert low <= (first > 0).mean() <= high


def test_false_alarms_are_rare_in_a_short_stream() -> None:
    rng = np.random.default_rng(2)
    first = first_alarms(true_rates(500, rng)[:, None], [5_000], rng)
    assert (first > 0).mean() <= 0.01


@pytest.mark.slow
def test_at_most_1_percent_have_a_false_alarm_in_100_000_images() -> None:
    rng = np.random.default_rng(3)
    first = first_alarms(true_rates(1_000, rng)[:, None], [100_000], rng)
    assert (first > 0).mean() <= 0.01


def test_the_weights_of_all_bets_sum_to_1() -> None:
    """Without evidence in either direction, the capital is the weight spent so far."""
    alarm = FlaggedRateAlarm(RANKS, RATE)
    alarm._flagged = alarm._unflagged = 1.0
    for _ in range(20 * RESTART):
        alarm.update(False)
    assert float(alarm.evidence) == pytest.approx(1 - 0.5 * RESTART / (alarm.images + RESTART))


def test_an_alarm_ends_after_its_cause() -> None:
    alarm = FlaggedRateAlarm(RANKS, RATE)
    for _ in range(500):
        alarm.update(True)
    assert alarm.evidence >= alarm.limit
    rng = np.random.default_rng(4)
    for _ in range(1_500):
        alarm.update(rng.random() < 0.05)
    assert alarm.evidence < alarm.limit


def test_few_ranks_make_a_cautious_alarm() -> None:
    """With 19 ranks the true rate may be far above 5%: a stream of 15% is no evidence."""
    alarm = FlaggedRateAlarm(19, RATE)
    assert 0.2 < alarm.null_rate < 0.3
    rng = np.random.default_rng(5)
    for _ in range(2_000):
        alarm.update(rng.random() < 0.15)
        assert alarm.evidence < alarm.limit


@pytest.mark.parametrize("quiet", [0, 300])
def test_the_shortest_run_of_flagged_images_raises_the_alarm(quiet: int) -> None:
    alarm = FlaggedRateAlarm(59, RATE)
    for _ in range(quiet):
        alarm.update(False)
    for images_left in range(alarm.shortest_run, 0, -1):
        assert alarm.evidence < alarm.limit
        assert alarm.shortest_run == images_left
        alarm.update(True)
    assert alarm.evidence >= alarm.limit
    assert alarm.shortest_run == 0


def test_scenes_of_several_images_have_no_alarm() -> None:
    """Bursts of agreeing images would raise it: of 400 simulated streams of bursts of ten, every eleventh did."""
    alarm = alarm_of(59, 1 / 60, RATE)
    assert alarm is not None
    assert alarm.null_rate == FlaggedRateAlarm(59, RATE).null_rate
    assert alarm_of(118, 1 / 60, RATE) is None
