"""Spots of another colour: what is lighter, darker or tinted beside its surroundings, from 2 to 48 pixels wide.

Patches of a network see edges and shapes, and a soft stain has neither. So the logarithms of the colours are averaged
over cells of several sizes, and the mean around each cell is subtracted, which removes light that changes slowly. What
remains is compared with that of good images: at the same place, or on textures over the whole image.

Shapes: N images, h and w rows and columns of cells of a size, S sizes; the first dimension of 3 is brightness, blue and
red.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ncml.data.scenes import members
from ncml.ood.conformal import Floats
from ncml.ood.views.extremes import largest_excess, typical
from ncml.ood.views.patches import CELL, Candidates
from ncml.ood.views.places import judged_places, mean_around

SIZES = (2, 4, 8, 16)
"""Pixels of a cell."""
CENTRE, SURROUNDINGS = 3, 9
"""Cells of a side whose mean is taken, and of the side of the mean that is subtracted."""
OFFSET = 16.0
"""Grey levels that are added before the logarithm: dark pixels are mostly noise."""
MIDDLE = 128.0
"""Grey level whose logarithm is 0, so that fp32 rounds the difference of two means less."""
LEAST_DEVIATION, LEAST_SHARE = 0.004, 0.6
"""A deviation is increased by this, and by this share of the mean deviation."""
BRIGHTNESS = (0.299, 0.587, 0.114)


class Contrasts(NamedTuple):
    """Colours of cells minus those around, by size of the cells."""

    values: tuple[Tensor, ...]
    """[3, h, w] each."""
    shown: tuple[Tensor, ...]
    """Whether the image shows a cell and all around it, bool [h, w] each."""

    def half(self) -> Contrasts:
        """Return the values in fp16, of which many are kept."""
        return Contrasts(tuple(value.half() for value in self.values), self.shown)


@dataclass(frozen=True)
class ColourSpots:
    """The contrasts that good images have."""

    name: ClassVar[str] = "colour_spots"

    means: tuple[Tensor, ...]
    deviations: tuple[Tensor, ...]
    """By size, [3, h, w], or [3, 1, 1] of the whole image; infinite at places that are not judged."""
    typical_S2: Floats
    """Mean and deviation over good images of the largest standardised contrast, by size."""

    @classmethod
    def estimate(
        cls, contrasts: Sequence[Contrasts], scenes_N: NDArray[np.int64], by_place: bool
    ) -> tuple[Self, Floats]:
        """Estimate from good images; return the contrasts and the score of each image without its own scene."""
        largest_NS = np.empty((len(contrasts), len(SIZES)))
        usual: list[tuple[Tensor, Tensor]] = []
        for size in range(len(SIZES)):
            values = [own.values[size] for own in contrasts]
            shown = [own.shown[size] for own in contrasts]
            total = _add(_sums(value, is_shown, by_place) for value, is_shown in zip(values, shown, strict=True))
            for own in members(scenes_N):
                mean, deviation = _usual(total - _add(_sums(values[i], shown[i], by_place) for i in own))
                for i in own:
                    largest_NS[i, size] = float(_standardise(values[i], shown[i], mean, deviation).max())
            usual.append(_usual(total))
        means, deviations = zip(*usual, strict=True)
        return cls(means, deviations, typical(largest_NS)), largest_excess(largest_NS, scenes_N)

    def candidates(self, contrasts: Contrasts) -> Candidates:
        """Return the score of an image at each size, and how unusual each cell is, [h, w]."""
        measured = zip(contrasts.values, contrasts.shown, self.means, self.deviations, strict=True)
        return Candidates.beyond(self.typical_S2, tuple(_standardise(*own) for own in measured))

    def store(self) -> dict[str, NDArray[Any]]:
        """Return the arrays."""
        arrays: dict[str, NDArray[Any]] = {"spots.typical": self.typical_S2.astype(np.float32)}
        for size, mean, deviation in zip(SIZES, self.means, self.deviations, strict=True):
            arrays |= {f"spots.mean{size}": mean.numpy(), f"spots.deviation{size}": deviation.numpy()}
        return arrays

    @classmethod
    def load(cls, tensors: dict[str, Tensor]) -> Self:
        """Read the arrays; raises LookupError or ValueError for damaged ones."""
        means = tuple(tensors[f"spots.mean{size}"].cpu() for size in SIZES)
        deviations = tuple(tensors[f"spots.deviation{size}"].cpu() for size in SIZES)
        typical_S2 = tensors["spots.typical"].cpu().double().numpy()
        for mean, deviation in zip(means, deviations, strict=True):
            if mean.ndim != 3 or len(mean) != 3 or mean.shape != deviation.shape or not bool((deviation > 0).all()):
                raise ValueError("its usual contrasts of colours have another shape")
        if typical_S2.shape != (len(SIZES), 2):
            raise ValueError("its typical contrasts of colours have another shape")
        return cls(means, deviations, typical_S2)


@torch.inference_mode()
def measure_contrasts(judged_HWC: Tensor, inside_hw: Tensor) -> Contrasts:
    """Measure an image whose sides are multiples of 16. inside_hw: the cells of `CELL` pixels that it shows."""
    pixels_3HW = judged_HWC.permute(2, 0, 1).float()
    outside_hw = 1 - inside_hw.cpu().float()
    weight_3 = torch.tensor(BRIGHTNESS)[:, None, None]
    values: list[Tensor] = []
    shown: list[Tensor] = []
    for size in SIZES:
        log_3hw = torch.log((F.avg_pool2d(pixels_3HW[None], size)[0] + OFFSET) / (MIDDLE + OFFSET))
        brightness_hw = (log_3hw * weight_3).sum(0)
        colours_3hw = torch.stack([brightness_hw, log_3hw[2] - brightness_hw, log_3hw[0] - brightness_hw])
        values.append(mean_around(colours_3hw, CENTRE) - mean_around(colours_3hw, SURROUNDINGS))
        if size > CELL:
            own_outside_hw = F.max_pool2d(outside_hw[None], size // CELL)[0]
        else:
            own_outside_hw = outside_hw.repeat_interleave(CELL // size, 0).repeat_interleave(CELL // size, 1)
        shown.append(F.max_pool2d(own_outside_hw[None], SURROUNDINGS, 1, SURROUNDINGS // 2)[0] == 0)
    return Contrasts(tuple(values), tuple(shown))


def _sums(value_3hw: Tensor, shown_hw: Tensor, by_place: bool) -> Tensor:
    """Return numbers, sums and sums of squares: [3, 3, h, w], or [3, 3, 1, 1] over the whole image."""
    seen_3hw = value_3hw.float() * shown_hw
    sums = torch.stack([shown_hw.float().expand_as(seen_3hw), seen_3hw, seen_3hw.square()])
    return sums if by_place else sums.sum((2, 3), keepdim=True)


def _add(sums: Iterable[Tensor]) -> Tensor:
    total = torch.zeros(())
    for own in sums:
        total = total + own
    return total


def _usual(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the deviation of contrasts, from their sums."""
    count, total, squares = sums
    number = count.clamp(min=1)
    mean = total / number
    deviation = mean_around((squares / number - mean.square()).clamp(min=0)).sqrt()
    is_judged = judged_places(count).float()
    mean_deviation = (deviation * is_judged).sum((1, 2), keepdim=True) / is_judged.sum((1, 2), keepdim=True).clamp(
        min=1
    )
    deviation = deviation + LEAST_SHARE * mean_deviation + LEAST_DEVIATION
    return mean, torch.where(is_judged > 0, deviation, torch.inf)


def _standardise(value_3hw: Tensor, shown_hw: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Return the largest standardised contrast of a colour, 0 where a place is not judged or shown, [h, w]."""
    return ((value_3hw.float() - mean) / deviation).abs().amax(0) * shown_hw
