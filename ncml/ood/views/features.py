"""The view `features`: patches of an image, compared with patches of good images by hidden activations of a network.

A patch is a cell of 8x8 pixels of the judged size, described by two stages of EfficientNet-Lite0 at strides 8 and 16,
each averaged over 3x3 of its cells (as in PatchCore, Roth et al., 2022), in units of each feature's deviation over the
patches of good images. An image has two scores, each the mean of the
ten largest distances of its patches from their nearest neighbours:

- `patches`: among the patches of good images anywhere. It finds marks, shapes and materials that good images lack.
- `places`: among patches of good images at about the same place. It finds what is missing or moved, which looks good
  elsewhere. It needs images of one aspect ratio.

Images are judged at one size, with a longer side of 448 pixels; if good images differ in aspect ratio, each at its own.

Shapes: N estimation images, h and w rows and columns of cells, P patches, F features, M patches of the bank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ncml.errors import ModelError
from ncml.network import efficientnet
from ncml.ood.conformal import Floats
from ncml.ood.views.protocol import Estimated, Measurement, Pixels, Reader, Stored
from ncml.progress import OnProgress, Progress

LONGER_SIDE = 448
"""Pixels of the longer side of a judged image."""
STAGES = (2, 4)
"""Stages of the network, at strides 8 and 16."""
CELL, COARSE_CELL = 8, 16
"""Pixels of a cell, and of one of the coarser stage, of which judged sizes are multiples."""
BANK = 10_000
"""Patches in the bank for `patches`."""
PLACE_IMAGES = 40
"""Images whose patches are kept by place."""
NEIGHBOURHOOD = 2
"""Cells by which a place of a good image may differ."""
MIN_DEVIATION = 1e-2
"""Smallest deviation of a feature, which images of one colour do not have at all."""
LARGEST = 10
"""Distances of an image that are averaged to its score."""
MAX_ASPECT_DIFFERENCE = 0.02
"""Relative difference of aspect ratios up to which images are judged at one size."""
COLUMNS = 8
"""Columns of cells that are compared at once."""


@dataclass(frozen=True)
class FeaturesView:
    """Banks of patches of good images."""

    kind: ClassVar[str] = "features"

    network: efficientnet.EfficientNetLite0
    size: tuple[int, int] | None
    """Height and width at which images are judged; None: each at its own aspect ratio."""
    deviation_F: Tensor
    """Standard deviation of each feature over the patches of good images, by which it is divided."""
    bank_MF: Tensor
    places_hwNF: Tensor | None
    """The patches of good images by place; None if they differ in aspect ratio."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the scores."""
        return ("patches",) if self.places_hwNF is None else ("patches", "places")

    @property
    def description(self) -> str:
        """The judged size, in one sentence."""
        size = f"a longer side of {LONGER_SIDE} pixels" if self.size is None else f"{self.size[1]}x{self.size[0]}"
        return f"patches are compared at {size}, where marks under about 3 pixels vanish"

    @classmethod
    def estimate(
        cls, readers: Sequence[Reader], scenes_N: NDArray[np.int64], *, device: str, on_progress: OnProgress
    ) -> Estimated:
        """Keep patches of good images. Raises `ModelError` if the package of the network is not installed."""
        network = efficientnet.load(device)
        size = common_size([reader().shape[:2] for reader in readers])
        features = list[Tensor]()
        for reader in readers:
            features.append(patch_features(network, reader(), size).half())
            on_progress(Progress("features", len(features), len(readers)))
        deviation_F = _deviations(features)
        features = [(features_hwF / deviation_F).half() for features_hwF in features]
        bank_MF, bank_scenes_M = _sample_bank(features, scenes_N)
        places_hwNF = place_scenes_N = None
        if size is not None:
            selected_N = _one_of_each_scene(scenes_N)
            places_hwNF = torch.stack([features[i] for i in selected_N], 2)
            place_scenes_N = torch.from_numpy(scenes_N[selected_N]).to(device)
        view = cls(network, size, deviation_F, bank_MF.float(), None if places_hwNF is None else places_hwNF.float())
        scores = view._score_without_own_scene(features, scenes_N, bank_scenes_M, place_scenes_N, on_progress)
        return Estimated(view, scores)

    def _score_without_own_scene(
        self,
        features: list[Tensor],
        scenes_N: NDArray[np.int64],
        bank_scenes_M: Tensor,
        place_scenes_N: Tensor | None,
        on_progress: OnProgress,
    ) -> dict[str, Floats]:
        scores: dict[str, list[float]] = {name: [] for name in self.names}
        for index, (features_hwF, scene) in enumerate(zip(features, scenes_N.tolist(), strict=True)):
            query_hwF = features_hwF.float()
            scores["patches"].append(_score(nearest(query_hwF, self.bank_MF[bank_scenes_M != scene])))
            if self.places_hwNF is not None:
                assert place_scenes_N is not None
                scores["places"].append(
                    _score(nearest_by_place(query_hwF, self.places_hwNF[:, :, place_scenes_N != scene]))
                )
            on_progress(Progress("compare features", index + 1, len(features)))
        return {name: np.array(values) for name, values in scores.items()}

    def measure(self, image_HWC: Pixels) -> dict[str, Measurement]:
        """Score an image by its patches."""
        query_hwF = patch_features(self.network, image_HWC, self.size) / self.deviation_F
        maps = {"patches": nearest(query_hwF, self.bank_MF)}
        if self.places_hwNF is not None:
            maps["places"] = nearest_by_place(query_hwF, self.places_hwNF)
        return {
            name: Measurement(_score(map_hw), map_hw.cpu().numpy().astype(np.float32)) for name, map_hw in maps.items()
        }

    def store(self) -> Stored:
        """Return the banks in fp16, and the digest of the network's weights."""
        tensors = {"bank": self.bank_MF.half().cpu().numpy(), "deviation": self.deviation_F.cpu().numpy()}
        if self.places_hwNF is not None:
            tensors["places"] = self.places_hwNF.half().cpu().numpy()
        return Stored(tensors, {"size": self.size and list(self.size), "weights": efficientnet.digest()})

    @classmethod
    def load(cls, stored: Stored, *, device: str) -> Self:
        """Read the banks; raise `ModelError` without the network, or if other weights made them."""
        network = efficientnet.load(device)
        if stored.values["weights"] != efficientnet.digest():
            raise ModelError(
                "the bank of patches was made by other weights of the feature network than those installed: "
                f"install the {efficientnet.PACKAGE.replace('_', '-')} that made it, or make the detector again."
            )
        size = stored.values["size"]
        bank_MF = torch.from_numpy(np.array(stored.tensors["bank"])).to(device).float()
        deviation_F = torch.from_numpy(np.array(stored.tensors["deviation"])).to(device).float()
        places = stored.tensors.get("places")
        places_hwNF = None if places is None else torch.from_numpy(np.array(places)).to(device).float()
        if bank_MF.ndim != 2 or not len(bank_MF):
            raise ValueError("its bank of patches is empty")
        if (places_hwNF is None) != (size is None):
            raise ValueError("its patches by place do not match its size")
        if places_hwNF is not None and places_hwNF.shape[:2] != (size[0] // CELL, size[1] // CELL):
            raise ValueError("its patches by place have another size")
        if deviation_F.shape != bank_MF.shape[1:] or not bool((deviation_F > 0).all()):
            raise ValueError("its deviations do not match its bank of patches")
        judged = None if size is None else (int(size[0]), int(size[1]))
        return cls(network, judged, deviation_F, bank_MF, places_hwNF)


def common_size(shapes: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Return the judged height and width of images of one aspect ratio; None if they differ."""
    aspects = np.array([height / width for height, width in shapes])
    if aspects.max() > aspects.min() * (1 + MAX_ASPECT_DIFFERENCE):
        return None
    height, width = shapes[0]
    return judged_size(height, width)


def judged_size(height: int, width: int) -> tuple[int, int]:
    """Return the height and width at which an image of this size is judged: multiples of 16, the longer 448."""
    scale = LONGER_SIDE / max(height, width)
    multiples = (max(2, round(side * scale / COARSE_CELL)) for side in (height, width))
    rows, columns = multiples
    return rows * COARSE_CELL, columns * COARSE_CELL


@torch.inference_mode()
def patch_features(network: efficientnet.EfficientNetLite0, image_HWC: Pixels, size: tuple[int, int] | None) -> Tensor:
    """Return the features of the patches of an image judged at this size, [h, w, F]."""
    H, W = image_HWC.shape[:2]
    height, width = size or judged_size(H, W)
    resized = Image.fromarray(image_HWC).resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    device = network.stem.conv.weight.device
    x_BCHW = torch.from_numpy(np.array(resized)).to(device).permute(2, 0, 1)[None].float()
    fine, coarse = network.activations(x_BCHW, STAGES)
    fine, coarse = (F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) for x in (fine, coarse))
    coarse = F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear")
    return torch.cat([fine, coarse], 1)[0].permute(1, 2, 0)


@torch.inference_mode()
def nearest(query_hwF: Tensor, bank_MF: Tensor) -> Tensor:
    """Return the distance of each patch from its nearest neighbour in a bank, [h, w]."""
    h, w, features = query_hwF.shape
    query_PF = query_hwF.reshape(-1, features)
    norms_M = bank_MF.square().sum(1)
    smallest = [torch.addmm(norms_M, part_PF, bank_MF.T, alpha=-2).min(1).values for part_PF in query_PF.split(512)]
    squared_P = query_PF.square().sum(1) + torch.cat(smallest)
    return squared_P.clamp(min=0).sqrt().reshape(h, w)


@torch.inference_mode()
def nearest_by_place(query_hwF: Tensor, places_hwNF: Tensor) -> Tensor:
    """Return the distance of each patch from the nearest one within `NEIGHBOURHOOD` cells of its place, [h, w]."""
    h, w, features = query_hwF.shape
    count = places_hwNF.shape[2]
    norms_hwN = places_hwNF.square().sum(3)
    smallest_hw = torch.full((h, w), torch.inf, device=query_hwF.device)
    for left in range(0, w, COLUMNS):
        right = min(left + COLUMNS, w)
        first, last = max(0, left - NEIGHBOURHOOD), min(w, right + NEIGHBOURHOOD)
        offsets = torch.arange(left, right)[:, None] - torch.arange(first, last)
        is_far_qb = (offsets.abs() > NEIGHBOURHOOD).to(query_hwF.device)
        for shift in range(-NEIGHBOURHOOD, NEIGHBOURHOOD + 1):
            top, bottom = max(0, -shift), min(h, h - shift)  # rows of the image whose neighbour at this shift exists
            if top >= bottom:
                continue
            rows = slice(top + shift, bottom + shift)
            bank_rFb = places_hwNF[rows, first:last].reshape(bottom - top, -1, features).transpose(1, 2)
            norms_rb = norms_hwN[rows, first:last].reshape(bottom - top, 1, -1)
            squared_rqb = torch.baddbmm(norms_rb, query_hwF[top:bottom, left:right], bank_rFb, alpha=-2)
            by_place = squared_rqb.reshape(bottom - top, right - left, last - first, count).amin(3)
            by_place.masked_fill_(is_far_qb, torch.inf)
            part = smallest_hw[top:bottom, left:right]
            torch.minimum(part, by_place.amin(2), out=part)
    return (query_hwF.square().sum(2) + smallest_hw).clamp(min=0).sqrt()


def _score(map_hw: Tensor) -> float:
    """Return the mean of the largest distances of an image."""
    values_P = map_hw.flatten()
    return float(values_P.topk(min(LARGEST, len(values_P))).values.mean())


def _deviations(features: Sequence[Tensor]) -> Tensor:
    """Return the standard deviation of each feature over all patches, [F]."""
    sums_2F = torch.stack(
        [
            torch.stack([patches_PF.mean(0), patches_PF.square().mean(0)])
            for patches_PF in (features_hwF.flatten(0, 1).double() for features_hwF in features)
        ]
    ).mean(0)
    variance_F = sums_2F[1] - sums_2F[0] ** 2
    return variance_F.clamp(min=MIN_DEVIATION**2).sqrt().float()


def _sample_bank(features: Sequence[Tensor], scenes_N: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Return patches for the bank, the same number of every scene, and the scene of each."""
    rng = np.random.default_rng(0)
    scenes, counts = np.unique(scenes_N, return_counts=True)
    count_of = dict(zip(scenes.tolist(), counts.tolist(), strict=True))
    parts: list[Tensor] = []
    labels: list[Tensor] = []
    for features_hwF, scene in zip(features, scenes_N.tolist(), strict=True):
        patches_PF = features_hwF.flatten(0, 1)
        share = max(1, BANK // (len(scenes) * count_of[scene]))
        selected = np.sort(rng.permutation(len(patches_PF))[:share])
        parts.append(patches_PF[selected])
        labels.append(torch.full((len(selected),), scene))
    return torch.cat(parts), torch.cat(labels).to(parts[0].device)


def _one_of_each_scene(scenes_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the positions of images of different scenes, at most `PLACE_IMAGES`, evenly spaced."""
    first = np.sort(np.unique(scenes_N, return_index=True)[1])
    count = min(PLACE_IMAGES, len(first))
    return first[np.arange(count) * len(first) // count]
