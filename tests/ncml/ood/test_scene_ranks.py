"""Ranks that count scenes: equal to brute force, valid for fresh scenes, with the stated rate of one calibration."""

import numpy as np
import pytest
from scipy import stats

from ncml.errors import InputError
from ncml.ood import conformal
from ncml.ood.scene_ranks import (
    SceneRanks,
    cutoff,
    fewest_scenes,
    flagged_ranks,
    min_scenes,
    rate_bound,
    share_interval,
)

RATE = 0.05


def brute_force(score: float, scores: np.ndarray, scenes: np.ndarray) -> float:
    shares = [float((scores[scenes == scene] >= score).mean()) for scene in np.unique(scenes)]
    return (1 + sum(shares)) / (len(shares) + 1)


@pytest.mark.parametrize("seed", range(5))
def test_p_values_equal_those_of_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scenes = rng.permutation(np.concatenate([np.arange(7), rng.integers(0, 7, 23)])) * 10
    scores = np.round(rng.normal(size=30), 1)  # with ties
    ranks = SceneRanks.rank(scores, scenes)
    tested = np.concatenate([scores, rng.normal(size=20), [-9, 9]])
    expected = [brute_force(score, scores, scenes) for score in tested]
    np.testing.assert_allclose(ranks.p_values(tested), expected, atol=1e-9)
    assert ranks.scenes == 7
    assert [ranks.count_at_or_above(s) for s in tested] == [int((scores >= s).sum()) for s in tested]


def test_a_score_below_all_has_the_p_value_1_although_shares_are_rounded() -> None:
    assert SceneRanks.rank(np.arange(49), np.repeat(range(7), 7)).p_values(0) == 1


def test_single_images_have_ordinary_conformal_p_values() -> None:
    scores = np.random.default_rng(0).normal(size=40)
    ranks = SceneRanks.rank(scores, np.arange(40))
    tested = np.linspace(-3, 3, 50)
    np.testing.assert_allclose(ranks.p_values(tested), conformal.p_values(tested, conformal.rank_scores(scores)))
    assert ranks.threshold(RATE) == conformal.threshold(conformal.rank_scores(scores), RATE)


@pytest.mark.parametrize("seed", range(5))
def test_a_score_is_above_the_threshold_exactly_when_its_p_value_is_at_most_the_rate(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scenes = np.concatenate([np.arange(30), rng.integers(0, 30, 60)])
    scores = np.round(rng.normal(size=90), 1)
    ranks = SceneRanks.rank(scores, scenes)
    tested = np.concatenate([scores, rng.normal(size=200)])
    np.testing.assert_array_equal(tested > ranks.threshold(RATE), ranks.p_values(tested) <= RATE + 1e-9)


def flagged_share(scene_count: int, per_scene: int, *, by_scene: bool, repetitions: int = 400) -> float:
    """Return the mean share of images of fresh scenes that are flagged, where images of one scene nearly agree."""
    rng = np.random.default_rng(1)
    shares = []
    for _ in range(repetitions):
        scenes = np.repeat(np.arange(scene_count), per_scene)
        scores = rng.normal(size=scene_count)[scenes] + 0.3 * rng.normal(size=len(scenes))
        fresh = rng.normal(size=200) + 0.3 * rng.normal(size=200)
        ranks = SceneRanks.rank(scores, scenes if by_scene else np.arange(len(scenes)))
        shares.append(float((fresh > ranks.threshold(RATE)).mean()))
    return float(np.mean(shares))


def test_images_of_fresh_scenes_are_flagged_at_the_rate_although_scenes_repeat() -> None:
    assert flagged_share(60, 10, by_scene=True) <= RATE + 0.005


def test_ranks_of_images_would_flag_more_of_few_scenes() -> None:
    """What the ranks of scenes are for: images of one scene are not independent."""
    assert flagged_share(20, 10, by_scene=False) > 1.15 * RATE
    assert flagged_share(20, 10, by_scene=True) <= RATE + 0.005


def test_too_few_scenes_are_refused_however_many_images_they_have() -> None:
    scenes = np.repeat(np.arange(18), 20)
    ranks = SceneRanks.rank(np.random.default_rng(0).normal(size=360), scenes)
    with pytest.raises(InputError, match=r"18 ranking scenes cannot support a false-positive rate of 0.05"):
        ranks.threshold(RATE)


@pytest.mark.parametrize(("ranks", "scenes"), [(1, 19), (3, 70), (5, 100), (50, 999)])
def test_the_bound_of_the_rate_is_the_quantile_of_a_beta_distribution(ranks: int, scenes: int) -> None:
    expected = stats.beta.ppf(0.95, ranks, scenes + 1 - ranks)
    assert rate_bound(ranks, scenes, 0.95) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("flagged", "images"), [(0, 20), (3, 40), (40, 40), (1, 1)])
def test_the_interval_of_a_share_is_that_of_scipy(flagged: int, images: int) -> None:
    expected = stats.binomtest(flagged, images).proportion_ci(0.95, method="exact")
    assert share_interval(flagged, images, 0.95) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_the_rate_of_one_calibration_stays_below_its_bound_with_the_stated_confidence() -> None:
    rng, n = np.random.default_rng(0), 76
    bound = rate_bound(flagged_ranks(n, RATE), n, 0.95)
    thresholds = [SceneRanks.rank(rng.uniform(size=n), np.arange(n)).threshold(RATE) for _ in range(2000)]
    assert np.mean(1 - np.array(thresholds) <= bound) == pytest.approx(0.95, abs=0.015)


def test_a_confidence_lowers_the_threshold_of_the_p_value_so_that_single_calibrations_keep_the_rate() -> None:
    rng, n = np.random.default_rng(0), 100
    cut = cutoff(n, RATE, 0.95)
    assert cut < RATE
    thresholds = [SceneRanks.rank(rng.uniform(size=n), np.arange(n)).threshold(cut) for _ in range(2000)]
    assert np.mean(1 - np.array(thresholds) <= RATE) >= 0.94
    assert cutoff(n, RATE, None) == RATE
    with pytest.raises(InputError, match="use at least 59"):
        cutoff(58, RATE, 0.95)
    assert cutoff(59, RATE, 0.95) == 1 / 60
    with pytest.raises(InputError, match="confidence"):
        cutoff(100, RATE, 1.5)


@pytest.mark.parametrize("confidence", [None, 0.9])
def test_the_fewest_scenes_flag_as_many_ranks_and_one_fewer_flags_less(confidence: float | None) -> None:
    def ranks(scenes: int) -> int:
        return flagged_ranks(scenes, cutoff(scenes, RATE, confidence))

    least = min_scenes(RATE, confidence)
    with pytest.raises(InputError):
        cutoff(least - 1, RATE, confidence)
    for scenes in range(least, 200):
        fewest = fewest_scenes(scenes, RATE, confidence)
        assert ranks(fewest) == ranks(scenes)
        assert fewest == least or ranks(fewest - 1) < ranks(fewest)


@pytest.mark.parametrize("confidence", [0.4, 1.0])
def test_a_confidence_out_of_range_is_refused(confidence: float) -> None:
    with pytest.raises(InputError, match=r"a confidence must be at least 0\.5 and less than 1"):
        fewest_scenes(100, RATE, confidence)


def test_the_fewest_scenes_for_a_confidence_flag_one_rank_although_their_bound_is_rounded() -> None:
    assert min_scenes(0.5, 0.75) == 2  # both scores are below the median in a quarter of all cases
    assert cutoff(2, 0.5, 0.75) == 1 / 3
