"""Crops of photographs of textures (brick, grass and gravel of scikit-image, CC0), good and with composed defects.

Good crops to calibrate with come from the upper five eighths of a photograph, all test images from the rest. Crops of
one part overlap, so the rate of false positives is not guaranteed.

Shapes: H rows and W columns of a photograph, S the side of a crop.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

TEXTURES = ("brick", "grass", "gravel")
SIDE = 128
UPPER = 5 / 8
"""Share of the rows of a photograph from which the calibrating crops are."""
HALF_AXES = 6, 14
"""Pixels of each half-axis of an ellipse in which another texture shows."""
SOFT_EDGE = 1.5
"""Pixels of the deviation by which its edge is blurred."""
ENLARGEMENT = 1.15
DEFOCUS = 0.7
"""Pixels of the deviation of the blur."""

Pixels = NDArray[np.uint8]


def write_crops(
    photographs: Path, texture: str, folder: Path, *, calibrating: int, tests: int
) -> dict[str, list[Path]]:
    """Write crops, PNG, and return their files by kind: calibration, good, local, enlarged and blurred.

    photographs: the folder of scikit-image's files.
    local: an ellipse shows another texture of the same mean and deviation. enlarged, blurred: the whole crop is.
    """
    rng = np.random.default_rng(0)
    other = TEXTURES[(TEXTURES.index(texture) + 1) % len(TEXTURES)]
    whole_HWC, other_HWC = (
        np.asarray(Image.open(photographs / f"{name}.png").convert("RGB")) for name in (texture, other)
    )
    edge = round(UPPER * len(whole_HWC))
    upper_HWC, lower_HWC = whole_HWC[:edge], whole_HWC[edge:]
    kinds = {
        "calibration": [_crop(upper_HWC, SIDE, rng) for _ in range(calibrating)],
        "good": [_crop(lower_HWC, SIDE, rng) for _ in range(tests)],
        "local": [_compose(_crop(lower_HWC, SIDE, rng), _crop(other_HWC, SIDE, rng), rng) for _ in range(tests)],
        "enlarged": [_resize(_crop(lower_HWC, round(SIDE / ENLARGEMENT), rng)) for _ in range(tests)],
        "blurred": [_crop(_blur(lower_HWC, DEFOCUS), SIDE, rng) for _ in range(tests)],
    }
    files: dict[str, list[Path]] = {}
    for kind, crops in kinds.items():
        (folder / texture / kind).mkdir(parents=True)
        files[kind] = [folder / texture / kind / f"{i:03}.png" for i in range(len(crops))]
        for file, crop_SSC in zip(files[kind], crops, strict=True):
            Image.fromarray(crop_SSC).save(file)
    return files


def _crop(image_HWC: Pixels, side: int, rng: np.random.Generator) -> Pixels:
    top, left = (int(rng.integers(length - side + 1)) for length in image_HWC.shape[:2])
    return image_HWC[top : top + side, left : left + side]


def _compose(crop_SSC: Pixels, other_SSC: Pixels, rng: np.random.Generator) -> Pixels:
    """Return a crop with an ellipse of another texture."""
    across, down = rng.uniform(*HALF_AXES, 2)
    x, y = rng.uniform(max(HALF_AXES), SIDE - max(HALF_AXES), 2)
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).ellipse((x - across, y - down, x + across, y + down), fill=255)
    share_SS1 = np.asarray(mask.filter(ImageFilter.GaussianBlur(SOFT_EDGE)), np.float64)[..., None] / 255
    similar_SSC = (other_SSC - other_SSC.mean()) / other_SSC.std() * crop_SSC.std() + crop_SSC.mean()
    return np.rint((1 - share_SS1) * crop_SSC + share_SS1 * similar_SSC.clip(0, 255)).astype(np.uint8)


def _resize(image_HWC: Pixels) -> Pixels:
    return np.asarray(Image.fromarray(image_HWC).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _blur(image_HWC: Pixels, deviation: float) -> Pixels:
    return np.asarray(Image.fromarray(image_HWC).filter(ImageFilter.GaussianBlur(deviation)))
