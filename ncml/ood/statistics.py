"""Does an image belong? The statistics of one image; `ncml.calibration` turns them into p-values.

Higher is more out-of-distribution, for every statistic. With D = 3 H W
values per image, b_t(x) = -log2 p_t(alpha(t) x) / D is its bits per dimension at noise level t under no class, and
s_t = grad log p_t the score there; images are scaled by alpha(t) without added noise, so every statistic is a function
of the image. Levels are named in grey levels of noise.

| statistic | equation | network passes |
|---|---|---|
| bpd | b_0 | 1 |
| typicality | abs(b_0 - mean b_0) | 1 |
| complexity | b_0 - 8 bytes(PNG) / D | 1 |
| llr | b_0 - b_T | 2 |
| score_norm_t | log norm(s_t) | 1 and its gradient (as much as 2.7) |
| ncml_grad | -log norm(grad p_0) = -(log p_0 + log norm(s_0)) | 1 and its gradient |
| multiscale | sqrt((v - m)' S^-1 (v - m)), v over levels and scales | one for each of 3 levels |

What several statistics need is computed once. Knows nothing of files.

Shapes: B or N images, C = 3 channels, H rows, W columns, M measurements.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ncml.errors import InputError
from ncml.network.likelihood import bits_per_dim, from_uint8, log_prob
from ncml.network.likelihood import score as gradient
from ncml.network.ncpn import NCPN
from ncml.network.sde import end_time, grey_levels, process, reaches, scale
from ncml.ood.conformal import Floats

if TYPE_CHECKING:
    from ncml.config import Config

FRACTIONS = (0.0, 0.25, 1.0)
"""The noise levels of the statistics, as fractions of the largest that the model knows."""

BLOCK = 4
"""Side, in pixels, of the blocks over which `coarse` averages."""

SHAPES = ("bits", "direct", "fine", "coarse")
"""What `multiscale` measures at each level."""

LEAST_FIT = 20
"""Images below which the mean and covariance of `multiscale` are not fitted."""

Columns = Mapping[str, Floats]
"""Measurements of N images by name, [N] each: a kind and a level, as in `bits_2.5`, or `codec`."""


# ---------------------------------------------------------------- measurements


def levels(config: Config) -> tuple[float, ...]:
    """The noise levels of a model's statistics, in grey levels, as far as its process reaches them.

    0 alone where it was trained on clean data alone.
    """
    process_ = process(config.noise)
    largest = grey_levels(process_, end_time(config.noise))
    if config.training.clean_mass == 1:
        return (0.0,)
    shares = (float(f"{fraction * largest:.6g}") for fraction in FRACTIONS)
    return tuple(level for level in shares if reaches(process_, level))


def column(kind: str, level: float) -> str:
    """The name of a measurement."""
    return f"{kind}_{level:g}"


@dataclass(frozen=True)
class Look:
    """One pass of the network over a batch at one noise level."""

    log_prob_BHW: Tensor
    """Nats of each pixel: a mass at t = 0, a density above."""
    measured: dict[str, Tensor]
    """By kind, [B] in fp64."""


def look(
    network: NCPN, pixels_BHWC: NDArray[np.uint8], t: float, kinds: Iterable[str] = (), class_B: Tensor | None = None
) -> Look:
    """Evaluate a batch at time t under its classes (None: no class).

    kinds: `bits`, b_t. `direct`, the log norm of the part of the score that does not go through the context, which
    needs no gradient of the network. `fine`, the log of the standard deviation of -log p over pixels; `coarse`, the
    same over means of 4x4 pixels. `norm`, the log norm of the whole score, which costs the network's gradient.
    """
    kinds = set(kinds)
    weight = network.head.weight
    t_B = torch.full((len(pixels_BHWC),), t, device=weight.device)
    class_B = None if class_B is None else class_B.to(weight.device)
    x_BCHW = from_uint8(torch.from_numpy(pixels_BHWC)).to(weight)
    x_BCHW = x_BCHW * scale(process(network.config.noise).alpha(t_B), x_BCHW)
    kept: list[Tensor] = []

    def density(x_BCHW: Tensor) -> Tensor:
        parameters_BPHW = network(x_BCHW, t_B, class_B)
        kept.append(parameters_BPHW.detach())
        return log_prob(x_BCHW, parameters_BPHW, edges_B=None)

    measured: dict[str, Tensor] = {}
    with torch.no_grad():
        if "norm" in kinds:
            measured["norm"] = _log_norm(gradient(density, x_BCHW))
        else:
            kept.append(network(x_BCHW, t_B, class_B))
        (parameters_BPHW,) = kept
        log_prob_BHW = log_prob(x_BCHW, parameters_BPHW, t_B == 0)
        if "bits" in kinds:
            pixels = log_prob_BHW[0].numel()
            measured["bits"] = bits_per_dim(log_prob_BHW.sum((1, 2), dtype=torch.float64), pixels)
        if "direct" in kinds:
            direct_BCHW = gradient(lambda x: log_prob(x, parameters_BPHW, edges_B=None), x_BCHW)
            measured["direct"] = _log_norm(direct_BCHW)
        if "fine" in kinds:
            measured["fine"] = _log_spread(log_prob_BHW)
        if "coarse" in kinds:
            side = min(BLOCK, *log_prob_BHW.shape[1:])
            measured["coarse"] = _log_spread(F.avg_pool2d(log_prob_BHW[:, None], side)[:, 0])
    return Look(log_prob_BHW, measured)


def _log_norm(s_BCHW: Tensor) -> Tensor:
    return torch.log(torch.linalg.vector_norm(s_BCHW.double(), dim=(1, 2, 3)).clamp(min=1e-9))


def _log_spread(log_prob_BHW: Tensor) -> Tensor:
    return torch.log(log_prob_BHW.double().flatten(1).std(1, correction=0) + 1e-3)


def measure(
    network: NCPN, pixels_BHWC: NDArray[np.uint8], names: Iterable[str]
) -> tuple[dict[str, Floats], Look | None]:
    """The named columns of a batch, in one pass for each noise level; and the pass at t = 0 if there was one."""
    names = list(names)
    wanted: dict[float, list[str]] = {}
    for name in names:
        if name != "codec":
            kind, level = name.rsplit("_", 1)
            wanted.setdefault(float(level), []).append(kind)
    time_of = process(network.config.noise).time_of
    looks = {level: look(network, pixels_BHWC, time_of(level), kinds) for level, kinds in wanted.items()}
    found = {
        column(kind, level): values_B.cpu().numpy()
        for level, seen in looks.items()
        for kind, values_B in seen.measured.items()
    }
    if "codec" in names:
        found["codec"] = np.array([png_bits(picture) for picture in pixels_BHWC])
    return {name: found[name] for name in names}, looks.get(0.0)


def png_bits(picture: NDArray[np.uint8]) -> float:
    """Bits per dimension of a picture as a PNG file (Pillow, optimised), header included."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", optimize=True)
    return 8 * len(file.getvalue()) / picture.size


# ------------------------------------------------------------------ statistics


def check_enough_to_fit(count: int) -> None:
    """Raise `InputError` for fewer than 20 images."""
    if count < LEAST_FIT:
        raise InputError(
            "data", f"{count} images cannot fit the statistics: give at least {LEAST_FIT} that do not rank."
        )


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian fitted to named measurements."""

    columns: tuple[str, ...]
    mean: tuple[float, ...]
    precision: tuple[tuple[float, ...], ...]

    @classmethod
    def fitted(cls, columns: Columns) -> Gaussian:
        """The sample mean, and the inverse of the sample covariance with a ridge that keeps it invertible.

        Raises `InputError` for fewer than 20 images.
        """
        count = len(next(iter(columns.values())))
        check_enough_to_fit(count)
        x_NM = np.stack(list(columns.values()), 1)
        deviation_M = np.maximum(x_NM.std(0), 1e-6)
        correlation_MM = np.atleast_2d(np.cov((x_NM / deviation_M).T))
        M = len(deviation_M)
        ridge = RIDGE * M / count * np.eye(M)
        precision_MM = np.linalg.inv(correlation_MM + ridge) / np.outer(deviation_M, deviation_M)
        return cls(tuple(columns), tuple(x_NM.mean(0).tolist()), tuple(map(tuple, precision_MM.tolist())))

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Gaussian:
        """The inverse of `dataclasses.asdict`."""
        return cls(tuple(stored["columns"]), tuple(stored["mean"]), tuple(map(tuple, stored["precision"])))

    def distance(self, columns: Columns) -> Floats:
        """The Mahalanobis distance sqrt((v - m)' S^-1 (v - m)) of each image, [N]."""
        off_NM = np.stack([columns[name] for name in self.columns], 1) - np.array(self.mean)
        return np.sqrt(np.einsum("ni,ij,nj->n", off_NM, np.array(self.precision), off_NM))


RIDGE = 0.03
"""Times M / N, added to the diagonal of the correlation matrix: levels agree to three digits, and few images fit them.

From 24 to 225 images its size matters little; shrinking as much as the formula of OAS (2010) asks finds less.
"""


@dataclass(frozen=True)
class Fit:
    """What the fit images teach the statistics that need teaching."""

    typical_bpd: float
    gaussian: Gaussian


@dataclass(frozen=True)
class Statistic:
    """How one statistic is computed."""

    needs: tuple[str, ...]
    """Columns."""
    of: Callable[[Columns, Any], Floats]
    """(columns, `Fit`, or None where none is needed) -> [N]."""
    fitted: bool = False
    """Whether it needs a calibration."""


def catalogue(config: Config) -> dict[str, Statistic]:
    """Every statistic of a model by name; the equations stand at the top of this module.

    bpd: bits per dimension; calls smooth images likely whatever they show (Nalisnick et al., "Do Deep Generative
    Models Know What They Don't Know?", 2019).
    typicality: distance from the bits per dimension of the fit images (Nalisnick et al., "Detecting Out-of-Distribution
    Inputs to Deep Generative Models Using Typicality", 2019, for one image).
    complexity: likelihood against a lossless codec's length, here PNG as Pillow writes it (Serra et al., "Input
    Complexity and Out-of-distribution Detection with Likelihood-based Generative Models", 2020).
    llr: the model of clean images against the one of noised images, as background (after Ren et al., "Likelihood
    Ratios for Out-of-Distribution Detection", 2019).
    score_norm_t: log norm of the score at one level (Mahmood et al., "Multiscale Score Matching for Out-of-Distribution
    Detection", 2021, fit a density to these).
    ncml_grad: norm of the gradient of the density itself, in logs as p underflows (Li and Kluger, 2022); it orders
    images almost as bpd does.
    multiscale: how far bits, direct score norm, and the spread of the pixels' surprise over two scales, each at every
    noise level, lie from those of the fit images: the Mahalanobis distance under one Gaussian.
    """
    at = levels(config)
    D = 3 * config.model.height * config.model.width
    found = {
        "bpd": Statistic(("bits_0",), lambda c, _: c["bits_0"]),
        "typicality": Statistic(("bits_0",), lambda c, fit: np.abs(c["bits_0"] - fit.typical_bpd), fitted=True),
        "complexity": Statistic(("bits_0", "codec"), lambda c, _: c["bits_0"] - c["codec"]),
    }
    if len(at) > 1:
        last = column("bits", at[-1])
        found["llr"] = Statistic(("bits_0", last), lambda c, _: c["bits_0"] - c[last])
    for name in (column("norm", level) for level in at):
        found[f"score_{name}"] = Statistic((name,), lambda c, _, name=name: c[name])
    found["ncml_grad"] = Statistic(("bits_0", "norm_0"), lambda c, _: D * math.log(2) * c["bits_0"] - c["norm_0"])
    shape = tuple(column(kind, level) for level in at for kind in SHAPES)
    found["multiscale"] = Statistic(shape, lambda c, fit: fit.gaussian.distance(c), fitted=True)
    return found


def chosen(names: Iterable[str] | str, known: Mapping[str, Statistic]) -> tuple[str, ...]:
    """The names asked for, "all" being every one; raises `InputError` for an unknown one."""
    if names == "all":
        return tuple(known)
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if name not in known:
            raise InputError("statistic", f"there is no statistic {name!r}: choose from {', '.join(known)}.")
    return names


def columns_for(names: Iterable[str], known: Mapping[str, Statistic]) -> list[str]:
    """The measurements that statistics need, each once."""
    return list(dict.fromkeys(column for name in names for column in known[name].needs))
