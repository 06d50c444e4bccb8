"""What is it that the score sees? The tables of docs/ood.md: which changes of an image are flagged, which are not.

    cp -r models/cifar10 models/tolerant
    ncml calibrate --model models/tolerant --data cifar10 --tolerate jpeg,resize
    python scripts/docs/controls.py --data cifar10 --ood mnist dtd10 imagenet1k_32 --tolerant models/tolerant

Prints Markdown: the false-positive rate on CIFAR-10 test images, and the share that is flagged of the same images after
each change and of other data sets, with and without the tolerance. Brackets are 95 % intervals: Wilson's of shares,
bootstrap of AUROCs.
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
from scipy.stats import binomtest

import ncml
from ncml import images
from ncml.evaluation import bootstrap
from ncml.images import perturbations
from ncml.images.perturbations import Perturbation
from ncml.ood.calibration import Calibration
from ncml.ood.measurements import Columns
from ncml.ood.measurements import measure as measure_columns
from ncml.ood.statistics import Gaussian
from ncml.training import dataset

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
    "upside down": lambda picture, _: picture[::-1].copy(),
    "red and blue swapped": perturbations.swap_channels,
    "16x16 patches shuffled": perturbations.shuffle_patches(16),
    "8x8 patches shuffled": perturbations.shuffle_patches(8),
    "4x4 patches shuffled": perturbations.shuffle_patches(4),
}
MATCHED: dict[str, Perturbation] = {
    "as they are": lambda picture, _: picture,
    **{name: PROCESSING[name] for name in ("JPEG, quality 50", "half size and back (box, bicubic)")},
}
"""Perturbations after which little is left of how a set had been processed before."""
MATCHED_FIT = 300
"""Held-out images that fit the Gaussian then."""

ALIKE = {
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
"""ImageNet's classes that show a class of CIFAR-10."""

PHOTOGRAPH = Path(__file__).resolve().parents[2] / "docs" / "cat.jpg"
"""Chelsea by Stefan van der Walt, CC0, cut square and compressed."""

Pictures = NDArray[np.uint8]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/cifar10")
    parser.add_argument("--tolerant", help="the same model, calibrated with --tolerate")
    parser.add_argument("--data", required=True)
    parser.add_argument("--ood", nargs="*", default=[])
    parser.add_argument("--limit", type=int, default=200, help="images of each set")
    parser.add_argument("--untouched", type=int, default=4000, help="test images for the false-positive rate")
    asked = parser.parse_args()
    model = ncml.load(asked.model)
    models = [model, *([ncml.load(asked.tolerant)] if asked.tolerant else [])]
    calibrations = [m.calibration for m in models if m.calibration is not None and m.version == model.version]
    if len(calibrations) < len(models):
        sys.exit("both must be calibrated, and have the same weights")
    head, *further = ["flagged", "flagged, tolerant"][: len(calibrations)]
    measured = partial(measure, model)

    def flagged(columns: Columns, statistic: str = "multiscale") -> str:
        return " | ".join(share(model, calibration, columns, statistic) for calibration in calibrations)

    def table(title: str, sets: dict[str, Callable[[], Pictures]]) -> None:
        print(f"\n{line([title, head, *further])}\n{line(['---', *['---:'] * len(calibrations)])}")
        for name, pictures in sets.items():
            print(f"| {name} | {flagged(measured(pictures()))} |", flush=True)

    own = partial(load, asked.data, model)
    print(f"{model.version[:12]}, {time.strftime('%Y-%m-%d')}, {asked.limit} images of each set")
    print(f"\n{line(['as they are, by', head, *further])}\n{line(['---', *['---:'] * len(calibrations)])}")
    untouched = measured(own(asked.untouched))
    for statistic in ("multiscale", "bpd"):
        print(f"| {statistic}, {asked.untouched} images | {flagged(untouched, statistic)} |", flush=True)
    some = own(asked.limit)
    for title, known in (("processing", PROCESSING), ("content", CONTENT)):
        table(title, {name: partial(changed, some, change) for name, change in known.items()})
    others: dict[str, Callable[[], Pictures]] = {"constant": partial(constant, some), "uniform": partial(uniform, some)}
    for source in asked.ood:
        name = source.rstrip("/").rsplit("/")[-1]
        others[name] = partial(load, source, model, asked.limit)
        if name.startswith("imagenet1k"):
            others[f"{name}, the classes of CIFAR-10"] = partial(alike, source, model, asked.limit)
    table("other images", others)
    cat = measured(images.resize_to(images.open_image(PHOTOGRAPH), model.height, model.width)[None])
    p = [float(c.p_values("multiscale", scored(model, c, cat, "multiscale"))[0]) for c in calibrations]
    print(f"\n{PHOTOGRAPH.name}: p {', tolerant '.join(f'{value:.2f}' for value in p)}")
    for name in others:
        if name.startswith("imagenet1k") and "," not in name:
            print(f"\n| cifar10 against {name}, both processed alike | AUROC |\n|---|---:|")
            for change_name, change in MATCHED.items():
                print(f"| {change_name} | {matched(model, asked.data, some, others[name](), change)} |", flush=True)


def line(cells: list[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def measure(model: ncml.Model, pictures: Pictures) -> Columns:
    """What `multiscale` and `bpd` need of every picture."""
    names = model.statistics["multiscale"].needs
    parts = [measure_columns(model.network, pictures[i : i + 32], names)[0] for i in range(0, len(pictures), 32)]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def scored(model: ncml.Model, calibration: Calibration, columns: Columns, statistic: str) -> NDArray[np.float64]:
    """A statistic of every picture."""
    return model.statistics[statistic].compute(columns, calibration.estimates)


def share(model: ncml.Model, calibration: Calibration, columns: Columns, statistic: str) -> str:
    """How many are flagged, and the interval of that."""
    verdicts = calibration.verdicts(statistic, scored(model, calibration, columns, statistic))
    count = sum(verdict.is_ood for verdict in verdicts)
    low, high = binomtest(count, len(verdicts)).proportion_ci(method="wilson")
    return f"{100 * count / len(verdicts):.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def matched(model: ncml.Model, source: str, own: Pictures, others: Pictures, change: Perturbation) -> str:
    """AUROC of a Gaussian that was fitted on pictures that went through the same change."""
    held_out = dataset.load(source, model.height, model.width).part("calibration-fit").spread(MATCHED_FIT)
    fit, inside, outside = (
        measure(model, changed(pictures, change)) for pictures in (held_out.images_NHWC.numpy(), own, others)
    )
    gaussian = Gaussian.estimate(fit)
    auroc = bootstrap.estimate_detection(gaussian.distance(inside), gaussian.distance(outside))["auroc"]
    return f"{auroc.value:.2f} [{auroc.low:.2f}, {auroc.high:.2f}]"


def load(source: str, model: ncml.Model, limit: int) -> Pictures:
    """Test images of a set, evenly spaced."""
    return dataset.load(source, model.height, model.width, split="test").spread(limit).images_NHWC.numpy()


def alike(source: str, model: ncml.Model, limit: int) -> Pictures:
    """The pictures of ImageNet whose class is one of CIFAR-10's, evenly spaced."""
    found = dataset.load(source, model.height, model.width, split="test")
    wanted = np.isin(found.labels_N.numpy(), [label for labels in ALIKE.values() for label in labels])
    pictures = found.images_NHWC.numpy()[wanted]
    return pictures[:: max(1, len(pictures) // limit)][:limit]


def constant(like: Pictures) -> Pictures:
    """One random colour for each picture."""
    rng = np.random.default_rng(0)
    return np.broadcast_to(rng.integers(0, 256, (len(like), 1, 1, 3)), like.shape).astype(np.uint8)


def uniform(like: Pictures) -> Pictures:
    """Independent random values."""
    return np.random.default_rng(0).integers(0, 256, like.shape).astype(np.uint8)


def changed(pictures: Pictures, change: Perturbation) -> Pictures:
    """Every picture through a change, each with chance of its own."""
    return np.stack([change(picture, np.random.default_rng(i)) for i, picture in enumerate(pictures)])


if __name__ == "__main__":
    main()
