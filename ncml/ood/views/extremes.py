"""How large the largest values of maps usually are in good images, so that maps of several kinds can be compared.

Shapes: N good images, K maps of an image.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ncml.ood.conformal import Floats

MIN_TYPICAL_DEVIATION = 1e-3


def typical(largest_NK: Floats, least: float = MIN_TYPICAL_DEVIATION) -> Floats:
    """Return the mean and the deviation over images, at least `least`, of the largest value of each map, [K, 2].

    Maps may have several dimensions: [N, ..., K] gives [..., K, 2].
    """
    return np.stack([largest_NK.mean(0), np.maximum(largest_NK.std(0), least)], -1)


def largest_excess(largest_NK: Floats, groups_N: NDArray[np.int64], least: float = MIN_TYPICAL_DEVIATION) -> Floats:
    """Return for each image the largest excess, in deviations (`typical`), over the images of other groups, [N]."""
    excess_N = np.empty(len(largest_NK))
    for group in np.unique(groups_N):
        is_own_N = groups_N == group
        mean_K, deviation_K = typical(largest_NK[~is_own_N], least).T
        excess_N[is_own_N] = ((largest_NK[is_own_N] - mean_K) / deviation_K).max(1)
    return excess_N
