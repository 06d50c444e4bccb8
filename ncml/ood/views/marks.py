"""Marks on a texture, recognised by what marks do to patches.

A patch can differ from all good ones in many ways, most of them harmless. So marks of random sizes and contrasts are
put into good images (`ncml.images.random_marks`). For each kind, a patch is compared by two Gaussians, of good patches
and of those that such a mark covers: how much likelier is the patch with the mark than without? The value of a
patch is log(1 + log ratio), and 0 where the ratio is below 1: a few good patches are extremely unlike the others, and
the second logarithm keeps them from deciding.

Shapes: N images, h and w rows and columns of cells, P patches, F features, K kinds of marks; G is K + 1 groups of
patches, good ones first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ncml.data.blocks import evenly_spaced
from ncml.data.scenes import fold_scenes, members
from ncml.images.random_marks import KINDS, add_marks
from ncml.network.efficientnet import EfficientNetLite0
from ncml.ood.conformal import Floats
from ncml.ood.views.extremes import largest_excess, typical
from ncml.ood.views.moments import Moments, invert
from ncml.ood.views.patches import CELL, Candidates, judged_resize, patch_features
from ncml.ood.views.view import Pixels

IMAGES, COPIES, MARKS = 30, 2, 16
"""Images into which marks are put at most, copies of each, and marks in a copy."""
COVERED = 0.3
"""Share of its contrast that a mark has somewhere in a patch that it covers."""
RIDGE = 0.2
"""Added to the variance of each feature, which is about 1."""
LEAST_DEVIATION = 0.5
"""Smallest deviation of a map's largest value over good images: it is 0 where none resembles a mark of a kind."""
LEAST_SCALE = 0.5
"""Smallest deviation by which the score is standardised: it is equal for all good images if none resembles a mark."""
FOLDS = 10
"""Parts of the scenes, each of which is scored without itself."""


class Marked(NamedTuple):
    """Patches that marks cover in copies of a good image."""

    features_PF: Tensor
    covered_KP: Tensor
    """Whether a mark of each kind covers a patch, bool."""

    @classmethod
    def of(
        cls,
        network: EfficientNetLite0,
        image_HWC: Pixels,
        judged_size: tuple[int, int],
        deviation_F: Tensor,
        seed: int,
        judged_HW: NDArray[np.bool_] | None = None,
    ) -> Self:
        """Put marks into an image as it is judged or, if it is enlarged for that, as it is: no mark is thinner.

        judged_HW: the pixels of the image that marks change; None: all.
        """
        resize = judged_resize(judged_size)
        is_enlarged = judged_size[0] > image_HWC.shape[0]
        good_HWC = image_HWC if is_enlarged else resize(image_HWC)
        if judged_HW is not None and not is_enlarged:
            judged_HW = resized_mask(judged_HW, judged_size)
        parts: list[Tensor] = []
        covered: list[Tensor] = []
        for copy in range(COPIES):
            marked_HWC, shares_KHW = add_marks(good_HWC, np.random.default_rng([seed, copy]), MARKS, judged_HW)
            shares = torch.from_numpy(shares_KHW)
            if is_enlarged:
                marked_HWC = resize(marked_HWC)
                shares = F.interpolate(shares[None], judged_size, mode="bilinear")[0]
            covered_Khw = (F.max_pool2d(shares, CELL) >= COVERED).to(deviation_F.device)
            is_covered_hw = covered_Khw.any(0)
            parts.append((patch_features(network, marked_HWC) / deviation_F)[is_covered_hw])
            covered.append(covered_Khw[:, is_covered_hw])
        return cls(torch.cat(parts), torch.cat(covered, 1))


@dataclass(frozen=True)
class Marks:
    """For each kind of mark, the logarithm of the ratio of two Gaussians: a quadratic function of a patch."""

    name: ClassVar[str] = "marks"

    centre_F: Tensor
    quadratic_KFF: Tensor
    linear_KF: Tensor
    constant_K: Tensor
    typical_K2: Floats
    """Mean and deviation over good images of the largest value of a map, by kind."""

    @classmethod
    def estimate(
        cls, features: Sequence[Tensor], marked: Mapping[int, Marked], scenes_N: NDArray[np.int64]
    ) -> tuple[Self, Floats]:
        """Estimate from good images, and marked patches by position; return each image's score without its own fold."""
        folds_N = fold_scenes(scenes_N, FOLDS)
        common_F = torch.stack([own.flatten(0, 1).double().mean(0) for own in features]).mean(0)
        folds = members(folds_N)
        moments: list[Moments] = []
        for own in folds:
            copies = [marked[i] for i in own if i in marked]
            covered = [[copy.features_PF[copy.covered_KP[kind]] for copy in copies] for kind in range(len(KINDS))]
            moments.append(Moments.of([features[i].flatten(0, 1) for i in own], *covered, common_F=common_F))
        largest_NK = np.empty((len(features), len(KINDS)))
        for fold, own in enumerate(folds):
            others = cls._of(Moments.without(moments, fold), common_F)
            for i in own:
                largest_NK[i] = [float(map_hw.max()) for map_hw in others._maps(features[i].float())]
        view = cls._of(Moments.sum(moments), common_F)
        return replace(view, typical_K2=typical(largest_NK, LEAST_DEVIATION)), largest_excess(
            largest_NK, folds_N, LEAST_DEVIATION
        )

    @classmethod
    def _of(cls, moments: Moments, common_F: Tensor) -> Self:
        mean_GF, covariance_GFF = moments.gaussians(RIDGE)
        difference_KF = mean_GF[1:] - mean_GF[:1]
        precision_GFF, logdet_G = invert(covariance_GFF)
        linear_KF = (precision_GFF[1:] @ difference_KF[:, :, None])[:, :, 0]
        constant_K = (logdet_G[:1] - logdet_G[1:] - (linear_KF * difference_KF).sum(1)) / 2
        quadratic_KFF = (precision_GFF[:1] - precision_GFF[1:]) / 2
        parts = (own.float() for own in (common_F + mean_GF[0], quadratic_KFF, linear_KF, constant_K))
        return cls(*parts, typical_K2=np.tile([0.0, 1.0], (len(KINDS), 1)))

    def candidates(self, query_hwF: Tensor) -> Candidates:
        """Return the score of an image for each kind of mark, and its map."""
        return Candidates.beyond(self.typical_K2, self._maps(query_hwF))

    def _maps(self, query_hwF: Tensor) -> tuple[Tensor, ...]:
        centred_hwF = query_hwF - self.centre_F
        return tuple(
            torch.log1p((((centred_hwF @ quadratic_FF + linear_F) * centred_hwF).sum(2) + constant).clamp(min=0))
            for quadratic_FF, linear_F, constant in zip(
                self.quadratic_KFF, self.linear_KF, self.constant_K, strict=True
            )
        )

    def store(self) -> dict[str, NDArray[Any]]:
        """Return the arrays."""
        return {
            "marks.centre": self.centre_F.cpu().numpy(),
            "marks.quadratic": self.quadratic_KFF.cpu().numpy(),
            "marks.linear": self.linear_KF.cpu().numpy(),
            "marks.constant": self.constant_K.cpu().numpy(),
            "marks.typical": self.typical_K2.astype(np.float32),
        }

    @classmethod
    def load(cls, tensors: dict[str, Tensor], features: int) -> Self:
        """Read the arrays; raises LookupError or ValueError for damaged ones."""
        parts = tuple(tensors[f"marks.{name}"] for name in ("centre", "quadratic", "linear", "constant"))
        typical_K2 = tensors["marks.typical"].cpu().double().numpy()
        K = len(typical_K2)
        shapes = [tuple(part.shape) for part in parts]
        if shapes != [(features,), (K, features, features), (K, features), (K,)] or typical_K2.shape != (K, 2):
            raise ValueError("its Gaussians of marks have another shape")
        if K == 0 or not bool((typical_K2[:, 1] > 0).all()):
            raise ValueError("its typical ratios of marks have no deviation")
        return cls(*parts, typical_K2=typical_K2)


def resized_mask(mask_HW: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return a mask at a size, True where its share is at least half of the largest: never empty if the mask is not."""
    share_HW = F.interpolate(torch.from_numpy(mask_HW)[None, None].float(), size, mode="area")[0, 0]
    return (share_HW >= share_HW.max() / 2).numpy()


def marked_images(count: int) -> NDArray[np.int64]:
    """Return the positions of the images into which marks are put, at most `IMAGES`, evenly spaced."""
    return evenly_spaced(count, IMAGES)
