"""Sums over patches, which add up over parts of the images, and the Gaussians that follow from them.

Shapes: P patches, F features, G groups of patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

PRIOR = 200
"""Patches of the first group that count as part of each other, so that few others suffice."""


class Moments(NamedTuple):
    """Numbers, sums and sums of products of groups of patches, fp64."""

    count_G: Tensor
    sum_GF: Tensor
    product_GFF: Tensor

    @classmethod
    def of(cls, *groups: Sequence[Tensor], common_F: Tensor | float = 0.0) -> Self:
        """Compute those of groups, each in parts, [P, F], of which the first group has at least one.

        common_F: is subtracted from all patches. Without it, features whose mean is far above their deviation would
            leave covariances of rounding errors.
        """
        G, F = len(groups), groups[0][0].shape[1]
        count_G, sum_GF, product_GFF = (
            groups[0][0].new_zeros(shape, dtype=torch.float64) for shape in ((G,), (G, F), (G, F, F))
        )
        for group, parts in enumerate(groups):
            for patches_PF in (part_PF.double() - common_F for part_PF in parts):
                count_G[group] += len(patches_PF)
                sum_GF[group] += patches_PF.sum(0)
                product_GFF[group] += patches_PF.T @ patches_PF
        return cls(count_G, sum_GF, product_GFF)

    @classmethod
    def sum(cls, parts: Sequence[Moments]) -> Self:
        """Return those of all parts."""
        return cls(*(torch.stack(own).sum(0) for own in zip(*parts, strict=True)))

    @classmethod
    def without(cls, parts: Sequence[Moments], part: int) -> Self:
        """Return those of all parts but one."""
        return cls.sum([*parts[:part], *parts[part + 1 :]])

    def gaussians(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Return the mean, [G, F], and the covariance, [G, F, F], of each group. ridge: added to the variances."""
        share_G = torch.full_like(self.count_G, PRIOR) / self.count_G[0].clamp(min=1)
        share_G[0] = 0
        count_G = (self.count_G + share_G * self.count_G[0]).clamp(min=1)
        mean_GF = (self.sum_GF + share_G[:, None] * self.sum_GF[0]) / count_G[:, None]
        square_GFF = (self.product_GFF + share_G[:, None, None] * self.product_GFF[0]) / count_G[:, None, None]
        covariance_GFF = square_GFF - mean_GF[:, :, None] * mean_GF[:, None]
        ridge_FF = ridge * torch.eye(mean_GF.shape[1], dtype=mean_GF.dtype, device=mean_GF.device)
        return mean_GF, covariance_GFF + ridge_FF


def invert(covariance_GFF: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inverses of covariances, [G, F, F], and the logarithms of their determinants, [G].

    By Cholesky: with MKL, the LU decomposition of several large matrices at once (`inv`, `logdet`) gives wrong numbers
    or fails after `torch.set_num_threads` (PyTorch 2.13 on the CPU).
    """
    factor_GFF = torch.linalg.cholesky(covariance_GFF)
    return torch.cholesky_inverse(factor_GFF), 2 * factor_GFF.diagonal(dim1=1, dim2=2).log().sum(1)
