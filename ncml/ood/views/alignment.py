"""Bring images of a part to one position: shift, angle and scale against a template of good images.

Only detail counts: grey levels minus their mean around, since shading does not turn with the part, and hides a small
print that shows its angle. The template is the mean of aligned good images; a pixel counts the more, the less good
images differ there, so that a changing background does not count. A coarse search compares the image, turned in steps
of a few degrees, with the template by correlation at all shifts; Gauss-Newton steps then minimise the weighted squared
difference, together with a gain and an offset of the brightness.

A pose is a similarity that maps places of the template to those of the image: p = (angle, log scale, x, y), about the
middle and in units of half the longer side.

Shapes: H rows and W columns of the template or of an image, A angles, S poses, P pixels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ncml.ood.views.view import Pixels
from ncml.progress import OnProgress, Progress

SEARCH_SIDE, COARSE_SIDE, FINE_SIDE = 80, 120, 240
"""Pixels of the longer side for the search, and for the first and the last Gauss-Newton steps."""
DETAIL = 15
"""Side of the window, in pixels of the template, whose mean is subtracted."""
ANGLE_STEP = 5
"""Degrees between neighbouring angles of the search."""
APART = 3
"""Angles of the search that candidates differ by at least, in steps."""
CANDIDATES = 6
"""Poses of the search from which Gauss-Newton steps begin, besides that of rest."""
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
"""Share of the median agreement below which the part was not found, and the image is judged as it is."""
MIN_COVERED = 0.3
"""Share of the template's weight that an image covers at least."""
MIN_DEVIATION = 4.0
"""Grey levels that good images always may differ by at a pixel."""


class Pose(NamedTuple):
    """Where the part lies, and how well it agrees with the template."""

    values_4: Tensor
    """Angle in radians, logarithm of the scale, and shift in units of half the longer side."""
    agreement: float
    """Weighted correlation with the template, at most 1."""


@dataclass(frozen=True)
class Template:
    """The mean of good images, and the weight of each pixel."""

    mean_HW: Tensor
    weight_HW: Tensor
    agreement: float = 0.0
    """Median agreement of good images."""
    detail: int = 0
    """Side of the window whose mean is subtracted from an image; 0: none, as in detectors that were made before."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.mean_HW.shape[0], self.mean_HW.shape[1]

    @classmethod
    def of(cls, grey: Sequence[Tensor], poses: Sequence[Pose]) -> Template:
        """Return the mean and the weights of grey images in these poses."""
        ones_HW = torch.ones_like(grey[0])
        sampled = [
            _sample(torch.stack([grey_HW, ones_HW]), pose.values_4[None])[0]
            for grey_HW, pose in zip(grey, poses, strict=True)
        ]
        aligned_NHW, inside_NHW = torch.stack(sampled, 1)
        count_HW = inside_NHW.sum(0).clamp(min=1)
        mean_HW = (aligned_NHW * inside_NHW).sum(0) / count_HW
        variance_HW = ((aligned_NHW - mean_HW).square() * inside_NHW).sum(0) / count_HW
        weight_HW = (inside_NHW.mean(0) > 0.5) / (variance_HW + MIN_DEVIATION**2)
        return cls(mean_HW, weight_HW / weight_HW.mean())

    @torch.inference_mode()
    def pose(self, image_HWC: Pixels) -> Pose:
        """Find the part in an image, uint8 [H, W, 3], of the template's aspect ratio; that of rest if it is lost."""
        grey_HW = _detail(shrink(image_HWC, self.size), self.detail)
        pose = self.find(grey_HW)
        return pose if pose.agreement >= LOST * self.agreement else self.rest(grey_HW)

    def rest(self, grey_HW: Tensor) -> Pose:
        """Return the pose of an image that is not moved."""
        agreement = _correlation(grey_HW.flatten()[None], self.mean_HW.flatten(), self.weight_HW.flatten()[None])
        return Pose(torch.zeros(4), float(agreement))

    def store(self) -> dict[str, NDArray[Any]]:
        """Return the arrays."""
        return {
            "template": self.mean_HW.numpy(),
            "template_weight": self.weight_HW.numpy(),
            "template_agreement": np.array([self.agreement], np.float32),
            "template_detail": np.array([self.detail], np.float32),
        }

    @classmethod
    def load(cls, tensors: dict[str, Tensor]) -> Template:
        """Read the arrays; raises LookupError or ValueError for damaged ones."""
        mean_HW, weight_HW = tensors["template"].cpu(), tensors["template_weight"].cpu()
        if mean_HW.ndim != 2 or mean_HW.shape != weight_HW.shape or min(mean_HW.shape) < 8:
            raise ValueError("its template and the weights have another shape")
        detail = int(tensors["template_detail"]) if "template_detail" in tensors else 0
        return cls(mean_HW, weight_HW, float(tensors["template_agreement"]), detail)

    @torch.inference_mode()
    def find(self, grey_HW: Tensor) -> Pose:
        """Find the part in a grey image of the template's size."""
        coarse = self._coarse
        coarse_HW = _shrunk(grey_HW, coarse.size)
        starts = [torch.zeros(4), *self._search.candidates(_shrunk(grey_HW, self._search.size))]
        best = coarse.refine(coarse_HW, torch.stack(starts), COARSE_STEPS)
        return self.refine(grey_HW, best.values_4[None], FINE_STEPS)

    @functools.cached_property
    def _coarse(self) -> Template:
        return self._reduced(COARSE_SIDE)

    @functools.cached_property
    def _search(self) -> _Search:
        return _Search.prepare(self._reduced(SEARCH_SIDE))

    def _reduced(self, side: int) -> Template:
        size = tuple(max(8, round(own * side / max(self.size))) for own in self.size)
        return Template(_shrunk(self.mean_HW, size), _shrunk(self.weight_HW, size))

    def refine(self, grey_HW: Tensor, poses_S4: Tensor, steps: int) -> Pose:
        """Minimise the weighted squared difference by Gauss-Newton steps from each pose; return the best one passed."""
        gradient_y, gradient_x = torch.gradient(grey_HW)
        per_unit = max(grey_HW.shape) / 2
        planes_4HW = torch.stack([grey_HW, gradient_x * per_unit, gradient_y * per_unit, torch.ones_like(grey_HW)])
        target_P, all_weight_P = self.mean_HW.flatten(), self.weight_HW.flatten()
        total_weight = all_weight_P.sum()
        best = Pose(poses_S4[0], -1.0)
        for step in range(steps + 1):
            grey_SP, along_x_SP, along_y_SP, inside_SP = _sample(planes_4HW, poses_S4).flatten(2).unbind(1)
            weight_SP = all_weight_P * (inside_SP > 0.99)
            share_S = weight_SP.sum(1) / total_weight
            agreement, first = (_correlation(grey_SP, target_P, weight_SP) * share_S).max(0)
            if agreement > best.agreement:
                best = Pose(poses_S4[first], float(agreement))
            if step == steps:
                break
            x_SP, y_SP = (_places(grey_HW.shape, poses_S4).flatten(1, 2) - poses_S4[:, None, 2:]).unbind(2)
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
            ).double()
            weighted_SP6 = (jacobian_S6P * weight_SP[:, None]).mT
            normal_S66 = jacobian_S6P @ weighted_SP6
            normal_S66 += torch.diag_embed(normal_S66.diagonal(dim1=1, dim2=2) * 1e-6 + 1e-9)
            solution_S6 = torch.linalg.solve(normal_S66, target_P.double() @ weighted_SP6)
            gain_S = solution_S6[:, 4]
            limit_4 = torch.tensor([0.1, 0.05, 0.1, 0.1])
            change_S4 = (solution_S6[:, :4] / gain_S[:, None]).float().clamp(-limit_4, limit_4)
            is_moving_S = (share_S >= MIN_COVERED) & (gain_S.abs() >= 1e-3) & (change_S4.abs().amax(1) >= STILL)
            if not is_moving_S.any():
                break
            poses_S4 = (poses_S4 + change_S4)[is_moving_S]
        return best


@dataclass(frozen=True)
class _Search:
    """A template prepared for correlation with turned images at all shifts."""

    size: tuple[int, int]
    angles_A: Tensor
    pattern_HW: Tensor
    """Fourier transform of the weighted template, conjugate."""
    weight_HW: Tensor
    """Fourier transform of the weights, conjugate."""
    covered_AHW: Tensor
    """Weight of the template that the turned image covers at each shift, at least `MIN_COVERED` of all."""

    @classmethod
    def prepare(cls, template: Template) -> _Search:
        """Transform the template."""
        H, W = template.size
        weight_HW = template.weight_HW
        angles_A = torch.deg2rad(torch.arange(0, 360, ANGLE_STEP, dtype=torch.float32))
        pattern_HW = weight_HW * (template.mean_HW - (weight_HW * template.mean_HW).sum() / weight_HW.sum())
        pattern, weight = (torch.fft.rfft2(plane_HW, s=(2 * H, 2 * W)).conj() for plane_HW in (pattern_HW, weight_HW))
        search = cls((H, W), angles_A, pattern, weight, torch.empty(0))
        covered_AHW = search._correlate(search._transform(search._turn(torch.ones(H, W))), weight)
        covered_AHW = covered_AHW.clamp(min=MIN_COVERED * float(weight_HW.sum()))
        return dataclasses.replace(search, covered_AHW=covered_AHW)

    def candidates(self, grey_HW: Tensor) -> list[Tensor]:
        """Return the poses of the largest correlations, of different angles."""
        H, W = self.size
        turned_AHW = self._turn(grey_HW - grey_HW.mean())
        transformed_AHW = self._transform(turned_AHW)
        sum_AHW = self._correlate(transformed_AHW, self.weight_HW)
        squares_AHW = self._correlate(self._transform(turned_AHW.square()), self.weight_HW)
        squares_AHW -= sum_AHW.square_() / self.covered_AHW
        # A covered part whose grey levels differ by less than one counts as if they differed by one.
        deviation_AHW = squares_AHW.clamp_(min=self.covered_AHW).sqrt_()
        correlation_AHW = self._correlate(transformed_AHW, self.pattern_HW) / deviation_AHW
        best_A = correlation_AHW.flatten(1).max(1)
        poses: list[Tensor] = []
        kept: list[int] = []
        count = len(self.angles_A)
        for index in best_A.values.argsort(descending=True).tolist():
            if any(min((index - other) % count, (other - index) % count) < APART for other in kept):
                continue
            kept.append(index)
            row, column = divmod(int(best_A.indices[index]), 2 * W)
            down, right = ((shift + side) % (2 * side) - side for shift, side in ((row, H), (column, W)))
            # The turned image shows at u what the image shows at R u, and at u + shift what the template shows at u.
            angle, unit = self.angles_A[index], 2 / max(H, W)
            x, y, cos, sin = right * unit, down * unit, torch.cos(angle), torch.sin(angle)
            poses.append(torch.stack([angle, torch.zeros(()), cos * x - sin * y, sin * x + cos * y]))
            if len(poses) == CANDIDATES:
                break
        return poses

    def _turn(self, grey_HW: Tensor) -> Tensor:
        poses_A4 = F.pad(self.angles_A[:, None], (0, 3))  # neither scaled nor shifted
        return _sample(grey_HW[None], poses_A4)[:, 0]

    def _transform(self, planes_AHW: Tensor) -> Tensor:
        return torch.fft.rfft2(planes_AHW, s=(2 * self.size[0], 2 * self.size[1]))

    def _correlate(self, transformed_AHW: Tensor, conjugate_HW: Tensor) -> Tensor:
        return torch.fft.irfft2(transformed_AHW * conjugate_HW, s=(2 * self.size[0], 2 * self.size[1]))


class Agreement(NamedTuple):
    """How good images agree with each other, and how they are brought to one position."""

    template: Template | None
    """None: they are left as they are."""
    poses: Sequence[Pose | None]
    """Of each image; None without a template."""
    value: float
    """Median correlation with the mean of the images, in these poses, every pixel counting alike."""
    lost: tuple[int, ...] = ()
    """Positions of the images in which the part was not found, and which are left as they are."""

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
    details = [_detail(grey_HW, DETAIL) for grey_HW in grey]
    count = min(TEMPLATE_IMAGES, len(grey))
    selected = [details[i * len(grey) // count] for i in range(count)]
    total, done = count * ROUNDS + len(grey), 0
    template = Template(selected[0], torch.ones_like(selected[0]))
    for _ in range(ROUNDS):
        poses: list[Pose] = []
        for grey_HW in selected:
            poses.append(template.find(grey_HW))
            done += 1
            on_progress(Progress("align", done, total))
        order = sorted(range(count), key=lambda i, poses=poses: -poses[i].agreement)
        kept = order[: max(2, int(KEPT * count))]
        template = Template.of([selected[i] for i in kept], [poses[i] for i in kept])
    all_poses: list[Pose] = []
    for detail_HW in details:
        all_poses.append(template.find(detail_HW))
        done += 1
        on_progress(Progress("align", done, total))
    agreement = _agreement(grey, all_poses)
    if agreement < LEAST_AGREEMENT or 1 - agreement > MOST_DISAGREEMENT * (1 - agreement_as_is):
        return Agreement(None, [None] * len(grey), agreement_as_is)
    usual = float(np.median([pose.agreement for pose in all_poses]))
    template = dataclasses.replace(template, agreement=usual, detail=DETAIL)
    lost = tuple(i for i, pose in enumerate(all_poses) if pose.agreement < LOST * usual)
    kept_poses = [template.rest(details[i]) if i in lost else pose for i, pose in enumerate(all_poses)]
    return Agreement(template, kept_poses, agreement, lost)


def _agreement(grey: Sequence[Tensor], poses: Sequence[Pose]) -> float:
    """Return the median correlation of grey images in these poses with their mean, every pixel counting alike."""
    ones_HW = torch.ones_like(grey[0])
    mean_P = Template.of(grey, poses).mean_HW.flatten()
    agreements = []
    for grey_HW, pose in zip(grey, poses, strict=True):
        seen_1P, shown_1P = _sample(torch.stack([grey_HW, ones_HW]), pose.values_4[None]).flatten(2).unbind(1)
        agreements.append(float(_correlation(seen_1P, mean_P, shown_1P)))
    return float(np.median(agreements))


def align(image: Image.Image, pose: Pose, cells: tuple[int, int]) -> tuple[Pixels, Tensor]:
    """Return an image with the part at the template's place, and the cells that it shows, bool [h, w].

    What lies outside the image mirrors it, and the cells beside are not counted as shown.
    """
    width, height = image.size
    margin = max(width, height) // 2
    padded = Image.fromarray(np.pad(np.asarray(image), ((margin, margin), (margin, margin), (0, 0)), "symmetric"))
    angle, log_scale, x, y = pose.values_4.double().tolist()
    cos, sin = np.exp(log_scale) * np.cos(angle), np.exp(log_scale) * np.sin(angle)
    half = max(height, width) / 2
    middle_x, middle_y = width / 2, height / 2
    left = middle_x + x * half - cos * middle_x + sin * middle_y
    top = middle_y + y * half - sin * middle_x - cos * middle_y
    affine: Any = Image.Transform.AFFINE
    matrix = (cos, -sin, left + margin, sin, cos, top + margin)
    turned = padded.transform((width, height), affine, matrix, Image.Resampling.BICUBIC)
    shown = Image.new("L", (width, height), 255).transform((width, height), affine, (cos, -sin, left, sin, cos, top))
    h, w = cells
    is_shown = torch.from_numpy(np.asarray(shown) > 0).reshape(h, height // h, w, width // w).all(3).all(1)
    beside = F.max_pool2d((~is_shown)[None, None].float(), 3, 1, 1)[0, 0]
    return np.asarray(turned), beside == 0


def restore(map_hw: Tensor, pose: Pose) -> Tensor:
    """Return a map of an aligned image as one of the image itself, 0 where it was not judged."""
    angle, log_scale, x, y = pose.values_4
    cos, sin = torch.exp(-log_scale) * torch.cos(angle), torch.exp(-log_scale) * torch.sin(angle)
    inverse_4 = torch.stack([-angle, -log_scale, -(cos * x + sin * y), -(cos * y - sin * x)])
    return _sample(map_hw[None], inverse_4[None])[0, 0]


def template_size(height: int, width: int) -> tuple[int, int]:
    """Return the height and width of the template of images of a size."""
    scale = FINE_SIDE / max(height, width)
    return max(8, round(height * scale)), max(8, round(width * scale))


def shrink(image_HWC: Pixels, size: tuple[int, int]) -> Tensor:
    """Return grey levels at a height and width, fp32."""
    height, width = size
    grey = Image.fromarray(image_HWC).convert("L").resize((width, height), Image.Resampling.BOX)
    return torch.from_numpy(np.array(grey)).float()


def _detail(grey_HW: Tensor, side: int) -> Tensor:
    """Return grey levels minus the mean of a window around each pixel; as they are for a side of 0."""
    if side == 0:
        return grey_HW
    return grey_HW - F.avg_pool2d(grey_HW[None], side, 1, side // 2, count_include_pad=False)[0]


def _shrunk(plane_HW: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(plane_HW[None, None], size=tuple(size), mode="area")[0, 0]


def _places(shape: Sequence[int], poses_S4: Tensor) -> Tensor:
    """Return the places of the image, x and y in units, that the pixels of the template show, [S, H, W, 2]."""
    H, W = shape
    unit = 2 / max(H, W)
    y_H = (torch.arange(H) + 0.5 - H / 2) * unit
    x_W = (torch.arange(W) + 0.5 - W / 2) * unit
    y_HW, x_HW = torch.meshgrid(y_H, x_W, indexing="ij")
    angle_S11, log_scale_S11, right_S11, down_S11 = poses_S4.T[:, :, None, None]
    scale_S11 = torch.exp(log_scale_S11)
    cos, sin = scale_S11 * torch.cos(angle_S11), scale_S11 * torch.sin(angle_S11)
    return torch.stack([cos * x_HW - sin * y_HW + right_S11, sin * x_HW + cos * y_HW + down_S11], 3)


def _sample(planes_CHW: Tensor, poses_S4: Tensor) -> Tensor:
    """Return planes of an image as the template sees them under each pose, 0 outside, [S, C, H, W]."""
    H, W = planes_CHW.shape[-2:]
    grid_SHW2 = _places((H, W), poses_S4) * torch.tensor([max(H, W) / W, max(H, W) / H])
    planes_SCHW = planes_CHW.expand(len(poses_S4), -1, -1, -1)
    return F.grid_sample(planes_SCHW, grid_SHW2, mode="bilinear", align_corners=False)


def _correlation(first_SP: Tensor, second_P: Tensor, weight_SP: Tensor) -> Tensor:
    """Return the weighted correlations, [S]."""
    total_S1 = weight_SP.sum(1, keepdim=True).clamp(min=1e-9)
    first_SP = first_SP - (weight_SP * first_SP).sum(1, keepdim=True) / total_S1
    second_SP = second_P - (weight_SP * second_P).sum(1, keepdim=True) / total_S1
    weighted_SP = weight_SP * first_SP
    norms_S = (weighted_SP * first_SP).sum(1) * (weight_SP * second_SP.square()).sum(1)
    return (weighted_SP * second_SP).sum(1) / norms_S.clamp(min=1e-9).sqrt()
