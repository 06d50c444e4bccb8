"""A copy of a model is calibrated on good images."""

from pathlib import Path

import numpy as np
import pytest
import torch

import ncml
from ncml.calibration.calibrated_copy import calibrate_copy
from ncml.calibration.estimation import divide
from ncml.data.blocks import one_of_each_block
from ncml.data.dataset import Dataset
from ncml.errors import InputError
from tests.ncml import nets


def good(count: int, seed: int = 0) -> Dataset:
    return Dataset(nets.images(count, seed=seed), torch.zeros(count, dtype=torch.int64), ())


@pytest.mark.parametrize(("count", "estimating"), [(39, 20), (60, 20), (70, 20), (100, 29), (600, 171)])
def test_every_image_is_used_either_to_estimate_or_to_rank(count: int, estimating: int) -> None:
    parts = divide(count, 0.05)
    assert [len(part) for part in parts] == [estimating, count - estimating]
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))
    assert parts[0].tolist() == one_of_each_block(count, estimating).tolist()


def test_too_few_or_equal_images_are_refused(model: ncml.Model, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"10 images are too few: use at least 39 good images, 20 to estimate and 19 to rank.$"
    ):
        calibrate_copy(model, good(10), tmp_path / "mine")
    remedy = (
        r"use at least 119 good images, 20 to estimate and 99 to rank, or raise the false-positive rate \(0.01\)\.$"
    )
    with pytest.raises(InputError, match=remedy):
        calibrate_copy(model, good(100), tmp_path / "mine", false_positive_rate=0.01)
    same = Dataset(torch.full((50, 8, 8, 3), 7, dtype=torch.uint8), torch.zeros(50, dtype=torch.int64), ())
    with pytest.raises(InputError, match="all images are equal"):
        calibrate_copy(model, same, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
