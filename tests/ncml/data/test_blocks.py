"""Positions that are spread over an order without following a period in it."""

import numpy as np
import pytest

from ncml.calibration.division import divide
from ncml.data.blocks import one_of_each_block
from ncml.ood.scene_ranks import SceneRanks, cutoff


def test_one_position_lies_in_each_block_and_equal_numbers_give_equal_ones() -> None:
    for count, blocks in ((1, 1), (10, 10), (38, 19), (100, 41), (667, 200)):
        positions = one_of_each_block(count, blocks)
        edges = np.arange(blocks + 1) * count // blocks
        assert ((edges[:-1] <= positions) & (positions < edges[1:])).all()
        np.testing.assert_array_equal(positions, one_of_each_block(count, blocks))


def test_positions_stay_the_same_with_other_versions() -> None:
    """An update divides images as the former detector did, perhaps with another version of Python or NumPy."""
    assert one_of_each_block(30, 11).tolist() == [1, 2, 5, 9, 10, 13, 17, 20, 23, 25, 29]


@pytest.mark.parametrize(("count", "cameras"), [(38, 2), (78, 2), (58, 3), (118, 3)])
def test_images_of_several_cameras_in_turn_are_flagged_at_the_rate(count: int, cameras: int) -> None:
    """Every second or third image would be of one camera, and only those of the others would rank."""
    rng = np.random.default_rng(0)
    spread_N = 1.0 + np.arange(count) % cameras
    _, ranking = divide(np.arange(count), 0.05)
    flagged: list[float] = []
    for _ in range(400):
        scores_N = np.abs(rng.normal(size=count)) * spread_N
        ranks = SceneRanks.rank(scores_N[ranking], np.arange(len(ranking)))
        fresh = np.abs(rng.normal(size=(200, cameras))) * np.arange(1, cameras + 1)
        flagged.append(float((fresh > ranks.threshold(cutoff(ranks.scenes, 0.05, None))).mean()))
    assert 0.035 < np.mean(flagged) < 0.065
