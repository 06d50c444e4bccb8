"""The weights of views are those that minimise the loss."""

import numpy as np
import pytest
from scipy.optimize import minimize

from ncml.ood.weights import DEFECTIVE_SCENES, LEAST_WEIGHT, MAX_STANDARDISED, PROCESSING_SHARE, RIDGE, learn_weights

NONE = np.empty(0, np.int64)


def learn_from_altered(good_VN: np.ndarray, altered_VM: np.ndarray, are_processed_M: np.ndarray) -> np.ndarray:
    """Return the weights without defective images."""
    return learn_weights(good_VN, altered_VM, are_processed_M, altered_VM[:, :0], NONE)


def minimal_weights(
    good_VN: np.ndarray, altered_VM: np.ndarray, processed: int, defective_VD: np.ndarray, scenes_D: np.ndarray
) -> np.ndarray:
    """Return the weights by a general optimiser; the last altered images are processed ones."""
    good_VN, altered_VM, defective_VD = (
        np.minimum(np.maximum(0, values), MAX_STANDARDISED) ** 2 for values in (good_VN, altered_VM, defective_VD)
    )
    marked_VM, processed_VM = altered_VM[:, :-processed], altered_VM[:, -processed:]

    def loss(parameters: np.ndarray) -> float:
        weights, offset = parameters[:-1], parameters[-1]
        of_good = np.logaddexp(0, weights @ good_VN + offset).mean()
        of_marked = np.logaddexp(0, -weights @ marked_VM - offset).mean()
        of_processed = np.logaddexp(0, -weights @ processed_VM - offset).mean()
        of_altered = (1 - PROCESSING_SHARE) * of_marked + PROCESSING_SHARE * of_processed
        of_defective = np.logaddexp(0, -weights @ defective_VD - offset)
        of_scenes = [of_defective[scenes_D == scene].mean() for scene in set(scenes_D.tolist())]
        of_unusual = (DEFECTIVE_SCENES * of_altered + sum(of_scenes)) / (DEFECTIVE_SCENES + len(of_scenes))
        return (of_good + of_unusual) / 2 + RIDGE / 2 * np.square(weights).sum()

    views = len(good_VN)
    weights_V = minimize(
        loss,
        np.append(np.full(views, 0.01), 0.0),
        bounds=[(0, None)] * views + [(None, None)],
        options={"ftol": 1e-14, "gtol": 1e-9, "maxiter": 5000, "maxfun": 200_000},
    ).x[:-1]
    return np.maximum(LEAST_WEIGHT, weights_V / weights_V.max())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("good", "altered", "defective"), [(11, 20, 0), (41, 42, 3), (41, 42, 60), (200, 42, 0)])
def test_weights_equal_those_of_a_general_optimiser(good: int, altered: int, defective: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    good_VN = rng.normal(size=(5, good)) + rng.normal(size=good)  # the scores of views agree
    altered_VM = rng.normal(size=(5, altered)) * [[1], [3], [1], [1], [9]] + [[0], [1], [4], [-3], [2]]
    processed = altered // 3
    are_processed_M = np.arange(altered) >= altered - processed
    defective_VD = rng.normal([[0], [6], [2], [-3], [1]], 1, (5, defective))
    scenes_D = rng.integers(max(1, defective // 2), size=defective)
    weights_V = learn_weights(good_VN, altered_VM, are_processed_M, defective_VD, scenes_D)
    expected_V = minimal_weights(good_VN, altered_VM, processed, defective_VD, scenes_D)
    np.testing.assert_allclose(weights_V, expected_V, atol=2e-3)
    assert weights_V.max() == 1
    assert weights_V[3] == LEAST_WEIGHT


def test_without_processed_images_the_others_weigh_all() -> None:
    rng = np.random.default_rng(0)
    good_VN, altered_VM = rng.normal(size=(2, 30)), rng.normal([[3], [1]], 1, (2, 40))
    alike = [learn_from_altered(good_VN, altered_VM, np.full(40, processed)) for processed in (True, False)]
    np.testing.assert_array_equal(*alike)


def test_odd_images_among_good_ones_do_not_hide_the_views_that_find_them() -> None:
    rng = np.random.default_rng(0)
    good_VN, altered_VM = rng.normal(size=(2, 12)), rng.normal([[4], [1]], 1, (2, 40))
    are_processed_M = np.arange(40) < 10
    odd_VN = np.append(good_VN, [[30.0], [0.0]], 1)
    expected_V = learn_from_altered(good_VN, altered_VM, are_processed_M)
    np.testing.assert_array_equal(learn_from_altered(odd_VN, altered_VM, are_processed_M), expected_V)
    assert np.isfinite(learn_from_altered(10 * odd_VN + 70, altered_VM, are_processed_M)).all()


def test_defective_images_raise_the_weight_of_the_view_that_finds_them() -> None:
    rng = np.random.default_rng(0)
    good_VN, altered_VM = rng.normal(size=(2, 40)), rng.normal([[4], [0]], 1, (2, 42))
    defective_VD, scenes = rng.normal([[0], [4]], 1, (2, 30)), [NONE, np.zeros(30, np.int64), np.arange(30)]
    weights = [
        learn_weights(good_VN, altered_VM, np.arange(42) < 10, defective_VD[:, : len(own_D)], own_D)[1]
        for own_D in scenes
    ]
    assert weights[0] == LEAST_WEIGHT
    assert weights[0] < weights[1] < weights[2]  # those of one scene count as one


def test_views_that_find_nothing_weigh_the_same() -> None:
    good_VN = np.random.default_rng(0).normal(size=(3, 30))
    np.testing.assert_array_equal(learn_from_altered(good_VN, good_VN - 4, np.zeros(30, bool)), 1)
    np.testing.assert_array_equal(learn_from_altered(0 * good_VN, 0 * good_VN, np.zeros(30, bool)), 1)
