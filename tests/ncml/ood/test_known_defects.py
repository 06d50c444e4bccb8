"""What distinguishes known defects from the most unusual patches of good images."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ncml.data.scenes import fold_scenes
from ncml.ood.views.known_defects import (
    DEFECTIVE,
    DEFECTIVE_FOLDS,
    UNUSUAL,
    Discriminant,
    KnownDefects,
    most_unusual,
)
from ncml.ood.views.moments import Moments

FEATURES = 12


def patches(seed: int, defect: int | None = None, features: int = FEATURES) -> Tensor:
    """Return the most unusual patches of an image; a defect changes one feature of four of them.

    The first feature varies much more than the others, in good images and in defective ones.
    """
    unusual_PF = torch.randn(UNUSUAL, features, generator=torch.Generator().manual_seed(seed))
    unusual_PF[:, 0] *= 10
    if defect is not None:
        unusual_PF[:4, defect] += 4
    return unusual_PF


def learned(defective: list[Tensor], scenes: list[int] | None = None) -> tuple[KnownDefects, np.ndarray, np.ndarray]:
    good = [patches(seed) for seed in range(30)]
    return KnownDefects.estimate(good, np.arange(30), defective, np.array(scenes or range(len(defective))))


def test_a_discriminant_is_that_of_fisher() -> None:
    """Beside the inverse of the pooled covariance, computed by numpy."""
    good_PF, defective_PF = patches(0), patches(1, 3)[:DEFECTIVE]
    groups = [group_PF.double().numpy() for group_PF in (good_PF, defective_PF)]
    centred_PF = np.concatenate([group_PF - group_PF.mean(0) for group_PF in groups])
    covariance_FF = centred_PF.T @ centred_PF / len(centred_PF) + 0.3 * np.eye(FEATURES)
    weight_F = np.linalg.inv(covariance_FF) @ (groups[1].mean(0) - groups[0].mean(0))
    discriminant = Discriminant.between(Moments.of([good_PF]), Moments.of([defective_PF]))
    np.testing.assert_allclose(discriminant.weight_F.numpy(), weight_F, rtol=1e-5)
    middle_F = torch.from_numpy(groups[0].mean(0) + groups[1].mean(0)).float() / 2
    assert float(discriminant(middle_F)) == pytest.approx(0, abs=1e-5)


def test_defects_like_the_known_ones_are_found_and_others_are_not() -> None:
    known, good_N, _ = learned([patches(100 + i, 3) for i in range(5)])
    fresh, same, other = (
        np.array([known.score(patches(seed + i, defect)) for i in range(50)])
        for seed, defect in ((200, None), (300, 3), (400, 7))
    )
    assert np.median(same) > max(good_N.max(), fresh.max())
    assert abs(np.median(other) - np.median(fresh)) < 1


def test_good_images_are_scored_as_new_ones_are() -> None:
    """With the patches of the image itself among the good ones, its own score would be too low (by 1 here)."""
    good, defective = ([patches(seed + i, defect, 176) for i in range(16)] for seed, defect in ((0, None), (100, 3)))
    known, good_N, _ = KnownDefects.estimate(good, np.arange(16), defective[:3], np.arange(3))
    fresh = np.array([known.score(patches(200 + i, features=176)) for i in range(300)])
    assert np.mean(good_N) == pytest.approx(0, abs=1e-9)
    assert np.mean(fresh) == pytest.approx(0, abs=0.5)
    assert np.std(fresh) == pytest.approx(1, abs=0.4)


def test_a_defective_image_is_scored_without_its_part_of_the_scenes() -> None:
    defective, scenes = [patches(100 + i, 3 if i < 7 else 7) for i in range(8)], [0, 1, 2, 3, 4, 5, 5, 6]
    _, _, scores = learned(defective, scenes)
    for i, scene in enumerate(scenes):
        others = [defective[j] for j, other in enumerate(scenes) if other != scene]
        assert scores[i] == pytest.approx(learned(others)[0].score(defective[i]), abs=1e-4)
    assert scores[:7].min() > scores[7] + 2  # the only one with its defect
    alone = learned([patches(100, 3), patches(101, 3)], [5, 5])[2]
    assert alone.tolist() == [0, 0]


def test_scenes_have_parts_of_their_own_up_to_ten() -> None:
    assert fold_scenes(np.array([7, 3, 7, 40]), DEFECTIVE_FOLDS).tolist() == [1, 0, 1, 2]
    assert sorted(set(fold_scenes(np.arange(35), DEFECTIVE_FOLDS).tolist())) == [*range(DEFECTIVE_FOLDS)]


def test_only_unusual_patches_are_judged() -> None:
    """A patch like a defect counts only if it is among the most unusual ones of its image."""
    known, _, _ = learned([patches(100 + i, 3) for i in range(5)])
    query_hwF = torch.randn(16, 16, FEATURES, generator=torch.Generator().manual_seed(0))
    query_hwF[4, 5, 3] += 6
    unusual_hw = torch.rand(16, 16, generator=torch.Generator().manual_seed(1))
    scores = []
    for value in (0.0, 2.0):
        unusual_hw[4, 5] = value
        candidates = known.candidates(query_hwF, unusual_hw)
        scores.append(float(candidates.scores_K))
        assert scores[-1] == pytest.approx(known.score(most_unusual(query_hwF, unusual_hw)), abs=1e-5)
        (map_hw,) = candidates.maps_K
        assert int((map_hw > 0).sum()) == UNUSUAL - 1
        assert float(map_hw.min()) == 0
    assert scores[1] > scores[0] + 3
    assert int(map_hw.argmax()) == 4 * 16 + 5


def test_an_image_of_few_patches_is_judged_by_all() -> None:
    features_hwF = torch.randn(2, 3, FEATURES)
    unusual_PF = most_unusual(features_hwF, torch.tensor([[0.0, 3, 1], [5, 2, 4]]))
    assert torch.equal(unusual_PF, features_hwF.flatten(0, 1)[[3, 5, 1, 4, 2, 0]])


def test_what_was_stored_is_checked() -> None:
    known, _, _ = learned([patches(100, 3)])
    tensors = {name: torch.from_numpy(array) for name, array in known.store().items()}
    loaded = KnownDefects.load(tensors, FEATURES)
    assert loaded is not None
    assert loaded.score(patches(300, 3)) == pytest.approx(known.score(patches(300, 3)), abs=1e-4)
    assert KnownDefects.load({}, FEATURES) is None
    with pytest.raises(ValueError, match="another shape"):
        KnownDefects.load(tensors, FEATURES + 1)
    with pytest.raises(ValueError, match="no deviation"):
        KnownDefects.load({**tensors, "known_defects.typical": torch.tensor([0.0, 0.0])}, FEATURES)
    del tensors["known_defects.offset"]
    with pytest.raises(LookupError):
        KnownDefects.load(tensors, FEATURES)
