"""The score of soft stains: what they do to patches at a place, learned from stains in good images."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from ncml.images.random_marks import STAIN, add_marks
from ncml.images.tiling import Box
from ncml.ood.detection import box_of
from ncml.ood.views import moments, stains
from ncml.ood.views.places import Places
from ncml.ood.views.stains import Averaged, Stained, Stains

FEATURES = 6
SHOWN = torch.ones(24, 32, dtype=torch.bool)


def good_patches(seed: int) -> torch.Tensor:
    """Return patches of a good image, which differ by place and from image to image, [24, 32, F]."""
    by_place = torch.randn(24, 32, FEATURES, generator=torch.Generator().manual_seed(0))
    return 3 * by_place + torch.randn(24, 32, FEATURES, generator=torch.Generator().manual_seed(1 + seed))


def stained_patches(seed: int, strength: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return patches that a stain raises in the second feature, and its share of each pixel."""
    rng = np.random.default_rng(seed)
    top, left = (int(rng.integers(side - 8)) for side in (24, 32))
    share_hw = torch.zeros(24, 32)
    share_hw[top : top + 8, left : left + 8] = 1
    patches_hwF = good_patches(seed)
    patches_hwF[..., 1] += strength * float(rng.choice([-1.0, 1.0])) * share_hw
    return patches_hwF, share_hw.repeat_interleave(8, 0).repeat_interleave(8, 1)


def estimated(
    count: int = 20, scenes_N: np.ndarray | None = None
) -> tuple[Stains, np.ndarray, list[Averaged], dict[int, Stained]]:
    images = [Averaged.of(good_patches(seed), SHOWN) for seed in range(count)]
    stained: dict[int, Stained] = {}
    for seed in range(count):
        patches_hwF, share_HW = stained_patches(seed)
        stained[seed] = Stained.of(Averaged.of(patches_hwF, SHOWN), share_HW)
    view, scores_N = Stains.estimate(images, stained, np.arange(count) if scenes_N is None else scenes_N)
    return view, scores_N, images, stained


def test_a_stain_is_found_that_changes_no_patch_much() -> None:
    view, scores_N, _, _ = estimated()
    count = len(scores_N)
    good = [good_patches(seed) for seed in range(count)]
    places, distances_N = Places.estimate(good, [SHOWN] * count, np.arange(count), 0)
    patches_hwF, share_HW = stained_patches(100, strength=1.5)
    candidates = view.candidates(patches_hwF, SHOWN)
    assert float(candidates.scores_K.max()) > scores_N.max() + 3
    row, column = divmod(int(candidates.maps_K[0].argmax()), 16)
    assert share_HW[16 * row + 8, 16 * column + 8] == 1
    assert float(places.candidates(patches_hwF, SHOWN).scores_K) < np.quantile(distances_N, 0.9)
    unstained = view.candidates(good_patches(101), SHOWN)
    assert float(unstained.scores_K.max()) < scores_N.max() + 1


def test_the_box_of_an_image_that_no_patch_of_resembles_a_stain_covers_what_does_most() -> None:
    view, scores_N, _, _ = estimated()
    patches_hwF = torch.stack([good_patches(seed) for seed in range(len(scores_N))]).mean(0)
    patches_hwF[12:20, 20:28, 1] += 0.2
    candidates = view.candidates(patches_hwF, SHOWN)
    assert float(candidates.scores_K[0]) < 0
    box = box_of(candidates.maps_K[0].numpy(), Box(0, 0, 256, 192))
    assert box == (160, 96, 64, 64)


def test_the_score_is_the_largest_ratio_of_two_t_distributions_of_the_difference_from_the_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a slow twin: the mean, the deviations and the distributions of each image leave out its scene."""
    monkeypatch.setattr(moments, "PRIOR", 0)
    scenes_N = np.array([0, 1, 2, 2, 3, 4, 5])
    view, scores_N, images, stained = estimated(7, scenes_N)
    averaged = np.stack([own.features_hwF.double().numpy() for own in images])

    def around(map_hw: np.ndarray) -> np.ndarray:
        means = [
            map_hw[max(0, i - 2) : i + 3, max(0, j - 2) : j + 3].mean()
            for i in range(map_hw.shape[0])
            for j in range(map_hw.shape[1])
        ]
        return np.reshape(means, map_hw.shape)

    def without(scene: int) -> np.ndarray:
        return averaged[scenes_N != scene].mean(0)

    differences = np.stack([own - without(scene) for own, scene in zip(averaged, scenes_N, strict=True)])

    def deviation(kept_N: np.ndarray) -> np.ndarray:
        variance = around((differences[kept_N] ** 2).mean(3).mean(0))
        return np.sqrt(variance + stains.LEAST_SHARE * variance.mean())

    deviations = [deviation(scenes_N != scene) for scene in scenes_N]
    standard = [own / scale[..., None] for own, scale in zip(differences, deviations, strict=True)]

    def distribution(patches_PF: np.ndarray) -> Any:
        covariance = np.cov(patches_PF.T, bias=True) + stains.RIDGE * np.eye(FEATURES)
        distributions: Any = stats
        return distributions.multivariate_t(patches_PF.mean(0), covariance, df=stains.FREEDOM)

    def ratio(kept: list[int]) -> tuple[Any, Any]:
        covered = []
        for i in kept:
            cells_P = stained[i].cells_P.numpy()
            difference_PF = stained[i].features_PF.numpy() - without(scenes_N[i]).reshape(-1, FEATURES)[cells_P]
            covered.append(difference_PF / deviations[i].reshape(-1, 1)[cells_P])
        good = np.concatenate([standard[i].reshape(-1, FEATURES) for i in kept])
        return distribution(good), distribution(np.concatenate(covered))

    for i, scene in enumerate(scenes_N):
        good, spoiled = ratio(np.flatnonzero(scenes_N != scene).tolist())
        expected = (spoiled.logpdf(standard[i]) - good.logpdf(standard[i])).max()
        assert scores_N[i] == pytest.approx(expected, rel=1e-3, abs=1e-3)
    query_hwF = stained_patches(50)[0]
    own = Averaged.of(query_hwF, SHOWN).features_hwF.double().numpy() - averaged.mean(0)
    own /= deviation(scenes_N >= 0)[..., None]
    good, spoiled = ratio(list(range(7)))
    expected_hw = spoiled.logpdf(own) - good.logpdf(own)
    candidates = view.candidates(query_hwF, SHOWN)
    assert float(candidates.scores_K[0]) == pytest.approx(expected_hw.max(), rel=1e-3, abs=1e-3)
    np.testing.assert_allclose(candidates.maps_K[0].numpy(), expected_hw - expected_hw.min(), rtol=1e-3, atol=1e-3)


def test_what_an_image_does_not_show_is_usual() -> None:
    view, _, _, _ = estimated(8)
    shown_hw = SHOWN.clone()
    shown_hw[:, 20:] = False
    plain_hwF, changed_hwF = good_patches(50), good_patches(50)
    changed_hwF[:, 21:] += 9
    plain, changed = (view.candidates(own, shown_hw) for own in (plain_hwF, changed_hwF))
    assert torch.equal(plain.maps_K[0], changed.maps_K[0])
    assert torch.equal(plain.scores_K, changed.scores_K)
    nothing = view.candidates(plain_hwF, torch.zeros_like(SHOWN))
    assert torch.isfinite(nothing.scores_K).all()
    assert float(nothing.scores_K[0]) < float(plain.scores_K[0])


def test_images_that_show_no_whole_patch_have_finite_scores() -> None:
    images = [Averaged.of(good_patches(seed), torch.zeros_like(SHOWN)) for seed in range(4)]
    view, scores_N = Stains.estimate(images, {}, np.arange(4))
    assert np.isfinite(scores_N).all()
    assert torch.isfinite(view.candidates(good_patches(9), SHOWN).scores_K).all()


def test_places_that_few_good_images_show_are_not_judged() -> None:
    shown_hw = SHOWN.clone()
    shown_hw[:8] = False
    images = [Averaged.of(good_patches(seed), SHOWN if seed < 3 else shown_hw) for seed in range(10)]
    patches_hwF, share_HW = stained_patches(1)
    stained = {0: Stained.of(Averaged.of(patches_hwF, SHOWN), share_HW)}
    view, scores_N = Stains.estimate(images, stained, np.arange(10))
    assert np.isfinite(scores_N).all()
    patches_hwF = good_patches(50)
    patches_hwF[:6, :, 1] += 9
    assert float(view.candidates(patches_hwF, SHOWN).maps_K[0][:3].max()) == 0


def test_stains_are_stored_and_damaged_ones_refused() -> None:
    view, _, _, _ = estimated(5)
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in view.store().items()}
    loaded = Stains.load(tensors, (24, 32), FEATURES)
    query_hwF = stained_patches(50)[0]
    for own, again in zip(view.candidates(query_hwF, SHOWN), loaded.candidates(query_hwF, SHOWN), strict=True):
        assert all(map(torch.equal, own, again))
    for name, damaged in (("stains.mean", torch.zeros(3)), ("stains.centres", torch.zeros(3))):
        with pytest.raises(ValueError, match="its"):
            Stains.load(tensors | {name: damaged}, (24, 32), FEATURES)


def test_without_a_patch_that_a_stain_covers_the_score_is_finite() -> None:
    _, _, images, stained = estimated(5)
    nothing = Stained(stained[0].features_PF[:0], stained[0].cells_P[:0])
    view, scores_N = Stains.estimate(images, {0: nothing}, np.arange(5))
    assert np.isfinite(scores_N).all()
    assert torch.isfinite(view.candidates(good_patches(9), SHOWN).scores_K).all()


def test_stains_are_soft_and_tinted() -> None:
    image_HWC = np.full((240, 320, 3), 128, np.uint8)
    for seed in range(5):
        stained_HWC, shares_1HW = add_marks(image_HWC, np.random.default_rng(seed), 1, kinds=(STAIN,))
        change_HWC = np.abs(stained_HWC.astype(int) - image_HWC)
        assert shares_1HW.shape == (1, 240, 320)
        assert 5 <= change_HWC.max() <= 45
        assert (change_HWC[shares_1HW[0] == 0] == 0).all()
        assert np.abs(np.diff(shares_1HW[0], axis=0)).max() < 0.3
        red, green, blue = change_HWC.reshape(-1, 3).max(0).tolist()
        assert len({red, green, blue}) > 1
