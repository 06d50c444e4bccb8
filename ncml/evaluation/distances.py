"""Networks whose features compare images, and the distances between two sets of features.

FID is a Frechet distance in one network's features (torch-fidelity's Inception); a distance in any other network's is
called FD, with the network's name, and is not comparable with published FIDs. It is larger for fewer images. KD, the
kernel distance (squared MMD with the cubic kernel of KID), is unbiased at any number, and has an interval.

Shapes: N and M images, F features, S bootstrap samples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from ncml.evaluation import bootstrap
from ncml.evaluation.bootstrap import Estimate, Floats
from ncml.network import efficientnet

INCEPTION = "Inception v3"
EFFICIENTNET_SIDE = 96
"""Pixels to which EfficientNet-Lite0's input is enlarged."""

Features = NDArray[np.float32]


@dataclass(frozen=True)
class FeatureExtractor:
    """A network whose features are compared."""

    network: str
    """Its name, and how images are prepared for it."""
    extract: Callable[[NDArray[np.uint8]], Features]
    """uint8 [N, H, W, 3] -> [N, F]."""

    @property
    def distance_name(self) -> str:
        """Name of a Frechet distance in its features: FID, or FD with the network's name."""
        return "FID" if self.network == INCEPTION else f"FD ({self.network})"


def load_inception() -> FeatureExtractor | None:
    """Load torch-fidelity's Inception; None if the package or its weights are not available."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
            FeatureExtractorInceptionV3,
        )

        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).eval()
    except (ImportError, OSError, RuntimeError):  # not installed, or the weights cannot be fetched
        return None

    @torch.inference_mode()
    def extract(pixels_NHWC: NDArray[np.uint8]) -> Features:
        return network(torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2))[0].numpy()

    return FeatureExtractor(INCEPTION, extract)


def load_efficientnet() -> FeatureExtractor:
    """Load EfficientNet-Lite0, trained on ImageNet: its last convolution averaged over the image, 1280 features."""
    network = efficientnet.load()

    @torch.inference_mode()
    def extract(pixels_NHWC: NDArray[np.uint8]) -> Features:
        x_NCHW = torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2).float()
        size = (EFFICIENTNET_SIDE, EFFICIENTNET_SIDE)
        x_NCHW = F.interpolate(x_NCHW, size, mode="bicubic", antialias=True, align_corners=False)
        return network(x_NCHW).numpy()

    return FeatureExtractor(f"EfficientNet-Lite0 at {EFFICIENTNET_SIDE} px", extract)


@functools.cache
def load_extractor() -> FeatureExtractor:
    """Load Inception if it is available, else EfficientNet-Lite0."""
    return load_inception() or load_efficientnet()


def frechet_distance(a_NF: Features, b_NF: Features) -> float:
    """Compute abs(m_a - m_b)^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of Gaussians estimated from two sets of features."""
    means, roots = [], []
    for x_NF in (a_NF.astype(np.float64), b_NF.astype(np.float64)):
        means.append(x_NF.mean(0))
        roots.append(np.asarray(np.linalg.qr(x_NF - means[-1], mode="r")) / math.sqrt(len(x_NF) - 1))  # S = R' R
    traces = sum(float((root_RF**2).sum()) for root_RF in roots)
    # (S_a S_b)^(1/2) has the trace of the singular values of R_a R_b'.
    singular_values = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False)
    return float(((means[0] - means[1]) ** 2).sum() + traces - 2 * singular_values.sum())


def kernel_distance(a_NF: Features, b_MF: Features) -> Estimate:
    """Estimate squared MMD with k(x, y) = (x'y / F + 1)^3, unbiased, and its bootstrap interval over both sets.

    Binkowski et al., "Demystifying MMD GANs" (2018). Pairs of an image with itself, or with its copy in a bootstrap
    sample, do not count.
    """
    return mean_kernel_distance([(a_NF, b_MF)])


def mean_kernel_distance(pairs: Sequence[tuple[Features, Features]]) -> Estimate:
    """Estimate the mean kernel distance over pairs of sets, as of the images of each class."""
    sizes = [len(features) for pair in pairs for features in pair]
    counts = bootstrap.resample_counts(*sizes)
    distances = [
        _kernel_distances(a_NF, b_MF, counts_SN, counts_SM)
        for (a_NF, b_MF), counts_SN, counts_SM in zip(pairs, counts[::2], counts[1::2], strict=True)
    ]
    return bootstrap.percentile_estimate(np.mean(distances, 0), sum(sizes))


def _kernel_distances(a_NF: Features, b_MF: Features, counts_SN: Floats, counts_SM: Floats) -> Floats:
    """Compute the kernel distance for each of S bootstrap samples, [S]."""
    dimension = a_NF.shape[1]
    N, M = len(a_NF), len(b_MF)

    def gram(x: Features, y: Features) -> Floats:
        k = x.astype(np.float64) @ y.T.astype(np.float64) / dimension + 1
        cube = k * k
        cube *= k  # in place: for 10,000 images, each matrix has 800 MB
        return cube

    def within(x: Features, counts: Floats) -> Floats:
        k = gram(x, x)
        off_diagonal = ((counts @ k) * counts).sum(1) - counts**2 @ k.diagonal()
        return off_diagonal / (len(x) ** 2 - (counts**2).sum(1))

    across = ((counts_SN @ gram(a_NF, b_MF)) * counts_SM).sum(1) / (N * M)
    return within(a_NF, counts_SN) + within(b_MF, counts_SM) - 2 * across
