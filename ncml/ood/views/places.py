"""Patches of good images by place: a patch of an image is compared only with those at about the same place.

It finds what is missing or moved, which looks good elsewhere. How far a patch is from its nearest neighbour depends on
the place: much on a varied background, little on even ground. So the distance is standardised by the distances that
good images have at that place, each from the others.

Shapes: N images, h and w rows and columns of cells, F features; cells of an image that it does not show (`ncml.ood.
views.alignment`) are False in `inside_hw`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ncml.data.blocks import evenly_spaced
from ncml.ood.conformal import Floats
from ncml.ood.views.patches import Candidates

IMAGES = 40
"""Images whose patches are kept."""
AROUND = 5
"""Patches of a side over which values of good images are averaged."""
LEAST_DEVIATION, LEAST_OF_MEAN = 0.1, 0.05
"""A deviation at a place is increased by these shares of the mean deviation and of the mean distance at the place."""
LEAST_SHOWN = 0.5
"""Share of the good images that show a place which is judged."""


@dataclass(frozen=True)
class Usual:
    """The distances that good images have at each place."""

    mean_hw: Tensor
    deviation_hw: Tensor
    """Infinite at places that are not judged."""

    @classmethod
    def from_sums(cls, sums_3hw: Tensor) -> Self:
        """Estimate from numbers of images that show a place, sums of their distances, and of the squares."""
        shown_hw, sum_hw, square_hw = sums_3hw
        count_hw = shown_hw.clamp(min=1)
        within_hw = square_hw - sum_hw.square() / count_hw
        around_hw, around_sum_hw, around_within_hw = mean_around(torch.stack([shown_hw, sum_hw, within_hw]))
        around_hw = around_hw.clamp(min=1e-3)
        deviation_hw = (around_within_hw / around_hw).clamp(min=0).sqrt()
        is_judged_hw = judged_places(shown_hw)
        mean_hw = around_sum_hw / around_hw
        deviation_hw += LEAST_DEVIATION * float(deviation_hw[is_judged_hw].mean()) + LEAST_OF_MEAN * mean_hw + 1e-6
        return cls(mean_hw, torch.where(is_judged_hw, deviation_hw, torch.inf))

    def standardise(self, distance_hw: Tensor, inside_hw: Tensor) -> Tensor:
        """Return standardised distances, 0 where a place is not judged or shown."""
        return torch.where(inside_hw, (distance_hw - self.mean_hw) / self.deviation_hw, 0.0)


@dataclass(frozen=True)
class Places:
    """Patches of good images by place, and their usual distances."""

    name: ClassVar[str] = "places"

    patches_hwNF: Tensor
    usual: Usual
    neighbourhood: int
    """Cells by which a place of a good image may differ."""

    @classmethod
    def estimate(
        cls, features: Sequence[Tensor], inside: Sequence[Tensor], scenes_N: NDArray[np.int64], neighbourhood: int
    ) -> tuple[Self, Floats]:
        """Keep patches of good images by place; return them and the score of each image without its own scene."""
        kept = _one_of_each_scene(scenes_N)
        patches_hwNF = torch.stack([features[i] for i in kept], 2).float()
        kept_scenes = torch.from_numpy(scenes_N[kept]).to(patches_hwNF.device)
        squares_hwN = patches_hwNF.square().sum(3)
        distances: list[Tensor] = []
        for features_hwF, scene in zip(features, scenes_N.tolist(), strict=True):
            others_hwN = squares_hwN.masked_fill(kept_scenes == scene, torch.inf)
            distances.append(nearest_by_place(features_hwF.float(), patches_hwNF, others_hwN, neighbourhood))
        sums_N3hw = torch.stack(
            [
                torch.stack([shown_hw, shown_hw * distance_hw, shown_hw * distance_hw.square()])
                for distance_hw, shown_hw in zip(distances, (inside_hw.float() for inside_hw in inside), strict=True)
            ]
        )
        total_3hw = sums_N3hw.sum(0)
        scores: list[float] = []
        for index, scene in enumerate(scenes_N.tolist()):
            is_own_N = torch.from_numpy(scenes_N == scene)
            usual = Usual.from_sums(total_3hw - sums_N3hw[is_own_N].sum(0))
            scores.append(float(usual.standardise(distances[index], inside[index]).max()))
        return cls(patches_hwNF, Usual.from_sums(total_3hw), neighbourhood), np.array(scores)

    @functools.cached_property
    def _squares_hwN(self) -> Tensor:
        return self.patches_hwNF.square().sum(3)

    def candidates(self, query_hwF: Tensor, inside_hw: Tensor) -> Candidates:
        """Return the score of an image, with a map of how unusual each patch is at its place."""
        distance_hw = nearest_by_place(query_hwF, self.patches_hwNF, self._squares_hwN, self.neighbourhood)
        return Candidates.of(self.usual.standardise(distance_hw, inside_hw))

    def store(self) -> dict[str, NDArray[Any]]:
        """Return the arrays."""
        return {
            "places": self.patches_hwNF.half().cpu().numpy(),
            "usual_mean": self.usual.mean_hw.cpu().numpy(),
            "usual_deviation": self.usual.deviation_hw.cpu().numpy(),
        }

    @classmethod
    def load(cls, tensors: dict[str, Tensor], size: tuple[int, int], features: int, neighbourhood: int) -> Self:
        """Read the arrays for a number of rows and columns; raises LookupError or ValueError for damaged ones."""
        patches_hwNF, mean_hw, deviation_hw = (tensors[name] for name in ("places", "usual_mean", "usual_deviation"))
        if patches_hwNF.ndim != 4 or patches_hwNF.shape[:2] != size or patches_hwNF.shape[3] != features:
            raise ValueError("its patches by place have another size")
        if mean_hw.shape != size or deviation_hw.shape != size or not bool((deviation_hw > 0).all()):
            raise ValueError("its usual distances do not match its patches by place")
        return cls(patches_hwNF, Usual(mean_hw, deviation_hw), neighbourhood)


def mean_around(maps_Khw: Tensor, side: int = AROUND) -> Tensor:
    """Return the means of maps over an odd number of cells of a side, [K, h, w]."""
    return F.avg_pool2d(maps_Khw[None], side, 1, side // 2, count_include_pad=False)[0]


def judged_places(shown_hw: Tensor) -> Tensor:
    """Return whether each place is judged, of the same shape. shown_hw: numbers of good images that show it."""
    return shown_hw >= LEAST_SHOWN * shown_hw.max()


@torch.inference_mode()
def nearest_by_place(query_hwF: Tensor, places_hwNF: Tensor, squares_hwN: Tensor, neighbourhood: int) -> Tensor:
    """Return the distance of each patch from the nearest one within some cells of its place, [h, w].

    squares_hwN: sums of the squares of the patches; infinite for those that are not compared.
    Each place of the good images is compared with the patches around it, K = (2 neighbourhood + 1)^2 of them.
    """
    h, w, features = query_hwF.shape
    side = 2 * neighbourhood + 1
    padded_hwF = F.pad(query_hwF, (0, 0, *(neighbourhood,) * 4))
    shifted = [padded_hwF[top : top + h, left : left + w] for top, left in itertools.product(range(side), repeat=2)]
    around_PKF = torch.stack(shifted, 2).reshape(h * w, -1, features)
    places_PFN = places_hwNF.reshape(h * w, -1, features).transpose(1, 2)
    squared_PKN = torch.baddbmm(squares_hwN.reshape(h * w, 1, -1), around_PKF, places_PFN, alpha=-2)
    smallest_Khw = squared_PKN.amin(2).T.reshape(-1, h, w)
    # The patch at (i, j) was compared by the place (i - shift) at (i); beyond the edges there are no places.
    padded_Khw = F.pad(smallest_Khw, (neighbourhood,) * 4, value=torch.inf)
    shifts = itertools.product(range(side - 1, -1, -1), repeat=2)
    by_shift = zip(padded_Khw, shifts, strict=True)
    smallest_hw = torch.stack([plane_hw[top : top + h, left : left + w] for plane_hw, (top, left) in by_shift]).amin(0)
    return (query_hwF.square().sum(2) + smallest_hw).clamp(min=0).sqrt()


def _one_of_each_scene(scenes_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the positions of images of different scenes, at most `IMAGES`, evenly spaced."""
    first = np.sort(np.unique(scenes_N, return_index=True)[1])
    return first[evenly_spaced(len(first), IMAGES)]
