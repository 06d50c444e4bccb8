"""Out-of-distribution statistics of one image; `ncml.ood.calibration` turns them into p-values.

Higher is more out-of-distribution, for every statistic. With D = 3 H W values per image,
b_t(x) = -log2 p_t(alpha(t) x) / D is its bits per dimension at noise level t under no class, and s_t = grad log p_t;
b_t includes the outlier component of `ncml.network.mixture`, s_t does not. Images are scaled by alpha(t) without
added noise, so every statistic is a function of the image. Levels are named in grey levels of noise.

| statistic | equation | network passes |
|---|---|---|
| bpd | b_0 | 1 |
| typicality | abs(b_0 - mean b_0) | 1 |
| complexity | b_0 - 8 bytes(WebP) / D | 1 |
| llr | b_0 - b_T | 2 |
| score_norm_t | log norm(s_t) | 1 and its gradient (as much as 2.7) |
| ncml_grad | -log norm(grad p_0) = -(log p_0 + log norm(s_0)) | 1 and its gradient |
| multiscale | sqrt((v - m)' S^-1 (v - m)), v over levels and scales | one for each of 3 levels |
| multiscale_corr | the same, v with corr_0 | one for each of 3 levels |
| fast | the same, v with corr_0 and 8 bytes(WebP) / D, at t = 0 only | 1 |

corr_0 are 15 correlations of the normal scores z at t = 0 (`ncml.network.mixture.normal_scores`): the means over
positions of z(p) z(q), for each channel and q right of p, below it, and on both diagonals; and of z_c z_d for each pair
of channels. They are near 0 where the model is right.

Does not read or write files.

Shapes: N images, M measurements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ncml.errors import InputError
from ncml.limits import MIN_ESTIMATION_IMAGES
from ncml.ood import storage
from ncml.ood.columns import CORRELATION_KINDS, Columns, column_name, noise_levels
from ncml.ood.conformal import Floats

if TYPE_CHECKING:
    from ncml.config import Config

MULTISCALE_KINDS = ("bits", "direct", "fine", "coarse")
"""The measurements of `multiscale` at each level."""

RIDGE = 0.03
"""Factor of the ridge RIDGE M / N on the diagonal of the correlation matrix: levels agree to three digits, and N may be
small. From 24 to 225 images the factor matters little; shrinking as much as the formula of OAS (2010) detects less.
"""

PRIOR_IMAGES = 10
"""Weight of a prior's correlations, as a number of images.

Measured on photographs (imagenet1k_32) with the first bundled calibration as prior: the mean AUROC over alterations and
textures rises by .013 with 20 images, and falls by .004 with 100; larger weights lose more.
"""

SUSPICIOUS = 8
"""Distance from the median, in robust standard deviations, beyond which a measurement makes an image suspicious.

The largest distance among 200 photographs is 6.5.
"""


def suspicious(columns: Columns) -> NDArray[np.bool_]:
    """Return which images of a set of similar images lie far from the others in any measurement, [N]."""
    x_NM = np.stack(list(columns.values()), 1)
    distance_NM = np.abs(x_NM - np.median(x_NM, 0))
    deviation_M = 1.4826 * np.median(distance_NM, 0)  # the standard deviation of a Gaussian
    deviation_M = np.where(deviation_M > 1e-6, deviation_M, np.maximum(x_NM.std(0), 1e-6))  # if most values are equal
    return np.asarray((distance_NM > SUSPICIOUS * deviation_M).any(1), np.bool_)


def usual_images(columns: Columns) -> NDArray[np.bool_]:
    """Return which images are used to estimate, [N]: those that are not suspicious; all if these are fewer than 20."""
    is_usual_N = ~suspicious(columns)
    return is_usual_N if is_usual_N.sum() >= MIN_ESTIMATION_IMAGES else np.ones_like(is_usual_N)


def check_image_count(count: int) -> None:
    """Raise `InputError` for fewer images than the statistics need."""
    if count < MIN_ESTIMATION_IMAGES:
        raise InputError(
            "data",
            f"{count} images are too few to estimate the statistics: use at least {MIN_ESTIMATION_IMAGES}, besides "
            "those to rank.",
        )


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian estimated from named measurements.

    Whitened nearest neighbours (k = 5) were measured as an alternative for `multiscale_corr` on CIFAR-10 against other
    sets: with 2,000 images they gain .003 to .011 of AUROC on whole data sets and lose .03 on images of half the
    resolution, and with 200 or fewer they gain nothing. This does not justify storing a reference set.
    """

    columns: tuple[str, ...]
    mean: tuple[float, ...]
    precision: tuple[tuple[float, ...], ...]

    @classmethod
    def estimate(cls, columns: Columns, prior: Gaussian | None = None) -> Gaussian:
        """Estimate the sample mean, and the inverse of the sample covariance with a ridge that keeps it invertible.

        prior: a Gaussian of the same measurements, towards whose correlations those of the sample are shrunk.
        Raises `InputError` for fewer than 20 images.
        """
        check_image_count(len(next(iter(columns.values()))))
        x_NM = np.stack(list(columns.values()), 1)
        count, M = x_NM.shape
        deviation_M = np.maximum(x_NM.std(0), 1e-6)
        correlation_MM = np.atleast_2d(np.cov((x_NM / deviation_M).T))
        if prior is not None and prior.columns == tuple(columns):
            correlation_MM = (count * correlation_MM + PRIOR_IMAGES * prior.correlation()) / (count + PRIOR_IMAGES)
            count += PRIOR_IMAGES
        ridge = RIDGE * M / count * np.eye(M)
        precision_MM = np.linalg.inv(correlation_MM + ridge) / np.outer(deviation_M, deviation_M)
        return cls(tuple(columns), tuple(x_NM.mean(0).tolist()), tuple(map(tuple, precision_MM.tolist())))

    @classmethod
    def from_json(cls, stored: dict[str, Any], columns: tuple[str, ...]) -> Gaussian:
        """Rebuild a Gaussian of these columns from the result of `dataclasses.asdict`.

        Raises ArithmeticError, LookupError, TypeError or ValueError for anything else.
        """
        if tuple(stored["columns"]) != columns:
            raise ValueError(f"its measurements are not {', '.join(columns)}")
        M = len(columns)
        mean_M, precision_MM = storage.floats(stored["mean"], M), storage.floats(stored["precision"], M, M)
        if np.linalg.eigvalsh(precision_MM + precision_MM.T)[0] <= 0:
            raise ValueError("its precision matrix is not positive definite")
        return cls(columns, tuple(mean_M.tolist()), tuple(map(tuple, precision_MM.tolist())))

    def correlation(self) -> Floats:
        """Return the correlations of the measurements, [M, M]."""
        covariance_MM = np.linalg.inv(np.array(self.precision))
        deviation_M = np.sqrt(np.diag(covariance_MM))
        return covariance_MM / np.outer(deviation_M, deviation_M)

    def distance(self, columns: Columns) -> Floats:
        """Compute the Mahalanobis distance sqrt((v - m)' S^-1 (v - m)) of each image, [N]."""
        centred_NM = np.stack([columns[name] for name in self.columns], 1) - np.array(self.mean)
        return np.sqrt(np.einsum("ni,ij,nj->n", centred_NM, np.array(self.precision), centred_NM))


@dataclass(frozen=True)
class Estimates:
    """Parameters of the statistics, estimated on held-out images."""

    typical_bpd: float
    gaussians: Mapping[str, Gaussian]
    """The Gaussian of each statistic that is a distance."""

    @classmethod
    def estimate(
        cls, columns: Columns, statistics: Mapping[str, Statistic], prior: Estimates | None = None
    ) -> Estimates:
        """Estimate the parameters of all statistics; `columns` are those that `required_columns` lists for them.

        Each parameter is estimated without the images that are suspicious in its measurements, if 20 others remain.
        prior: other estimates, towards whose correlations the Gaussians are shrunk.
        """
        priors = {} if prior is None else prior.gaussians
        gaussians: dict[str, Gaussian] = {}
        for name, statistic in statistics.items():
            if statistic.is_gaussian:
                check_image_count(len(columns[statistic.needs[0]]))
                is_usual_N = usual_images({column: columns[column] for column in statistic.needs})
                usual = {column: columns[column][is_usual_N] for column in statistic.needs}
                gaussians[name] = Gaussian.estimate(usual, priors.get(name))
        bits_N = columns["bits_0"]
        return cls(float(bits_N[usual_images({"bits_0": bits_N})].mean()), gaussians)


@dataclass(frozen=True)
class Statistic:
    """How one statistic is computed."""

    needs: tuple[str, ...]
    """The names of the columns that it is computed from."""
    compute: Callable[[Columns, Any], Floats]
    """(columns, `Estimates`, or None if none are needed) -> [N]."""
    needs_estimates: bool = False
    """Whether it needs a calibration."""
    is_gaussian: bool = False
    """Whether it is a distance under a Gaussian of its columns."""

    @classmethod
    def distance(cls, name: str, columns: Iterable[str]) -> Statistic:
        """Return the statistic of this name that is the Mahalanobis distance of columns."""
        return cls(tuple(columns), lambda c, e: e.gaussians[name].distance(c), needs_estimates=True, is_gaussian=True)


def build_statistics(config: Config) -> dict[str, Statistic]:
    """Return every statistic of a model by name; the equations are at the top of this module.

    bpd: bits per dimension; low for smooth images whatever they show (Nalisnick et al., "Do Deep Generative Models Know
    What They Don't Know?", 2019).
    typicality: distance from the mean bits per dimension of held-out images (Nalisnick et al., "Detecting
    Out-of-Distribution Inputs to Deep Generative Models Using Typicality", 2019, for one image).
    complexity: likelihood against a lossless codec's length, here WebP's (Serra et al., "Input Complexity and
    Out-of-distribution Detection with Likelihood-based Generative Models", 2020).
    llr: the model of clean images against that of noised images, as background (after Ren et al., "Likelihood Ratios
    for Out-of-Distribution Detection", 2019).
    score_norm_t: log norm of grad log p at one level (Mahmood et al., "Multiscale Score Matching for
    Out-of-Distribution Detection", 2021, train a density model of these).
    ncml_grad: norm of the gradient of the density itself, in logs as p underflows (Li and Kluger, 2022); it orders
    images almost as bpd does.
    multiscale: how far bits, direct gradient norm, and the spread of the pixels' surprise over two scales, each at
    every noise level, lie from those of held-out images: the Mahalanobis distance under one Gaussian.
    multiscale_corr: the same with the correlations that the model leaves between neighbouring pixels and channels.
    fast: the part of `multiscale_corr` that one pass at t = 0 measures, with the codec's length.
    """
    levels = noise_levels(config)
    D = 3 * config.model.height * config.model.width
    statistics = {
        "bpd": Statistic(("bits_0",), lambda c, _: c["bits_0"]),
        "typicality": Statistic(("bits_0",), lambda c, e: np.abs(c["bits_0"] - e.typical_bpd), needs_estimates=True),
        "complexity": Statistic(("bits_0", "codec"), lambda c, _: c["bits_0"] - c["codec"]),
    }
    if len(levels) > 1:
        bits_T = column_name("bits", levels[-1])
        statistics["llr"] = Statistic(("bits_0", bits_T), lambda c, _: c["bits_0"] - c[bits_T])
    for name in (column_name("norm", level) for level in levels):
        statistics[f"score_{name}"] = Statistic((name,), lambda c, _, name=name: c[name])
    statistics["ncml_grad"] = Statistic(("bits_0", "norm_0"), lambda c, _: D * math.log(2) * c["bits_0"] - c["norm_0"])
    clean, *noisy = ([column_name(kind, level) for kind in MULTISCALE_KINDS] for level in levels)
    multiscale = [*clean, *(column for columns in noisy for column in columns)]
    corr_0 = [column_name(kind, 0) for kind in CORRELATION_KINDS]
    vectors = {"multiscale": multiscale, "multiscale_corr": multiscale + corr_0, "fast": [*clean, *corr_0, "codec"]}
    return statistics | {name: Statistic.distance(name, columns) for name, columns in vectors.items()}


def select_names(
    names: Iterable[str] | str, statistics: Mapping[str, Statistic], field: str = "statistics"
) -> tuple[str, ...]:
    """Return the requested names; raises `InputError`, which names `field`, for one that there is not."""
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if name not in statistics:
            raise InputError(field, f"there is no statistic {name!r}: choose from {', '.join(statistics)}.")
    return names


def required_columns(names: Iterable[str], statistics: Mapping[str, Statistic]) -> list[str]:
    """Return the columns that statistics need, each once."""
    return list(dict.fromkeys(column for name in names for column in statistics[name].needs))
