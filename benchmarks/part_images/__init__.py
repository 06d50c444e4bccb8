"""Images of parts, rendered like photographs: good ones, defective ones with their true regions, and foreign ones.

`render` makes one image, `write_folders` a data set in the layout of MVTec AD. Everything is a function of the kind,
the seed and the image's number. `kinds` describes the parts, `marks` the defects of their surface, `canvas` the camera.
"""

from __future__ import annotations

import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from .canvas import Array, Canvas, Light, Pose
from .kinds import KINDS, Edit, Kind
from .marks import MARKS
from .variations import VARIATIONS

Pixels = NDArray[np.uint8]

VISIBLE = 18.0
"""Grey levels by which a defect changes at least `VISIBLE_PIXELS` pixels; one that does not is drawn again."""
VISIBLE_PIXELS = 6
ATTEMPTS = 40

FEATURE_DEFECTS = ("missing", "recoloured", "moved")
SURFACE_MARKS = ("scratch", "spot", "pit", "stain", "fibre")


@dataclass(frozen=True)
class Rendered:
    """An image, and what is wrong with it."""

    image_HWC: Pixels
    mask_HW: NDArray[np.bool_]
    """Where the defect changed the image; all False without one."""
    defect: str | None = None
    sizes: dict[str, float] | None = None
    """Of the mark, in pixels."""
    contrast: float = 0.0
    """Mean change over the mask in grey levels."""


def defects_of(kind: str) -> tuple[str, ...]:
    """Return the names of the defects that a kind of part can have."""
    if KINDS[kind].features == 0:
        return SURFACE_MARKS
    return (*MARKS, *FEATURE_DEFECTS)


def render(
    kind_name: str, number: int, *, defect: str | None = None, variation: str | None = None, seed: int = 0
) -> Rendered:
    """Render one image; the same kind, number, defect and seed give the same image.

    variation: one of `VARIATIONS`, which good images have.
    """
    kind = KINDS[kind_name]
    key = [seed, crc32(kind_name.encode()), number, crc32((defect or "").encode())]
    rng = np.random.default_rng(key)
    size = kind.sizes[int(rng.integers(len(kind.sizes)))]
    pose, light = _pose(kind, rng), _light(rng)
    part_seed, camera_seed = (int(value) for value in rng.integers(2**62, size=2))
    canvas = _surface(kind, size, pose, part_seed, Edit())
    if variation is not None:
        light = VARIATIONS[variation](canvas, rng, light)
    good = canvas.photograph(light)
    if defect is None:
        return Rendered(_expose(kind, good, camera_seed), np.zeros(good.shape[:2], bool))
    for _ in range(ATTEMPTS):
        canvas, sizes = _defective(kind, size, pose, part_seed, defect, rng)
        changed = canvas.photograph(light)
        change = np.abs(changed - good).max(2)
        if (ndimage.gaussian_filter(change, 0.7) > VISIBLE).sum() >= VISIBLE_PIXELS:
            mask = change > VISIBLE / 3
            contrast = float(change[mask].mean())
            return Rendered(_expose(kind, changed, camera_seed), mask, defect, sizes, contrast)
    raise ValueError(f"no visible {defect} on {kind_name} {number} in {ATTEMPTS} attempts")


def _pose(kind: Kind, rng: np.random.Generator) -> Pose:
    placement = kind.placement
    x, y = rng.uniform(-1, 1, 2) * placement.shift
    angle = np.deg2rad(rng.uniform(-1, 1) * placement.angle)
    return Pose(float(x), float(0.75 * y), float(angle), float(1 + rng.uniform(-1, 1) * placement.scale))


def _light(rng: np.random.Generator) -> Light:
    warmth = rng.normal(0, 0.015)
    return Light(
        azimuth=float(-2.2 + rng.normal(0, 0.12)),
        elevation=float(np.deg2rad(50 + rng.normal(0, 3))),
        exposure=float(np.exp(rng.normal(0, 0.06))),
        gradient=(float(rng.normal(0, 0.05)), float(rng.normal(0, 0.05))),
        tint=(float(1 + warmth), 1.0, float(1 - warmth)),
    )


def _surface(kind: Kind, size: tuple[int, int], pose: Pose, part_seed: int, edit: Edit) -> Canvas:
    canvas = Canvas(*size, pose)
    kind.draw(canvas, np.random.default_rng(part_seed), edit)
    return canvas


def _defective(
    kind: Kind, size: tuple[int, int], pose: Pose, part_seed: int, defect: str, rng: np.random.Generator
) -> tuple[Canvas, dict[str, float]]:
    """Return a surface with a defect, and the sizes of the mark in pixels."""
    if defect in MARKS:
        canvas = _surface(kind, size, pose, part_seed, Edit())
        return canvas, MARKS[defect](canvas, rng)
    feature = int(rng.integers(kind.features))
    if defect == "missing":
        return _surface(kind, size, pose, part_seed, Edit(missing=feature)), {}
    if defect == "recoloured":
        return _surface(kind, size, pose, part_seed, Edit(recoloured=feature)), {}
    length, angle = rng.uniform(0.02, 0.05), rng.uniform(0, 2 * np.pi)
    edit = Edit(moved=feature, shift=(float(length * np.cos(angle)), float(length * np.sin(angle))))
    return _surface(kind, size, pose, part_seed, edit), {"shift": length * size[0] / 2}


def _expose(kind: Kind, image: Array, camera_seed: int) -> Pixels:
    """Add focus, noise and compression of a camera."""
    rng = np.random.default_rng(camera_seed)
    blurred = ndimage.gaussian_filter(image, (sigma := float(rng.uniform(0.55, 0.85)), sigma, 0))
    deviation = np.sqrt(1.0 + 0.012 * blurred)
    noise = ndimage.gaussian_filter(rng.standard_normal(image.shape, np.float32), (0.4, 0.4, 0))
    pixels = np.clip(np.rint(blurred + 1.4 * deviation * noise), 0, 255).astype(np.uint8)
    if kind.jpeg is None:
        return pixels
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=kind.jpeg)
    return np.asarray(Image.open(file))


def foreign(kind_name: str, number: int, *, seed: int = 0) -> Pixels:
    """Return an image of something else: another part, a photograph that scikit-learn contains, or no part at all."""
    rng = np.random.default_rng([seed, crc32(kind_name.encode()), number, 1])
    kind = KINDS[kind_name]
    width, height = kind.sizes[0]
    if number % 3 == 2 and kind.features:
        outside = _surface(kind, (width, height), Pose(x=9), number, Edit())
        return _expose(kind, outside.photograph(_light(rng)), number)
    if number % 3:
        image_HWC = _photograph(rng)
    else:
        others = [name for name in KINDS if name != kind_name]
        image_HWC = render(others[int(rng.integers(len(others)))], 300_000 + number, seed=seed).image_HWC
    return np.asarray(Image.fromarray(image_HWC).resize((width, height), Image.Resampling.BICUBIC))


def _photograph(rng: np.random.Generator) -> Pixels:
    """Return a random part of a photograph, of 4:3."""
    from sklearn.datasets import load_sample_image

    photograph = load_sample_image(("china.jpg", "flower.jpg")[int(rng.integers(2))])
    height = round(photograph.shape[0] * rng.uniform(0.5, 1.0))
    width = round(height * 4 / 3)
    top = int(rng.integers(photograph.shape[0] - height + 1))
    left = int(rng.integers(photograph.shape[1] - width + 1))
    return photograph[top : top + height, left : left + width]


def write_folders(
    root: Path, kind_name: str, *, training: int, good: int, defective: int, foreign_images: int, seed: int = 0
) -> Path:
    """Write `train/good`, `test/<defect>`, `test/good`, `test/foreign` and `ground_truth` below root/kind; return it.

    `defective` images are written of each defect. `truth.json` lists each defect's sizes, contrast and box.
    """
    folder = root / kind_name
    suffix = "png" if KINDS[kind_name].jpeg is None else "jpg"

    def save(part: str, number: int, image_HWC: Pixels) -> Path:
        path = folder / part / f"{number:04d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        # A second compression at this quality changes hardly anything, and keeps the file small.
        Image.fromarray(image_HWC).save(path, quality=98)
        return path

    for number in range(training):
        save("train/good", number, render(kind_name, number, seed=seed).image_HWC)
    for number in range(good):
        save("test/good", number, render(kind_name, 100_000 + number, seed=seed).image_HWC)
    for number in range(foreign_images):
        save("test/foreign", number, foreign(kind_name, number, seed=seed))
    truth = {}
    for defect in defects_of(kind_name):
        for number in range(defective):
            rendered = render(kind_name, 200_000 + number, defect=defect, seed=seed)
            path = save(f"test/{defect}", number, rendered.image_HWC)
            mask = folder / "ground_truth" / defect / f"{number:04d}.png"
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rendered.mask_HW).save(mask)
            rows, columns = np.nonzero(rendered.mask_HW)
            truth[path.relative_to(folder).as_posix()] = {
                "defect": defect,
                "box": [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1],
                "contrast": round(rendered.contrast, 1),
                **{name: round(float(value), 1) for name, value in (rendered.sizes or {}).items()},
            }
    (folder / "truth.json").write_text(json.dumps(truth, indent=1) + "\n")
    return folder


def reuse_or_write_folders(
    root: Path, kind_name: str, *, training: int, good: int, defective: int, foreign_images: int, seed: int = 0
) -> Path:
    """Return the folder that `write_folders` writes, with the images that are there; end for those of other options."""
    folder = root / kind_name
    if not (folder / "truth.json").is_file():
        counts = {"training": training, "good": good, "defective": defective, "foreign_images": foreign_images}
        return write_folders(root, kind_name, **counts, seed=seed)
    numbers = {
        "train/good": training, "test/good": good, "test/foreign": foreign_images,
        **{f"test/{defect}": defective for defect in defects_of(kind_name)},
    }  # fmt: skip
    has_numbers = all(sum(1 for _ in (folder / part).glob("*")) == number for part, number in numbers.items())
    if not has_numbers or not _begins_with_seed(folder, seed):
        raise SystemExit(f"{folder} has images of other options: name another folder with --images, or remove it.")
    return folder


def _begins_with_seed(folder: Path, seed: int) -> bool:
    """Return whether the first image of a folder is what is rendered with a seed."""
    with tempfile.TemporaryDirectory() as temporary:
        written = write_folders(
            Path(temporary), folder.name, training=1, good=0, defective=0, foreign_images=0, seed=seed
        )
        [first] = (written / "train" / "good").iterdir()
        return (folder / "train" / "good" / first.name).read_bytes() == first.read_bytes()
