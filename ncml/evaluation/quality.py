"""Quality of samples by sampling method: their distance from test images in named features, variety, and white noise.

The floor is what the same number of training images have, compared with the test images: that of a perfect model.

Shapes: N and M images, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncml.config import SOLVERS, STEPPED_SOLVER
from ncml.data.inventory import counted
from ncml.errors import InputError
from ncml.evaluation import published
from ncml.evaluation.bootstrap import Estimate, format_json, share
from ncml.evaluation.distances import Features, frechet_distance, kernel_distance, load_extractor
from ncml.evaluation.image_sets import ImageSet
from ncml.evaluation.inputs import Inputs, class_labels
from ncml.evaluation.report import OURS, PUBLISHED, Cell, Figure, Section, Table, make_axes
from ncml.evaluation.samples import IN_TURN, Arguments, as_trained, default_arguments
from ncml.evaluation.variety import NEIGHBOURS, class_pairs, precision_recall, relative_variance
from ncml.model import Model
from ncml.ood.columns import noise_levels

BATCH = 64

NOISE_ROUGHNESS = 64.0
"""Roughness from which an image is white noise, in grey levels.

Of 4,000 test images of CIFAR-10, none exceeds 33. Independent values have 85, and images of black and white values 128.
"""


def roughness(images_NHWC: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Compute the mean absolute difference of neighbouring values, in grey levels. [N].

    Neighbours are values of one channel, side by side or one above the other.
    """
    x_NHWC = images_NHWC.astype(np.int16)
    differences = [np.abs(np.diff(x_NHWC, axis=axis)).reshape(len(x_NHWC), -1) for axis in (1, 2)]
    return np.concatenate(differences, 1).mean(1, dtype=np.float64)


def generate_samples(inputs: Inputs, model: Model, n: int, arguments: Arguments) -> NDArray[np.uint8]:
    """Generate samples with the seeds 0 to n - 1. uint8 [n, H, W, 3]."""
    in_turn = arguments.get("classes") == IN_TURN

    def measure(start: int, stop: int) -> dict[str, Any]:
        classes = {"classes": classes_in_turn(model, stop)[start:].tolist()} if in_turn else {}
        return {"pixels": model.generate(stop - start, seeds=start, **arguments | classes)}

    key = {"model": model.version, **arguments}
    return inputs.cache.rows("samples", key, n, measure, chunk=BATCH)["pixels"]


def classes_in_turn(model: Model, n: int) -> NDArray[np.intp]:
    """Return the class of each of n images that are of all classes in turn, [n]."""
    return np.arange(n) % len(model.classes)


def extract_features(inputs: Inputs, source: dict[str, Any], pixels_NHWC: NDArray[np.uint8]) -> Features:
    """Return features of the images that `source` identifies, [N, F]."""
    extractor = load_extractor()

    def measure(start: int, stop: int) -> dict[str, Any]:
        return {"features": extractor.extract(pixels_NHWC[start:stop])}

    key = {"network": extractor.distance_name, **source}
    return inputs.cache.rows("features", key, len(pixels_NHWC), measure, chunk=BATCH)["features"]


@dataclass(frozen=True)
class FeaturedImages:
    """Images to compare, with their features."""

    pixels_NHWC: NDArray[np.uint8]
    features_NF: Features
    labels_N: NDArray[np.intp] | None
    """The class of each image, as an index of the model's; None without classes."""

    def __len__(self) -> int:
        return len(self.pixels_NHWC)

    def take(self, index: NDArray[np.intp] | slice) -> FeaturedImages:
        """Return some of the images."""
        labels_N = None if self.labels_N is None else self.labels_N[index]
        return FeaturedImages(self.pixels_NHWC[index], self.features_NF[index], labels_N)


def featured_samples(inputs: Inputs, model: Model, n: int, arguments: Arguments) -> FeaturedImages:
    """Generate samples with the seeds 0 to n - 1."""
    pixels_NHWC = generate_samples(inputs, model, n, arguments)
    features_NF = extract_features(inputs, {"samples": model.version, **arguments}, pixels_NHWC)
    labels_N = classes_in_turn(model, n) if arguments.get("classes") == IN_TURN else None
    return FeaturedImages(pixels_NHWC, features_NF, labels_N)


def featured_set(inputs: Inputs, model: Model, images: ImageSet) -> FeaturedImages:
    """Return images of a data set; without labels if their classes are not the model's."""
    features_NF = extract_features(inputs, {"data": images.digest}, images.pixels_NHWC)
    try:
        labels_N = class_labels(model, images)
    except InputError:
        labels_N = None
    return FeaturedImages(images.pixels_NHWC, features_NF, labels_N)


def headline_methods(model: Model) -> dict[str, Arguments]:
    """Return the methods of the main table: direct, from the largest noise and a quarter of it, and the defaults."""
    methods = {"direct (t = 0)": as_trained(0.0)}
    if model.config.is_noise_conditional:
        methods |= {
            f"noisy at {noise:g} grey levels, refined (Tweedie)": as_trained(noise)
            for noise in noise_levels(model.config, (1.0, 0.25))
        }
    defaults = model.sampling_limits.defaults
    tuned = default_arguments(model)
    unguided = tuned | {"guidance": 1.0}  # without a class
    if unguided not in methods.values():
        methods[f"defaults: noise {defaults.noise:g}, temperature {defaults.temperature:g}"] = unguided
    if model.classes:
        for guidance in dict.fromkeys((1.0, defaults.guidance)):  # on images of the same classes
            arguments = tuned | {"guidance": guidance, "classes": IN_TURN}
            methods[f"defaults, of all classes in turn: guidance {guidance:g}"] = arguments
    return methods


def sweep_points(model: Model) -> dict[str, list[tuple[float, Arguments]]]:
    """Return the points of each curve: start noise with one Tweedie step, and SDE steps from the largest noise."""
    if not model.config.is_noise_conditional:
        return {}
    levels = noise_levels(model.config, (0.0, 0.25, 0.5, 1.0))
    steps: list[tuple[float, Arguments]] = [(1, as_trained(model.noise))]
    steps += [(n, _refined(model, STEPPED_SOLVER, n)) for n in (2, 5, 10)]
    return {"start noise": [(noise, as_trained(noise)) for noise in levels], "steps": steps}


def solver_methods(model: Model) -> dict[str, Arguments]:
    """Return direct sampling, and every solver with its default number of steps from the largest noise."""
    if not model.config.is_noise_conditional:
        return {}
    refined = {
        f"{solver}, {counted(steps, 'step')}": _refined(model, solver, steps) for solver, steps in SOLVERS.items()
    }
    return {"direct (t = 0)": as_trained(0.0)} | refined


def _refined(model: Model, solver: str, steps: int) -> Arguments:
    # For the default solver and one step, these are the headline's arguments, so its samples are used again.
    return as_trained(model.noise) | {"solver": solver, "steps": steps}


@dataclass(frozen=True)
class SampleQuality:
    """What n images have in common with the test images; smaller distances are better."""

    n: int
    frechet: float
    kernel: Estimate
    precision: Estimate
    recall: Estimate
    variance: Estimate | None
    """Variance within classes relative to that of the test images; None for images without classes."""
    white_noise: Estimate
    """Share of images that are white noise."""

    @classmethod
    def compare(cls, images: FeaturedImages, test: FeaturedImages) -> SampleQuality:
        """Compare images with test images."""
        features_NF, test_MF = images.features_NF, test.features_NF
        precision, recall = precision_recall(features_NF, test_MF)
        variance = None
        if images.labels_N is not None and test.labels_N is not None:
            pairs = class_pairs(features_NF, images.labels_N, test_MF, test.labels_N)
            variance = relative_variance(list(pairs.values())) if pairs else None
        return cls(
            len(images),
            frechet_distance(features_NF, test_MF),
            kernel_distance(features_NF, test_MF),
            precision,
            recall,
            variance,
            share(roughness(images.pixels_NHWC) > NOISE_ROUGHNESS),
        )

    def cells(self) -> tuple[Cell, ...]:
        """Return the cells of a table row: the number, the distances, and `QUALITY_COLUMNS`."""
        return str(self.n), self.frechet, self.kernel, self.precision, self.recall, self.variance, self.white_noise

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        estimates = {name: getattr(self, name) for name in ("kernel", "precision", "recall", "variance", "white_noise")}
        return {"n": self.n, "frechet": self.frechet} | {
            name: estimate and estimate.to_json() for name, estimate in estimates.items()
        }


QUALITY_COLUMNS = ("precision", "recall", "variance within classes", "white noise")


class QualityMeter:
    """Measures the quality of one model's samples, and the floor."""

    def __init__(self, inputs: Inputs, model: Model) -> None:
        self.inputs, self.model = inputs, model
        test = inputs.test_images(model, "fid")
        self.n = len(test)
        self.test = featured_set(inputs, model, test)
        self.train: ImageSet | None = None
        self.no_floor = f"the evaluated images of {inputs.data_name} are its training split, or its only one."
        """Why there is no floor, if there is no `train`."""
        try:
            train = inputs.images(inputs.data, model, "fid", split="train")
        except InputError as error:
            self.no_floor = str(error)
        else:
            self.train = None if train.digest == test.digest else train

    def floor(self, n: int) -> SampleQuality | None:
        """Measure n training images, if the data set has any that are not the test images."""
        if self.train is None:
            return None
        train = featured_set(self.inputs, self.model, self.train)
        return SampleQuality.compare(train.take(slice(n)), self.test)

    def samples(self, n: int, arguments: Arguments) -> SampleQuality:
        """Measure n samples."""
        return SampleQuality.compare(featured_samples(self.inputs, self.model, n, arguments), self.test)

    def compare_methods(self, n: int, methods: dict[str, Arguments]) -> dict[str, SampleQuality]:
        """Measure n samples of each method, after the floor if there is one."""
        floor = self.floor(n)
        qualities = {} if floor is None else {"floor": floor}
        return qualities | {method: self.samples(n, arguments) for method, arguments in methods.items()}


@dataclass
class _QualityReport:
    """The tables and the figure of `fid`, filled model by model."""

    data_name: str
    headline: list[tuple[Cell, ...]]
    solvers: list[tuple[Cell, ...]]
    sweep: list[tuple[Cell, ...]]
    axes: list[Any]

    def add_methods(
        self, rows: list[tuple[Cell, ...]], label: str, qualities: dict[str, SampleQuality]
    ) -> dict[str, Any]:
        """Append a row for each method, without repeating a floor that models share; return their JSON."""
        for method, quality in qualities.items():
            name = f"{self.data_name} train (the floor)" if method == "floor" else f"{label}, {method}"
            row = (name, OURS, *quality.cells())
            if row not in rows:
                rows.append(row)
        return {method: quality.to_json() for method, quality in qualities.items()}

    def add_sweep(self, label: str, meter: QualityMeter, n: int) -> dict[str, Any]:
        """Measure a model's curves, plot them and append their rows; return their JSON."""
        results: dict[str, Any] = {}
        for axis, (curve, points) in zip(self.axes, sweep_points(meter.model).items(), strict=False):
            x = [position for position, _ in points]
            kernels = [meter.samples(n, arguments).kernel for _, arguments in points]
            for position, kernel in zip(x, kernels, strict=True):
                self.sweep.append((label, curve, f"{position:g}", str(n), kernel))
            results[curve] = [{"at": position, **k.to_json()} for position, k in zip(x, kernels, strict=True)]
            (line,) = axis.plot(x, [k.value for k in kernels], marker="o", ms=4, label=label)
            axis.fill_between(x, [k.low for k in kernels], [k.high for k in kernels], alpha=0.2, color=line.get_color())
        return results


def fid(inputs: Inputs) -> Section:
    """Measure FID or FD of samples beside the floor, every solver, and quality against steps and start noise."""
    extractor = load_extractor()
    name = extractor.distance_name
    kd = name.replace("FID", "KID").replace("FD", "KD")
    plot, axes = make_axes(8, 3.2, 1, 2)
    report = _QualityReport(inputs.data_name, [], [], [], axes)
    results: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    for label, model in inputs.models.items():
        meter = QualityMeter(inputs, model)
        solver_count, sweep_count = (min(meter.n, inputs.limits[limit]) for limit in ("solvers", "sweep"))
        headline = meter.compare_methods(meter.n, headline_methods(model))
        results[label] = {
            "distance": name,
            "n": meter.n,
            "measured": report.add_methods(report.headline, label, headline),
        }
        if meter.train is None:
            notes.append(f"There is no floor to compare with: {meter.no_floor}")
        if model.config.is_noise_conditional:
            solvers = meter.compare_methods(solver_count, solver_methods(model))
            results[label]["solvers"] = report.add_methods(report.solvers, label, solvers)
        results[label]["sweep"] = report.add_sweep(label, meter, sweep_count)
    axes[0].set(xlabel="start noise, grey levels (one Tweedie step)", ylabel=kd, ylim=(0, None))
    axes[1].set(xlabel="refinement steps from the largest noise", ylim=(0, None))
    if report.sweep:
        axes[0].legend(fontsize=8, frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    if name == "FID" and published.is_cifar10(inputs.data_name):
        report.headline += [(m, PUBLISHED, "50000", f"{value:.2f}", *[None] * 5) for m, value in published.FID.items()]
    text = (
        f"Both distances are computed in the features of {extractor.network}, from the same test images. "
        "The floor is the distance of the same number of training images: no model can be expected to be closer. "
        "FD depends on the number of images, so compare it only within one table. "
        "KD is the unbiased squared MMD with a cubic kernel. Precision is the share of images that lie among the test "
        f"images, recall the share of test images that lie among them (no farther than the {NEIGHBOURS}rd neighbour "
        "of one of them; both depend on the number of images). A precision above the floor's means that samples keep "
        "to where test images are dense, not that they are better than real ones. The variance within classes is that "
        "of the features, relative to the test images. White noise is the share of images in which neighbouring values "
        f"differ by more than {NOISE_ROUGHNESS:g} grey levels on average. Images without a class should be compared "
        "only with one another: those of all classes in turn have the classes of the test images in the same shares. "
        "Brackets are 95% intervals: bootstrap for KD and the variance, Wilson's for shares. Those of precision and "
        "recall take the neighbourhoods as fixed, and are therefore too narrow."
    )
    if name != "FID":
        text += (
            " **This is not FID**: Inception's weights are not available here. No published number is comparable, "
            "so none is shown."
        )
    caption = f"{kd} of samples against start noise (left) and refinement steps (right); lower is better."
    solver_caption = "Every solver at its default steps, from the largest noise"
    header = ("samples", "source", "images", name, kd, *QUALITY_COLUMNS)
    sweep_header = ("model", "curve", "at", "images", kd)
    return Section(
        kind="fid",
        title="Sample quality" if name != "FID" else "Table 1: FID",
        text=[text],
        findings=[sentence for label, result in results.items() for sentence in _findings(label, result, kd)],
        tables=[
            Table("quality", "Distance of samples from test images", header, report.headline),
            Table("quality_solvers", solver_caption, header, report.solvers),
            Table("quality_sweep", "Quality against start noise and steps", sweep_header, report.sweep),
        ],
        figures=[Figure("quality_sweep", caption, plot)] if report.sweep else [],
        results=results,
        notes=list(dict.fromkeys([*inputs.notes, *notes])),
    )


def _findings(label: str, result: Mapping[str, Any], kd: str) -> list[str]:
    """Compare the sampling method with the smallest kernel distance with the floor, if there is one."""
    measured = dict(result["measured"])
    floor = measured.pop("floor", None)
    method = min(measured, key=lambda name: measured[name]["kernel"]["value"])
    best = measured[method]
    found = [
        f"The smallest {kd} of samples of the model {label} is {format_json(best['kernel'])} ({method})",
        f"{format_json(best['recall'])} of the test images lie among these samples",
    ]
    if floor is None:
        return [f"{sentence}." for sentence in found]
    compared = (
        f"that of training images {format_json(floor['kernel'])}",
        f"among training images {format_json(floor['recall'])}",
    )
    return [f"{sentence}; {comparison}." for sentence, comparison in zip(found, compared, strict=True)]
