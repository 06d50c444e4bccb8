"""Soft stains on a part, recognised by what stains do to patches at a place.

A soft stain changes a patch no more than a turned light does, so its distance from other patches does not show it. But
it changes neighbouring patches alike, and in few directions. So patches are averaged over 4x4 cells, and their
differences from the mean of good images at the place, in units of what good images differ by there, are compared by two
t-distributions: of good images, and of stains that were put into them. The value of a patch is the logarithm of their
ratio, also below 0: where hardly any good patch resembles a stain, good images would all have the score 0. Normal
distributions would make a few good patches, which are extremely unlike the others, resemble a stain.

Shapes: N images, h and w rows and columns of a grid of every second cell, F features, P patches; the first dimension of
2 is good and stained patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ncml.data.scenes import fold_scenes, members
from ncml.ood.conformal import Floats
from ncml.ood.views.marks import COVERED, FOLDS
from ncml.ood.views.moments import Moments, invert
from ncml.ood.views.patches import CELL, Candidates
from ncml.ood.views.places import judged_places, mean_around

STAINS = 8
"""Stains in an image."""
LEAST_SHARE = 0.1
"""A variance is increased by this share of the mean variance."""
RIDGE = 0.05
"""Added to the variance of each feature, which is about 1 on average."""
FREEDOM = 100.0
"""Degrees of freedom of the t-distributions, of 176 features."""


class Averaged(NamedTuple):
    """Patches of an image, averaged over 4x4 cells around every second one."""

    features_hwF: Tensor
    inside_hw: Tensor
    """Whether the image shows all of these cells."""

    @classmethod
    def of(cls, features_hwF: Tensor, inside_hw: Tensor) -> Self:
        """Average the patches of an image, of an even number of rows and columns."""
        averaged = F.avg_pool2d(features_hwF.permute(2, 0, 1)[None], 4, 2, 1, count_include_pad=False)[0]
        outside_hw = F.max_pool2d(1 - inside_hw.float()[None, None], 4, 2, 1)[0, 0]
        return cls(averaged.permute(1, 2, 0), outside_hw == 0)


class Stained(NamedTuple):
    """Averaged patches that stains cover in a good image, and their positions in the grid."""

    features_PF: Tensor
    cells_P: Tensor

    @classmethod
    def of(cls, averaged: Averaged, share_HW: Tensor) -> Self:
        """Return the patches of a stained image that have a share of a stain."""
        covered_hw = F.max_pool2d(share_HW[None, None], 2 * CELL)[0, 0].to(averaged.inside_hw.device) >= COVERED
        cells_P = (covered_hw & averaged.inside_hw).flatten().nonzero()[:, 0]
        return cls(averaged.features_hwF.flatten(0, 1)[cells_P], cells_P)


@dataclass(frozen=True)
class _Sums:
    """Numbers of images that show a place, and the sums of their patches."""

    count_hw: Tensor
    total_hwF: Tensor

    @classmethod
    def of(cls, images: Sequence[Averaged]) -> Self:
        shown = [own.inside_hw.float() for own in images]
        totals = [own.features_hwF.float() * shown_hw[..., None] for own, shown_hw in zip(images, shown, strict=True)]
        return cls(torch.stack(shown).sum(0), torch.stack(totals).sum(0))

    def without(self, other: _Sums) -> _Sums:
        return _Sums(self.count_hw - other.count_hw, self.total_hwF - other.total_hwF)

    @property
    def mean_hwF(self) -> Tensor:
        return self.total_hwF / self.count_hw.clamp(min=1)[..., None]


@dataclass(frozen=True)
class Stains:
    """Usual patches at each place, and how stains differ from them."""

    name: ClassVar[str] = "stains"

    mean_hwF: Tensor
    deviation_hw: Tensor
    """Root of the mean square of what good images differ by; infinite at places that are not judged."""
    ratio: _Ratio

    @classmethod
    def estimate(
        cls, images: Sequence[Averaged], stained: Mapping[int, Stained], scenes_N: NDArray[np.int64]
    ) -> tuple[Self, Floats]:
        """Estimate from good images, and stained patches by position; return each image's score without its own fold.

        Its scene has no part in the mean and the deviations, and its fold's patches have none in the distributions.
        """
        total = _Sums.of(images)
        standard, deviation_hw = _standardise(images, stained, scenes_N, total)
        folds = members(fold_scenes(scenes_N, FOLDS))
        moments = [
            Moments.of(
                [standard[i].good_hwF[standard[i].judged_hw] for i in own], [standard[i].stained_PF for i in own]
            )
            for own in folds
        ]
        scores_N = np.empty(len(images))
        for fold, own in enumerate(folds):
            others = _Ratio.of(Moments.without(moments, fold))
            for i in own:
                scores_N[i] = float(others.log_ratios(standard[i].good_hwF).max())
        return cls(total.mean_hwF, deviation_hw, _Ratio.of(Moments.sum(moments))), scores_N

    def candidates(self, query_hwF: Tensor, inside_hw: Tensor) -> Candidates:
        """Return the score of an image by its patches, and a map of how much each resembles a stain.

        The map counts from the least, to have an order also where no patch does; 0 at places not judged or shown.
        """
        averaged = Averaged.of(query_hwF, inside_hw)
        ratio_hw = self.ratio.log_ratios(_difference(averaged, self.mean_hwF) / self.deviation_hw[..., None])
        is_judged_hw = averaged.inside_hw & self.deviation_hw.isfinite()
        return Candidates(ratio_hw.max()[None], (torch.where(is_judged_hw, ratio_hw - ratio_hw.min(), 0.0),))

    def store(self) -> dict[str, NDArray[Any]]:
        """Return the arrays."""
        return {
            "stains.mean": self.mean_hwF.cpu().numpy(),
            "stains.deviation": self.deviation_hw.cpu().numpy(),
            "stains.centres": self.ratio.centre_2F.cpu().numpy(),
            "stains.precisions": self.ratio.precision_2FF.cpu().numpy(),
            "stains.constant": self.ratio.constant_1.cpu().numpy(),
        }

    @classmethod
    def load(cls, tensors: dict[str, Tensor], size: tuple[int, int], features: int) -> Self:
        """Read the arrays for a number of rows and columns; raises LookupError or ValueError for damaged ones."""
        mean_hwF, deviation_hw = tensors["stains.mean"], tensors["stains.deviation"]
        grid = size[0] // 2, size[1] // 2
        if mean_hwF.shape != (*grid, features) or deviation_hw.shape != grid or not bool((deviation_hw > 0).all()):
            raise ValueError("its usual patches do not match its patches by place")
        parts = tuple(tensors[f"stains.{name}"] for name in ("centres", "precisions", "constant"))
        if [tuple(part.shape) for part in parts] != [(2, features), (2, features, features), (1,)]:
            raise ValueError("its distributions of stains have another shape")
        return cls(mean_hwF, deviation_hw, _Ratio(*parts))


@dataclass(frozen=True)
class _Ratio:
    """Two t-distributions of standardised differences, as exponents of their densities."""

    centre_2F: Tensor
    precision_2FF: Tensor
    constant_1: Tensor
    """Half the difference of the logarithms of the determinants, of good and of stained patches."""

    @classmethod
    def of(cls, moments: Moments) -> Self:
        """Return those with the means and the covariances of good and of stained patches."""
        centre_2F, covariance_2FF = moments.gaussians(RIDGE)
        precision_2FF, logdet_2 = invert(covariance_2FF)
        return cls(centre_2F.float(), precision_2FF.float(), ((logdet_2[:1] - logdet_2[1:]) / 2).float())

    def log_ratios(self, standard_hwF: Tensor) -> Tensor:
        """Return the logarithm of the ratio for each patch, [h, w]."""
        good_hw, stained_hw = (
            torch.log(((centred_hwF @ precision_FF) * centred_hwF).sum(2).clamp(min=0) + FREEDOM)
            for centred_hwF, precision_FF in (
                (standard_hwF - centre_F, precision_FF)
                for centre_F, precision_FF in zip(self.centre_2F, self.precision_2FF, strict=True)
            )
        )
        return (FREEDOM + standard_hwF.shape[2]) / 2 * (good_hw - stained_hw) + self.constant_1


class _Standard(NamedTuple):
    """Differences of an image from the mean, in deviations, neither of which its scene has a part in."""

    good_hwF: Tensor
    judged_hw: Tensor
    """Whether the image shows a place, and the place is judged."""
    stained_PF: Tensor


def _standardise(
    images: Sequence[Averaged], stained: Mapping[int, Stained], scenes_N: NDArray[np.int64], total: _Sums
) -> tuple[list[_Standard], Tensor]:
    """Return the differences of each image and of its stained patches, and the deviations of all images."""
    scenes = members(scenes_N)
    good: dict[int, Tensor] = {}
    stained_PF: dict[int, Tensor] = {}
    for own in scenes:
        mean_hwF = total.without(_Sums.of([images[i] for i in own])).mean_hwF
        for i in own:
            good[i] = _difference(images[i], mean_hwF)
            if i in stained:
                stained_PF[i] = stained[i].features_PF.float() - mean_hwF.flatten(0, 1)[stained[i].cells_P]
    sums_N2hw = torch.stack(
        [torch.stack([own.inside_hw.float(), good[i].square().mean(2)]) for i, own in enumerate(images)]
    )
    total_2hw = sums_N2hw.sum(0)
    standard: dict[int, _Standard] = {}
    for own in scenes:
        deviation_hw = _deviation(total_2hw - sums_N2hw[own].sum(0))
        for i in own:
            covered_PF = good[i].new_empty(0, good[i].shape[2])
            if i in stained:
                deviation_P = deviation_hw.flatten()[stained[i].cells_P]
                covered_PF = (stained_PF[i] / deviation_P[:, None])[deviation_P.isfinite()]
            judged_hw = images[i].inside_hw & deviation_hw.isfinite()
            good_hwF = good[i].div_(deviation_hw[..., None])
            standard[i] = _Standard(good_hwF, judged_hw, covered_PF)
    return [standard[i] for i in range(len(images))], _deviation(total_2hw)


def _difference(own: Averaged, mean_hwF: Tensor) -> Tensor:
    """Return by how much patches differ from those that are usual at their place, 0 where a place is not shown."""
    return torch.where(own.inside_hw[..., None], own.features_hwF.float() - mean_hwF, 0.0)


def _deviation(sums_2hw: Tensor) -> Tensor:
    """Return deviations from numbers of images that show a place and sums of squares, infinite if not judged."""
    shown_hw, _ = sums_2hw
    around_hw, squares_hw = mean_around(sums_2hw)
    variance_hw = squares_hw / around_hw.clamp(min=1e-3)
    is_judged_hw = judged_places(shown_hw)
    variance_hw = variance_hw + LEAST_SHARE * variance_hw[is_judged_hw].mean() + 1e-9
    return torch.where(is_judged_hw, variance_hw.sqrt(), torch.inf)
