"""Measure the tables of docs/ood-method.md: which changes of an image are flagged, and which are not.

    python scripts/docs/controls.py --data cifar10 --ood mnist dtd10 imagenet1k_32

Prints Markdown: the false-positive rate on CIFAR-10 test images, and the flagged share of the same images after each
change and of other data sets, by each calibration of the model. Brackets are 95% intervals (Wilson's). docs/ood.md
repeats some of the rows.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Resampling

import ncml
from ncml import images
from ncml.data import dataset
from ncml.evaluation import bootstrap
from ncml.images import perturbations
from ncml.images.perturbations import Perturbation
from ncml.ood.calibration import DEFAULT_STATISTIC, Calibration
from ncml.ood.columns import Columns
from ncml.ood.measurements import measure as measure_columns
from ncml.ood.statistics import required_columns

PROCESSING: dict[str, Perturbation] = {
    **{f"JPEG, quality {quality}": perturbations.jpeg(quality) for quality in (95, 75, 50)},
    "half size and back (box, bicubic)": perturbations.resample(0.5, Resampling.BOX, Resampling.BICUBIC),
    "3/4 size and back (Lanczos)": perturbations.resample(0.75, Resampling.LANCZOS, Resampling.LANCZOS),
    "twice the size and back (bicubic, box)": perturbations.resample(2, Resampling.BICUBIC, Resampling.BOX),
    "twice the size and back (bilinear)": perturbations.resample(2, Resampling.BILINEAR, Resampling.BILINEAR),
    **{f"blur, {sigma:g} pixels": perturbations.blur(sigma) for sigma in (0.5, 1, 2)},
    **{f"noise, {levels} grey levels": perturbations.noise(levels) for levels in (1, 2, 5, 10, 20)},
    **{f"contrast x {factor:g}": perturbations.contrast(factor) for factor in (0.5, 0.8, 1.25)},
    "lowest bits flipped": perturbations.flip_lowest_bits,
}
CONTENT: dict[str, Perturbation] = {
    "mirrored": perturbations.mirror,
    "upside down": lambda image, _: image[::-1].copy(),
    "red and blue swapped": perturbations.swap_channels,
    "16x16 patches shuffled": perturbations.shuffle_patches(16),
    "8x8 patches shuffled": perturbations.shuffle_patches(8),
    "4x4 patches shuffled": perturbations.shuffle_patches(4),
}
STATISTICS = (DEFAULT_STATISTIC, "fast", "multiscale", "bpd")

CORRESPONDING_LABELS = {
    "airplane": (404, 895),
    "automobile": (436, 468, 511, 627, 656, 661, 751, 779, 817),
    "bird": (*range(7, 25), *range(80, 101), *range(127, 147)),
    "cat": range(281, 286),
    "deer": (351, 352, 353),
    "dog": range(151, 269),
    "frog": (30, 31, 32),
    "horse": (339,),
    "ship": (403, 510, 628, 724),
    "truck": (555, 569, 675, 717, 734, 864, 867),
}
"""The labels of ImageNet that correspond to each class of CIFAR-10."""

CAT = Path(__file__).resolve().parents[2] / "docs" / "cat.jpg"
"""Chelsea by Stefan van der Walt, CC0, cropped to a square and compressed."""

Images = NDArray[np.uint8]


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/cifar10")
    parser.add_argument("--data", required=True)
    parser.add_argument("--ood", nargs="*", default=[])
    parser.add_argument("--limit", type=int, default=200, help="number of images of each set")
    parser.add_argument("--untouched", type=int, default=4000, help="number of test images for the false-positive rate")
    options = parser.parse_args()
    model = ncml.load(options.model)
    calibrations = list(model.calibrations.by_name.values())
    if not calibrations:
        sys.exit(model.missing_reason)
    headings = [f"flagged, {calibration.name}" for calibration in calibrations]
    measured = partial(measure, model)

    def flagged(columns: Columns, statistic: str = DEFAULT_STATISTIC) -> str:
        return " | ".join(share(model, calibration, columns, statistic) for calibration in calibrations)

    def table(title: str, sets: dict[str, Callable[[], Images]]) -> None:
        print(f"\n{line([title, *headings])}\n{line(['---', *['---:'] * len(calibrations)])}")
        for name, load_set in sets.items():
            print(f"| {name} | {flagged(measured(load_set()))} |", flush=True)

    own = partial(load, options.data, model)
    print(f"{model.version[:12]}, {time.strftime('%Y-%m-%d')}, {options.limit} images of each set")
    print(f"\n{line(['as they are, by', *headings])}\n{line(['---', *['---:'] * len(calibrations)])}")
    untouched = measured(own(options.untouched))
    for statistic in STATISTICS:
        print(f"| {statistic}, {options.untouched} images | {flagged(untouched, statistic)} |", flush=True)
    test_images = own(options.limit)
    for title, perturbations_by_name in (("processing", PROCESSING), ("content", CONTENT)):
        table(title, {name: partial(perturb, test_images, change) for name, change in perturbations_by_name.items()})
    others: dict[str, Callable[[], Images]] = {
        "constant": partial(constant, test_images),
        "uniform": partial(uniform, test_images),
    }
    for source in options.ood:
        name = source.rstrip("/").rsplit("/")[-1]
        others[name] = partial(load, source, model, options.limit)
        if name.startswith("imagenet1k"):
            others[f"{name}, the classes of CIFAR-10"] = partial(load_corresponding, source, model, options.limit)
    table("other images", others)
    cat = measured(images.resize_to(images.open_image(CAT), model.height, model.width)[None])
    for calibration in calibrations:
        ood_score = scored(model, calibration, cat, DEFAULT_STATISTIC)
        p_value = float(calibration.p_values(DEFAULT_STATISTIC, ood_score)[0])
        print(f"\n{CAT.name}, {calibration.name}: p {p_value:.2f}")


def line(cells: list[str]) -> str:
    """Format cells as a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def measure(model: ncml.Model, pixels: Images) -> Columns:
    """Measure the columns of every image that `STATISTICS` need."""
    names = required_columns(STATISTICS, model.statistics)
    parts = [measure_columns(model.network, pixels[i : i + 32], names)[0] for i in range(0, len(pixels), 32)]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def scored(model: ncml.Model, calibration: Calibration, columns: Columns, statistic: str) -> NDArray[np.float64]:
    """Compute a statistic of every image."""
    return model.statistics[statistic].compute(columns, calibration.estimates)


def share(model: ncml.Model, calibration: Calibration, columns: Columns, statistic: str) -> str:
    """Format the flagged share and its interval."""
    verdicts = calibration.verdicts(statistic, scored(model, calibration, columns, statistic))
    flagged = bootstrap.share(np.array([verdict.is_ood for verdict in verdicts]))
    return f"{100 * flagged.value:.1f}% [{100 * flagged.low:.1f}, {100 * flagged.high:.1f}]"


def load(source: str, model: ncml.Model, limit: int) -> Images:
    """Load evenly spaced test images of a set."""
    return dataset.load(source, model.height, model.width, split="test").spread(limit).images_NHWC.numpy()


def load_corresponding(source: str, model: ncml.Model, limit: int) -> Images:
    """Load evenly spaced images of ImageNet whose class is one of CIFAR-10's."""
    images = dataset.load(source, model.height, model.width, split="test")
    corresponds = np.isin(
        images.labels_N.numpy(), [label for labels in CORRESPONDING_LABELS.values() for label in labels]
    )
    pixels = images.images_NHWC.numpy()[corresponds]
    return pixels[:: max(1, len(pixels) // limit)][:limit]


def constant(like: Images) -> Images:
    """Generate images of one random colour each."""
    rng = np.random.default_rng(0)
    return np.broadcast_to(rng.integers(0, 256, (len(like), 1, 1, 3)), like.shape).astype(np.uint8)


def uniform(like: Images) -> Images:
    """Generate images of independent random values."""
    return np.random.default_rng(0).integers(0, 256, like.shape).astype(np.uint8)


def perturb(pixels: Images, change: Perturbation) -> Images:
    """Perturb every image, each with its own random generator."""
    return np.stack([change(image, np.random.default_rng(i)) for i, image in enumerate(pixels)])


if __name__ == "__main__":
    main()
