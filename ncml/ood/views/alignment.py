"""Bring images of a part to one position: shift, angle and scale against a template of good images.

Only detail counts: grey levels minus their mean around, since shading does not turn with the part, and hides a small
print that shows its angle. The template is the mean of aligned good images; a pixel counts the more, the less good
images differ there, so that a changing background does not count. A coarse search compares the image, turned in steps
of a few degrees, with the template by correlation at all shifts; Gauss-Newton steps then minimise the weighted squared
difference, together with a gain and an offset of the brightness. Steps find scales up to 5 or 10% from that of their
start, so the search is repeated at other scales where the part was not found.

`pose_search.py` has the search, `poses.py` describes poses.

Shapes: H rows and W columns of the template or of an image, S poses, P pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ncml.data.blocks import evenly_spaced
from ncml.images.resizing import Resize
from ncml.ood.views.pose_search import MIN_COVERED, Search
from ncml.ood.views.poses import Pose, affine, correlation, places, reduced, sample
from ncml.ood.views.view import Pixels
from ncml.progress import OnProgress, Progress

SEARCH_SIDE, COARSE_SIDE, FINE_SIDE = 80, 120, 240
"""Pixels of the longer side for the search, and for the first and the last Gauss-Newton steps."""
DETAIL = 15
"""Side of the window, in pixels of the template, whose mean is subtracted."""
COARSE_STEPS, FINE_STEPS = 6, 8
"""Gauss-Newton steps of each candidate, and of the best one, at most."""
STILL = 1e-4
"""Change of a pose, in radians and units, that ends its steps: about a hundredth of a pixel of the template."""
ROUNDS = 2
"""How often the template is estimated again from images that were aligned to it."""
TEMPLATE_IMAGES = 40
"""Good images of which a template is estimated at most."""
KEPT = 0.75
"""Share of these that enter the template, those that agree best with the former one."""
LEAST_AGREEMENT, SURE_AGREEMENT = 0.5, 0.87
"""Median agreements from which aligned images may have the same things at the same places, and from which all do."""
MOST_DISAGREEMENT = 0.7
"""Images are aligned if the difference of their agreement from 1 is at most this share of that as they are."""
LOST = 0.5
"""Share of the median agreement below which the part was not found."""
LOG_SCALES = tuple(0.09 * step for step in (-4, -3, -2, -1, 1, 2, 3, 4))
"""Logarithms of the other scales, from 0.70 to 1.43, at which a part is searched that was not found."""
USUAL = 0.9
"""Quantile of the agreements with a template that is not final yet, for a good image whose scale it has."""
MAX_SCALES = 32
"""Other scales of a stored template at most."""
MIN_DEVIATION = 4.0
"""Grey levels that good images always may differ by at a pixel."""


@dataclass(frozen=True)
class Template:
    """The mean of good images, and the weight of each pixel."""

    mean_HW: Tensor
    weight_HW: Tensor
    agreement: float = 0.0
    """Median agreement of good images."""
    detail: int = 0
    """Side of the window whose mean is subtracted from an image; 0: none."""
    log_scales: tuple[float, ...] = ()
    """Logarithms of other scales at which the part is searched."""
    least_log_scale: float = -math.inf
    most_log_scale: float = math.inf
    """The range of good images."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.mean_HW.shape[0], self.mean_HW.shape[1]

    @classmethod
    def of(cls, grey: Sequence[Tensor], poses: Sequence[Pose]) -> Template:
        """Return the mean and the weights of grey images in these poses."""
        ones_HW = torch.ones_like(grey[0])
        sampled = [
            sample(torch.stack([grey_HW, ones_HW]), pose.values_4[None])[0]
            for grey_HW, pose in zip(grey, poses, strict=True)
        ]
        aligned_NHW, inside_NHW = torch.stack(sampled, 1)
        count_HW = inside_NHW.sum(0).clamp(min=1)
        mean_HW = (aligned_NHW * inside_NHW).sum(0) / count_HW
        variance_HW = ((aligned_NHW - mean_HW).square() * inside_NHW).sum(0) / count_HW
        weight_HW = (inside_NHW.mean(0) > 0.5) / (variance_HW + MIN_DEVIATION**2)
        return cls(mean_HW, weight_HW / weight_HW.mean())

    @torch.inference_mode()
    def pose(self, image_HWC: Pixels) -> Pose | None:
        """Find the part in an image, uint8 [H, W, 3], of the template's aspect ratio; None: it was not found."""
        grey_HW = detail(shrink(image_HWC, self.size), self.detail)
        pose = self.find(grey_HW)
        return self.accept(pose) or self.accept(self.find_scaled(grey_HW, pose))

    def accept(self, pose: Pose) -> Pose | None:
        """Return a pose; None if it agrees so much less than those of good images that the part was not found."""
        return pose if pose.agreement >= LOST * self.agreement else None

    @property
    def largest_to_smallest(self) -> float:
        """Size of the largest part in good images relative to the smallest."""
        return math.exp(self.most_log_scale - self.least_log_scale)

    def relative_size(self, pose_4: Tensor) -> Tensor:
        """Return the size of a part in a pose, relative to the nearest one in good images: 1 within their range."""
        return torch.exp(pose_4[1] - pose_4[1].clamp(self.least_log_scale, self.most_log_scale))

    def store(self) -> dict[str, NDArray[Any]]:
        """Return the arrays."""
        return {
            "template": self.mean_HW.numpy(),
            "template_weight": self.weight_HW.numpy(),
            "template_agreement": np.array([self.agreement], np.float32),
            "template_detail": np.array([self.detail], np.float32),
            "template_log_scales": np.array(self.log_scales, np.float32),
            "template_range": np.array([self.least_log_scale, self.most_log_scale], np.float32),
        }

    @classmethod
    def load(cls, tensors: dict[str, Tensor]) -> Template:
        """Read the arrays; raises LookupError or ValueError for damaged ones."""
        mean_HW, weight_HW = tensors["template"].cpu(), tensors["template_weight"].cpu()
        if mean_HW.ndim != 2 or mean_HW.shape != weight_HW.shape or min(mean_HW.shape) < 8:
            raise ValueError("its template and the weights have another shape")
        detail = int(tensors["template_detail"])
        if detail not in (0, *range(1, max(mean_HW.shape) + 1, 2)):
            raise ValueError("the window of its detail is not odd, or is larger than the template")
        log_scales, range_2 = tensors["template_log_scales"], tensors["template_range"]
        if log_scales.ndim != 1 or len(log_scales) > MAX_SCALES or not (log_scales.abs() <= 1).all():
            raise ValueError("the scales at which its part is searched are damaged")
        if range_2.shape != (2,) or not range_2[0] <= range_2[1]:
            raise ValueError("the range of the scales of its good images is damaged")
        agreement = float(tensors["template_agreement"])
        return cls(mean_HW, weight_HW, agreement, detail, tuple(log_scales.tolist()), *range_2.tolist())

    @torch.inference_mode()
    def find(self, grey_HW: Tensor) -> Pose:
        """Find the part in a grey image of the template's size, at about its scale."""
        return self._refine_both(grey_HW, self.search.starts(reduced(grey_HW, self.search.size)))

    @torch.inference_mode()
    def find_scaled(self, grey_HW: Tensor, pose: Pose) -> Pose:
        """Find the part at other scales; return the pose that agrees best, which may be the given one."""
        if not self.log_scales:
            return pose
        small_HW = reduced(grey_HW, self.search.size)
        starts = [self.search.starts_at(small_HW, torch.tensor(log_scale)) for log_scale in self.log_scales]
        starts_S4, _ = max(starts, key=lambda start: start[1])
        return max(pose, self._refine_both(grey_HW, starts_S4), key=lambda found: found.agreement)

    def _refine_both(self, grey_HW: Tensor, starts_S4: Tensor) -> Pose:
        coarse = self.coarse
        best = coarse.refine(reduced(grey_HW, coarse.size), starts_S4, COARSE_STEPS)
        return self.refine(grey_HW, best.values_4[None], FINE_STEPS)

    @functools.cached_property
    def coarse(self) -> Template:
        """The template with `COARSE_SIDE` pixels."""
        return self._reduced(COARSE_SIDE)

    @functools.cached_property
    def search(self) -> Search:
        """The search for it, with `SEARCH_SIDE` pixels."""
        template = self._reduced(SEARCH_SIDE)
        return Search.prepare(template.mean_HW, template.weight_HW)

    def _reduced(self, side: int) -> Template:
        size = tuple(max(8, round(own * side / max(self.size))) for own in self.size)
        return Template(reduced(self.mean_HW, size), reduced(self.weight_HW, size))

    def refine(self, grey_HW: Tensor, poses_S4: Tensor, steps: int) -> Pose:
        """Minimise the weighted squared difference by Gauss-Newton steps from each pose; return the best one passed."""
        planes_4HW = gradients(grey_HW)
        best = Pose(poses_S4[0], -1.0)
        for step in range(steps + 1):
            agreement_S, next_S4, is_moving_S = self.step(planes_4HW, poses_S4)
            agreement, first = agreement_S.max(0)
            if agreement > best.agreement:
                best = Pose(poses_S4[first], float(agreement))
            if step == steps or not is_moving_S.any():
                break
            poses_S4 = next_S4[is_moving_S]
        return best

    def step(self, planes_4HW: Tensor, poses_S4: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the agreement at each pose, the pose after a Gauss-Newton step from it, and whether it moves.

        planes_4HW: from `gradients`. In fp64, so that two starts that end in one pose differ by more than rounding, and
        the same one is taken wherever the steps are computed.
        """
        target_P, all_weight_P = self.mean_HW.double().flatten(), self.weight_HW.double().flatten()
        grey_SP, along_x_SP, along_y_SP, inside_SP = sample(planes_4HW, poses_S4).flatten(2).unbind(1)
        weight_SP = all_weight_P * (inside_SP > 0.99)
        share_S = weight_SP.sum(1) / all_weight_P.sum()
        agreement_S = correlation(grey_SP, target_P, weight_SP) * share_S
        x_SP, y_SP = (places(planes_4HW.shape[1:], poses_S4).flatten(1, 2) - poses_S4[:, None, 2:]).unbind(2)
        jacobian_S6P = torch.stack(
            [
                along_y_SP * x_SP - along_x_SP * y_SP,
                along_x_SP * x_SP + along_y_SP * y_SP,
                along_x_SP,
                along_y_SP,
                grey_SP,
                torch.ones_like(grey_SP),
            ],
            1,
        )
        weighted_SP6 = (jacobian_S6P * weight_SP[:, None]).mT
        normal_S66 = jacobian_S6P @ weighted_SP6
        solution_S6 = _solve(normal_S66, (target_P @ weighted_SP6)[:, :, None])[:, :, 0]
        gain_S = solution_S6[:, 4]
        angle_S1, scale_S1, shift_S2 = (solution_S6[:, :4] / gain_S[:, None]).split((1, 1, 2), 1)
        changes = angle_S1.clamp(-0.1, 0.1), scale_S1.clamp(-0.05, 0.05), shift_S2.clamp(-0.1, 0.1)
        change_S4 = torch.cat(changes, 1)
        is_moving_S = (share_S >= MIN_COVERED) & (gain_S.abs() >= 1e-3) & (change_S4.abs().amax(1) >= STILL)
        return agreement_S, poses_S4 + change_S4, is_moving_S


class Agreement(NamedTuple):
    """How good images agree with each other, and how they are brought to one position."""

    template: Template | None
    """None: they are left as they are."""
    poses: Sequence[Pose | None]
    """Of each image; None without a template, and where the part was not found."""
    value: float
    """Median correlation with the mean of the images, in these poses, every pixel counting alike."""

    @property
    def lost(self) -> tuple[int, ...]:
        """Positions of the images in which the part was not found."""
        return () if self.template is None else tuple(i for i, pose in enumerate(self.poses) if pose is None)

    @property
    def is_at_one_place(self) -> bool | None:
        """Whether the same things lie at the same places; None if the agreement does not decide it."""
        if self.value >= SURE_AGREEMENT:
            return True
        return False if self.template is None else None


def estimate(grey: Sequence[Tensor], on_progress: OnProgress, align: bool = True) -> Agreement:
    """Compare good images of one aspect ratio, from `shrink`, as they are and aligned, and return the better.

    align: whether they may be aligned.
    """
    as_they_are = [Pose(torch.zeros(4), 0.0)] * len(grey)
    agreement_as_is = _agreement(grey, as_they_are)
    if not align:
        return Agreement(None, [None] * len(grey), agreement_as_is)
    details = [detail(grey_HW, DETAIL) for grey_HW in grey]
    selected = [details[i] for i in evenly_spaced(len(grey), TEMPLATE_IMAGES)]
    count = len(selected)
    progress = _Counter(on_progress, count * ROUNDS + len(grey))
    template = Template(selected[0], torch.ones_like(selected[0]), log_scales=LOG_SCALES)
    for _ in range(ROUNDS):
        poses = _find_all(template, selected, progress)
        order = sorted(range(count), key=lambda i, poses=poses: -poses[i].agreement)
        kept = order[: max(2, int(KEPT * count))]
        template = Template.of([selected[i] for i in kept], [poses[i] for i in kept])
        template = dataclasses.replace(template, log_scales=LOG_SCALES)
    all_poses = _find_all(template, details, progress)
    agreement = _agreement(grey, all_poses)
    if agreement < LEAST_AGREEMENT or 1 - agreement > MOST_DISAGREEMENT * (1 - agreement_as_is):
        return Agreement(None, [None] * len(grey), agreement_as_is)
    usual = float(np.median([pose.agreement for pose in all_poses]))
    template = dataclasses.replace(template, agreement=usual, detail=DETAIL)
    accepted = [template.accept(pose) for pose in all_poses]
    log_scales = [float(pose.values_4[1]) for pose in accepted if pose is not None]
    template = dataclasses.replace(template, least_log_scale=min(log_scales), most_log_scale=max(log_scales))
    return Agreement(template, accepted, agreement)


def _find_all(template: Template, details: Sequence[Tensor], progress: _Counter) -> list[Pose]:
    """Return the poses of good images, also of those that show the part at another scale than most do."""
    poses: list[Pose] = []
    for detail_HW in details:
        poses.append(template.find(detail_HW))
        progress.advance()
    usual = float(np.quantile([pose.agreement for pose in poses], USUAL))
    lost = [i for i, pose in enumerate(poses) if pose.agreement < LOST * usual]
    progress.total += len(lost)
    for i in lost:
        poses[i] = template.find_scaled(details[i], poses[i])
        progress.advance()
    return poses


@dataclass
class _Counter:
    """Images that were searched, of a total that grows with those that are searched again."""

    on_progress: OnProgress
    total: int
    done: int = 0

    def advance(self) -> None:
        self.done += 1
        self.on_progress(Progress("align", self.done, self.total))


def _agreement(grey: Sequence[Tensor], poses: Sequence[Pose]) -> float:
    """Return the median correlation of grey images in these poses with their mean, every pixel counting alike."""
    ones_HW = torch.ones_like(grey[0])
    mean_P = Template.of(grey, poses).mean_HW.flatten()
    agreements = []
    for grey_HW, pose in zip(grey, poses, strict=True):
        seen_1P, shown_1P = sample(torch.stack([grey_HW, ones_HW]), pose.values_4[None]).flatten(2).unbind(1)
        agreements.append(float(correlation(seen_1P, mean_P, shown_1P)))
    return float(np.median(agreements))


def align(image: Image.Image, pose: Pose, cells: tuple[int, int]) -> tuple[Pixels, Tensor]:
    """Return an image with the part at the template's place, and the cells that it shows, bool [h, w].

    What lies outside the image mirrors it, and the cells beside are not counted as shown.
    """
    width, height = image.size
    margin = max(width, height) // 2
    padded = Image.fromarray(np.pad(np.asarray(image), ((margin, margin), (margin, margin), (0, 0)), "symmetric"))
    cos, sin, left, top = affine(pose.values_4, height, width).tolist()
    method: Any = Image.Transform.AFFINE
    matrix = (cos, -sin, left + margin, sin, cos, top + margin)
    turned = padded.transform((width, height), method, matrix, Image.Resampling.BICUBIC)
    shown = Image.new("L", (width, height), 255).transform((width, height), method, (cos, -sin, left, sin, cos, top))
    h, w = cells
    is_shown = torch.from_numpy(np.asarray(shown) > 0).reshape(h, height // h, w, width // w).all(3).all(1)
    beside = F.max_pool2d((~is_shown)[None, None].float(), 3, 1, 1)[0, 0]
    return np.asarray(turned), beside == 0


def restore(map_hw: Tensor, pose: Pose) -> Tensor:
    """Return a map of an aligned image as one of the image itself, 0 where it was not judged."""
    angle, log_scale, x, y = pose.values_4
    cos, sin = torch.exp(-log_scale) * torch.cos(angle), torch.exp(-log_scale) * torch.sin(angle)
    inverse_4 = torch.stack([-angle, -log_scale, -(cos * x + sin * y), -(cos * y - sin * x)])
    return sample(map_hw[None], inverse_4[None])[0, 0]


def template_size(height: int, width: int) -> tuple[int, int]:
    """Return the height and width of the template of images of a size."""
    scale = FINE_SIDE / max(height, width)
    return max(8, round(height * scale)), max(8, round(width * scale))


def grey_resize(size: tuple[int, int]) -> Resize:
    """Return what brings an image to grey levels at a height and width."""
    return Resize(*size, "BOX", grey=True)


def shrink(image_HWC: Pixels, size: tuple[int, int]) -> Tensor:
    """Return grey levels at a height and width, fp32."""
    return torch.from_numpy(grey_resize(size)(image_HWC)).float()


def detail(grey_HW: Tensor, side: int) -> Tensor:
    """Return grey levels minus the mean of a window around each pixel; as they are for a side of 0."""
    if side == 0:
        return grey_HW
    return grey_HW - F.avg_pool2d(grey_HW[None], side, 1, side // 2, count_include_pad=False)[0]


def gradients(grey_HW: Tensor) -> Tensor:
    """Return grey levels, their change to the right and down per unit, and ones: fp64 [4, H, W]."""
    grey_HW = grey_HW.double()
    gradient_y, gradient_x = torch.gradient(grey_HW)
    per_unit = max(grey_HW.shape) / 2
    return torch.stack([grey_HW, gradient_x * per_unit, gradient_y * per_unit, torch.ones_like(grey_HW)])


def _solve(normal_S66: Tensor, right_S61: Tensor) -> Tensor:
    """Solve equations with positive definite matrices by elimination, which any runtime computes alike."""
    size = normal_S66.shape[-1]
    ridge = torch.eye(size, dtype=normal_S66.dtype)
    rows_S67 = torch.cat([normal_S66 * (1 + 1e-6 * ridge) + 1e-9 * ridge, right_S61], 2)
    for pivot in range(size):
        row_S17 = rows_S67[:, pivot : pivot + 1] / rows_S67[:, pivot : pivot + 1, pivot : pivot + 1]
        rows_S67 = rows_S67 - (rows_S67[:, :, pivot : pivot + 1] - ridge[:, pivot : pivot + 1]) * row_S17
    return rows_S67[:, :, size:]
