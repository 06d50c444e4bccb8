"""What the scores of good images say about images that are unlike the others."""

import numpy as np
import pytest

from ncml.calibration.good_scores import GoodScores
from ncml.ood.detector_calibration import Scale
from ncml.ood.scene_ranks import cutoff


def scores_of(values_N: np.ndarray, estimating: int) -> GoodScores:
    positions = np.arange(len(values_N))
    altered = {"one": values_N[:estimating] + 1}
    return GoodScores(
        {"one": values_N},
        altered,
        np.zeros(estimating, bool),
        {},
        frozenset(),
        positions,
        positions[:estimating],
        positions[estimating:],
        0,
    )


def test_the_threshold_without_suspects_is_that_of_the_other_ranking_images() -> None:
    values_N = np.random.default_rng(0).normal(size=71)
    odd = {12, 30, 31, 70}
    values_N[[*odd]] += 1000
    scores = scores_of(values_N, 12)
    with_suspects = scores.ranks.threshold(cutoff(59, 0.05, None))
    assert with_suspects > 100
    without = scores.threshold_without(odd, 0.05, None)
    others = np.sort(np.delete(scores.combined_N, [*range(12), *odd]))
    assert without is not None
    np.testing.assert_allclose(without, others[-2], rtol=1e-5)  # 55 scenes flag two ranks at 5%
    assert scores.threshold_without({3}, 0.05, None) is None
    assert scores.threshold_without(set(range(30, 71)), 0.05, None) is None
    assert scores.threshold_without(set(range(71)), 0.05, None) is None


def test_the_score_is_the_root_of_weighted_squares_above_the_median() -> None:
    rng = np.random.default_rng(0)
    values = {"finds": rng.normal(size=50), "finds_more": rng.normal(size=50), "finds_nothing": rng.normal(size=50)}
    altered = {name: rng.normal(shift, 1, 40) for name, shift in zip(values, (2.0, 4.0, 0.0), strict=True)}
    positions = np.arange(50)
    scores = GoodScores(
        values, altered, np.arange(40) < 10, {}, frozenset(), positions, positions[:20], positions[20:], 0
    )
    weights = {name: scale.weight for name, scale in scores.scales.items()}
    assert weights["finds_more"] == 1
    assert weights["finds_nothing"] < 0.2 < weights["finds"] < 1
    for i in range(50):
        squares = {name: scale.square(values[name][i]) for name, scale in scores.scales.items()}
        assert sum(squares.values()) ** 0.5 == pytest.approx(scores.combined_N[i])
        assert squares[scores.leading_views_N[i]] == max(squares.values())


def scores_with_reviewed(seed: int) -> GoodScores:
    """Return the scores of 20 images that estimate, 30 that rank and 5 reviewed ones, by two views."""
    rng = np.random.default_rng(0)
    good = {name: rng.normal(size=50) for name in ("finds", "finds_less")}
    altered = {name: rng.normal(shift, 1, 40) for name, shift in zip(good, (3.0, 2.0), strict=True)}
    others = np.random.default_rng(seed)
    for own_N in good.values():
        own_N[20:] = others.normal(3 * seed, 1 + seed, 30)  # those that rank
    values = {name: np.append(own_N, others.normal(9 * seed, 1, 5)) for name, own_N in good.items()}
    positions = np.arange(55)
    estimating, ranking = np.append(positions[:20], positions[50:]), positions[20:50]
    return GoodScores(values, altered, np.arange(40) < 10, {}, frozenset(), positions, estimating, ranking, 5)


def test_scales_and_weights_depend_on_no_ranking_and_no_reviewed_image() -> None:
    one, other = scores_with_reviewed(1), scores_with_reviewed(2)
    assert one.scales == other.scales
    assert (one.combined_N[20:] != other.combined_N[20:]).all()


def test_an_outlier_among_good_images_does_not_hide_a_score() -> None:
    usual_N = np.linspace(-1, 1, 41)
    assert Scale.estimate(np.append(usual_N, 1e6)).deviation < 2 * Scale.estimate(usual_N).deviation
