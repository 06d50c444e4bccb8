"""What is it that the score sees? The tables of docs/ood.md: which changes of an image are flagged, which are not.

    ncml calibrate --model models/tolerant --data cifar10 --tolerate jpeg,resize    # a copy of models/cifar10
    python docs/controls.py --data cifar10 --ood mnist dtd10 imagenet1k_32 --tolerant models/tolerant

Prints Markdown: the share of CIFAR-10 test images that are flagged at the calibrated false-positive rate, after each
change, and the same for other data sets, with and without the tolerance.
"""

import argparse
import sys
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Resampling

import ncml
from ncml import changes, data, ood
from ncml.changes import Change, Picture

PROCESSING: dict[str, Change] = {
    "as it is": lambda picture, _: picture,
    **{f"JPEG, quality {quality}": changes.jpeg(quality) for quality in (95, 75, 50)},
    "half size and back (box, bicubic)": changes.resample(0.5, Resampling.BOX, Resampling.BICUBIC),
    "3/4 size and back (Lanczos)": changes.resample(0.75, Resampling.LANCZOS, Resampling.LANCZOS),
    "twice the size and back (bicubic, box)": changes.resample(2, Resampling.BICUBIC, Resampling.BOX),
    "twice the size and back (bilinear)": changes.resample(2, Resampling.BILINEAR, Resampling.BILINEAR),
    **{f"blur, {sigma:g} pixels": changes.blur(sigma) for sigma in (0.5, 1, 2)},
    **{f"noise, {levels} grey levels": changes.noise(levels) for levels in (1, 2, 5, 10, 20)},
    **{f"contrast x {factor:g}": changes.contrast(factor) for factor in (0.5, 0.8, 1.25)},
    "lowest bits flipped": changes.flip_lowest_bits,
}
CONTENT: dict[str, Change] = {
    "mirrored": changes.mirror,
    "upside down": lambda picture, _: picture[::-1].copy(),
    "red and blue swapped": changes.swap_channels,
    "16x16 patches shuffled": changes.shuffle_patches(16),
    "8x8 patches shuffled": changes.shuffle_patches(8),
    "4x4 patches shuffled": changes.shuffle_patches(4),
}


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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/cifar10")
    parser.add_argument("--tolerant", help="the same model, calibrated with --tolerate")
    parser.add_argument("--data", required=True)
    parser.add_argument("--ood", nargs="*", default=[])
    parser.add_argument("--limit", type=int, default=500, help="images of each set")
    asked = parser.parse_args()
    model = ncml.load(asked.model)
    models = [model, *([ncml.load(asked.tolerant)] if asked.tolerant else [])]
    calibrations = [m.calibration for m in models if m.calibration is not None and m.version == model.version]
    if len(calibrations) < len(models):
        sys.exit("both must be calibrated, and have the same weights")
    evenly = load(asked.data, model, asked.limit)

    def flagged(pictures: NDArray[np.uint8]) -> str:
        names = model.statistics["multiscale"].needs
        parts = [ood.measure(model.network, pictures[i : i + 32], names)[0] for i in range(0, len(pictures), 32)]
        columns = {name: np.concatenate([part[name] for part in parts]) for name in names}
        rates = []
        for calibration in calibrations:
            scores = model.statistics["multiscale"].of(columns, calibration.fit)
            rates.append(np.mean([verdict.is_ood for verdict in calibration.verdicts("multiscale", scores)]))
        return " | ".join(f"{rate:.1%}" for rate in rates)

    def table(title: str, pictures_of: dict[str, Callable[[], NDArray[np.uint8]]]) -> None:
        heads = ["flagged", "flagged, tolerant"][: len(calibrations)]
        print(f"\n| {title} | {' | '.join(heads)} |\n|---|{'---:|' * len(heads)}", flush=True)
        for name, pictures in pictures_of.items():
            print(f"| {name} | {flagged(pictures())} |", flush=True)

    print(f"{model.version[:12]}, {len(evenly)} test images, {time.strftime('%Y-%m-%d')}")
    for title, some in (("CIFAR-10 test images: processing", PROCESSING), ("content", CONTENT)):
        table(title, {name: lambda change=change: changed(evenly, change) for name, change in some.items()})
    rng = np.random.default_rng(0)
    shape = evenly.shape
    others: dict[str, Callable[[], NDArray[np.uint8]]] = {
        "constant": lambda: np.broadcast_to(rng.integers(0, 256, (shape[0], 1, 1, 3)), shape).astype(np.uint8),
        "uniform": lambda: rng.integers(0, 256, shape).astype(np.uint8),
    }
    for source in asked.ood:
        name = source.rstrip("/").rsplit("/")[-1]
        others[name] = lambda source=source: load(source, model, asked.limit)
        if name.startswith("imagenet1k"):
            others[f"{name}, the classes of CIFAR-10"] = lambda source=source: alike(source, model, asked.limit)
    table("other images", others)


def load(source: str, model: ncml.Model, limit: int) -> NDArray[np.uint8]:
    """Test images of a set, evenly spaced."""
    found = data.load(source, model.height, model.width, split="test").images_NHWC.numpy()
    return found[:: max(1, len(found) // limit)][:limit]


def alike(source: str, model: ncml.Model, limit: int) -> NDArray[np.uint8]:
    """The pictures of ImageNet whose class is one of CIFAR-10's."""
    found = data.load(source, model.height, model.width, split="test")
    wanted = np.isin(found.labels_N.numpy(), [label for labels in ALIKE.values() for label in labels])
    return found.images_NHWC.numpy()[wanted][:limit]


def changed(pictures: NDArray[np.uint8], change: Change) -> Picture:
    """Every picture through a change, each with chance of its own."""
    return np.stack([change(picture, np.random.default_rng(i)) for i, picture in enumerate(pictures)])


if __name__ == "__main__":
    main()
