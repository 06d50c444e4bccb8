"""Make the wall of docs/ood.md: a defect is drawn into a good image and found by tiles.

    python scripts/docs/tiles.py

28 good images are random crops of the left half of docs/brick.png; the scored wall is a crop of its right half.
brick.png is scikit-image's, CC0. Writes docs/tiles.png, and docs/stained.png for scripts/docs/screenshots.py;
prints the figures of docs/ood-method.md.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

import ncml
from ncml import images
from ncml.calibration import tile_estimation
from ncml.images import heat
from ncml.ood.tile_calibration import TileCalibration
from ncml.ood.tiles import scan

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
BRICK = DOCS / "brick.png"
SIDE = 128
DEFECT = (150, 90, 194, 122)
"""Left, top, right and bottom of the ellipse in which the texture and mortar are almost invisible."""


def main() -> None:
    """Calibrate the model, scan both walls, and draw the figure."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    wall = images.open_image(BRICK)[128:384, 256:]
    stained = stain(wall, np.random.default_rng(1))
    Image.fromarray(stained).save(DOCS / "stained.png", optimize=True)
    with tempfile.TemporaryDirectory() as folder:
        model, calibration = calibrate_wall(Path(folder) / "wall")
        scans = {
            name: scan(model.network, image, calibration) for name, image in (("good", wall), ("stained", stained))
        }
    panels = []
    for image, result in zip((wall, stained), scans.values(), strict=True):
        over = heat.overlay(image, result.map, float(scans["good"].map.min()), calibration.threshold)
        panels += [image, heat.frame(over, result.box)]
    gap = np.full((wall.shape[0], 8, 3), 255, np.uint8)
    Image.fromarray(np.hstack([part for panel in panels for part in (panel, gap)][:-1])).save(DOCS / "tiles.png")
    for name, result in scans.items():
        print(
            f"{name}: {result.view} {result.score:.2f} at {result.box}, p {result.p_value:.3f}, flagged {result.is_ood}"
        )
    print(f"flagged above {calibration.threshold:.2f}; the defect is at {DEFECT}")


def calibrate_wall(folder: Path) -> tuple[ncml.Model, TileCalibration]:
    """Copy the bundled model to a folder and calibrate its tiles on good images of the wall."""
    brick = images.open_image(BRICK)
    rng = np.random.default_rng(0)
    good = [crop(brick, rng) for _ in range(28)]
    readers: list[Callable[[], NDArray[np.uint8]]] = [lambda image=image: image for image in good]
    model = ncml.load(shutil.copytree(ROOT / "models" / "cifar10", folder))
    calibration = tile_estimation.calibrate(model, readers[:8], readers[8:])
    calibration.save(folder)
    return model, calibration


def crop(brick: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Crop a good image, mirrored half of the time."""
    top, left = rng.integers(brick.shape[0] - SIDE), rng.integers(brick.shape[1] // 2 - SIDE)
    image = brick[top : top + SIDE, left : left + SIDE]
    return np.ascontiguousarray(image[:, ::-1] if rng.random() < 0.5 else image)


def stain(wall: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Blend in a soft-edged patch of the wall's mean grey and slight grain, at 85% opacity."""
    mask = Image.new("L", wall.shape[1::-1])
    ImageDraw.Draw(mask).ellipse(DEFECT, fill=255)
    weight = 0.85 * np.asarray(mask.filter(ImageFilter.GaussianBlur(3)))[..., None] / 255
    grain = 1.5 * rng.standard_normal((*wall.shape[:2], 1))
    return np.rint(wall * (1 - weight) + (wall.mean((0, 1)) + grain) * weight).clip(0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
