"""The wall of docs/ood.md: a defect composed into a good picture, found by tiles.

    python scripts/docs/tiles.py

28 good pictures are random cuts of the left half of docs/brick.png; the wall to be judged is cut from its right half.
brick.png is scikit-image's, CC0. Writes docs/tiles.png, and docs/stained.png for scripts/docs/screenshots.py.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

import ncml
from ncml import images
from ncml.calibration import tiles
from ncml.images import heat
from ncml.ood.tiles import TileCalibration, scan

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
BRICK = DOCS / "brick.png"
SIDE = 128
DEFECT = (150, 90, 194, 122)
"""Left, top, right, bottom of the ellipse where the bricks' texture and mortar are all but wiped out."""


def main() -> None:
    """Calibrate, judge and draw."""
    wall = images.open_image(BRICK)[128:384, 256:]
    stained = stain(wall, np.random.default_rng(1))
    Image.fromarray(stained).save(DOCS / "stained.png", optimize=True)
    with tempfile.TemporaryDirectory() as folder:
        model, made = calibrated(Path(folder) / "wall")
        found = {name: scan(model.network, picture, made) for name, picture in (("good", wall), ("stained", stained))}
    drawn = []
    for picture, result in zip((wall, stained), found.values(), strict=True):
        over = heat.overlay(picture, result.map, float(found["good"].map.min()), made.threshold)
        drawn += [picture, heat.frame(over, result.box)]
    gap = np.full((wall.shape[0], 8, 3), 255, np.uint8)
    Image.fromarray(np.hstack([part for picture in drawn for part in (picture, gap)][:-1])).save(DOCS / "tiles.png")
    for name, result in found.items():
        print(f"{name}: worst tile {result.score:.2f} at {result.box}, p {result.p_value:.3f}, flagged {result.is_ood}")
    print(f"flagged above {made.threshold:.2f}; the defect is at {DEFECT}")


def calibrated(folder: Path) -> tuple[ncml.Model, TileCalibration]:
    """The bundled model in a folder of its own, with tiles calibrated on good pictures of the wall."""
    brick = images.open_image(BRICK)
    rng = np.random.default_rng(0)
    good = [cut(brick, rng) for _ in range(28)]
    opened: list[Callable[[], NDArray[np.uint8]]] = [lambda picture=picture: picture for picture in good]
    model = ncml.load(shutil.copytree(ROOT / "models" / "cifar10", folder))
    made = tiles.calibrate(model, opened[:8], opened[8:])
    made.save(folder)
    return model, made


def cut(brick: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A good picture, mirrored half of the time."""
    top, left = rng.integers(brick.shape[0] - SIDE), rng.integers(brick.shape[1] // 2 - SIDE)
    picture = brick[top : top + SIDE, left : left + SIDE]
    return np.ascontiguousarray(picture[:, ::-1] if rng.random() < 0.5 else picture)


def stain(wall: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A soft-edged patch of the wall's mean grey and a little grain, over 85 % of what was there."""
    mask = Image.new("L", wall.shape[1::-1])
    ImageDraw.Draw(mask).ellipse(DEFECT, fill=255)
    weight = 0.85 * np.asarray(mask.filter(ImageFilter.GaussianBlur(3)))[..., None] / 255
    grain = 1.5 * rng.standard_normal((*wall.shape[:2], 1))
    return np.rint(wall * (1 - weight) + (wall.mean((0, 1)) + grain) * weight).clip(0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
