"""Measure how much of a detection is due to processing: both sets processed alike (docs/ood-method.md).

    python scripts/docs/matched.py --data cifar10 --ood imagenet1k_32 dtd10

Prints a Markdown table of AUROCs for each set: images of CIFAR-10 and of the set go through the same change, and a
Gaussian is estimated on held-out images of CIFAR-10 after that change. Detectors that need no network are compared with
the default statistic; all are Mahalanobis distances under such a Gaussian. Brackets are 95% bootstrap intervals.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Resampling

import ncml
from ncml.data import dataset
from ncml.evaluation import bootstrap
from ncml.images import perturbations
from ncml.images.perturbations import Perturbation
from ncml.ood.calibration import DEFAULT_STATISTIC
from ncml.ood.columns import Columns
from ncml.ood.measurements import measure, webp_bits
from ncml.ood.statistics import Gaussian

Images = NDArray[np.uint8]

CROP = 28
"""Side of the square at the centre that is enlarged to the size of the images again."""


def crop(image: Images, _: np.random.Generator) -> Images:
    """Cut out the centre and resize it to the former size with a Lanczos filter."""
    height, width = image.shape[:2]
    top, left = (height - CROP) // 2, (width - CROP) // 2
    centre = Image.fromarray(image[top : top + CROP, left : left + CROP])
    return np.array(centre.resize((width, height), Resampling.LANCZOS), np.uint8)


CHANGES: dict[str, Perturbation] = {
    "as they are": lambda image, _: image,
    "JPEG, quality 90": perturbations.jpeg(90),
    "half size and back (box, bicubic)": perturbations.resample(0.5, Resampling.BOX, Resampling.BICUBIC),
    "noise, 4 grey levels": perturbations.noise(4),
    f"centre of {CROP}x{CROP}, resized (Lanczos)": crop,
}


class LinearPredictor:
    """Predicts each value from the 24 others of the 5x5 values around it, of the same channel, by least squares."""

    def __init__(self, images_NHWC: Images) -> None:
        around, centre = self._windows(images_NHWC)
        self.coefficients = np.linalg.lstsq(around.reshape(-1, 24), centre.reshape(-1), rcond=None)[0]

    @staticmethod
    def _windows(images_NHWC: Images) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the 24 values around each value that is not near the border, and the value."""
        x = images_NHWC.astype(np.float64) - 127.5
        windows = np.lib.stride_tricks.sliding_window_view(x, (5, 5), (1, 2)).reshape(*x[:, 4:, 4:].shape, 25)
        return np.delete(windows, 12, -1), windows[..., 12]

    def measure(self, images_NHWC: Images) -> Columns:
        """Measure the residuals of each image: the scale of each channel, and the correlations that `corr_0` has."""
        around, centre = self._windows(images_NHWC)
        r_NHWC = centre - around @ self.coefficients
        scale_NC = r_NHWC.std((1, 2)) + 1e-3
        z = (r_NHWC - r_NHWC.mean((1, 2), keepdims=True)) / scale_NC[:, None, None]
        products = [z[:, :, 1:] * z[:, :, :-1], z[:, 1:] * z[:, :-1]]
        products += [z[:, 1:, 1:] * z[:, :-1, :-1], z[:, 1:, :-1] * z[:, :-1, 1:]]
        products.append(z * np.roll(z, 1, -1))  # channels with one another
        values = [np.log(scale_NC), *(product.mean((1, 2)) for product in products)]
        return {f"residuals_{i}": column for i, column in enumerate(np.concatenate(values, 1).T)}


Measure = Callable[[Images], Columns]


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/cifar10")
    parser.add_argument("--data", required=True)
    parser.add_argument("--ood", nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=250, help="number of images of each set")
    parser.add_argument("--estimation", type=int, default=300, help="number of images that estimate the Gaussians")
    options = parser.parse_args()
    model = ncml.load(options.model)
    statistic = model.statistics[DEFAULT_STATISTIC]

    def measure_statistic(pixels_NHWC: Images) -> Columns:
        batches = [pixels_NHWC[i : i + 32] for i in range(0, len(pixels_NHWC), 32)]
        parts = [measure(model.network, batch, statistic.needs)[0] for batch in batches]
        return {name: np.concatenate([part[name] for part in parts]) for name in statistic.needs}

    def load(source: str, **part: str) -> Images:
        images = dataset.load(source, model.height, model.width, **part).spread(options.limit)
        return images.images_NHWC.numpy()

    held_out = dataset.load(options.data, model.height, model.width).part("calibration-fit").spread(options.estimation)
    sets = {"own": load(options.data, split="test")} | {source: load(source, split="test") for source in options.ood}
    sizes = f"{options.estimation} estimation images, {options.limit} of each set"
    print(f"{model.version[:12]}, {time.strftime('%Y-%m-%d')}, {sizes}\n", flush=True)
    header = ["set", "both processed alike", DEFAULT_STATISTIC, "WebP length", "linear predictor"]
    print(f"| {' | '.join(header)} |\n|---|---|---:|---:|---:|", flush=True)
    for name, change in CHANGES.items():
        estimation = perturb(held_out.images_NHWC.numpy(), change)
        predictor = LinearPredictor(estimation)
        detectors: list[Measure] = [
            measure_statistic,
            lambda pixels_NHWC: {"webp": np.array([webp_bits(image) for image in pixels_NHWC])},
            predictor.measure,
        ]
        changed = {source: perturb(pixels, change) for source, pixels in sets.items()}
        cells: dict[str, list[str]] = {source: [] for source in options.ood}
        for detector in detectors:
            gaussian = Gaussian.estimate(detector(estimation))
            inside = gaussian.distance(detector(changed["own"]))
            for source in options.ood:
                outside = gaussian.distance(detector(changed[source]))
                auroc = bootstrap.estimate_detection(inside, outside)["auroc"]
                cells[source].append(f"{auroc.value:.2f} [{auroc.low:.2f}, {auroc.high:.2f}]")
        for source in options.ood:
            print(f"| {source.rstrip('/').rsplit('/')[-1]} | {name} | {' | '.join(cells[source])} |", flush=True)


def perturb(images_NHWC: Images, change: Perturbation) -> Images:
    """Change every image, each with its own random generator."""
    return np.stack([change(image, np.random.default_rng(i)) for i, image in enumerate(images_NHWC)])


if __name__ == "__main__":
    main()
