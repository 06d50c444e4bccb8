"""How many marks and missing parts an estimate of a view finds in altered estimation images.

It chooses between patches at the same place and patches anywhere where the agreement of good images does not decide:
turned parts agree little, since shading does not turn with them, and a weave agrees well wherever it lies. The images
that rank have no part in the choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ncml.data.blocks import evenly_spaced
from ncml.images.alterations import ALTERATIONS, Alteration
from ncml.ood.views.view import Estimated, Reader

KINDS = ("scratch", "spot", "pit", "missing part", "moved part")
IMAGES = 30
"""Images that are altered at most, each in one way."""
USUAL = 0.95
"""Share of the good images whose score a found mark exceeds."""


def share_found(estimated: Estimated, name: str, readers: Sequence[Reader]) -> float:
    """Return the share of altered images that have a larger score of this name than nearly all good ones."""
    threshold = float(np.quantile(estimated.scores[name], USUAL))
    kinds = [_middle(kind) for kind in KINDS]
    found: list[bool] = []
    for number, position in enumerate(evenly_spaced(len(readers), IMAGES)):
        image_HWC = readers[position]()
        alteration = kinds[number % len(kinds)]
        if alteration.fits(*image_HWC.shape[:2]):
            altered = alteration.apply(image_HWC, number)
            found.append(estimated.view.measure(altered.image_HWC)[name].score > threshold)
    return float(np.mean(found)) if found else 0.0


def _middle(kind: str) -> Alteration:
    """Return the alteration of middle size."""
    sizes = [alteration for alteration in ALTERATIONS if alteration.kind == kind]
    return sizes[len(sizes) // 2]
