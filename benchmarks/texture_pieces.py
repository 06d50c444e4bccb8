"""Pieces of photographs of textures (brick, grass and gravel of scikit-image, CC0), good and with composed defects.

A photograph is cut into a checkerboard of squares that do not overlap: 32 white ones calibrate, 32 black ones are the
good test images, and defects are composed into these.

Shapes: H rows and W columns of a photograph, S the side of a piece.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

TEXTURES = ("brick", "grass", "gravel")
SIDE = 64
HALF_AXES = 4, 9
"""Pixels of each half-axis of an ellipse in which another texture shows."""
SOFT_EDGE = 1.0
"""Pixels of the deviation by which its edge is blurred."""
ENLARGEMENT = 1.15
DEFOCUS = 0.7
"""Pixels of the deviation of the blur."""

Pixels = NDArray[np.uint8]


def write_pieces(photographs: Path, texture: str, folder: Path) -> dict[str, list[Path]]:
    """Write pieces, PNG, and return their files by kind: calibration, good, local, enlarged and blurred.

    photographs: the folder of scikit-image's files.
    local: an ellipse shows another texture of the same mean and deviation. enlarged, blurred: the whole piece is.
    """
    rng = np.random.default_rng(0)
    other = TEXTURES[(TEXTURES.index(texture) + 1) % len(TEXTURES)]
    white, black = _squares(_read(photographs, texture))
    others, _ = _squares(_read(photographs, other))
    kinds = {
        "calibration": white,
        "good": black,
        "local": [_compose(own, stranger, rng) for own, stranger in zip(black, others, strict=True)],
        "enlarged": [_enlarge(piece) for piece in black],
        "blurred": [_blur(piece) for piece in black],
    }
    files: dict[str, list[Path]] = {}
    for kind, pieces in kinds.items():
        (folder / kind).mkdir(parents=True)
        files[kind] = [folder / kind / f"{i:03}.png" for i in range(len(pieces))]
        for file, piece_SSC in zip(files[kind], pieces, strict=True):
            Image.fromarray(piece_SSC).save(file)
    return files


def _read(photographs: Path, texture: str) -> Pixels:
    return np.asarray(Image.open(photographs / f"{texture}.png").convert("RGB"))


def _squares(image_HWC: Pixels) -> tuple[list[Pixels], list[Pixels]]:
    """Return the white and the black squares."""
    colours: tuple[list[Pixels], list[Pixels]] = [], []
    for row in range(image_HWC.shape[0] // SIDE):
        for column in range(image_HWC.shape[1] // SIDE):
            top, left = row * SIDE, column * SIDE
            colours[(row + column) % 2].append(image_HWC[top : top + SIDE, left : left + SIDE])
    return colours


def _compose(piece_SSC: Pixels, other_SSC: Pixels, rng: np.random.Generator) -> Pixels:
    """Return a piece with an ellipse of another texture."""
    across, down = rng.uniform(*HALF_AXES, 2)
    x, y = rng.uniform(max(HALF_AXES), SIDE - max(HALF_AXES), 2)
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).ellipse((x - across, y - down, x + across, y + down), fill=255)
    share_SS1 = np.asarray(mask.filter(ImageFilter.GaussianBlur(SOFT_EDGE)), np.float64)[..., None] / 255
    similar_SSC = (other_SSC - other_SSC.mean()) / other_SSC.std() * piece_SSC.std() + piece_SSC.mean()
    return np.rint((1 - share_SS1) * piece_SSC + share_SS1 * similar_SSC.clip(0, 255)).astype(np.uint8)


def _enlarge(piece_SSC: Pixels) -> Pixels:
    margin = (SIDE - SIDE / ENLARGEMENT) / 2
    box = (margin, margin, SIDE - margin, SIDE - margin)
    return np.asarray(Image.fromarray(piece_SSC).resize((SIDE, SIDE), Image.Resampling.BICUBIC, box))


def _blur(piece_SSC: Pixels) -> Pixels:
    return np.asarray(Image.fromarray(piece_SSC).filter(ImageFilter.GaussianBlur(DEFOCUS)))
