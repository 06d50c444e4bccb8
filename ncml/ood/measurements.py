"""Measurements of an image by the network, from which `ncml.ood.statistics` are computed.

`ncml.ood.columns` names them. The network runs once for each noise level, independently of how much is measured.

Shapes: B or N images, C = 3 channels, H rows, W columns, P parameters of a pixel's mixture.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ncml.network.mixture import add_outliers, bits_per_dim, from_uint8, grad_log_prob, log_mixture, normal_scores
from ncml.network.ncpn import NCPN
from ncml.network.sde import broadcast_to, largest_noise, make_sde
from ncml.ood.columns import CHANNELS, CORRELATION_KINDS, NEIGHBOURS, column_name
from ncml.ood.conformal import Floats

BLOCK = 4
"""Side, in pixels, of the blocks over which `coarse` averages."""

WINDOW = 5
"""Side, in pixels, of the windows of which `peak` takes the largest mean."""


@dataclass(frozen=True)
class LevelMeasurement:
    """One pass of the network over a batch at one noise level."""

    log_prob_BHW: Tensor
    """Log-likelihood of each pixel in nats: of a mass at t = 0, of a density at t > 0."""
    log_mixture_BHW: Tensor
    """The same without the outlier component."""
    values: dict[str, Tensor]
    """The measurements by kind, [B] in fp64."""


def measure_level(
    network: NCPN, pixels_BHWC: NDArray[np.uint8], t: float, kinds: Iterable[str] = (), class_B: Tensor | None = None
) -> LevelMeasurement:
    """Measure a batch at time t under its classes (None: no class).

    kinds: any of
        bits: b_t.
        direct: log norm of the part of grad log p that does not pass through the context; needs no network gradient.
        fine, coarse: log of the standard deviation of -log p over pixels, and over means of 4x4 pixels.
        peak: the largest mean bits/dim of 5x5 pixels, minus the mean of all.
        norm: log norm of the whole of grad log p, which needs the network's gradient.
        CORRELATION_KINDS, only at t = 0: mean products of normal scores of neighbouring pixels, and of two channels.

    All but `bits` are of `log_mixture`, without the outlier component: it bounds the surprise of single pixels, and
    with it fewer seams and pasted patches were detected.
    """
    kinds = set(kinds)
    weight = network.head.weight
    t_B = torch.full((len(pixels_BHWC),), t, device=weight.device)
    class_B = None if class_B is None else class_B.to(weight.device)
    x_BCHW = from_uint8(torch.from_numpy(pixels_BHWC)).to(weight)
    x_BCHW = x_BCHW * broadcast_to(make_sde(network.config.sde).alpha(t_B), x_BCHW)
    outputs: list[Tensor] = []

    def density(x_BCHW: Tensor) -> Tensor:
        parameters_BPHW = network(x_BCHW, t_B, class_B)
        outputs.append(parameters_BPHW.detach())
        return log_mixture(x_BCHW, parameters_BPHW, edges_B=None)

    values: dict[str, Tensor] = {}
    with torch.no_grad():
        if "norm" in kinds:
            values["norm"] = _log_norm(grad_log_prob(density, x_BCHW))
        else:
            outputs.append(network(x_BCHW, t_B, class_B))
        (parameters_BPHW,) = outputs
        log_mixture_BHW = log_mixture(x_BCHW, parameters_BPHW, t_B == 0)
        log_prob_BHW = add_outliers(log_mixture_BHW, x_BCHW, t_B == 0)
        if "bits" in kinds:
            pixels = log_prob_BHW[0].numel()
            values["bits"] = bits_per_dim(log_prob_BHW.sum((1, 2), dtype=torch.float64), pixels)
        if "direct" in kinds:
            direct_BCHW = grad_log_prob(lambda x: log_mixture(x, parameters_BPHW, edges_B=None), x_BCHW)
            values["direct"] = _log_norm(direct_BCHW)
        if "fine" in kinds:
            values["fine"] = _log_spread(log_mixture_BHW)
        if "coarse" in kinds:
            side = min(BLOCK, *log_mixture_BHW.shape[1:])
            values["coarse"] = _log_spread(F.avg_pool2d(log_mixture_BHW[:, None], side)[:, 0])
        if "peak" in kinds:
            values["peak"] = window_excess(log_mixture_BHW).amax((1, 2))
        if not kinds.isdisjoint(CORRELATION_KINDS):
            values |= correlations(normal_scores(x_BCHW, parameters_BPHW))
    return LevelMeasurement(log_prob_BHW, log_mixture_BHW, values)


def _log_norm(grad_BCHW: Tensor) -> Tensor:
    return torch.log(torch.linalg.vector_norm(grad_BCHW.double(), dim=(1, 2, 3)).clamp(min=1e-9))


def _log_spread(log_mixture_BHW: Tensor) -> Tensor:
    return torch.log(log_mixture_BHW.double().flatten(1).std(1, correction=0) + 1e-3)


def window_excess(log_mixture_BHW: Tensor) -> Tensor:
    """Return bits/dim averaged over each window of 5x5 pixels, minus the mean of the image, in fp64."""
    bits_BHW = bits_per_dim(log_mixture_BHW.double(), 1)
    side = min(WINDOW, *bits_BHW.shape[1:])
    return F.avg_pool2d(bits_BHW[:, None], side, 1)[:, 0] - bits_BHW.mean((1, 2), keepdim=True)


def locate_peak(network: NCPN, pixels_HWC: NDArray[np.uint8], level: float) -> tuple[int, int, int]:
    """Return top, left and side of the window with the largest excess, `peak`, at a noise level in grey levels."""
    time = make_sde(network.config.sde).time_of(level)
    excess_HW = window_excess(measure_level(network, pixels_HWC[None], time).log_mixture_BHW)[0]
    top, left = divmod(int(excess_HW.argmax()), excess_HW.shape[1])
    return top, left, pixels_HWC.shape[0] - excess_HW.shape[0] + 1


def correlations(z_BCHW: Tensor) -> dict[str, Tensor]:
    """Return the mean products of neighbouring values in each channel, and of channels; by kind, [B] in fp64."""
    z_BCHW = z_BCHW.double()
    H, W = z_BCHW.shape[2:]
    values: dict[str, Tensor] = {}
    for name, (down, right) in NEIGHBOURS.items():
        first = z_BCHW[:, :, max(0, -down) : H - max(0, down), : W - right]
        second = z_BCHW[:, :, max(0, down) : H - max(0, -down), right:]
        means_BC = (first * second).mean((2, 3))
        values |= {f"corr_{name}_{channel}": means_BC[:, i] for i, channel in enumerate(CHANNELS)}
    red, green, blue = z_BCHW.unbind(1)
    pairs = {"red_green": (red, green), "green_blue": (green, blue), "red_blue": (red, blue)}
    return values | {f"corr_{name}": (first * second).mean((1, 2)) for name, (first, second) in pairs.items()}


def measure(
    network: NCPN, pixels_BHWC: NDArray[np.uint8], names: Iterable[str]
) -> tuple[dict[str, Floats], LevelMeasurement | None]:
    """Return the named columns of a batch, and the measurement at t = 0 if there was one."""
    names = list(names)
    kinds_by_level: dict[float, list[str]] = {}
    for name in names:
        if name != "codec":
            kind, level = name.rsplit("_", 1)
            kinds_by_level.setdefault(float(level), []).append(kind)
    sde, largest = make_sde(network.config.sde), largest_noise(network.config.sde)
    measurements = {
        # A column's name has six digits, which may round the largest noise up.
        level: measure_level(network, pixels_BHWC, sde.time_of(min(level, largest)), kinds)
        for level, kinds in kinds_by_level.items()
    }
    columns = {
        column_name(kind, level): values_B.cpu().numpy()
        for level, measurement in measurements.items()
        for kind, values_B in measurement.values.items()
    }
    if "codec" in names:
        columns["codec"] = np.array([webp_bits(image) for image in pixels_BHWC])
    return {name: columns[name] for name in names}, measurements.get(0.0)


def webp_bits(image: NDArray[np.uint8]) -> float:
    """Return bits per dimension of an image as a lossless WebP file (Pillow's defaults), header included."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "WEBP", lossless=True)
    return 8 * len(file.getvalue()) / image.size
