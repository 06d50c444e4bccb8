"""Ranks, thresholds and discoveries against closed forms, brute force and scipy."""

from decimal import Decimal

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from ncml.errors import InputError
from ncml.ood import conformal

FEW = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=40)  # ties are the rule
RATES = st.sampled_from([0.01, 0.05, 0.1, 0.25, 0.5])


@given(FEW, FEW)
def test_p_values_are_ranks(calibration: list[float], scores: list[float]) -> None:
    result = conformal.p_values(scores, np.sort(calibration))
    expected = [(1 + sum(c >= s for c in calibration)) / (len(calibration) + 1) for s in scores]
    assert result.tolist() == expected


@given(FEW, FEW, RATES)
def test_a_score_is_above_the_threshold_if_p_is_at_most_the_rate(
    cal: list[float], scores: list[float], rate: float
) -> None:
    ranked = np.sort(cal)
    if 1 / (len(cal) + 1) > rate + 1e-12:
        with pytest.raises(InputError, match="ranking images cannot support"):
            conformal.threshold(ranked, rate)
        return
    limit = conformal.threshold(ranked, rate)
    p = conformal.p_values(scores, ranked)
    assert (np.array(scores) > limit).tolist() == (p <= rate + 1e-12).tolist()


def test_19_images_support_5_percent_and_18_do_not() -> None:
    ranked = np.arange(19.0)
    assert conformal.threshold(ranked, 0.05) == 18.0
    assert conformal.p_values([18.5], ranked).tolist() == [0.05]
    with pytest.raises(InputError, match=r"18 ranking images .* 0\.05.* 0\.0526, so use at least 19") as refused:
        conformal.threshold(ranked[1:], 0.05)
    assert refused.value.field == "data"


def test_a_rate_near_1_flags_all_but_the_smallest_scores() -> None:
    assert conformal.threshold(np.arange(5.0), 1 - 1e-10) == 0.0


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, float("nan")])
def test_a_rate_is_between_0_and_1(rate: float) -> None:
    with pytest.raises(InputError, match="false-positive rate must be at least 1e-09"):
        conformal.threshold(np.arange(100.0), rate)
    with pytest.raises(InputError, match="false discovery rate must be more than 0"):
        conformal.discoveries([0.1], rate)


def test_p_values_of_the_same_distribution_are_uniform() -> None:
    rng = np.random.default_rng(0)
    p = np.concatenate([conformal.p_values(rng.normal(size=10), np.sort(rng.normal(size=200))) for _ in range(2_000)])
    for rate in (0.01, 0.05, 0.2):
        exact = np.floor(rate * 201) / 201
        assert (p <= rate).mean() == pytest.approx(exact, abs=0.005)


@given(st.lists(st.floats(0.0001, 1), min_size=1, max_size=60), RATES)
def test_discoveries_equal_those_of_scipy(p: list[float], rate: float) -> None:
    adjusted = stats.false_discovery_control(p)
    near = np.isclose(adjusted, rate, rtol=1e-9, atol=0)
    assert ((conformal.discoveries(p, rate) == (adjusted <= rate)) | near).all()


def test_a_p_value_that_equals_its_bound_is_discovered() -> None:
    assert conformal.discoveries([0.05, 0.5, 0.9], 0.15).tolist() == [True, False, False]  # 0.15 / 3 < 0.05 in fp64


def test_without_p_values_there_is_no_discovery() -> None:
    assert conformal.largest_discovery(np.empty(0), 0.1) == -1
    assert conformal.discoveries([], 0.1).tolist() == []


def test_the_false_discovery_rate_is_controlled() -> None:
    """40 of 200 images are out-of-distribution; each round has its own calibration set."""
    rng = np.random.default_rng(1)
    false, power = [], []
    for _ in range(300):
        scores = np.concatenate([rng.normal(size=160), rng.normal(4, 1, size=40)])
        result = conformal.discoveries(conformal.p_values(scores, np.sort(rng.normal(size=1000))), 0.2)
        false.append(result[:160].sum() / max(1, result.sum()))
        power.append(result[160:].mean())
    assert np.mean(false) < 0.2
    assert np.mean(power) > 0.8


@given(st.integers(1, 60), st.integers(19, 200), RATES)
def test_fewer_than_the_minimum_of_discoveries_find_nothing(count: int, n_rank: int, rate: float) -> None:
    smallest = 1 / (n_rank + 1)
    needed = conformal.min_discoveries(count, smallest, rate)
    for flagged in {min(max(0, needed - 1), count), min(needed, count)}:
        p = np.concatenate([np.full(flagged, smallest), np.ones(count - flagged)])
        assert conformal.discoveries(p, rate)[:flagged].any() == (0 < needed <= flagged)


VIEWS_OF_IMAGES = st.integers(1, 3).flatmap(
    lambda views: st.lists(st.lists(st.integers(0, 9).map(float), min_size=views, max_size=views), min_size=2)
)


@given(VIEWS_OF_IMAGES)
def test_the_p_value_of_several_views_is_no_smaller_than_that_of_the_smallest_rank(scores: list[list[float]]) -> None:
    """Rank the last image among the others: its rank by the smallest of its ranks among all images is valid."""
    every_VN = np.array(scores).T
    views, ranking_VN = len(every_VN), every_VN[:, :-1]
    smallest = conformal.smallest_ranks(ranking_VN)
    rank = min(
        int(conformal.ranks(every[-1], np.sort(ranking))) for every, ranking in zip(every_VN, ranking_VN, strict=True)
    )
    smallest_of_all = np.min([[(every >= score).sum() for score in every] for every in every_VN], 0)
    assert rank == smallest_of_all[-1]
    exact = (smallest_of_all <= smallest_of_all[-1]).mean()
    p = conformal.combined_p_value(rank, views, smallest)
    assert exact <= p + 1e-12 <= 1 + 1e-12
    if views == 1:
        assert p == pytest.approx(conformal.p_values(every_VN[0, -1], np.sort(ranking_VN[0])))


@pytest.mark.parametrize("correlation", [0.0, 0.9])
@pytest.mark.parametrize("count", [59, 118, 200])
def test_three_views_flag_good_images_at_no_more_than_the_rate(correlation: float, count: int) -> None:
    """The rate is hardly lower, except for the remainder that the number of ranks leaves."""
    rng, repeats, rate = np.random.default_rng(0), 4_000, 0.05
    mixing = np.linalg.cholesky(correlation + (1 - correlation) * np.eye(3))
    flagged = 0
    for _ in range(repeats):
        scores_VN = mixing @ rng.standard_t(3, (3, count + 1))
        ranking_VN = scores_VN[:, :-1]
        smallest = conformal.smallest_ranks(ranking_VN)
        limit = conformal.largest_rank(3, smallest, rate)
        assert limit >= 1
        thresholds = np.sort(ranking_VN)[:, count - limit]
        ranks = [int(conformal.ranks(scores[-1], np.sort(scores[:-1]))) for scores in scores_VN]
        is_flagged = bool((scores_VN[:, -1] > thresholds).any())
        assert is_flagged == (conformal.combined_p_value(min(ranks), 3, smallest) <= rate)
        flagged += is_flagged
    share, deviation = flagged / repeats, np.sqrt(rate * (1 - rate) / repeats)
    assert share <= rate + 3 * deviation
    assert share >= 1 / (count + 1)
    if count == 200:
        assert share >= 0.6 * rate


@example([0.1])
@given(st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=30))
def test_an_image_equal_to_a_ranking_image_never_scores_above_it(scores: list[float]) -> None:
    """Rounding must not break ties: it goes up, and keeps six digits."""
    rounded = conformal.round_scores(scores)
    assert (rounded >= scores).all()
    for score, result in zip(scores, rounded.tolist(), strict=True):
        unit = Decimal(10) ** (Decimal(score).adjusted() - 5)
        assert Decimal(repr(result)) - Decimal(score) < unit
    assert (conformal.p_values(scores, np.sort(rounded)) >= conformal.p_values(scores, np.sort(scores))).all()


def test_repeated_images_are_flagged_no_more_often_than_the_rate() -> None:
    score = 1.2345641  # six digits: 1.23456, below it
    ranked = conformal.rank_scores([score] * 99)
    assert conformal.p_values([score], ranked).tolist() == [1.0]
    assert score <= conformal.threshold(ranked, 0.05)


@pytest.mark.parametrize("rate", [0.5, 1 - 1e-10])
def test_the_largest_rank_is_at_most_the_number_of_ranking_images(rate: float) -> None:
    assert 0 < conformal.largest_rank(1, np.arange(1, 20), rate) <= 19
