"""Detect defects of solar cells, of simulated textiles and of photographed textures, beside other methods.

AUROC, share detected at 5%, false positives and seconds an image.

    pip install conformal-clip-data elpv-dataset scikit-image
    python benchmarks/defects.py [--quick] [--tile N] [--overlap SHARE] [--sets textiles cells brick grass gravel]
                                 [--methods adapted bundled detector patches pooled likelihood linear4 linear24
                                  brightness]

Textiles are 250x250 RGB, with local or global defects; cells are photographs of solar cells, 300x300 grey, sound or
certainly defective. (The data of elpv-dataset is CC-BY-NC-SA: it is measured with, and not part of this project.)
Brick, grass and gravel are 64x64 with composed defects, 32 good ones to calibrate with and 32 of each kind
(`texture_pieces.py`). Of the others, each method is calibrated on 100 good images, and tested on at most 100 images of
each kind. It sees no defect before.

adapted: a detector, as `ncml adapt` makes it; combined is its verdict, and a view detects what it alone raises above
the threshold. bundled: the bundled model, its tiles calibrated. detector: the same after fine-tuning on crops of
further good images, as `ncml train detector` does it. patches: distances of EfficientNet-Lite0's patch features from
the nearest ones of good images, as PatchCore does it. pooled: scikit-learn's local outlier factor on that network's
pooled features.
likelihood: the view `likelihood` of detectors, by the bundled model `detector-base`. linear4, linear24: a linear
predictor of each pixel from the 4 or 24 pixels before it within 1 or 3 rows and columns, estimated by least squares.
brightness: the distance of the mean brightness from the median of good images.

`--quick` tests 10 images of each kind, and trains for 2 minutes. Seconds are CPU time of one thread, so other programs
on the machine do not change them much.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import importlib.util
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import uniform_filter
from sklearn.metrics import roc_auc_score
from texture_pieces import TEXTURES, write_pieces

import ncml
from ncml import checkpoint, config, images, recipes
from ncml.calibration import tile_estimation
from ncml.calibration.detector import make_detector
from ncml.data.cropping import Cropping
from ncml.data.dataset import Dataset
from ncml.data.good_images import open_folder
from ncml.images.tiling import OVERLAP, Tiling
from ncml.network import efficientnet
from ncml.network.ncpn import NCPN
from ncml.ood import conformal
from ncml.ood.judging import Detector
from ncml.ood.tiles import scan
from ncml.ood.views.likelihood import LikelihoodView
from ncml.progress import ignore_progress
from ncml.runtime import use_full_precision
from ncml.training.distributed import SINGLE_PROCESS
from ncml.training.precision import without_emulation
from ncml.training.trainer import Trainer
from ncml.training.transfer import start_from

ROOT = Path(__file__).resolve().parents[1]
RATE, CALIBRATION, ESTIMATING, TRAINING = 0.05, 100, 30, 500
"""False-positive rate; good images that calibrate, of which these estimate; and further ones that train."""
RANKING = 19
"""Ranking pieces of a photograph, which a threshold at this rate needs; the others estimate."""

TILE = 128
"""Side of tiles and crops in pixels: a quarter of it is left at the model's size, and small defects may not be."""

TIE_WEIGHT, TIE_RANGE = 1e-6, 1e3
"""Share of the statistic that orders images of one p-value; far less than the difference of two p-values."""

CROPS = 40
"""Crops per training image."""

Pixels = NDArray[np.uint8]
Scores = dict[str, NDArray[np.float64]]
"""OOD scores of the images of a kind, by method or view."""


@dataclass(frozen=True)
class ImageSet:
    """Files of good images and of each kind of test images, `good` among them."""

    training: list[Path]
    calibration: list[Path]
    tests: dict[str, list[Path]]
    estimating: int = ESTIMATING
    """Number of calibrating images that estimate, the first ones; the others rank."""
    tile: int = TILE
    overlap: float = OVERLAP

    @property
    def estimation(self) -> list[Path]:
        """The calibrating images that estimate."""
        return self.calibration[: self.estimating]

    @property
    def ranking(self) -> list[Path]:
        """The calibrating images that rank."""
        return self.calibration[self.estimating :]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 test images of each kind, 2 minutes of training")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--images", type=int, metavar="N", help="test images of each kind (default: 100, or 10)")
    parser.add_argument(
        "--tile", type=int, default=TILE, metavar="N", help=f"side of tiles in pixels (default: {TILE})"
    )
    parser.add_argument(
        "--overlap", type=float, default=OVERLAP, metavar="SHARE", help=f"of a tile (default: {OVERLAP:g})"
    )
    parser.add_argument("--minutes", type=float, metavar="N", help="CPU time of training (default: 10, or 2)")
    parser.add_argument(
        "--orders", type=int, default=1, metavar="N", help="random orders of the calibrating images, after their own"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file, as they come")
    options = parser.parse_args()
    count = options.images or (10 if options.quick else 100)
    minutes = options.minutes or (2 if options.quick else 10)
    torch.set_num_threads(1)
    use_full_precision()
    results: dict[str, Any] = {}
    for name in options.sets:
        image_set = replace(SETS[name](count), tile=options.tile, overlap=options.overlap)
        for method in options.methods:
            rows: list[dict[str, Any]] = []
            for order in range(options.orders):
                scorer, good = METHODS[method](reordered(image_set, order), minutes)
                rows.append(measure(f"{name}, {method}", image_set, scorer, good))
            results[f"{name}, {method}"] = rows[0] if len(rows) == 1 else rows
            if len(rows) > 1:
                print_means(f"{name}, {method}", rows)
            if options.json:
                options.json.write_text(json.dumps(results, indent=2) + "\n")


def reordered(image_set: ImageSet, order: int) -> ImageSet:
    """Return a set whose calibrating images are divided otherwise: 0 as they are, others in random orders."""
    if order == 0:
        return image_set
    shuffled = np.random.default_rng(order).permutation(len(image_set.calibration))
    return replace(image_set, calibration=[image_set.calibration[i] for i in shuffled])


def textiles(count: int) -> ImageSet:
    """Return the files of conformal-clip-data."""
    root = _package("conformal_clip_data") / "data" / "textile_images" / "simulated"
    good = sorted((root / "nominal").glob("*.jpg"))
    tests = {kind: sorted((root / kind).glob("*.jpg"))[:count] for kind in ("local", "global")}
    return _divide(good, count, tests)


def cells(count: int) -> ImageSet:
    """Return the files of elpv-dataset: probability 0 of a defect, and 1."""
    root = _package("elpv_dataset") / "data"
    rows = [line.split() for line in (root / "labels.csv").read_text().splitlines()]
    order = np.random.default_rng(0).permutation(len(rows))  # neighbours are of one module
    by_label = {label: [root / rows[i][0] for i in order if float(rows[i][1]) == label] for label in (0.0, 1.0)}
    return _divide(by_label[0.0], count, {"defective": by_label[1.0][:count]})


def textures(count: int, *, texture: str) -> ImageSet:
    """Return pieces of a photograph of scikit-image, in a folder that is removed when the program ends."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    files = write_pieces(_package("skimage", "scikit-image") / "data", texture, Path(folder.name))
    calibration = files.pop("calibration")
    tests = {kind: paths[:count] for kind, paths in files.items()}
    return ImageSet([], calibration, tests, estimating=len(calibration) - RANKING)


def _divide(good: list[Path], count: int, tests: dict[str, list[Path]]) -> ImageSet:
    calibration, good_tests, training = np.split(np.array(good, object), [CALIBRATION, CALIBRATION + count])
    return ImageSet(list(training[:TRAINING]), list(calibration), {"good": list(good_tests), **tests})


def _package(name: str, project: str = "") -> Path:
    package = importlib.util.find_spec(name)
    if package is None or package.origin is None:
        raise SystemExit(f"{name} is not installed: pip install {project or name.replace('_', '-')}")
    return Path(package.origin).parent


Scorer = Callable[[Pixels], Mapping[str, float]]
"""One image to its scores, by view; a score is higher for a defect."""


def adapted(image_set: ImageSet, minutes: float) -> tuple[Scorer, dict[str, Any]]:
    """Make a detector from the calibrating images."""
    paths = image_set.calibration
    with tempfile.TemporaryDirectory() as folder:
        made = make_detector(
            ncml.load(ROOT / "models" / "cifar10"),
            open_folder(paths[0].parent, paths),
            Path(folder) / "detector",
            false_positive_rate=RATE,
            group="image",
            power_images=0,
        )
        judging = Detector.load(made.folder, made.calibration)
    weights = {name: math.sqrt(scale.weight) for name, scale in made.calibration.scales.items()}

    def score(image_HWC: Pixels) -> dict[str, float]:
        detection = judging.judge(image_HWC)
        alone = {name: weights[name] * view.standardised for name, view in detection.views.items()}
        return {"combined": detection.score} | alone

    names = ("combined", *weights)
    return score, {"thresholds": dict.fromkeys(names, made.calibration.threshold)}


def bundled(image_set: ImageSet, minutes: float) -> tuple[Scorer, dict[str, Any]]:
    """Calibrate the bundled model's tiles."""
    return _calibrated(ncml.load(ROOT / "models" / "cifar10"), image_set)


def detector(image_set: ImageSet, minutes: float) -> tuple[Scorer, dict[str, Any]]:
    """Train the recipe `detector` on crops, and calibrate tiles."""
    base = ncml.load(ROOT / "models" / "cifar10")
    recipe = without_emulation(recipes.detector(), SINGLE_PROCESS)
    shape = {name: getattr(base.config.model, name) for name in config.SHAPE}
    recipe = replace(recipe, model=replace(recipe.model, **shape))
    cropping = Cropping(Tiling.for_model(base.height, base.width, image_set.tile), CROPS)
    crops = [
        crop
        for number, path in enumerate(image_set.training)
        for crop in cropping.cut(images.open_image(path), path.name, number, base.height, base.width)
    ]
    data = Dataset(torch.from_numpy(np.stack(crops)), torch.zeros(len(crops), dtype=torch.int64), ())

    def initialize(network: NCPN) -> None:
        start_from(network, base.network, base.name)

    trainer = Trainer(recipe, data, initialize=initialize)
    started = step_started = time.process_time()
    for _ in range(2):  # the first also initialises kernels
        step_started = time.process_time()
        trainer.train_step()
    step_seconds = time.process_time() - step_started
    batch_size = recipe.training.batch_size
    trainer.set_length(max(1, int(60 * minutes / step_seconds)) * batch_size)
    while not trainer.finished and time.process_time() - started < 60 * minutes:
        trainer.train_step()
    print_line(f"trained on {trainer.images_seen} crops in {time.process_time() - started:.0f} s of CPU time")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder) / "detector", trainer.ema)
        return _calibrated(ncml.load(Path(folder) / "detector"), image_set)


def _calibrated(model: ncml.Model, image_set: ImageSet) -> tuple[Scorer, dict[str, Any]]:
    readers = [lambda path=path: images.open_image(path) for path in image_set.calibration]
    tiling = Tiling.for_model(model.height, model.width, image_set.tile, image_set.overlap)
    calibration = tile_estimation.calibrate(
        model, readers[: image_set.estimating], readers[image_set.estimating :], tiling=tiling, false_positive_rate=RATE
    )

    def score(image_HWC: Pixels) -> dict[str, float]:
        result = scan(model.network, image_HWC, calibration)
        assert result.p_value is not None
        # The p-value orders images; of one p-value, the distance from the threshold of the deciding view does.
        excess = np.clip(calibration.excess(result.view, result.score), -TIE_RANGE, TIE_RANGE)
        combined = -result.p_value + TIE_WEIGHT * float(excess)
        return {view: verdict.score for view, verdict in result.views.items()} | {"combined": combined}

    return score, {"thresholds": {**calibration.thresholds, "combined": -RATE - TIE_WEIGHT * TIE_RANGE}}


def patches(image_set: ImageSet, minutes: float) -> tuple[Scorer, dict[str, Any]]:
    """Keep patch features of the estimating images; an image scores the largest distance from its nearest."""
    network = efficientnet.load()
    bank = torch.cat([_patch_features(network, images.open_image(path)) for path in image_set.estimation])
    bank = bank[torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))[:10_000]]

    def score(image_HWC: Pixels) -> dict[str, float]:
        distances_PB = torch.cdist(_patch_features(network, image_HWC), bank)
        return {"patches": float(distances_PB.min(1).values.max())}

    return score, _ranked(score, image_set)


def pooled(image_set: ImageSet, minutes: float) -> tuple[Scorer, dict[str, Any]]:
    """Estimate the local outlier factor on pooled features of the estimating images."""
    from sklearn.neighbors import LocalOutlierFactor

    network = efficientnet.load()

    def features(image_HWC: Pixels) -> NDArray[np.float32]:
        return _patch_features(network, image_HWC).mean(0).numpy()

    estimating = [features(images.open_image(path)) for path in image_set.estimation]
    factor = LocalOutlierFactor(n_neighbors=10, novelty=True).fit(np.stack(estimating))

    def score(image_HWC: Pixels) -> dict[str, float]:
        return {"pooled": -float(factor.score_samples(features(image_HWC)[None])[0])}

    return score, _ranked(score, image_set)


def likelihood(image_set: ImageSet, minutes: float) -> tuple[Scorer, dict[str, Any]]:
    """Estimate the view `likelihood` of detectors, with the bundled base; combined: the largest standardised score."""
    readers = [lambda path=path: images.open_image(path) for path in image_set.estimation]
    estimated = LikelihoodView.estimate(
        readers, np.arange(image_set.estimating), device="cpu", on_progress=ignore_progress
    )
    typical = {name: (np.median(own_N), own_N.std()) for name, own_N in estimated.scores.items()}

    def score(image_HWC: Pixels) -> dict[str, float]:
        scores = {name: measured.score for name, measured in estimated.view.measure(image_HWC).items()}
        combined = max((scores[name] - median) / deviation for name, (median, deviation) in typical.items())
        return scores | {"combined": float(combined)}

    return score, _ranked(score, image_set)


def linear(image_set: ImageSet, minutes: float, *, radius: int) -> tuple[Scorer, dict[str, Any]]:
    """Estimate a linear predictor of grey pixels; an image scores by its residuals, in windows and as a whole."""
    estimating = [images.open_image(path) for path in image_set.estimation]
    products, targets = 0.0, 0.0
    for image_HWC in estimating:
        before_PK, pixel_P = _causal_neighbours(image_HWC, radius)
        products, targets = products + before_PK.T @ before_PK, targets + before_PK.T @ pixel_P
    coefficients_K = np.linalg.solve(products, targets)

    def measure_residuals(image_HWC: Pixels) -> NDArray[np.float64]:
        before_PK, pixel_P = _causal_neighbours(image_HWC, radius)
        residual_P = pixel_P - before_PK @ coefficients_K
        log_HW = np.log(np.abs(residual_P).reshape(image_HWC.shape[0] - radius, -1) + 0.5)
        peak = uniform_filter(log_HW, 5).max() - log_HW.mean()
        windows = uniform_filter(log_HW, 32)[16:-16, 16:-16]
        return np.array([peak, windows.max(), -windows.min(), log_HW.mean(), -log_HW.mean()])

    typical = np.stack([measure_residuals(image_HWC) for image_HWC in estimating])

    def score(image_HWC: Pixels) -> dict[str, float]:
        standard = (measure_residuals(image_HWC) - np.median(typical, 0)) / typical.std(0)
        return {"combined": float(standard.max())}

    return score, _ranked(score, image_set)


def _causal_neighbours(image_HWC: Pixels, radius: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the grey pixels before each one within a radius, [P, K], and itself, [P], minus the mean of all."""
    grey_HW = image_HWC.mean(2)
    grey_HW = grey_HW - grey_HW.mean()
    height, width = grey_HW.shape
    offsets = [(down, right) for down in range(-radius, 1) for right in range(-radius, radius + 1)]
    columns = [
        grey_HW[radius + down : height + down, radius + right : width - radius + right].ravel()
        for down, right in offsets
        if (down, right) <= (0, 0)
    ]
    return np.stack(columns[:-1], 1), columns[-1]


def brightness(image_set: ImageSet, minutes: float) -> tuple[Scorer, dict[str, Any]]:
    """Score the distance of an image's mean brightness from the median of the estimating images."""
    typical = np.median([images.open_image(path).mean() for path in image_set.estimation])

    def score(image_HWC: Pixels) -> dict[str, float]:
        return {"brightness": abs(float(image_HWC.mean()) - float(typical))}

    return score, _ranked(score, image_set)


def _ranked(score: Scorer, image_set: ImageSet) -> dict[str, Any]:
    """Return the thresholds of a method at the rate, from the ranking images."""
    rows = [score(images.open_image(path)) for path in image_set.ranking]
    ranked = {name: conformal.rank_scores([row[name] for row in rows]) for name in rows[0]}
    return {"thresholds": {name: conformal.threshold(values, RATE) for name, values in ranked.items()}}


@torch.inference_mode()
def _patch_features(network: efficientnet.EfficientNetLite0, image_HWC: Pixels) -> torch.Tensor:
    """Return the features of stages 3 and 5, averaged over 3x3 positions, at 448 pixels: [patches, features]."""
    resized = np.asarray(Image.fromarray(image_HWC).resize((448, 448), Image.Resampling.BICUBIC))
    x_BCHW = torch.from_numpy(resized.copy()).permute(2, 0, 1)[None].float()
    fine, coarse = network.activations(x_BCHW, (2, 4))
    pool = torch.nn.functional.avg_pool2d
    coarse = torch.nn.functional.interpolate(pool(coarse, 3, 1, 1), size=(56, 56), mode="bilinear")
    return torch.cat([pool(fine, 3, 1, 1), coarse], 1)[0].flatten(1).T


def measure(name: str, image_set: ImageSet, score: Scorer, calibrated: Mapping[str, Any]) -> dict[str, Any]:
    """Score the test images and print a row for each view."""
    scores: dict[str, Scores] = {}
    started, count = time.process_time(), 0
    for kind, paths in image_set.tests.items():
        rows = [score(images.open_image(path)) for path in paths]
        scores[kind] = {view: np.array([row[view] for row in rows]) for view in rows[0]}
        count += len(paths)
    seconds = (time.process_time() - started) / count
    result: dict[str, Any] = {
        "seconds": seconds,
        "images": {kind: len(paths) for kind, paths in image_set.tests.items()},
    }
    for view, threshold in calibrated["thresholds"].items():
        good = scores["good"][view]
        row = {"false positives": float((good > threshold).mean())}
        for kind in scores.keys() - {"good"}:
            defective = scores[kind][view]
            is_defective = np.repeat([False, True], [len(good), len(defective)])
            row[f"{kind} AUROC"] = float(roc_auc_score(is_defective, np.concatenate([good, defective])))
            row[f"{kind} detected"] = float((defective > threshold).mean())
        result[view] = row
        figures = "  ".join(f"{key} {value:.3f}" for key, value in sorted(row.items()))
        print_line(f"{name:20} {view:10} {figures}  {seconds:.2f} s")
    return result


def print_means(name: str, rows: list[dict[str, Any]]) -> None:
    """Print for each view the mean of each figure over the orders, and its range."""
    for view in (key for key in rows[0] if key not in ("seconds", "images")):
        figures = {key: [row[view][key] for row in rows] for key in sorted(rows[0][view])}
        texts = [f"{key} {np.mean(own):.3f} ({min(own):.3f} to {max(own):.3f})" for key, own in figures.items()]
        print_line(f"{name:20} {view:10} mean of {len(rows)}: {'  '.join(texts)}")


print_line = functools.partial(print, flush=True)

SETS = {"textiles": textiles, "cells": cells} | {name: functools.partial(textures, texture=name) for name in TEXTURES}
METHODS = {
    "adapted": adapted,
    "bundled": bundled,
    "detector": detector,
    "patches": patches,
    "pooled": pooled,
    "likelihood": likelihood,
    "linear4": functools.partial(linear, radius=1),
    "linear24": functools.partial(linear, radius=3),
    "brightness": brightness,
}

if __name__ == "__main__":
    main()
