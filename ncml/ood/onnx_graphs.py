"""The views of a detector as graphs of fixed shapes, to be exported (`ncml.ood.onnx_file`).

A graph takes an image of one size, brought to the size that its view judges (and to that of its template, if it brings
parts to one position), and returns for every score its
candidates, of which the largest is the score, and their maps. It computes what the view computes, without what a graph
cannot hold: shapes that depend on values, and arrays of numpy.

Shapes: H rows and W columns of an image at one scale, h and w rows and columns of a map, K candidates of a score, M
measurements, R and C rows and columns of windows.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from ncml.errors import ModelError
from ncml.images.resizing import Resize
from ncml.ood.exported import RELATIVE_SIZE
from ncml.ood.onnx_alignment import AlignmentGraph
from ncml.ood.views import alignment, appearance, likelihood
from ncml.ood.views.appearance import GRID, AppearanceView
from ncml.ood.views.areas import Areas
from ncml.ood.views.bank import Bank
from ncml.ood.views.features import FeaturesView
from ncml.ood.views.gaussian import ShrunkenGaussian
from ncml.ood.views.likelihood import LikelihoodView
from ncml.ood.views.likelihood_maps import surprise
from ncml.ood.views.patches import CELL, Candidates, area_resize, patch_resize
from ncml.ood.views.places import Places
from ncml.ood.views.poses import Pose
from ncml.ood.views.view import View


class ViewGraph(nn.Module):
    """A view of images of one size: `forward` returns the candidates by score of an image at each of its inputs."""

    def __init__(self, *resizes: Resize, **others: Resize) -> None:
        super().__init__()
        self.inputs: dict[str, tuple[Resize, ...]] = {"image": resizes} | {name: (own,) for name, own in others.items()}
        """What brings an image to each input of the graph, one step or more."""
        self.input_size = resizes[-1].height, resizes[-1].width


def make_graph(view: View, height: int, width: int) -> ViewGraph:
    """Return the graph of a view for images of a size; raise `ModelError` for a view that no graph can hold."""
    match view:
        case FeaturesView():
            return FeaturesGraph(view, height, width)
        case AppearanceView():
            return AppearanceGraph(view, height, width)
        case LikelihoodView():
            return LikelihoodGraph(view, height, width)
        case _:
            raise ModelError(f"the view {view.kind!r} cannot be exported.")


class FeaturesGraph(ViewGraph):
    """Patches and colours of an image, and how far they are from those of good images."""

    def __init__(self, view: FeaturesView, height: int, width: int) -> None:
        others: dict[str, Resize] = {}
        if view.template is not None:
            others["grey"] = alignment.grey_resize(view.template.size)
        if Areas.name in view.parts:
            others["small"] = area_resize(view.size, (height, width))
        super().__init__(patch_resize(view.size, (height, width)), **others)
        self.view = view
        self.alignment = None if view.template is None else AlignmentGraph(view.template, *self.input_size, CELL)
        # Patches are stored in fp16, and half as large so.
        self.bank_MF = nn.Buffer(view.bank.patches_MF.half())
        places = view.parts.get(Places.name)
        self.places_hwNF = nn.Buffer(places.patches_hwNF.half()) if isinstance(places, Places) else None
        self.network = view.network

    def forward(self, image_HWC: Tensor, other: Tensor | None = None) -> dict[str, Candidates]:
        """Compare the patches and the colours, of the part at its place if the view brings it there.

        other: the grey image that a template is compared with, or the image at the size of its areas.
        Returns also, as `RELATIVE_SIZE`, the size of the part, 0 if it was not found, if there is a template.
        """
        parts = dict(self.view.parts)
        for name, part in parts.items():
            if isinstance(part, Bank):
                parts[name] = dataclasses.replace(part, patches_MF=self.bank_MF.float())
            elif isinstance(part, Places) and self.places_hwNF is not None:
                parts[name] = dataclasses.replace(part, patches_hwNF=self.places_hwNF.float())
        view = dataclasses.replace(self.view, parts=parts)
        if self.alignment is None or other is None:
            cells = image_HWC.shape[0] // CELL, image_HWC.shape[1] // CELL
            return view.candidates(image_HWC, torch.ones(cells, dtype=torch.bool), other)
        aligned_HWC, inside_hw, pose_4, relative_size = self.alignment(image_HWC, other)
        pose = Pose(pose_4, 0.0)
        candidates = {
            name: Candidates(scores_K, tuple(alignment.restore(map_hw, pose) for map_hw in maps_K))
            for name, (scores_K, maps_K) in view.candidates(aligned_HWC, inside_hw).items()
        }
        return candidates | {RELATIVE_SIZE: Candidates(relative_size[None], ())}


class AppearanceGraph(ViewGraph):
    """Brightness, contrast and colour of an image."""

    def __init__(self, view: AppearanceView, height: int, width: int) -> None:
        super().__init__(*appearance.resizes(height, width))
        self.gaussians = nn.ModuleDict({name: _Gaussian(gaussian) for name, gaussian in view.gaussians.items()})
        rows, columns = (np.arange(GRID + 1) * side // GRID for side in self.input_size)
        self.cells = [(slice(*row), slice(*column)) for row in pairwise(rows) for column in pairwise(columns)]

    def forward(self, image_HWC: Tensor) -> dict[str, Candidates]:
        """Measure the image and the cells of its grid."""
        red_HW, green_HW, blue_HW = image_HWC.double().unbind(2)
        brightness_HW = 0.299 * red_HW + 0.587 * green_HW + 0.114 * blue_HW
        planes_KHW = torch.stack([brightness_HW, blue_HW - brightness_HW, red_HW - brightness_HW])
        whole_M = torch.cat([planes_KHW.mean((1, 2)), _deviation(planes_KHW)])
        cells = [planes_KHW[:, rows, columns] for rows, columns in self.cells]
        grid_M = torch.cat([torch.cat([cell.mean((1, 2)), _deviation(cell[:1])]) for cell in cells])
        whole, grid = (cast(_Gaussian, self.gaussians[name]) for name in ("appearance", "appearance_grid"))
        unlike_RC = grid.standardise(grid_M).abs().reshape(GRID, GRID, -1).amax(2)
        return {
            "appearance": Candidates(whole(whole_M)[None], ()),
            "appearance_grid": Candidates(grid(grid_M)[None], (unlike_RC.float(),)),
        }


class LikelihoodGraph(ViewGraph):
    """Bits/dim of an image at halved sizes."""

    def __init__(self, view: LikelihoodView, height: int, width: int) -> None:
        side = likelihood.window_side(view.network)
        size = likelihood.first_size(height, width, side, view.halvings + view.scales)
        super().__init__(Resize(*size, "BICUBIC"))
        self.side = side
        self.network = view.network
        self.halvings = likelihood.judged_halvings(*size, side, view.halvings, view.scales)
        self.whole = _Gaussian(view.whole)
        self.windows = nn.ModuleList(_Gaussian(gaussian) for gaussian in view.windows)
        self.typical_KS2 = nn.Buffer(torch.from_numpy(view.typical_KS2))

    def forward(self, image_HWC: Tensor) -> dict[str, Candidates]:
        """Measure the image at each size."""
        for _ in range(self.halvings):
            image_HWC = halve(image_HWC)
        whole: list[Tensor] = []
        extremes: list[Tensor] = []
        window_maps: list[Tensor] = []
        peak_maps: list[Tensor] = []
        for gaussian in self.windows:
            bits_HW = surprise(self.network, image_HWC)
            measured = likelihood.measure_bits(bits_HW, self.side)
            distances_RC = gaussian(measured.windows_RC2)
            whole.append(measured.whole_M)
            extremes.append(torch.stack([distances_RC.max(), measured.peak]))
            window_maps.append(likelihood.spread(distances_RC.float(), self.side))
            peak_maps.append(measured.peak_hw)
            image_HWC = halve(image_HWC)
        standard_KS = (torch.stack(extremes, 1) - self.typical_KS2[..., 0]) / self.typical_KS2[..., 1]
        mean, window, peak = likelihood.NAMES
        return {
            mean: Candidates(self.whole(torch.cat(whole))[None], ()),
            window: Candidates(standard_KS[0], tuple(window_maps)),
            peak: Candidates(_compressed(standard_KS[1]), tuple(peak_maps)),
        }


class _Gaussian(nn.Module):
    """`ShrunkenGaussian.distance`."""

    def __init__(self, gaussian: ShrunkenGaussian) -> None:
        super().__init__()
        self.mean_M, self.deviation_M, self.precision_MM = (
            nn.Buffer(torch.from_numpy(part)) for part in (gaussian.mean_M, gaussian.deviation_M, gaussian.precision_MM)
        )

    def standardise(self, values_M: Tensor) -> Tensor:
        """Return measurements in deviations from the mean."""
        return (values_M - self.mean_M) / self.deviation_M

    def forward(self, values_M: Tensor) -> Tensor:
        """Return the distance of [..., M] measurements: [...]."""
        standard_M = self.standardise(values_M)
        return torch.sqrt(((standard_M @ self.precision_MM) * standard_M).sum(-1) / standard_M.shape[-1])


def _compressed(excess_S: Tensor) -> Tensor:
    """`likelihood.compressed`."""
    return torch.log1p(excess_S.clamp(min=0)) + excess_S.clamp(max=0)


def _deviation(planes_KHW: Tensor) -> Tensor:
    return (planes_KHW - planes_KHW.mean((1, 2), keepdim=True)).square().mean((1, 2)).sqrt()


def halve(image_HWC: Tensor) -> Tensor:
    """`likelihood_maps.halved`: the sums of four grey levels are exact, and halves are rounded to even."""
    rows, columns = image_HWC.shape[0] // 2, image_HWC.shape[1] // 2
    blocks = image_HWC[: 2 * rows, : 2 * columns].float().reshape(rows, 2, columns, 2, 3)
    return torch.round(blocks.sum((1, 3)) / 4)
