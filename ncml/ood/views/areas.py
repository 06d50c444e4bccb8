"""Areas of an image, compared with areas of good images wherever they lie (`patches.py` describes them).

An area shows a shape or a whole region, whose patches differ too much from one good image to another. Several areas
differ where something larger is wrong, so the score is the mean of the largest distances from the nearest good areas.

Shapes: N images, r and c rows and columns of areas, G features, M areas of the bank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ncml.ood.conformal import Floats
from ncml.ood.views.bank import BANK, nearest, sample
from ncml.ood.views.patches import Candidates, deviations

SHARE = 0.05
"""Share of the largest distances whose mean is the score."""


@dataclass(frozen=True)
class Areas:
    """Areas of good images, in deviations of their features."""

    name: ClassVar[str] = "areas"

    areas_MG: Tensor
    deviation_G: Tensor

    @classmethod
    def estimate(cls, areas: Sequence[Tensor], scenes_N: NDArray[np.int64]) -> tuple[Self, Floats]:
        """Keep areas of good images, [r, c, G] each; return them and the score of each image without its own scene."""
        deviation_G = deviations(areas)
        areas_MG, scenes_M = sample([areas_rcG / deviation_G for areas_rcG in areas], scenes_N, BANK)
        scores = [
            float(cls(areas_MG[scenes_M != scene], deviation_G).candidates(areas_rcG).scores_K)
            for areas_rcG, scene in zip(areas, scenes_N.tolist(), strict=True)
        ]
        return cls(areas_MG, deviation_G), np.array(scores)

    def candidates(self, query_rcG: Tensor) -> Candidates:
        """Return the score of an image, and a map of the distance of each area."""
        distance_rc, _ = nearest(query_rcG / self.deviation_G, self.areas_MG)
        count = max(1, int(SHARE * distance_rc.numel()))
        return Candidates(distance_rc.flatten().topk(count).values.mean()[None], (distance_rc,))

    def store(self) -> dict[str, NDArray[Any]]:
        """Return the arrays."""
        return {"areas": self.areas_MG.half().cpu().numpy(), "areas.deviation": self.deviation_G.cpu().numpy()}

    @classmethod
    def load(cls, tensors: dict[str, Tensor]) -> Self:
        """Read the arrays; raises LookupError or ValueError for damaged ones."""
        areas_MG, deviation_G = tensors["areas"], tensors["areas.deviation"]
        if areas_MG.ndim != 2 or not len(areas_MG) or areas_MG.shape[1:] != deviation_G.shape:
            raise ValueError("its bank of areas is empty or has another shape")
        if not bool((deviation_G > 0).all()):
            raise ValueError("its deviations of areas are not positive")
        return cls(areas_MG, deviation_G)
