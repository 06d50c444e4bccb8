"""Does an image belong? Statistics of one image, and the calibration that turns them into p-values.

Higher is more out-of-distribution, for every statistic; a small p-value is more out-of-distribution. With D = 3 H W
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

What several statistics need is computed once. Knows nothing of files but `calibration.json`.

Shapes: B or N images, C = 3 channels, H rows, W columns, M measurements.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ncml import checkpoint, conformal, images
from ncml.changes import Tolerance, tolerated
from ncml.conformal import Floats
from ncml.errors import InputError, ModelError
from ncml.likelihood import bits_per_dim, from_uint8, log_prob
from ncml.likelihood import score as gradient
from ncml.network import NCPN
from ncml.noise import end_time, grey_levels, process, scale

if TYPE_CHECKING:
    from ncml.config import Config
    from ncml.model import Model

DEFAULT = "multiscale"
"""The statistic that gives the verdict unless another is asked for."""

FRACTIONS = (0.0, 0.25, 1.0)
"""The noise levels of the statistics, as fractions of the largest that the model knows."""

BLOCK = 4
"""Side, in pixels, of the blocks over which `coarse` averages."""

PREPROCESSING = "{name} v{version}".format(**images.PREPROCESSING)

SHAPES = ("bits", "direct", "fine", "coarse")
"""What `multiscale` measures at each level."""

LEAST_FIT = 20
"""Images below which the mean and covariance of `multiscale` are not fitted."""

Columns = Mapping[str, Floats]
"""Measurements of N images by name, [N] each: a kind and a level, as in `bits_2.5`, or `codec`."""


# ---------------------------------------------------------------- measurements


def levels(config: Config) -> tuple[float, ...]:
    """The noise levels of a model's statistics, in grey levels; 0 alone where it was trained on clean data alone."""
    largest = grey_levels(process(config.noise), end_time(config.noise))
    if config.training.clean_mass == 1:
        return (0.0,)
    return tuple(float(f"{fraction * largest:.6g}") for fraction in FRACTIONS)


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
    no_edges_B = torch.zeros(len(x_BCHW), dtype=torch.bool, device=weight.device)
    kept: list[Tensor] = []

    def density(x_BCHW: Tensor) -> Tensor:
        parameters_BPHW = network(x_BCHW, t_B, class_B)
        kept.append(parameters_BPHW.detach())
        return log_prob(x_BCHW, parameters_BPHW, no_edges_B)

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
            direct_BCHW = gradient(lambda x: log_prob(x, parameters_BPHW, no_edges_B), x_BCHW)
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


# ----------------------------------------------------------------- calibration


@dataclass(frozen=True)
class Ood:
    """The verdict on one image."""

    statistic: str
    score: float
    p_value: float
    """The share of images from the calibrated distribution that would score as high, by their ranks."""
    threshold: float
    is_ood: bool
    """score > threshold: the p-value is at most the calibrated false-positive rate."""


@dataclass(frozen=True)
class Histogram:
    """How ranking images spread."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Calibration:
    """What held-out images say about a model's statistics; bound to one version of the model and of preprocessing."""

    model_version: str
    fit: Fit
    ranked: Mapping[str, Floats]
    """Scores of the ranking images by statistic, ascending: p-values are ranks among these."""
    n_fit: int
    false_positive_rate: float = 0.05
    statistic: str = DEFAULT
    tolerate: tuple[Tolerance, ...] = ()
    preprocessing: str = PREPROCESSING

    @property
    def n_rank(self) -> int:
        """Ranking images."""
        return len(self.ranked[self.statistic])

    @property
    def smallest_p(self) -> float:
        """The smallest p-value that there can be: 1 / (n_rank + 1)."""
        return 1 / (self.n_rank + 1)

    @functools.cached_property
    def thresholds(self) -> dict[str, float]:
        """Of each statistic: a score above it is out-of-distribution at the false-positive rate."""
        return {name: conformal.threshold(scores, self.false_positive_rate) for name, scores in self.ranked.items()}

    @functools.cached_property
    def histograms(self) -> dict[str, Histogram]:
        """How the ranking images spread, by statistic: 40 bins over the central 99.8 %, the rest in the outer two."""

        def histogram(scores: Floats) -> Histogram:
            low, high = np.quantile(scores, [0.001, 0.999])
            edges = np.linspace(low, max(high, low + 1e-9), 41)
            counts, _ = np.histogram(scores.clip(edges[0], edges[-1]), edges)
            return Histogram(tuple(edges.tolist()), tuple(counts.tolist()))

        return {name: histogram(scores) for name, scores in self.ranked.items()}

    @functools.cached_property
    def version(self) -> str:
        """SHA-256 of all that a verdict depends on, 64 hexadecimal digits."""
        return digest(self._content())

    def p_values(self, statistic: str, scores: Floats) -> Floats:
        """Conformal p-values of scores, [N]."""
        return conformal.p_values(scores, self.ranked[statistic])

    def verdicts(self, statistic: str, scores: Floats) -> list[Ood]:
        """The verdict on each score of a statistic."""
        limit = self.thresholds[statistic]
        return [
            Ood(statistic, float(score), float(p), limit, bool(score > limit))
            for score, p in zip(scores, self.p_values(statistic, scores), strict=True)
        ]

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model_version": self.model_version,
            "preprocessing": self.preprocessing,
            "statistic": self.statistic,
            "false_positive_rate": self.false_positive_rate,
            "tolerate": list(self.tolerate),
            "n_fit": self.n_fit,
            "fit": asdict(self.fit),
            "ranked": {name: values.tolist() for name, values in self.ranked.items()},
        }

    def save(self, folder: Path) -> None:
        """Write `calibration.json` into the model folder."""
        write_bound(folder / checkpoint.CALIBRATION, self._content())

    @classmethod
    def read(cls, folder: Path, model_version: str, config: Config) -> Calibration:
        """Read `calibration.json`; raises `ModelError`, in one sentence, if it is damaged or for something else."""
        path = folder / checkpoint.CALIBRATION
        stored = read_bound(path, model_version)
        try:
            return cls(
                model_version,
                Fit(stored["fit"]["typical_bpd"], Gaussian.from_json(stored["fit"]["gaussian"])),
                {name: np.array(stored["ranked"][name], np.float64) for name in catalogue(config)},
                stored["n_fit"],
                stored["false_positive_rate"],
                stored["statistic"],
                tuple(stored["tolerate"]),
            )
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ModelError(f"{path} is damaged ({str(error).rstrip('.')}): {REMEDY}.") from error


FORMAT = 1
REMEDY = "calibrate the model again"


def digest(content: dict[str, Any]) -> str:
    """The version of a calibration: SHA-256 of its content, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_bound(path: Path, content: dict[str, Any]) -> None:
    """Write what is bound to a model's version, with a digest of its own, whole or not at all."""
    text = json.dumps({"version": digest(content)} | content)
    checkpoint.replace_file(path, lambda new: new.write_text(text + "\n"))


def read_bound(path: Path, model_version: str) -> dict[str, Any]:
    """Read what `write_bound` wrote; raises `ModelError` where it is not for this model, or was changed since."""
    stored = checkpoint.read_json(path)
    if stored.get("format") != FORMAT:
        raise ModelError(f"{path} has format {stored.get('format')!r}, not {FORMAT}: {REMEDY}.")
    if stored.get("model_version") != model_version:
        raise ModelError(f"{path} was made for another version of this model: {REMEDY}.")
    if stored.get("preprocessing") != PREPROCESSING:
        raise ModelError(f"{path} was made under the preprocessing {stored.get('preprocessing')!r}: {REMEDY}.")
    if stored.pop("version", None) != digest(stored):
        raise ModelError(f"{path} was changed after it was written: {REMEDY}.")
    return stored


Bar = Callable[[str, int, int, str], None]
"""(stage, done, total, note): what a progress bar shows."""


def calibrate(
    model: Model,
    fit_images: NDArray[np.uint8] | Tensor,
    rank_images: NDArray[np.uint8] | Tensor,
    *,
    false_positive_rate: float = 0.05,
    tolerate: Sequence[Tolerance] = (),
    batch_size: int = 32,
    bar: Bar = lambda stage, done, total, note: None,
) -> Calibration:
    """Calibrate a model on held-out images, uint8 [N, H, W, 3]: one set fits the statistics, the other ranks.

    The two sets must be disjoint from each other and from what the model was trained on, or p-values are too large.
    tolerate: changes of processing (`ncml.changes`) that half of the images go through, so that they are not flagged.
    Raises `InputError` where there are too few images: 20 to fit, and 1 / false_positive_rate - 1 to rank.
    """
    fit_pixels, rank_pixels = (np.asarray(some, np.uint8) for some in (fit_images, rank_images))
    check_enough_to_fit(len(fit_pixels))
    conformal.threshold(np.zeros(len(rank_pixels)), false_positive_rate)
    statistics = catalogue(model.config)

    def measured(stage: str, pixels: NDArray[np.uint8], names: Sequence[str], seed: int) -> Columns:
        parts: list[dict[str, Floats]] = []
        for start in range(0, len(pixels), batch_size):
            some = tolerated(pixels[start : start + batch_size], tolerate, seed=seed + start)
            parts.append(measure(model.network, some, names)[0])
            bar(stage, min(start + batch_size, len(pixels)), len(pixels), "")
        joined = {name: np.concatenate([part[name] for part in parts]) for name in names}
        for name, values in joined.items():
            if not np.isfinite(values).all():
                raise ModelError(f"{model.folder} measures {name} of a {stage} image as not finite; train it anew.")
        return joined

    taught = [name for name, statistic in statistics.items() if statistic.fitted]
    fit_columns = measured("fit", fit_pixels, columns_for(taught, statistics), seed=1)
    gaussian = Gaussian.fitted({name: fit_columns[name] for name in statistics["multiscale"].needs})
    fit = Fit(float(fit_columns["bits_0"].mean()), gaussian)
    ranking = measured("rank", rank_pixels, columns_for(statistics, statistics), seed=2**20)
    ranked = {name: np.sort(rounded(statistic.of(ranking, fit))) for name, statistic in statistics.items()}
    return Calibration(model.version, fit, ranked, len(fit_pixels), false_positive_rate, tolerate=tuple(tolerate))


def rounded(scores: Floats) -> Floats:
    """Six digits, which keeps files small; more would be the rounding of fp32."""
    return np.array([float(f"{score:.6g}") for score in scores])
