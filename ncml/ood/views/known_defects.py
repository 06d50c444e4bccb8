"""Defects like those that are known, recognised by what distinguishes their patches from good ones.

Most of a defective image is good. So only its most unusual patches, by their distance from good ones (`bank.py`), count
as defective, and they are compared with the most unusual patches of good images: a linear discriminant weights the
features so that it ignores how good images differ (Fisher, Annals of Eugenics 7, 1936). The score of an image is the
largest value among its most unusual patches, standardised by the scores of good images.

Shapes: N good and D defective images, h and w rows and columns of cells, P patches, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncml.data.scenes import fold_scenes, members
from ncml.ood.conformal import Floats
from ncml.ood.views.extremes import typical
from ncml.ood.views.moments import Moments
from ncml.ood.views.patches import Candidates

UNUSUAL = 64
"""Patches of an image that are judged, the most unusual ones."""
DEFECTIVE = 16
"""Patches of a defective image that count as defective, among these."""
RIDGE = 0.3
"""Added to the variance of each feature, which is about 1."""
GOOD_FOLDS = 5
"""Parts of the scenes of good images, each of which is scored without itself."""
DEFECTIVE_FOLDS = 10
"""Parts of the scenes of defective images, likewise: one scene each if there are at most ten."""


@dataclass(frozen=True)
class Discriminant:
    """A linear function of patches, which is larger for defective than for good ones."""

    weight_F: Tensor
    """fp32."""
    offset: float

    @classmethod
    def between(cls, good: Moments, defective: Moments) -> Self:
        """Distinguish two groups of patches of about equal covariance; 0 lies in the middle of their means."""
        count_2, sum_2F, product_2FF = (torch.cat(own) for own in zip(good, defective, strict=True))
        good_F, defective_F = sum_2F / count_2[:, None]
        scatter_FF = (product_2FF - sum_2F[:, :, None] * sum_2F[:, None] / count_2[:, None, None]).sum(0)
        ridge_FF = RIDGE * torch.eye(len(good_F), dtype=good_F.dtype, device=good_F.device)
        factor_FF = torch.linalg.cholesky(scatter_FF / count_2.sum() + ridge_FF)
        weight_F = torch.cholesky_solve((defective_F - good_F)[:, None], factor_FF)[:, 0]
        return cls(weight_F.float(), -float(weight_F @ (good_F + defective_F)) / 2)

    def __call__(self, patches_F: Tensor) -> Tensor:
        """Return the value of each patch, [..., F] to [...]."""
        return patches_F @ self.weight_F + self.offset


@dataclass(frozen=True)
class KnownDefects:
    """What distinguishes known defects from the most unusual patches of good images."""

    name: ClassVar[str] = "known_defects"

    discriminant: Discriminant
    typical_2: Floats
    """Mean and deviation over good images of the score before it is standardised."""

    @classmethod
    def estimate(
        cls,
        good: Sequence[Tensor],
        scenes_N: NDArray[np.int64],
        defective: Sequence[Tensor],
        scenes_D: NDArray[np.int64],
    ) -> tuple[Self, Floats, Floats]:
        """Learn from the most unusual patches of each image (`most_unusual`), of one defective image at least.

        Returns also the score of each good and of each defective image, learned without its part of the scenes; that of
        defective images of a single scene is 0, as of good ones on average.
        """
        good_folds = members(fold_scenes(scenes_N, GOOD_FOLDS))
        defective_folds = members(fold_scenes(scenes_D, DEFECTIVE_FOLDS))
        of_good = [Moments.of([torch.cat([good[i] for i in own])]) for own in good_folds]
        of_defective = [Moments.of([torch.cat([defective[i][:DEFECTIVE] for i in own])]) for own in defective_folds]

        def learn(of_known: Moments) -> tuple[Self, Floats]:
            """Return the view, and the score of each good image, by what was learned without its part of the scenes."""
            largest_N = np.empty(len(good))
            for fold, own in enumerate(good_folds):
                discriminant = Discriminant.between(Moments.without(of_good, fold), of_known)
                largest_N[own] = [float(discriminant(good[i]).max()) for i in own]
            view = cls(Discriminant.between(Moments.sum(of_good), of_known), typical(largest_N))
            return view, (largest_N - view.typical_2[0]) / view.typical_2[1]

        view, good_N = learn(Moments.sum(of_defective))
        defective_D = np.zeros(len(defective))
        if len(defective_folds) > 1:
            for fold, own in enumerate(defective_folds):
                without, _ = learn(Moments.without(of_defective, fold))
                defective_D[own] = [without.score(defective[i]) for i in own]
        return view, good_N, defective_D

    def score(self, unusual_PF: Tensor) -> float:
        """Return the score of an image from its most unusual patches."""
        return (float(self.discriminant(unusual_PF).max()) - self.typical_2[0]) / self.typical_2[1]

    def candidates(self, query_hwF: Tensor, unusual_hw: Tensor) -> Candidates:
        """Return the score of an image, and a map of how much each patch resembles known defects.

        The map counts from the least, as values may all be negative; 0 where patches are not judged.
        unusual_hw: how unusual each patch is.
        """
        value_hw = self.discriminant(query_hwF)
        is_judged_hw = unusual_hw >= unusual_hw.flatten().topk(min(UNUSUAL, unusual_hw.numel())).values[-1]
        lowest = torch.where(is_judged_hw, value_hw, torch.inf).min()
        map_hw = torch.where(is_judged_hw, value_hw, lowest)
        return Candidates.beyond(self.typical_2[None], (map_hw,))._replace(maps_K=(map_hw - lowest,))

    def store(self) -> dict[str, NDArray[Any]]:
        """Return the arrays."""
        return {
            "known_defects.weight": self.discriminant.weight_F.cpu().numpy(),
            "known_defects.offset": np.array([self.discriminant.offset], np.float32),
            "known_defects.typical": self.typical_2.astype(np.float32),
        }

    @classmethod
    def load(cls, tensors: dict[str, Tensor], features: int) -> Self | None:
        """Read the arrays; None if no defect was known. Raises LookupError or ValueError for damaged ones."""
        if "known_defects.weight" not in tensors:
            return None
        weight_F, offset_1 = tensors["known_defects.weight"], tensors["known_defects.offset"]
        typical_2 = tensors["known_defects.typical"].cpu().double().numpy()
        if weight_F.shape != (features,) or offset_1.shape != (1,) or typical_2.shape != (2,):
            raise ValueError("its discriminant of known defects has another shape")
        if not typical_2[1] > 0:
            raise ValueError("its typical value of known defects has no deviation")
        return cls(Discriminant(weight_F, float(offset_1)), typical_2)


def most_unusual(features_hwF: Tensor, unusual_hw: Tensor) -> Tensor:
    """Return the features of the most unusual patches of an image, these first, [P, F] with at most `UNUSUAL`."""
    order_P = unusual_hw.flatten().topk(min(UNUSUAL, unusual_hw.numel())).indices
    return features_hwF.flatten(0, 1)[order_P].float()
