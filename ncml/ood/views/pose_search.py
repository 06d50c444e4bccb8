"""A coarse search for a part: turned by steps of a few degrees, and scaled, the image is correlated with the template.

Shapes: H rows and W columns of the template and of the image, A angles, S poses.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ncml.ood.views.poses import sample

ANGLE_STEP = 5
"""Degrees between neighbouring angles."""
APART = 3
"""Angles of candidates that differ by at least this, in steps."""
CANDIDATES = 6
"""Poses that are returned."""
MIN_COVERED = 0.3
"""Share of the template's weight that an image covers at least."""


@dataclass(frozen=True)
class Search:
    """A template prepared for correlation with turned images at all shifts."""

    size: tuple[int, int]
    angles_A: Tensor
    pattern: Tensor
    """Fourier transform of the weighted template, conjugate."""
    weight: Tensor
    """Fourier transform of the weights, conjugate."""
    least_covered: float
    """Weight that counts as covered at least."""
    covered_AHW: Tensor
    """`covered` at the scale 1, where every image is searched."""

    @classmethod
    def prepare(cls, mean_HW: Tensor, weight_HW: Tensor) -> Self:
        """Transform a template, its mean and its weights."""
        H, W = mean_HW.shape
        angles_A = torch.deg2rad(torch.arange(0, 360, ANGLE_STEP, dtype=torch.float32))
        pattern_HW = weight_HW * (mean_HW - (weight_HW * mean_HW).sum() / weight_HW.sum())
        pattern, weight = (torch.fft.rfft2(plane_HW, s=(2 * H, 2 * W)).conj() for plane_HW in (pattern_HW, weight_HW))
        search = cls((H, W), angles_A, pattern, weight, MIN_COVERED * float(weight_HW.sum()), torch.empty(0))
        return dataclasses.replace(search, covered_AHW=search.covered(torch.zeros(())))

    def covered(self, log_scale: Tensor) -> Tensor:
        """Return the weight of the template that the turned and scaled image covers at each shift."""
        covered_AHW = self.correlate(self.transform(self._turn(torch.ones(self.size), log_scale)), self.weight)
        return covered_AHW.clamp(min=self.least_covered)

    def starts(self, grey_HW: Tensor) -> Tensor:
        """Return the pose of rest and those of the largest correlations, of different angles: fp64 [S, 4]."""
        poses_S4, _ = self._peaks(grey_HW, torch.zeros(()), self.covered_AHW)
        return F.pad(poses_S4, (0, 0, 1, 0))

    def starts_at(self, grey_HW: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return the poses of the largest correlations at a scale, fp64 [S, 4], and the largest correlation.

        log_scale: logarithm of the scale, fp32 [].
        """
        return self._peaks(grey_HW, log_scale, self.covered(log_scale))

    def _peaks(self, grey_HW: Tensor, log_scale: Tensor, covered_AHW: Tensor) -> tuple[Tensor, Tensor]:
        turned_AHW = self._turn(grey_HW - grey_HW.mean(), log_scale)
        transformed_AHW = self.transform(turned_AHW)
        sum_AHW = self.correlate(transformed_AHW, self.weight)
        squares_AHW = self.correlate(self.transform(turned_AHW.square()), self.weight)
        squares_AHW -= sum_AHW.square_() / covered_AHW
        # A covered part whose grey levels differ by less than one counts as if they differed by one.
        deviation_AHW = torch.maximum(squares_AHW, covered_AHW).sqrt_()
        correlation_AHW = self.correlate(transformed_AHW, self.pattern) / deviation_AHW
        best_A, shift_A = correlation_AHW.flatten(1).max(1)
        return self._poses(best_A, shift_A, log_scale.double()), best_A.max()

    def _poses(self, best_A: Tensor, shift_A: Tensor, log_scale: Tensor) -> Tensor:
        H, W = self.size
        count = len(self.angles_A)
        numbers_A = torch.arange(count)
        poses: list[Tensor] = []
        for _ in range(CANDIDATES):
            number_1 = best_A.argmax(0, keepdim=True)  # and gather: an exported loop has no indices that are tensors
            place_1 = shift_A.gather(0, number_1)
            down_1, right_1 = (
                ((shift_1 + side) % (2 * side) - side).double()
                for shift_1, side in ((place_1 // (2 * W), H), (place_1 % (2 * W), W))
            )
            # The turned image shows at u what the image shows at s R u, and at u + shift what the template shows at u.
            angle_1 = self.angles_A.gather(0, number_1).double()
            x_1, y_1 = right_1 * 2 / max(H, W), down_1 * 2 / max(H, W)
            cos_1, sin_1 = torch.exp(log_scale) * torch.cos(angle_1), torch.exp(log_scale) * torch.sin(angle_1)
            shifts = cos_1 * x_1 - sin_1 * y_1, sin_1 * x_1 + cos_1 * y_1
            poses.append(torch.stack([angle_1, log_scale.expand(1), *shifts], 1))
            steps_A = (numbers_A - number_1) % count
            is_near_A = torch.minimum(steps_A, count - steps_A) < APART
            best_A = torch.where(is_near_A, -torch.inf, best_A)
        return torch.cat(poses)

    def transform(self, planes_AHW: Tensor) -> Tensor:
        """Return the Fourier transforms of planes that zeros extend to twice their size."""
        return torch.fft.rfft2(planes_AHW, s=(2 * self.size[0], 2 * self.size[1]))

    def correlate(self, transformed_AHW: Tensor, conjugate_HW: Tensor) -> Tensor:
        """Return the correlations at all shifts, from a transform and a conjugate one."""
        return torch.fft.irfft2(transformed_AHW * conjugate_HW, s=(2 * self.size[0], 2 * self.size[1]))

    def _turn(self, grey_HW: Tensor, log_scale: Tensor) -> Tensor:
        poses_A4 = F.pad(torch.stack([self.angles_A, log_scale.expand_as(self.angles_A)], 1), (0, 2))  # not shifted
        return sample(grey_HW[None], poses_A4)[:, 0]
