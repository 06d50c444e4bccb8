"""Patches that are compared anywhere: near the border, where the network's features of good images are unusual, too."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ncml.ood.views.bank import FOLDS, RINGS, Bank, cover
from ncml.progress import Progress

H, W, FEATURES = 20, 24, 6


def good_patches(seed: int, border: float = 2.0) -> Tensor:
    """Return features that vary more at the border, [h, w, F]."""
    features_hwF = torch.randn(H, W, FEATURES, generator=torch.Generator().manual_seed(seed))
    inner = features_hwF[1:-1, 1:-1].clone()
    features_hwF *= border
    features_hwF[1:-1, 1:-1] = inner
    return features_hwF


def estimate(features: list[Tensor]) -> tuple[Bank, np.ndarray]:
    """Make a bank of images that each show a scene of their own, wholly; return also their scores."""
    inside = [torch.ones(features_hwF.shape[:2], dtype=torch.bool) for features_hwF in features]
    bank, maps = Bank.estimate(features, inside, np.arange(len(features)))
    return bank, np.array([float(map_hw.max()) for map_hw in maps])


def estimated(border: float = 2.0) -> tuple[Bank, np.ndarray]:
    return estimate([good_patches(seed, border) for seed in range(12)])


def largest(bank: Bank, features_hwF: Tensor) -> tuple[float, tuple[int, int]]:
    """Return the score, and where the map is largest."""
    candidates = bank.candidates(features_hwF, torch.ones(features_hwF.shape[:2], dtype=torch.bool))
    [map_hw] = candidates.maps_K
    row, column = divmod(int(map_hw.argmax()), W)
    return float(candidates.scores_K), (row, column)


def test_the_border_neither_decides_good_images_nor_hides_a_mark_inside() -> None:
    bank, scores_N = estimated()
    assert bank.border_R[0] > 1.2
    assert (bank.border_R[2:] < 1.05).all()
    marked = good_patches(100)
    marked[10:13, 8:11] += 2.7
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
    bank, scores_N = estimate(narrow)
    assert (bank.border_R == 1).all()
    assert np.isfinite(scores_N).all()
    mixed, _ = estimate([*narrow, *map(good_patches, range(12, 24))])
    assert mixed.border_R[0] > 1.2
    assert mixed.candidates(narrow[0], torch.ones(2 * RINGS, W, dtype=torch.bool)).maps_K[0].shape == (2 * RINGS, W)


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


def test_a_bank_covers_what_few_patches_show() -> None:
    """A thousand patches of even ground, and one of an edge: nearly every random choice of 20 would miss it."""
    pool_PF = torch.randn(1001, FEATURES, generator=torch.Generator().manual_seed(0))
    pool_PF[700] += 20
    positions = cover(pool_PF, 20).tolist()
    assert 700 in positions
    assert len({*positions}) == 20
    farthest = [float(torch.cdist(pool_PF, pool_PF[part]).amin(1).max()) for part in (positions, positions[:10])]
    assert farthest[0] < farthest[1]
    assert cover(pool_PF[:20], 20).tolist() == [*range(20)]


def test_an_image_is_scored_by_a_bank_without_its_scene() -> None:
    """Two equal images unlike all others: as one scene, neither is in the bank that scores them; as two, one may be."""
    odd = [good_patches(seed, border=1.0) for seed in (50, 50)]
    odd = [features_hwF + 30 for features_hwF in odd]
    features = [*odd, *(good_patches(seed, border=1.0) for seed in range(10))]
    inside = [torch.ones(H, W, dtype=torch.bool)] * len(features)
    together, apart = (
        torch.stack(Bank.estimate(features, inside, np.array(scenes))[1]).amax((1, 2))
        for scenes in ([0, 0, *range(1, 11)], range(12))
    )
    assert together[:2].min() > 3 * together[2:].max()
    assert apart[:2].max() < apart[2:].max()


def test_what_is_not_shown_is_not_judged() -> None:
    """Cells beyond the edge of an aligned image are neither in the bank nor unusual."""
    features = [good_patches(seed, border=1.0) for seed in range(12)]
    inside_hw = torch.ones(H, W, dtype=torch.bool)
    inside_hw[:, -4:] = False
    for features_hwF in features:
        features_hwF[:, -4:] = 100
    bank, _ = Bank.estimate(features, [inside_hw] * 12, np.arange(12))
    assert bank.patches_MF.max() < 50
    marked = good_patches(100, border=1.0)
    marked[:, -4:] = -100
    assert (bank.map(marked, inside_hw)[:, -2:] == 0).all()


def test_the_progress_names_each_bank_that_is_made() -> None:
    features, done = [good_patches(seed) for seed in range(7)], list[Progress]()
    inside = [torch.ones(H, W, dtype=torch.bool)] * 7
    Bank.estimate(features, inside, np.arange(7), done.append)
    assert done == [Progress("compare features", number, FOLDS + 1) for number in range(FOLDS + 2)]
