"""A bank of patches of good images, with which patches of an image are compared wherever they lie.

The distance of a patch from its nearest neighbour is divided by the usual distance of that neighbour from patches of
other scenes: a mark on even ground is nearer to good patches than two good patches of a varied ground are to each
other.

Shapes: N images, h and w rows and columns of cells, F features, M patches of the bank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ncml.ood.conformal import Floats
from ncml.ood.views.patches import Candidates

BANK = 4_000
"""Patches, or areas, in a bank."""
NEIGHBOURS = 3
"""Patches of other scenes whose mean distance is the usual one."""
LEAST_USUAL = 0.1
"""Smallest usual distance, of the median one."""
SMOOTHED = 3
"""Cells of a side over which scores are averaged, which costs marks little and a texture much."""
ROWS = 512
"""Patches that are compared at once."""


@dataclass(frozen=True)
class Bank:
    """Patches of good images, and the usual distance of each."""

    name: ClassVar[str] = "patches"

    patches_MF: Tensor
    usual_M: Tensor

    @classmethod
    def estimate(cls, features: Sequence[Tensor], scenes_N: NDArray[np.int64]) -> tuple[Self, Floats]:
        """Keep patches of good images; return the bank and the score of each image without its own scene."""
        patches_MF, scenes_M = sample(features, scenes_N)
        usual_M = _usual(patches_MF, scenes_M)
        bank = cls(patches_MF, usual_M)
        scores = [
            float(bank._without(scenes_M == scene).candidates(features_hwF.float()).scores_K)
            for features_hwF, scene in zip(features, scenes_N.tolist(), strict=True)
        ]
        return bank, np.array(scores)

    def _without(self, is_own_M: Tensor) -> Bank:
        return Bank(self.patches_MF[~is_own_M], self.usual_M[~is_own_M])

    def candidates(self, query_hwF: Tensor) -> Candidates:
        """Return the score of an image, with a map of how unusual each patch is."""
        distance_hw, index_hw = nearest(query_hwF, self.patches_MF)
        relative_hw = (distance_hw / self.usual_M[index_hw])[None, None]
        return Candidates.of(F.avg_pool2d(relative_hw, SMOOTHED, 1, SMOOTHED // 2, count_include_pad=False)[0, 0])

    def store(self) -> dict[str, NDArray[Any]]:
        """Return the arrays."""
        return {"bank": self.patches_MF.half().cpu().numpy(), "usual": self.usual_M.cpu().numpy()}

    @classmethod
    def load(cls, tensors: dict[str, Tensor], features: int) -> Self:
        """Read the arrays; raises LookupError or ValueError for damaged ones."""
        patches_MF, usual_M = tensors["bank"], tensors["usual"]
        if patches_MF.ndim != 2 or not len(patches_MF) or patches_MF.shape[1] != features:
            raise ValueError("its bank of patches is empty or has another shape")
        if usual_M.shape != patches_MF.shape[:1] or not bool((usual_M > 0).all()):
            raise ValueError("its usual distances do not match its bank of patches")
        return cls(patches_MF, usual_M)


@torch.inference_mode()
def nearest(query_hwF: Tensor, bank_MF: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance of each patch from its nearest neighbour in a bank, and its position there, [h, w]."""
    h, w, features = query_hwF.shape
    query_PF = query_hwF.reshape(-1, features)
    norms_M = bank_MF.square().sum(1)
    smallest = [torch.addmm(norms_M, part_PF, bank_MF.T, alpha=-2).min(1) for part_PF in query_PF.split(ROWS)]
    squared_P = query_PF.square().sum(1) + torch.cat([part.values for part in smallest])
    index_P = torch.cat([part.indices for part in smallest])
    return squared_P.clamp(min=0).sqrt().reshape(h, w), index_P.reshape(h, w)


@torch.inference_mode()
def _usual(patches_MF: Tensor, scenes_M: Tensor) -> Tensor:
    """Return the mean distance of each patch from its nearest ones of other scenes, [M]."""
    parts: list[Tensor] = []
    for patches_PF, scenes_P in zip(patches_MF.split(ROWS), scenes_M.split(ROWS), strict=True):
        distances_PM = torch.cdist(patches_PF, patches_MF)
        distances_PM.masked_fill_(scenes_P[:, None] == scenes_M[None], torch.inf)
        parts.append(distances_PM.topk(min(NEIGHBOURS, len(patches_MF)), largest=False).values.mean(1))
    usual_M = torch.cat(parts)
    usual_M[~usual_M.isfinite()] = usual_M[usual_M.isfinite()].max()
    return usual_M.clamp(min=max(1e-6, LEAST_USUAL * float(usual_M.median())))


def sample(features: Sequence[Tensor], scenes_N: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Return patches for a bank, the same number of every scene, and the scene of each."""
    rng = np.random.default_rng(0)
    scenes, counts = np.unique(scenes_N, return_counts=True)
    count_of = dict(zip(scenes.tolist(), counts.tolist(), strict=True))
    parts: list[Tensor] = []
    labels: list[Tensor] = []
    for features_hwF, scene in zip(features, scenes_N.tolist(), strict=True):
        patches_PF = features_hwF.flatten(0, 1)
        share = max(1, BANK // (len(scenes) * count_of[scene]))
        selected = np.sort(rng.permutation(len(patches_PF))[:share])
        parts.append(patches_PF[selected].float())
        labels.append(torch.full((len(selected),), scene))
    return torch.cat(parts), torch.cat(labels).to(parts[0].device)
