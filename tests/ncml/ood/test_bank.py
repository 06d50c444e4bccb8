"""Patches that are compared anywhere: near the border, where the network's features of good images are unusual, too."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ncml.ood.views.bank import RINGS, Bank

H, W, FEATURES = 20, 24, 6


def good_patches(seed: int, border: float = 2.0) -> Tensor:
    """Return features that vary more at the border, [h, w, F]."""
    features_hwF = torch.randn(H, W, FEATURES, generator=torch.Generator().manual_seed(seed))
    inner = features_hwF[1:-1, 1:-1].clone()
    features_hwF *= border
    features_hwF[1:-1, 1:-1] = inner
    return features_hwF


def estimated(border: float = 2.0) -> tuple[Bank, np.ndarray]:
    return Bank.estimate([good_patches(seed, border) for seed in range(12)], np.arange(12))


def largest(bank: Bank, features_hwF: Tensor) -> tuple[float, tuple[int, int]]:
    """Return the score, and where the map is largest."""
    candidates = bank.candidates(features_hwF)
    [map_hw] = candidates.maps_K
    row, column = divmod(int(map_hw.argmax()), W)
    return float(candidates.scores_K), (row, column)


def test_the_border_neither_decides_good_images_nor_hides_a_mark_inside() -> None:
    bank, scores_N = estimated()
    assert bank.border_R[0] > 1.2
    assert (bank.border_R[2:] < 1.05).all()
    marked = good_patches(100)
    marked[10:13, 8:11] += 3
    score, (row, column) = largest(bank, marked)
    assert score > scores_N.max()
    assert 9 <= row <= 13
    assert 7 <= column <= 11
    without = Bank(bank.patches_MF, bank.usual_M, torch.ones(RINGS))
    at_border = [largest(without, good_patches(seed))[1] for seed in range(100, 110)]
    assert all(min(row, H - 1 - row, column, W - 1 - column) <= 1 for row, column in at_border)
    assert largest(without, marked)[0] < max(largest(without, good_patches(seed))[0] for seed in range(100, 110))


def test_a_mark_at_the_border_that_exceeds_what_is_usual_there_is_found() -> None:
    bank, scores_N = estimated()
    marked = good_patches(100)
    marked[:3, 8:11] += 12
    score, (row, column) = largest(bank, marked)
    assert score > scores_N.max()
    assert row <= 3
    assert 7 <= column <= 11


def test_where_the_border_is_usual_nothing_changes() -> None:
    bank, _ = estimated(border=1.0)
    assert bank.border_R == pytest.approx(torch.ones(RINGS), abs=0.06)
    assert (bank.border_R >= 1).all()


def test_images_without_an_inside_are_compared_as_they_are() -> None:
    narrow = [good_patches(seed)[: 2 * RINGS] for seed in range(12)]
    bank, scores_N = Bank.estimate(narrow, np.arange(12))
    assert (bank.border_R == 1).all()
    assert np.isfinite(scores_N).all()
    mixed, _ = Bank.estimate([*narrow, *map(good_patches, range(12, 24))], np.arange(24))
    assert mixed.border_R[0] > 1.2
    assert mixed.candidates(narrow[0]).maps_K[0].shape == (2 * RINGS, W)


@pytest.mark.parametrize(
    ("border", "words"),
    [([1.0] * (RINGS - 1), "at the border is damaged"), ([0.5] * RINGS, "at the border is damaged")],
)
def test_damaged_divisors_are_refused(border: list[float], words: str) -> None:
    bank, _ = estimated()
    tensors = {name: torch.from_numpy(array).float() for name, array in bank.store().items()}
    assert torch.equal(Bank.load(tensors, FEATURES).border_R, bank.border_R)
    with pytest.raises(ValueError, match=words):
        Bank.load(tensors | {"border": torch.tensor(border)}, FEATURES)
