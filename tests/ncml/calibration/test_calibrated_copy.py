"""A copy of a model is calibrated on good images."""

import pytest
import torch

from ncml.calibration import calibrated_copy
from ncml.data.blocks import one_of_each_block
from ncml.data.dataset import Dataset
from ncml.errors import InputError
from tests.ncml import nets


def good(count: int, seed: int = 0) -> Dataset:
    return Dataset(nets.images(count, seed=seed), torch.zeros(count, dtype=torch.int64), ())


@pytest.mark.parametrize(("count", "estimating"), [(39, 20), (60, 20), (70, 20), (100, 29), (600, 171)])
def test_every_image_is_used_either_to_estimate_or_to_rank(count: int, estimating: int) -> None:
    images = Dataset(torch.arange(count, dtype=torch.uint8)[:, None, None, None], torch.arange(count), ())
    parts = calibrated_copy.split(images, 0.05)
    assert [len(part) for part in parts] == [estimating, count - estimating]
    assert sorted(torch.cat([part.labels_N for part in parts]).tolist()) == list(range(count))
    assert parts[0].labels_N.tolist() == one_of_each_block(count, estimating).tolist()


def test_too_few_or_equal_images_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"10 images are too few: use at least 39 good images, 20 to estimate and 19 to rank.$"
    ):
        calibrated_copy.split(good(10), 0.05)
    remedy = (
        r"use at least 119 good images, 20 to estimate and 99 to rank, or raise the false-positive rate \(0.01\)\.$"
    )
    with pytest.raises(InputError, match=remedy):
        calibrated_copy.split(good(100), 0.01)
    same = Dataset(torch.full((50, 8, 8, 3), 7, dtype=torch.uint8), torch.zeros(50, dtype=torch.int64), ())
    with pytest.raises(InputError, match="all images are equal"):
        calibrated_copy.split(same, 0.05)
