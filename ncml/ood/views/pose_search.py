"""A coarse search for a part: turned by steps of a few degrees, the image is correlated with the template.

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
"""Poses that are returned besides that of rest."""
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
    covered_AHW: Tensor
    """Weight of the template that the turned image covers at each shift, at least `MIN_COVERED` of all."""

    @classmethod
    def prepare(cls, mean_HW: Tensor, weight_HW: Tensor) -> Self:
        """Transform a template, its mean and its weights."""
        H, W = mean_HW.shape
        angles_A = torch.deg2rad(torch.arange(0, 360, ANGLE_STEP, dtype=torch.float32))
        pattern_HW = weight_HW * (mean_HW - (weight_HW * mean_HW).sum() / weight_HW.sum())
        pattern, weight = (torch.fft.rfft2(plane_HW, s=(2 * H, 2 * W)).conj() for plane_HW in (pattern_HW, weight_HW))
        search = cls((H, W), angles_A, pattern, weight, torch.empty(0))
        covered_AHW = search.correlate(search.transform(search._turn(torch.ones(H, W))), weight)
        covered_AHW = covered_AHW.clamp(min=MIN_COVERED * float(weight_HW.sum()))
        return dataclasses.replace(search, covered_AHW=covered_AHW)

    def starts(self, grey_HW: Tensor) -> Tensor:
        """Return the pose of rest and those of the largest correlations, of different angles: fp64 [S, 4]."""
        turned_AHW = self._turn(grey_HW - grey_HW.mean())
        transformed_AHW = self.transform(turned_AHW)
        sum_AHW = self.correlate(transformed_AHW, self.weight)
        squares_AHW = self.correlate(self.transform(turned_AHW.square()), self.weight)
        squares_AHW -= sum_AHW.square_() / self.covered_AHW
        # A covered part whose grey levels differ by less than one counts as if they differed by one.
        deviation_AHW = torch.maximum(squares_AHW, self.covered_AHW).sqrt_()
        correlation_AHW = self.correlate(transformed_AHW, self.pattern) / deviation_AHW
        best_A, shift_A = correlation_AHW.flatten(1).max(1)
        return self._poses(best_A, shift_A)

    def _poses(self, best_A: Tensor, shift_A: Tensor) -> Tensor:
        H, W = self.size
        count = len(self.angles_A)
        numbers_A = torch.arange(count)
        poses = [torch.zeros(4, dtype=torch.float64)]
        for _ in range(CANDIDATES):
            number = best_A.argmax()
            row, column = shift_A[number] // (2 * W), shift_A[number] % (2 * W)
            down, right = ((shift + side) % (2 * side) - side for shift, side in ((row, H), (column, W)))
            # The turned image shows at u what the image shows at R u, and at u + shift what the template shows at u.
            angle = self.angles_A[number].double()
            x, y = right.double() * 2 / max(H, W), down.double() * 2 / max(H, W)
            cos, sin = torch.cos(angle), torch.sin(angle)
            poses.append(torch.stack([angle, torch.zeros_like(angle), cos * x - sin * y, sin * x + cos * y]))
            steps_A = (numbers_A - number) % count
            is_near_A = torch.minimum(steps_A, count - steps_A) < APART
            best_A = torch.where(is_near_A, -torch.inf, best_A)
        return torch.stack(poses)

    def transform(self, planes_AHW: Tensor) -> Tensor:
        """Return the Fourier transforms of planes that zeros extend to twice their size."""
        return torch.fft.rfft2(planes_AHW, s=(2 * self.size[0], 2 * self.size[1]))

    def correlate(self, transformed_AHW: Tensor, conjugate_HW: Tensor) -> Tensor:
        """Return the correlations at all shifts, from a transform and a conjugate one."""
        return torch.fft.irfft2(transformed_AHW * conjugate_HW, s=(2 * self.size[0], 2 * self.size[1]))

    def _turn(self, grey_HW: Tensor) -> Tensor:
        poses_A4 = F.pad(self.angles_A[:, None], (0, 3))  # neither scaled nor shifted
        return sample(grey_HW[None], poses_A4)[:, 0]
