"""The score of marks: what marks do to patches, learned from marks in good images."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from ncml.images.random_marks import KINDS, add_marks
from ncml.network import efficientnet
from ncml.ood.detector_calibration import Scale
from ncml.ood.views import marks, moments
from ncml.ood.views.marks import Marked, Marks, marked_images
from ncml.ood.views.patches import Candidates, patch_features

FEATURES = 4


def good_patches(seed: int) -> torch.Tensor:
    """Return patches of a good image, which differ most in the first feature."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 16, FEATURES, generator=generator) * torch.tensor([3.0, 1, 1, 1])


def marked_patches(seed: int, count: int = 60) -> Marked:
    """Return patches in which a mark of each kind raises another feature, the second, third or fourth."""
    generator = torch.Generator().manual_seed(1000 + seed)
    patches_PF = good_patches(500 + seed).flatten(0, 1)[:count]
    kinds_P = torch.arange(count) % len(KINDS)
    raised_PF = 4 * torch.nn.functional.one_hot(kinds_P + 1, FEATURES) * torch.rand(count, 1, generator=generator)
    return Marked(patches_PF + raised_PF, torch.stack([kinds_P == kind for kind in range(len(KINDS))]))


def estimated(count: int = 12) -> tuple[Marks, np.ndarray]:
    good = [good_patches(seed) for seed in range(count)]
    marked = {int(i): marked_patches(int(i)) for i in marked_images(count)}
    return Marks.estimate(good, marked, np.arange(count))


def test_a_mark_is_found_where_a_larger_harmless_difference_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marks, "LEAST_DEVIATION", 0.1)  # ratios of four features vary less than those of a network's
    found, scores_N = estimated()
    harmless, spoiled = good_patches(100), good_patches(100)
    harmless[3, 5] = torch.tensor([9.0, 0, 0, 0])
    spoiled[3, 5] = torch.tensor([0, 0, 5.0, 0])
    candidates = found.candidates(spoiled)
    best = int(candidates.scores_K.argmax())
    assert best == 1
    assert divmod(int(candidates.maps_K[best].argmax()), 16) == (3, 5)
    usual = max(scores_N.max(), float(found.candidates(good_patches(101)).scores_K.max()))
    assert float(candidates.scores_K.max()) > usual + 1 > float(found.candidates(harmless).scores_K.max())


def test_a_map_is_the_ratio_of_two_gaussians(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "PRIOR", 0)
    good = [good_patches(seed) for seed in range(5)]
    marked = {i: marked_patches(i) for i in range(5)}
    found, _ = Marks.estimate(good, marked, np.arange(5))

    def gaussian(patches_PF: torch.Tensor) -> MultivariateNormal:
        covariance_FF = torch.cov(patches_PF.double().T, correction=0) + marks.RIDGE * torch.eye(FEATURES)
        return MultivariateNormal(patches_PF.double().mean(0), covariance_FF)

    query_hwF = good_patches(200) + 1.5
    usual = gaussian(torch.cat([own.flatten(0, 1) for own in good])).log_prob(query_hwF.double())
    for kind, map_hw in enumerate(found.candidates(query_hwF).maps_K):
        covered_PF = torch.cat([own.features_PF[own.covered_KP[kind]] for own in marked.values()])
        ratio_hw = gaussian(covered_PF).log_prob(query_hwF.double()) - usual
        torch.testing.assert_close(map_hw.double(), torch.log1p(ratio_hw.clamp(min=0)), rtol=1e-4, atol=1e-4)


def test_scores_of_good_images_are_those_without_their_own_scene() -> None:
    """By brute force: estimate without the scene, and standardise by the images of the others."""
    scenes_N = np.array([0, 1, 2, 2, 3, 4])
    good = [good_patches(seed) for seed in range(6)]
    good[3] = good[2] + 0.3
    marked = {i: marked_patches(i) for i in range(6)}
    found, scores_N = Marks.estimate(good, marked, scenes_N)
    largest_NK = np.empty((6, len(KINDS)))
    for i, scene in enumerate(scenes_N):
        kept = np.flatnonzero(scenes_N != scene).tolist()
        others, _ = Marks.estimate([good[j] for j in kept], {n: marked[j] for n, j in enumerate(kept)}, scenes_N[kept])
        largest_NK[i] = [float(map_hw.max()) for map_hw in others.candidates(good[i]).maps_K]
    for i, scene in enumerate(scenes_N):
        others_MK = largest_NK[scenes_N != scene]
        expected = ((largest_NK[i] - others_MK.mean(0)) / np.maximum(others_MK.std(0), marks.LEAST_DEVIATION)).max()
        assert scores_N[i] == pytest.approx(expected, rel=1e-3)
    deviation_K = np.maximum(largest_NK.std(0), marks.LEAST_DEVIATION)
    np.testing.assert_allclose(found.typical_K2, np.stack([largest_NK.mean(0), deviation_K], 1), rtol=1e-3)


def test_where_no_good_image_resembles_a_mark_a_slight_resemblance_is_not_unusual(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Deviations of 0 would make any ratio above 1, and the rounding of one, extremely unusual."""
    monkeypatch.setattr(moments, "PRIOR", 0)
    good = [0.3 * good_patches(seed) for seed in range(12)]
    far = [Marked(5 + own.features_PF, own.covered_KP) for own in map(marked_patches, range(12))]
    found, scores_N = Marks.estimate(good, dict(enumerate(far)), np.arange(12))
    assert (found.typical_K2[:, 0] == 0).all()
    assert (scores_N == 0).all()
    ratio = float(np.log1p(0.05))
    slight = Candidates.beyond(found.typical_K2, tuple(torch.full((2, 2), ratio) for _ in KINDS))
    assert float(slight.scores_K.max()) < 1
    assert float(found.candidates(far[0].features_PF[None]).scores_K.max()) > 10


def test_features_whose_mean_is_far_above_their_deviation_give_the_same_maps() -> None:
    """Sums of products of such features, which fp32 rounds, are not those of a Gaussian."""
    good, marked = [good_patches(seed) for seed in range(4)], {i: marked_patches(i) for i in range(4)}
    far = {i: Marked(own.features_PF + 4096, own.covered_KP) for i, own in marked.items()}
    near_maps = Marks.estimate(good, marked, np.arange(4))[0].candidates(good_patches(9) + 1).maps_K
    found, scores_N = Marks.estimate([own + 4096 for own in good], far, np.arange(4))
    assert np.isfinite(scores_N).all()
    for far_hw, near_hw in zip(found.candidates(good_patches(9) + 1 + 4096).maps_K, near_maps, strict=True):
        torch.testing.assert_close(far_hw, near_hw, rtol=0, atol=0.01)


def test_without_a_patch_that_a_mark_covers_the_score_is_finite() -> None:
    nothing = Marked(torch.empty(0, FEATURES), torch.empty(len(KINDS), 0, dtype=torch.bool))
    found, scores_N = Marks.estimate([good_patches(seed) for seed in range(4)], {0: nothing}, np.arange(4))
    assert np.isfinite(scores_N).all()
    assert torch.isfinite(found.candidates(good_patches(9)).scores_K).all()


@pytest.mark.parametrize("level", [0, 3, 252, 255])
def test_a_mark_that_black_or_white_hides_covers_nothing(level: int) -> None:
    image_HWC = np.full((96, 128, 3), level, np.uint8)
    marked_HWC, shares_KHW = add_marks(image_HWC, np.random.default_rng(0), 12)
    change_HW = np.abs(marked_HWC.astype(int) - image_HWC).max(2)
    assert shares_KHW.max() > 0.9
    assert (change_HW[shares_KHW.max(0) > 0.9] > 5).mean() > 0.9


@pytest.mark.parametrize("shape", [(96, 128), (32, 512)])
def test_marks_change_an_image_where_their_shares_say(shape: tuple[int, int]) -> None:
    image_HWC = np.full((*shape, 3), 128, np.uint8)
    marked_HWC, shares_KHW = add_marks(image_HWC, np.random.default_rng(0), 6)
    assert (marked_HWC == add_marks(image_HWC, np.random.default_rng(0), 6)[0]).all()
    is_changed_HW = (marked_HWC != image_HWC).any(2)
    assert is_changed_HW.any()
    assert not is_changed_HW[shares_KHW.max(0) == 0].any()
    assert is_changed_HW[shares_KHW.max(0) > 0.9].mean() > 0.9
    for kind in range(len(KINDS)):
        assert shares_KHW[kind].max() > 0.5


@pytest.mark.parametrize(("side", "drawn"), [(32, 32), (96, 96), (160, 96)])
def test_marks_have_the_widths_of_pixels_of_the_image_unless_it_is_reduced(
    side: int, drawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def record(image_HWC: np.ndarray, *others: Any) -> tuple[np.ndarray, np.ndarray]:
        sizes.append(len(image_HWC))
        return add_marks(image_HWC, *others)

    monkeypatch.setattr(marks, "add_marks", record)
    image_HWC = np.full((side, side, 3), 128, np.uint8)
    network = efficientnet.load("cpu")
    plain_F = patch_features(network, np.full((96, 96, 3), 128, np.uint8))[6, 6]
    marked = Marked.of(network, image_HWC, (96, 96), torch.ones(len(plain_F)), seed=0)
    assert sizes == [drawn] * marks.COPIES
    assert marked.features_PF.shape == (marked.covered_KP.shape[1], len(plain_F))
    assert marked.covered_KP.any(0).all()
    assert ((marked.features_PF - plain_F).abs().amax(1) > 0.1).float().mean() > 0.95  # what is covered has changed


@pytest.mark.parametrize("corner", [(slice(0, 24), slice(0, 24)), (slice(200, 208), slice(60, 256))])
def test_marks_change_only_what_a_mask_judges_and_lie_there(corner: tuple[slice, slice]) -> None:
    image_HWC = np.full((208, 256, 3), 128, np.uint8)
    judged_HW = np.zeros((208, 256), bool)
    judged_HW[corner] = True
    marked_HWC, shares_KHW = add_marks(image_HWC, np.random.default_rng(0), 9, judged_HW)
    is_changed_HW = (marked_HWC != image_HWC).any(2)
    assert not is_changed_HW[~judged_HW].any()
    assert (shares_KHW[:, ~judged_HW] == 0).all()
    assert is_changed_HW[judged_HW].mean() > 0.1
    for kind in range(len(KINDS)):
        assert shares_KHW[kind].max() > 0.5


@pytest.mark.parametrize(("side", "drawn"), [(96, 96), (192, 96), (64, 64)])
def test_a_mask_is_judged_at_the_size_at_which_marks_are_put(
    side: int, drawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one of thin lines, which a smaller image only half shows."""
    masks: list[np.ndarray] = []

    def record(*arguments: Any) -> tuple[np.ndarray, np.ndarray]:
        masks.append(arguments[3])
        return add_marks(*arguments)

    monkeypatch.setattr(marks, "add_marks", record)
    judged_HW = np.zeros((96, 96), bool)
    judged_HW[:, 12::24] = True
    image_HWC = np.full((96, 96, 3), 128, np.uint8)
    network = efficientnet.load("cpu")
    deviation_F = torch.ones(patch_features(network, image_HWC).shape[2])
    marked = Marked.of(network, image_HWC, (side, side), deviation_F, 0, judged_HW)
    assert marked.covered_KP.any(1).all()
    for mask_HW in masks:
        assert np.flatnonzero(mask_HW.all(0)).tolist() == [column * drawn // 96 for column in (12, 36, 60, 84)]
        assert mask_HW.shape == (drawn, drawn)
        assert mask_HW.sum() == 4 * drawn


def test_covariances_are_inverted_with_any_number_of_threads() -> None:
    samples_GPF = np.random.default_rng(0).normal(size=(4, 400, 176))
    covariance_GFF = np.einsum("gpf,gpe->gfe", samples_GPF, samples_GPF) / 400
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # several LU decompositions at once are then wrong
    try:
        precision_GFF, logdet_G = moments.invert(torch.from_numpy(covariance_GFF))
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(precision_GFF.numpy(), np.linalg.inv(covariance_GFF), atol=1e-10)
    np.testing.assert_allclose(logdet_G.numpy(), np.linalg.slogdet(covariance_GFF)[1], rtol=1e-10)


def test_where_no_good_image_resembles_a_mark_one_that_hardly_does_is_not_extreme() -> None:
    scale = Scale.estimate(np.zeros(40), least_deviation=marks.LEAST_SCALE)
    slightly = 0.2 / marks.LEAST_DEVIATION
    assert 0 < scale.standardise(slightly) < 1
