"""Variety of generated images: what a distance between distributions, or a classifier, does not show by itself.

    precision    share of generated images that lie among real ones: no farther from some real image than its
                 k-th nearest real neighbour
    recall       share of real images that lie among generated ones, in the same way
    variance     within classes: the trace of the covariance of the features of a class, averaged over classes, of
                 generated images divided by that of real ones

Precision and recall are those of Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative
Models" (2019). Both depend on the numbers of images, so compare them only between sets of the same sizes.

Shapes: N and M images, F features, S bootstrap samples, K classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ncml.evaluation import bootstrap
from ncml.evaluation.bootstrap import Estimate, Floats
from ncml.evaluation.distances import Features, mean_kernel_distance
from ncml.evaluation.inputs import MIN_IMAGES
from ncml.evaluation.probe import Labels

NEIGHBOURS = 3
"""k, that of the article."""

BLOCK = 1_000
"""Rows of a matrix of distances that are computed at once."""

Pair = tuple[Features, Features]
"""Features of generated and of real images."""


@dataclass(frozen=True)
class Variety:
    """How images of several classes vary beside as many real ones."""

    kernel: Estimate
    """Kernel distance from real images of the same class, averaged over classes."""
    precision: Estimate
    recall: Estimate
    variance: Estimate
    """Variance within classes relative to that of real images."""

    @classmethod
    def compare(cls, generated_NF: Features, real_MF: Features, pairs: Sequence[Pair]) -> Variety | None:
        """Compare images with real ones, and those of each class with those of `pairs`; None without such pairs."""
        if not pairs:
            return None
        return cls(mean_kernel_distance(pairs), *precision_recall(generated_NF, real_MF), relative_variance(pairs))

    @property
    def estimates(self) -> dict[str, Estimate]:
        """The estimates by name."""
        return dict(vars(self))


def precision_recall(generated_NF: Features, real_MF: Features, k: int = NEIGHBOURS) -> tuple[Estimate, Estimate]:
    """Estimate precision and recall, with Wilson's intervals for fixed neighbourhoods.

    A set of at most k images has smaller neighbourhoods: up to the farthest other image.
    """
    precision = bootstrap.share(_lie_among(generated_NF, real_MF, k))
    return precision, bootstrap.share(_lie_among(real_MF, generated_NF, k))


def _lie_among(x_NF: Features, others_MF: Features, k: int) -> NDArray[np.bool_]:
    """Return whether each image lies in the neighbourhood of one of the others, [N]."""
    k = min(k, len(others_MF) - 1)  # the nearest image of each is itself
    radii_M = np.concatenate([np.partition(block, k, 1)[:, k] for block in _squared_distances(others_MF, others_MF)])
    return np.concatenate([(block <= radii_M).any(1) for block in _squared_distances(x_NF, others_MF)])


def _squared_distances(x_NF: Features, y_MF: Features) -> Iterator[Floats]:
    """Yield rows of the matrix of squared distances, [at most `BLOCK`, M]."""
    y = y_MF.astype(np.float64)
    squares_M = (y**2).sum(1)
    for start in range(0, len(x_NF), BLOCK):
        x = x_NF[start : start + BLOCK].astype(np.float64)
        yield (x**2).sum(1)[:, None] + squares_M - 2 * x @ y.T


def class_pairs(generated_NF: Features, generated_N: Labels, real_MF: Features, real_M: Labels) -> dict[int, Pair]:
    """Return the features of the images of each class that has `MIN_IMAGES` in both sets, by its index."""
    pairs = {int(i): (generated_NF[generated_N == i], real_MF[real_M == i]) for i in np.unique(real_M)}
    return {index: pair for index, pair in pairs.items() if min(map(len, pair)) >= MIN_IMAGES}


def relative_variance(pairs: Sequence[Pair]) -> Estimate:
    """Estimate the variance within classes relative to real images, resampling the images of each class."""
    sizes = [len(features) for pair in pairs for features in pair]
    sets = itertools.chain(*pairs)
    traces = [_traces(*one_set) for one_set in zip(sets, bootstrap.resample_counts(*sizes), strict=True)]
    return bootstrap.percentile_estimate(np.sum(traces[::2], 0) / np.sum(traces[1::2], 0), sum(sizes))


def _traces(features_NF: Features, counts_SN: Floats) -> Floats:
    """Compute the trace of the covariance, unbiased, of the images and of each bootstrap sample. [S]."""
    n = len(features_NF)
    x_NF = features_NF.astype(np.float64)
    x_NF = x_NF - x_NF.mean(0)
    traces_S = (counts_SN @ (x_NF**2).sum(1) - ((counts_SN @ x_NF) ** 2).sum(1) / n) / (n - 1)
    traces_S[1:] *= n / (n - 1)  # the covariance of a bootstrap sample is that of a population of n images
    return traces_S


def balanced(labels_N: Labels, per_class: int) -> NDArray[np.intp]:
    """Return the positions of the first images of each class, in order: of all classes the same number.

    That is fewer than `per_class` if a class of the set has fewer.
    """
    classes, counts = np.unique(labels_N, return_counts=True)
    per_class = min(per_class, int(counts.min()))
    return np.sort(np.concatenate([np.flatnonzero(labels_N == i)[:per_class] for i in classes]))
