"""What the scores of good images say about images that are unlike the others, and about defective ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ncml.calibration.good_scores import GoodScores, combine
from ncml.ood.detector_calibration import Scale
from ncml.ood.scene_ranks import cutoff
from ncml.ood.views.known_defects import KnownDefects
from ncml.ood.weights import KNOWN_WEIGHT

NO_SCENES, NONE_LEARNED = np.empty(0, np.int64), np.empty(0, bool)


def scores_of(values_N: np.ndarray, estimating: int) -> GoodScores:
    positions = np.arange(len(values_N))
    altered = {"one": values_N[:estimating] + 1}
    return GoodScores(
        {"one": values_N},
        altered,
        np.zeros(estimating, bool),
        {"one": np.empty(0)},
        NO_SCENES,
        NONE_LEARNED,
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
    none = {name: np.empty(0) for name in values}
    scores = GoodScores(
        *(values, altered, np.arange(40) < 10, none, NO_SCENES, NONE_LEARNED, {}, frozenset()),
        *(positions, positions[:20], positions[20:], 0),
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
    none = {name: np.empty(0) for name in values}
    return GoodScores(
        *(values, altered, np.arange(40) < 10, none, NO_SCENES, NONE_LEARNED, {}, frozenset()),
        *(positions, estimating, ranking, 5),
    )


def test_scales_and_weights_depend_on_no_ranking_and_no_reviewed_image() -> None:
    one, other = scores_with_reviewed(1), scores_with_reviewed(2)
    assert one.scales == other.scales
    assert (one.combined_N[20:] != other.combined_N[20:]).all()


def test_an_outlier_among_good_images_does_not_hide_a_score() -> None:
    usual_N = np.linspace(-1, 1, 41)
    assert Scale.estimate(np.append(usual_N, 1e6)).deviation < 2 * Scale.estimate(usual_N).deviation


def scores_with_defective(shifts: tuple[float, float], scenes_D: np.ndarray, are_learned_D: np.ndarray) -> GoodScores:
    """Return scores of 20 images that estimate, 59 that rank, and defective ones, which no altered one resembles.

    shifts: of the scores of defective images in the two views; those of altered ones are 3 and 0.
    """
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=79) for name in ("altered", "defective")}
    altered = {name: rng.normal(shift, 1, 40) for name, shift in zip(values, (3.0, 0.0), strict=True)}
    defective = {name: rng.normal(shift, 1, len(scenes_D)) for name, shift in zip(values, shifts, strict=True)}
    positions = np.arange(79)
    return GoodScores(
        *(values, altered, np.arange(40) < 10, defective, scenes_D, are_learned_D, {}, frozenset()),
        *(positions, positions[:20], positions[20:], 0),
    )


@pytest.mark.parametrize("scenes", [3, 12, 30])
def test_defective_images_are_judged_by_weights_that_were_learned_without_them(scenes: int) -> None:
    scenes_D, flagged = np.arange(30) % scenes, 0
    scores = scores_with_defective((0, 2.5), scenes_D, np.ones(30, bool))
    for fold in range(min(scenes, 10)):
        is_own_D = scenes_D % 10 == fold
        others = replace(scores, are_learned_D=~is_own_D)
        combined_D = np.zeros(30)
        for name, scale in others.scales.items():
            combined_D += [scale.square(score) for score in scores.defective[name].tolist()]
        threshold = others.ranks.threshold(cutoff(59, 0.05, None))
        flagged += int((np.sqrt(combined_D)[is_own_D] > threshold).sum())
    assert scores.are_found(cutoff(59, 0.05, None)).sum() == flagged
    assert 0 < flagged < 30


def test_more_defective_images_are_found_if_weights_are_learned_from_them() -> None:
    found = [
        scores_with_defective((0, 3), np.arange(30), np.full(30, learned)).are_found(cutoff(59, 0.05, None)).sum()
        for learned in (False, True)
    ]
    assert found[1] > found[0] + 5


def test_the_view_of_known_defects_has_a_weight_that_is_not_learned() -> None:
    scores = scores_with_defective((0, 3), np.arange(30), np.ones(30, bool))
    parts = {"scores": scores.scores, "defective": scores.defective}
    both = replace(scores, **{part: {**own, "known_defects": own["defective"]} for part, own in parts.items()})
    assert both.scales["known_defects"].weight == KNOWN_WEIGHT
    assert {name: own for name, own in both.scales.items() if name != "known_defects"} == scores.scales
    assert both.are_found(cutoff(59, 0.05, None)).sum() > scores.are_found(cutoff(59, 0.05, None)).sum()


def test_one_defective_image_is_not_judged_by_what_was_learned_from_it() -> None:
    alone = scores_with_defective((0, 3), np.zeros(30, np.int64), np.ones(30, bool))
    without = scores_with_defective((0, 3), np.zeros(30, np.int64), np.zeros(30, bool))
    assert alone.scales["defective"].weight > without.scales["defective"].weight
    assert alone.are_found(cutoff(59, 0.05, None)).sum() == without.are_found(cutoff(59, 0.05, None)).sum()
    assert scores_of(np.arange(40.0), 12).are_found(cutoff(28, 0.05, None)).tolist() == []


def test_nothing_is_learned_from_defective_images_whose_scenes_rank() -> None:
    scores = scores_with_defective((0, 3), np.arange(30), np.arange(30) < 20)
    fewer = replace(
        scores,
        defective={name: own_D[:20] for name, own_D in scores.defective.items()},
        defective_scenes_D=np.arange(20),
        are_learned_D=np.ones(20, bool),
    )
    assert scores.scales == fewer.scales
    assert (
        scores.are_found(cutoff(59, 0.05, None)).sum() > fewer.are_found(cutoff(59, 0.05, None)).sum()
    )  # all are judged


def test_the_rate_holds_after_weights_were_learned_from_missed_defects() -> None:
    """Simulated: in each of two updates, the ten that were missed most narrowly, so they depend on the ranks."""
    rng = np.random.default_rng(0)
    names = ("altered", "defective", "neither")
    flagged = []
    for _ in range(100):
        values, fresh, defects = ({name: rng.normal(size=n) for name in names} for n in (99, 1000, 200))
        defects["defective"] += 2
        altered = {name: rng.normal(3 * (name == "altered"), 1, 20) for name in names}
        positions = np.arange(99)
        scores = GoodScores(
            *(values, altered, np.arange(20) < 5, {name: np.empty(0) for name in names}, NO_SCENES, NONE_LEARNED, {}),
            *(frozenset(), positions, positions[:20], positions[20:], 0),
        )
        learned: list[int] = []
        after = []
        for _update in range(3):
            of_fresh, of_defects = (combine(scores.scales, own) for own in (fresh, defects))
            threshold = scores.ranks.threshold(cutoff(79, 0.05, None))
            after.append((of_fresh > threshold).mean())
            missed = np.flatnonzero(of_defects <= threshold)
            learned += [i for i in missed[np.argsort(-of_defects[missed])].tolist() if i not in learned][:10]
            scores = replace(
                scores,
                defective={name: own_D[learned] for name, own_D in defects.items()},
                defective_scenes_D=np.arange(len(learned)),
                are_learned_D=np.ones(len(learned), bool),
            )
        flagged.append(after)
    assert np.mean(flagged, 0) == pytest.approx(0.05, abs=0.008)


def test_the_rate_holds_after_a_view_has_learned_missed_defects() -> None:
    """Simulated: images of eight patches; in each of two updates, it learns the ten that were missed most narrowly."""
    rng = np.random.default_rng(0)
    known: KnownDefects | None

    def draw(count: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=(count, 8, 6))).float()

    def judge(images_NPF: torch.Tensor) -> dict[str, np.ndarray]:
        scores = {"patches": images_NPF.norm(dim=2).amax(1).double().numpy()}
        if known is not None:
            scores[known.name] = np.array([known.score(image_PF) for image_PF in images_NPF])
        return scores

    rows = []
    for _ in range(60):
        good, fresh, defects, altered = (draw(count) for count in (99, 300, 200, 20))
        defects[:, :3, 0] += 2
        known, learned, row = None, list[int](), []
        values = judge(good)
        positions = np.arange(99)
        scores = GoodScores(
            *(values, judge(1.3 * altered), np.arange(20) < 5, {"patches": np.empty(0)}, NO_SCENES, NONE_LEARNED, {}),
            *(frozenset(), positions, positions[:20], positions[20:], 0),
        )
        for _update in range(3):
            of_fresh, of_defects = (combine(scores.scales, judge(own)) for own in (fresh, defects))
            threshold = scores.ranks.threshold(cutoff(79, 0.05, None))
            row.append([(of_fresh > threshold).mean(), (of_defects > threshold).mean()])
            missed = np.flatnonzero(of_defects <= threshold)
            learned += [i for i in missed[np.argsort(-of_defects[missed])].tolist() if i not in learned][:10]
            numbers = np.arange(len(learned))
            known, good_N, own_D = KnownDefects.estimate([*good[:20]], positions[:20], [*defects[learned]], numbers)
            values = judge(good)
            values[known.name][:20] = good_N
            scores = replace(
                scores,
                scores=values,
                defective={**judge(defects[learned]), known.name: own_D},
                defective_scenes_D=numbers,
                are_learned_D=np.ones(len(learned), bool),
            )
        rows.append(row)
    means = np.mean(rows, 0)
    assert means[:, 0] == pytest.approx(0.05, abs=0.01)
    assert means[1, 1] > means[0, 1] + 0.1
