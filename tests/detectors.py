"""Images of a part, and a small detector of them."""

import atexit
import functools
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.ncml import nets


def good_image(seed: int, height: int = 72, width: int = 96) -> np.ndarray:
    """Return a good image: a bright bar on a dark ground, a disc beside it, and noise; it lies a pixel to any side."""
    rng = np.random.default_rng(seed)
    image = rng.normal(70 + rng.normal(0, 3), 4, (height, width, 3))
    y, x = np.mgrid[:height, :width]
    top, left = 20 + rng.integers(-1, 2), 20 + rng.integers(-1, 2)
    image[top : top + 12, left : left + 40] += 90
    image[np.hypot(y - 50, x - 70) < 8] += 120
    return image.clip(0, 255).astype(np.uint8)


def fixed_image(seed: int, height: int = 72, width: int = 96) -> np.ndarray:
    """Return a good image whose bar always lies at the same place."""
    rng = np.random.default_rng(seed)
    image = rng.normal(70 + rng.normal(0, 3), 4, (height, width, 3))
    image[height // 4 : height // 2, width // 4 : width // 2] += 90
    return image.clip(0, 255).astype(np.uint8)


def turned_image(seed: int, height: int = 72, width: int = 96) -> np.ndarray:
    """Return a good image of an L-shaped part in any direction, shifted by up to 6 pixels, on a random ground."""
    rng = np.random.default_rng(seed)
    angle = rng.uniform(-np.pi, np.pi)
    y, x = np.mgrid[:height, :width] + 0.5
    x, y = x - width / 2 - rng.uniform(-6, 6), y - height / 2 - rng.uniform(-6, 6)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    is_part = ((abs(u) < 22) & (abs(v + 11) < 5)) | ((abs(u + 17) < 5) & (abs(v) < 16))
    image = rng.normal(70, 4, (height, width, 3)) + 90 * is_part[..., None]
    return image.clip(0, 255).astype(np.uint8)


def plate(seed: int, angle: float, scale: float) -> np.ndarray:
    """Return an image, 96 x 128, of a plate with bars, turned in degrees and scaled; the bars show its scale alone."""
    rng = np.random.default_rng(seed)
    y, x = (np.mgrid[:96, :128] - np.array([47.5, 63.5])[:, None, None]) / scale
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    u, v = cos * x + sin * y, cos * y - sin * x
    is_dark = np.random.default_rng(0).random(22) < 0.5  # bars of 3 pixels
    is_light = (abs(u) < 33) & (abs(v) < 22) & ~is_dark[((u + 33) / 3).astype(int).clip(0, 21)]
    image = 60 + 90 * is_light[..., None] + rng.normal(0, 3, (96, 128, 3))
    return image.clip(0, 255).astype(np.uint8)


def texture(seed: int, height: int = 72, width: int = 96) -> np.ndarray:
    """Return an image of a texture, in which nothing has a place."""
    rng = np.random.default_rng(seed)
    image = rng.normal(128 + rng.normal(0, 3), 40, (height, width, 3))
    return ((image + np.roll(image, 1, 0) + np.roll(image, 1, 1)) / 3).clip(0, 255).astype(np.uint8)


def without_disc(seed: int) -> np.ndarray:
    """Return an image in which the disc is missing."""
    image = good_image(seed)
    image[40:62, 58:82] = image[40:62, 2:26]
    return image


def save_parts(folder: Path, count: int) -> None:
    """Write good images of a part (`good_image`) into a folder, which is made if it is missing."""
    folder.mkdir(exist_ok=True)
    for seed in range(count):
        Image.fromarray(good_image(seed)).save(folder / f"{seed:03}.png")


def save_good_images(folder: Path, seed: int = 2, count: int = 60) -> None:
    """Write images that differ, of which 007.png is unlike the others."""
    images_NHWC = np.random.default_rng(seed).normal(120, 12, (count, 40, 40, 3)).astype(np.uint8)
    images_NHWC[7:8] = 0
    nets.save_images(folder, images_NHWC)


@functools.cache
def small_base() -> Path:
    """Return the folder of a network that computes the likelihood of pixels from their neighbours: one layer."""
    import torch

    from ncml import checkpoint
    from ncml.config import LevelConfig
    from ncml.network.ncpn import NCPN
    from ncml.recipes import detector_base

    recipe = detector_base()
    torch.manual_seed(0)
    network = NCPN(
        replace(recipe, model=replace(recipe.model, levels=(LevelConfig(width=8, blocks=0, attention=False),)))
    )
    folder = Path(tempfile.mkdtemp(prefix="ncml-base-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    checkpoint.save(folder / "base", network)
    return folder / "base"


def use_small_scale(patch: pytest.MonkeyPatch) -> None:
    """Judge small images at their size, with a small network of the likelihood; align them by few angles and
    candidates, and measure few alterations."""
    from ncml.images import alterations

    patch.setattr("ncml.ood.views.likelihood.find_detector_base", small_base)
    patch.setattr("ncml.ood.views.patches.LEAST_SIDE", 96)
    patch.setattr("ncml.ood.views.patches.AREA_SIDE", 96)
    patch.setattr("ncml.ood.views.alignment.SEARCH_SIDE", 40)
    patch.setattr("ncml.ood.views.alignment.COARSE_SIDE", 48)
    patch.setattr("ncml.ood.views.alignment.FINE_SIDE", 96)
    patch.setattr("ncml.ood.views.pose_search.ANGLE_STEP", 30)
    patch.setattr("ncml.ood.views.pose_search.CANDIDATES", 2)
    patch.setattr("ncml.calibration.altered_originals.ALTERATIONS", alterations.ALTERATIONS[:3])


def make_small_detector(base: Path, images: Path, out: Path, count: int = 40) -> None:
    """Make a detector of good images, which are written to a folder, at a reduced size, so that it is quick."""
    import ncml
    from ncml.calibration.detector import make_detector
    from ncml.data.good_images import open_folder

    save_parts(images, count)
    with pytest.MonkeyPatch.context() as patch:
        use_small_scale(patch)
        make_detector(ncml.load(base), open_folder(images, sorted(images.iterdir())), out, power_images=2)
