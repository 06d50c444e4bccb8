"""A bank of patches of good images, with which patches of an image are compared wherever they lie.

The distance of a patch from its nearest neighbour is divided by the usual distance of that neighbour from patches of
other scenes: a mark on even ground is nearer to good patches than two good patches of a varied ground are to each
other.

Near the border of an image, the network sees zeros instead of what lies there, so even good patches are far from all
others. Their distances are divided by how far those of good images go beyond the distances inside, or they would decide
the score of most images and hide marks inside.

Shapes: N images, h and w rows and columns of cells, F features, M patches of the bank, R rings of cells at the border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ncml.data.scenes import fold_scenes, members
from ncml.ood.views.patches import Candidates
from ncml.progress import OnProgress, Progress, ignore_progress

BANK = 4_000
"""Patches, or areas, in a bank."""
POOL = 40_000
"""Patches, of all scenes alike, among which those of a bank are chosen."""
PROJECTED = 64
"""Dimensions in which they are compared, those of a random projection."""
FOLDS = 5
"""Parts into which scenes are divided; the images of each are scored by a bank of the others."""
NEIGHBOURS = 3
"""Patches of other scenes whose mean distance is the usual one."""
LEAST_USUAL = 0.1
"""Smallest usual distance, of the median one."""
SMOOTHED = 3
"""Cells of a side over which scores are averaged, which costs marks little and a texture much."""
RINGS = 4
"""Rings of cells at the border whose distances are divided; further inside, they are usual."""
ROWS = 512
"""Patches that are compared at once."""


@dataclass(frozen=True)
class Bank:
    """Patches of good images, and the usual distance of each."""

    name: ClassVar[str] = "patches"

    patches_MF: Tensor
    usual_M: Tensor
    border_R: Tensor
    """By what the distances of each ring are divided, from the border inwards; at least 1."""

    @classmethod
    def estimate(
        cls,
        features: Sequence[Tensor],
        inside: Sequence[Tensor],
        scenes_N: NDArray[np.int64],
        on_progress: OnProgress = ignore_progress,
    ) -> tuple[Self, list[Tensor]]:
        """Keep patches of good images; return the bank, and a map of each image by a bank of other scenes."""
        shown = [features_hwF[inside_hw] for features_hwF, inside_hw in zip(features, inside, strict=True)]
        pool_PF, scenes_P = sample(shown, scenes_N, POOL)
        maps: dict[int, Tensor] = {}
        folds = members(fold_scenes(scenes_N, FOLDS))
        for fold, own in enumerate(folds):
            on_progress(Progress("compare features", fold, len(folds) + 1))
            is_other_P = torch.from_numpy(~np.isin(scenes_P.cpu().numpy(), scenes_N[own]))
            bank = cls._covering(pool_PF[is_other_P], scenes_P[is_other_P])
            for i in own:
                maps[i] = bank.map(features[i].float(), inside[i])
        on_progress(Progress("compare features", len(folds), len(folds) + 1))
        ordered = [maps[i] for i in range(len(features))]
        bank = replace(cls._covering(pool_PF, scenes_P), border_R=_border(ordered))
        on_progress(Progress("compare features", len(folds) + 1, len(folds) + 1))
        return bank, [bank._relative(map_hw) for map_hw in ordered]

    @classmethod
    def _covering(cls, pool_PF: Tensor, scenes_P: Tensor) -> Self:
        """Make a bank of patches that cover a pool, whose scenes are given."""
        positions_M = cover(pool_PF, BANK)
        usual_M = _usual(pool_PF[positions_M], scenes_P[positions_M])
        return cls(pool_PF[positions_M], usual_M, usual_M.new_ones(RINGS))

    def candidates(self, query_hwF: Tensor, inside_hw: Tensor) -> Candidates:
        """Return the score of an image, with a map of how unusual each patch is."""
        return Candidates.of(self._relative(self.map(query_hwF, inside_hw)))

    def map(self, query_hwF: Tensor, inside_hw: Tensor) -> Tensor:
        """Return how unusual each patch is, before the border is taken into account, [h, w]; 0 where not shown."""
        distance_hw, index_hw = nearest(query_hwF, self.patches_MF)
        relative_hw = torch.where(inside_hw, distance_hw / self.usual_M[index_hw], 0.0)[None, None]
        return F.avg_pool2d(relative_hw, SMOOTHED, 1, SMOOTHED // 2, count_include_pad=False)[0, 0]

    def _relative(self, map_hw: Tensor) -> Tensor:
        """Take the border into account."""
        divisors = torch.cat([self.border_R, self.border_R.new_ones(1)])
        return map_hw / divisors[_rings(*map_hw.shape).to(divisors.device)]

    def store(self) -> dict[str, NDArray[Any]]:
        """Return the arrays."""
        return {
            "bank": self.patches_MF.half().cpu().numpy(),
            "usual": self.usual_M.cpu().numpy(),
            "border": self.border_R.cpu().numpy(),
        }

    @classmethod
    def load(cls, tensors: dict[str, Tensor], features: int) -> Self:
        """Read the arrays; raises LookupError or ValueError for damaged ones."""
        patches_MF, usual_M, border_R = tensors["bank"], tensors["usual"], tensors["border"]
        if patches_MF.ndim != 2 or not len(patches_MF) or patches_MF.shape[1] != features:
            raise ValueError("its bank of patches is empty or has another shape")
        if usual_M.shape != patches_MF.shape[:1] or not bool((usual_M > 0).all()):
            raise ValueError("its usual distances do not match its bank of patches")
        if border_R.shape != (RINGS,) or not bool((border_R >= 1).all()):
            raise ValueError("what divides the distances at the border is damaged")
        return cls(patches_MF, usual_M, border_R)


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
def cover(pool_PF: Tensor, count: int) -> Tensor:
    """Return the positions of patches that cover a pool, each of them the farthest from those before it.

    So a bank has what few patches show, such as an edge of a part on even ground, as PatchCore's has; of patches chosen
    at random, nearly all would show the ground. (Gonzalez, Theoretical Computer Science 38, 1985: the farthest patch of
    the pool is at most twice as far as with the best choice.)
    """
    if len(pool_PF) <= count:
        return torch.arange(len(pool_PF), device=pool_PF.device)
    generator = torch.Generator().manual_seed(0)
    projection_FJ = torch.randn(pool_PF.shape[1], PROJECTED, generator=generator).to(pool_PF.device)
    projected_PJ = pool_PF @ projection_FJ
    squares_P = projected_PJ.square().sum(1)
    positions = [0]
    distance_P = torch.full_like(squares_P, torch.inf)
    for _ in range(count - 1):
        last = positions[-1]
        distance_P = torch.minimum(distance_P, squares_P - 2 * (projected_PJ @ projected_PJ[last]) + squares_P[last])
        positions.append(int(distance_P.argmax()))
    return torch.tensor(positions, device=pool_PF.device)


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


def _rings(h: int, w: int) -> Tensor:
    """Return the ring of each cell: 0 at the border, up to `RINGS` for all that are further inside, [h, w]."""
    rows, columns = (torch.minimum(torch.arange(n), n - 1 - torch.arange(n)) for n in (h, w))
    return torch.minimum(rows[:, None], columns[None]).clamp(max=RINGS)


def _border(maps: Sequence[Tensor]) -> Tensor:
    """Return by how much the largest distances of good images in each ring exceed those inside, at least 1, [R].

    The means over the images are compared. Images that are too narrow for an inside have no part in them.
    """
    largest: list[Tensor] = []
    for map_hw in maps:
        ring_hw = _rings(*map_hw.shape).to(map_hw.device)
        if int(ring_hw.max()) == RINGS:
            largest.append(torch.stack([map_hw[ring_hw == ring].max() for ring in range(RINGS + 1)]))
    if not largest:
        return maps[0].new_ones(RINGS)
    mean_R1 = torch.stack(largest).mean(0)
    return (mean_R1[:-1] / mean_R1[-1].clamp(min=1e-6)).clamp(min=1)


def sample(features: Sequence[Tensor], scenes_N: NDArray[np.int64], size: int) -> tuple[Tensor, Tensor]:
    """Return patches at random, of features [..., F], about as many of every scene, and the scene of each."""
    rng = np.random.default_rng(0)
    scenes, counts = np.unique(scenes_N, return_counts=True)
    count_of = dict(zip(scenes.tolist(), counts.tolist(), strict=True))
    parts: list[Tensor] = []
    labels: list[Tensor] = []
    for features_F, scene in zip(features, scenes_N.tolist(), strict=True):
        patches_PF = features_F.reshape(-1, features_F.shape[-1])
        share = max(1, size // (len(scenes) * count_of[scene]))
        selected = np.sort(rng.permutation(len(patches_PF))[:share])
        parts.append(patches_PF[selected].float())
        labels.append(torch.full((len(selected),), scene))
    return torch.cat(parts), torch.cat(labels).to(parts[0].device)
