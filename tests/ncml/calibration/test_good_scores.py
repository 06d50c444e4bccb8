"""What the scores of good images say about images that are unlike the others."""

import numpy as np

from ncml.calibration.good_scores import GoodScores
from ncml.ood.detector_calibration import Scale
from ncml.ood.scene_ranks import cutoff


def scores_of(values_N: np.ndarray, estimating: int) -> GoodScores:
    positions = np.arange(len(values_N))
    return GoodScores(
        {"one": values_N}, {"one": 0.0}, {}, frozenset(), positions, positions[:estimating], positions[estimating:], 0
    )


def test_the_threshold_without_suspects_is_that_of_the_other_ranking_images() -> None:
    values_N = np.random.default_rng(0).normal(size=71)
    odd = {12, 30, 31, 70}
    values_N[[*odd]] += 1000
    scores = scores_of(values_N, 12)
    with_suspects = scores.ranks.threshold(cutoff(59, 0.05, None))
    assert with_suspects > 100
    without = scores.threshold_without(odd, 0.05, None)
    others = np.sort(np.delete(scores.largest_N, [*range(12), *odd]))
    assert without is not None
    np.testing.assert_allclose(without, others[-2], rtol=1e-5)  # 55 scenes flag two ranks at 5%
    assert scores.threshold_without({3}, 0.05, None) is None
    assert scores.threshold_without(set(range(30, 71)), 0.05, None) is None
    assert scores.threshold_without(set(range(71)), 0.05, None) is None


def test_an_outlier_among_good_images_does_not_hide_a_score() -> None:
    usual_N = np.linspace(-1, 1, 41)
    assert Scale.estimate(np.append(usual_N, 1e6)).deviation < 2 * Scale.estimate(usual_N).deviation
