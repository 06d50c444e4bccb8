"""A Gaussian of a few measurements, estimated from a few images. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ncml.ood.conformal import Floats

PARTS = ("mean_M", "deviation_M", "precision_MM")
"""Names of the arrays, also where they are stored."""


@dataclass(frozen=True)
class ShrunkenGaussian:
    """A mean, and the inverse of a covariance that was shrunk towards its diagonal.

    The share M / (M + N) of each correlation of M measurements is removed, the more the fewer the N images are.
    """

    mean_M: Floats
    deviation_M: Floats
    precision_MM: Floats
    """Of the measurements in units of their deviations."""

    @classmethod
    def estimate(cls, values_NM: Floats, min_deviation: float) -> Self:
        """Estimate from at least two images; deviations are at least `min_deviation`."""
        N, M = values_NM.shape
        deviation_M = np.maximum(values_NM.std(0, ddof=1), min_deviation)
        standard_NM = (values_NM - values_NM.mean(0)) / deviation_M
        share = M / (M + N)
        shrunken_MM = (1 - share) * (standard_NM.T @ standard_NM / (N - 1)) + share * np.eye(M)
        return cls(values_NM.mean(0), deviation_M, np.linalg.inv(shrunken_MM))

    def distance(self, values_M: Floats) -> Floats:
        """Return the Mahalanobis distance of [..., M] measurements, for each measurement: [...]."""
        standard_M = (values_M - self.mean_M) / self.deviation_M
        return np.sqrt(np.einsum("...i,ij,...j->...", standard_M, self.precision_MM, standard_M) / standard_M.shape[-1])

    def store(self, name: str) -> dict[str, NDArray[np.float32]]:
        """Return the arrays, each named by this name and its own."""
        return {f"{name}.{part}": getattr(self, part).astype(np.float32) for part in PARTS}

    @classmethod
    def load(cls, tensors: Mapping[str, NDArray[Any]], name: str, M: int) -> Self:
        """Read the arrays of M measurements; raises LookupError or ValueError for damaged ones."""
        parts = [np.asarray(tensors[f"{name}.{part}"], np.float64) for part in PARTS]
        if [part.shape for part in parts] != [(M,), (M,), (M, M)]:
            raise ValueError(f"its Gaussian {name} has another shape")
        return cls(*parts)
