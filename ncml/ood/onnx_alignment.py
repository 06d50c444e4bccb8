"""The search for a part, and the image brought to its place, as a graph of fixed shapes (`ncml.ood.views.alignment`).

Fourier transforms become products with matrices, steps run to their largest number with those that ended masked, and
Pillow's bicubic transform is written out. Poses are computed in fp64, as by the view, so that both agree to far less
than a pixel.

Shapes: H rows and W columns of the template or of the judged image, h and w of cells, A angles, S poses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop
from torch.nn import functional as F

from ncml.ood.views import pose_search
from ncml.ood.views.alignment import COARSE_STEPS, FINE_STEPS, LOST, Template, detail, gradients
from ncml.ood.views.pose_search import Search
from ncml.ood.views.poses import affine, reduced

FIXED = 65_536.0
"""Pillow's nearest transform computes in multiples of 1 / 65536."""


class AlignmentGraph(nn.Module):
    """An image of a judged size, uint8 [H, W, 3], and its grey levels at the template's size -> the part at its place.

    What lies beside the image mirrors it. Returned are the image, the cells that it shows, the pose, fp64 [4], and the
    relative size of the part, fp64 []; both are zero if the part was not found.
    """

    def __init__(self, template: Template, height: int, width: int, cell: int) -> None:
        super().__init__()
        self.template, self.coarse = template, template.coarse
        self.search = _ProductSearch.of(template.search)
        self.least_agreement = LOST * template.agreement
        self.log_scales = torch.tensor(template.log_scales)
        self.height, self.width, self.cell = height, width, cell
        margin = max(height, width) // 2
        self.mirrored = [torch.from_numpy(np.pad(np.arange(side), margin, "symmetric")) for side in (height, width)]
        self.margin = margin

    def forward(self, image_HWC: Tensor, grey_HW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Find the part, and bring it to its place."""
        pose_4, agreement = self._find(detail(grey_HW.float(), self.template.detail))
        is_lost = agreement < self.least_agreement
        relative_size = torch.where(is_lost, 0.0, self.template.relative_size(pose_4))
        pose_4 = torch.where(is_lost, 0.0, pose_4)
        cos, sin, left, top = affine(pose_4, self.height, self.width).unbind()
        rows_H1 = torch.arange(self.height, dtype=torch.float64)[:, None]
        columns_W = torch.arange(self.width, dtype=torch.float64)
        x_HW = cos * (columns_W + 0.5) - sin * (rows_H1 + 0.5) + (left + self.margin)
        y_HW = sin * (columns_W + 0.5) + cos * (rows_H1 + 0.5) + (top + self.margin)
        aligned_HWC = self._sample(image_HWC, x_HW, y_HW)

        def is_inside(along_columns: Tensor, along_rows: Tensor, start: Tensor, side: int) -> Tensor:
            begin = _fixed(start + along_columns * 0.5 + along_rows * 0.5)
            place_HW = torch.floor((begin + _fixed(along_columns) * columns_W + _fixed(along_rows) * rows_H1) / FIXED)
            return (place_HW >= 0) & (place_HW < side)

        is_shown_HW = is_inside(cos, -sin, left, self.width) & is_inside(sin, cos, top, self.height)
        outside_hw = F.max_pool2d(1 - is_shown_HW.float()[None, None], self.cell)
        return aligned_HWC, F.max_pool2d(outside_hw, 3, 1, 1)[0, 0] == 0, pose_4, relative_size

    def _find(self, grey_HW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pose and its agreement, as `Template.find` does, and `find_scaled` where the part is lost."""
        small_HW = reduced(grey_HW, self.search.size)
        pose_4, agreement = self._refine_both(grey_HW, self.search.starts(small_HW), torch.tensor(True))
        if len(self.log_scales) == 0:
            return pose_4, agreement
        is_lost = agreement < self.least_agreement
        scaled_4, scaled_agreement = self._refine_both(grey_HW, self._starts_scaled(small_HW, is_lost), is_lost)
        is_better = scaled_agreement > agreement
        return torch.where(is_better, scaled_4, pose_4), torch.where(is_better, scaled_agreement, agreement)

    def _starts_scaled(self, small_HW: Tensor, is_lost: Tensor) -> Tensor:
        """Return the starts of the other scale that correlates best; zeros if the part is not lost."""
        count = torch.tensor(len(self.log_scales))

        def continues(number: Tensor, starts_S4: Tensor, best: Tensor) -> Tensor:
            return is_lost & (number < count)

        def advance(number: Tensor, starts_S4: Tensor, best: Tensor) -> tuple[Tensor, ...]:
            log_scale = self.log_scales.index_select(0, number[None])[0]
            next_S4, correlation = self.search.starts_at(small_HW, log_scale)
            is_better = correlation > best
            return number + 1, torch.where(is_better, next_S4, starts_S4), torch.where(is_better, correlation, best)

        starts_S4 = torch.zeros(pose_search.CANDIDATES, 4, dtype=torch.float64)
        return _loop(continues, advance, (torch.tensor(0), starts_S4, torch.tensor(-2.0)))[1]

    def _refine_both(self, grey_HW: Tensor, starts_S4: Tensor, is_wanted: Tensor) -> tuple[Tensor, Tensor]:
        template, coarse = self.template, self.coarse
        start_4, _ = _refine(coarse, reduced(grey_HW, coarse.size), starts_S4, COARSE_STEPS, is_wanted)
        return _refine(template, grey_HW, start_4[None], FINE_STEPS, is_wanted)

    def _sample(self, image_HWC: Tensor, x_HW: Tensor, y_HW: Tensor) -> Tensor:
        """Return an image at places in pixels of the mirrored one, in whole grey levels, as Pillow does."""
        mirrored_rows, mirrored_columns = self.mirrored
        x_HW, y_HW = x_HW - 0.5, y_HW - 0.5
        left_HW, top_HW = torch.floor(x_HW), torch.floor(y_HW)
        pixels_PC = image_HWC.reshape(-1, 3)

        def indices(first_HW: Tensor, mirrored: Tensor) -> list[Tensor]:
            last = len(mirrored) - 1
            return [mirrored[(first_HW + offset).clamp(0, last).long()] for offset in (-1, 0, 1, 2)]

        columns = indices(left_HW, mirrored_columns)
        beside_x_HW1, beside_y_HW1 = (x_HW - left_HW)[..., None], (y_HW - top_HW)[..., None]
        lines = [
            _cubic([pixels_PC[row_HW * self.width + column_HW].double() for column_HW in columns], beside_x_HW1)
            for row_HW in indices(top_HW, mirrored_rows)
        ]
        value_HWC = torch.floor(_cubic(lines, beside_y_HW1).clamp(0, 255))
        is_inside_HW = (x_HW >= -0.5) & (x_HW < len(mirrored_columns) - 0.5)
        is_inside_HW &= (y_HW >= -0.5) & (y_HW < len(mirrored_rows) - 0.5)
        return torch.where(is_inside_HW[..., None], value_HWC, 0.0).float()


@dataclass(frozen=True)
class _ProductSearch(Search):
    """A search whose Fourier transforms are products with matrices; they are stacks of real and imaginary parts.

    Matrices are pairs of cosines and sines, and stored as they are used: an exported loop cannot take parts of a tensor
    from outside it.
    """

    rows: tuple[Tensor, Tensor]
    """[2H, H]."""
    columns: tuple[Tensor, Tensor]
    """[W, W + 1]."""
    rows_back: tuple[Tensor, Tensor]
    """[2H, 2H]."""
    columns_back: tuple[Tensor, Tensor]
    """[W + 1, 2W], divided by the number of places."""

    @classmethod
    def of(cls, search: Search) -> _ProductSearch:
        """Return the same search by products."""
        H, W = search.size
        rows, columns = (
            torch.outer(torch.arange(side), torch.arange(count)).double() * (2 * torch.pi / side)
            for side, count in ((2 * H, 2 * H), (2 * W, W + 1))
        )
        # Of a real result, all frequencies but the first and the last count twice, for their conjugates.
        share = torch.full((W + 1, 1), 2 / (4 * H * W), dtype=torch.float64)
        share[0] = share[-1] = 1 / (4 * H * W)
        cosines_sines = [
            ((scale * torch.cos(waves)).float(), (scale * torch.sin(waves)).float())
            for waves, scale in ((rows[:, :H], 1), (columns[:W], 1), (rows, 1), (columns.T, share))
        ]
        pattern, weight = (
            torch.view_as_real(own).movedim(-1, 0)
            for own in (search.pattern.resolve_conj(), search.weight.resolve_conj())
        )
        return cls(
            search.size, search.angles_A, pattern, weight, search.least_covered, search.covered_AHW, *cosines_sines
        )

    def transform(self, planes_AHW: Tensor) -> Tensor:
        """Return the transforms, [2, A, 2H, W + 1]."""
        (cos_rows, sin_rows), (cos_columns, sin_columns) = self.rows, self.columns
        real, imaginary = planes_AHW @ cos_columns, -(planes_AHW @ sin_columns)
        return torch.stack([cos_rows @ real + sin_rows @ imaginary, cos_rows @ imaginary - sin_rows @ real])

    def correlate(self, transformed_AHW: Tensor, conjugate_HW: Tensor) -> Tensor:
        """Return the correlations at all shifts."""
        (cos_rows, sin_rows), (cos_columns, sin_columns) = self.rows_back, self.columns_back
        squares = transformed_AHW * conjugate_HW[:, None]
        real, imaginary = squares[0] - squares[1], (transformed_AHW * conjugate_HW.flip(0)[:, None]).sum(0)
        real, imaginary = cos_rows @ real - sin_rows @ imaginary, cos_rows @ imaginary + sin_rows @ real
        return real @ cos_columns - imaginary @ sin_columns


def _refine(
    template: Template, grey_HW: Tensor, poses_S4: Tensor, steps: int, is_wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the pose of `Template.refine`, and its agreement; without steps, and -1, if it is not wanted."""
    planes_4HW = gradients(grey_HW)
    last = torch.tensor(steps)

    def continues(step: Tensor, poses_S4: Tensor, is_moving_S: Tensor, best_4: Tensor, best: Tensor) -> Tensor:
        return (step <= last) & is_moving_S.any()

    def advance(
        step: Tensor, poses_S4: Tensor, is_moving_S: Tensor, best_4: Tensor, best: Tensor
    ) -> tuple[Tensor, ...]:
        agreement_S, next_S4, moves_S = template.step(planes_4HW, poses_S4)
        agreement, first = torch.where(is_moving_S, agreement_S, -2.0).max(0)
        is_better = agreement > best
        best_4 = torch.where(is_better, poses_S4.index_select(0, first[None])[0], best_4)
        is_moving_S = is_moving_S & moves_S
        poses_S4 = torch.where(is_moving_S[:, None], next_S4, poses_S4)
        return step + 1, poses_S4, is_moving_S, best_4, torch.where(is_better, agreement, best)

    nothing = torch.full((), -1.0, dtype=torch.float64)
    state = torch.tensor(0), poses_S4, is_wanted.expand(len(poses_S4)).clone(), poses_S4[0].clone(), nothing
    _, _, _, best_4, best = _loop(continues, advance, state)
    return best_4, best


def _loop(
    continues: Callable[..., Tensor], advance: Callable[..., tuple[Tensor, ...]], state: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Advance a state while it continues; as a loop of the graph, where one is exported."""
    if torch.compiler.is_exporting():
        return tuple(while_loop(continues, advance, state))
    while continues(*state):
        state = advance(*state)
    return state


def _fixed(value: Tensor) -> Tensor:
    return torch.floor(value * FIXED + 0.5)


def _cubic(values: list[Tensor], beside: Tensor) -> Tensor:
    """Interpolate between the second and the third of four values, as Pillow does, in the order of its sums."""
    first, second, third, fourth = values
    square = 2 * (first - second) + third - fourth
    cube = second - first - third + fourth
    return second + beside * (third - first + beside * (square + beside * cube))
