"""Poses of a part, and images as they are seen under a pose.

A pose is a similarity that maps places of the template to those of the image: p = (angle, log scale, x, y), about the
middle and in units of half the longer side.

Shapes: H rows and W columns of the template or of an image, S poses, P pixels, C planes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Pose(NamedTuple):
    """Where the part lies, and how well it agrees with the template."""

    values_4: Tensor
    """Angle in radians, logarithm of the scale, and shift in units of half the longer side."""
    agreement: float
    """Weighted correlation with the template, at most 1."""


def places(shape: Sequence[int], poses_S4: Tensor) -> Tensor:
    """Return the places of the image, x and y in units, that the pixels of the template show, [S, H, W, 2]."""
    H, W = shape
    longer = H if H > W else W  # not max(H, W): PyTorch 2.13 exports it from a loop as the smaller one
    # Numbers here and below are those that fp32 holds exactly: an exported graph stores them so.
    y_H = (torch.arange(H).to(poses_S4) + 0.5 - H / 2) * 2 / longer
    x_W = (torch.arange(W).to(poses_S4) + 0.5 - W / 2) * 2 / longer
    y_HW, x_HW = torch.meshgrid(y_H, x_W, indexing="ij")
    angle_S11, log_scale_S11, right_S11, down_S11 = poses_S4.T[:, :, None, None].unbind(0)
    scale_S11 = torch.exp(log_scale_S11)
    cos, sin = scale_S11 * torch.cos(angle_S11), scale_S11 * torch.sin(angle_S11)
    return torch.stack([cos * x_HW - sin * y_HW + right_S11, sin * x_HW + cos * y_HW + down_S11], 3)


def affine(pose_4: Tensor, height: int, width: int) -> Tensor:
    """Return what places of an image are made by, in pixels: cosine and sine times the scale, left and top, fp64 [4].

    The pixel at (x, y) of the template shows the place (cos x - sin y + left, sin x + cos y + top).
    """
    angle, log_scale, x, y = pose_4.double().unbind()
    cos, sin = torch.exp(log_scale) * torch.cos(angle), torch.exp(log_scale) * torch.sin(angle)
    half, middle_x, middle_y = max(height, width) / 2, width / 2, height / 2
    left = middle_x + x * half - cos * middle_x + sin * middle_y
    top = middle_y + y * half - sin * middle_x - cos * middle_y
    return torch.stack([cos, sin, left, top])


def sample(planes_CHW: Tensor, poses_S4: Tensor) -> Tensor:
    """Return planes of an image as the template sees them under each pose, 0 outside, [S, C, H, W]."""
    H, W = planes_CHW.shape[-2:]
    longer = H if H > W else W
    x_SHW, y_SHW = places((H, W), poses_S4.to(planes_CHW)).unbind(3)
    grid_SHW2 = torch.stack([x_SHW * longer / W, y_SHW * longer / H], 3)
    planes_SCHW = planes_CHW.expand(len(poses_S4), -1, -1, -1)
    return F.grid_sample(planes_SCHW, grid_SHW2, mode="bilinear", align_corners=False)


def correlation(first_SP: Tensor, second_P: Tensor, weight_SP: Tensor) -> Tensor:
    """Return the weighted correlations, [S]."""
    total_S1 = weight_SP.sum(1, keepdim=True).clamp(min=1e-9)
    first_SP = first_SP - (weight_SP * first_SP).sum(1, keepdim=True) / total_S1
    second_SP = second_P - (weight_SP * second_P).sum(1, keepdim=True) / total_S1
    weighted_SP = weight_SP * first_SP
    norms_S = (weighted_SP * first_SP).sum(1) * (weight_SP * second_SP.square()).sum(1)
    return (weighted_SP * second_SP).sum(1) / norms_S.clamp(min=1e-9).sqrt()


def reduced(plane_HW: Tensor, size: Sequence[int]) -> Tensor:
    """Return the means of a plane over the cells of a smaller size."""
    rows, columns = (
        F.interpolate(torch.eye(side)[None, None], size=(cells, side), mode="area")[0, 0]
        for side, cells in zip(plane_HW.shape, size, strict=True)
    )
    return rows @ plane_HW @ columns.T
