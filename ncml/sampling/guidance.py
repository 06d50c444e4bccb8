"""Guidance and temperature: each channel is sampled on a grid, from its distribution raised to powers.

Let p(v | c) be the probability of level v of a channel, given the channels and pixels before it, for class c or for no
class (0). Guidance w and temperature tau sample from

    q(v) = softmax((log p(v | 0) + w (log p(v | c) - log p(v | 0))) / tau)

which is classifier-free guidance (Ho and Salimans, 2022) applied to each distribution of an autoregressive model. At
t = 0 the levels are the 256 grey levels, and q is exact. At t > 0 they are the cells of a grid, p(v) is the density at
a cell's centre, and the value is uniform in the cell; the grid ends where noised data does.

The class and no class are two rows of a batch (`Conditions.expand`) with the same pixels. Distributions that do not
change (w = 1 and tau = 1) are sampled without a grid, by `ncml.network.mixture.PixelSampler`.

The arithmetic runs in numpy on the CPU, on every device of the network: a pixel takes a hundred small operations,
which cost less there, and an element's bits do not depend on its position in an array.

Shapes: B images, H rows for each, 1, or 2 with guidance, N = H B rows in all, K components, V cells of the grid.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncml.network.mixture import HALF_LEVEL, LOG_SCALES, PixelDraws, PixelSampler
from ncml.network.ncpn import NCPN
from ncml.network.sde import SDE, make_sde
from ncml.sampling.conditions import NO_TILT, Conditions, Tilt

TAIL = 4.5
"""Standard deviations of the noise that the grid reaches beyond the range of the data."""

CELLS_PER_DEVIATION, CELLS = 2, (128, 384)
"""Cells of the grid at t > 0 for each standard deviation of the noise, and their minimum and maximum number."""

CHUNK = 16
"""Images computed together: more do not fit in a processor's cache."""

Floats = NDArray[np.floating[Any]]


def make_pixel_sampler(network: NCPN, B: int, W: int, conditions: Conditions) -> PixelSampler | TiltedPixelSampler:
    """Return the sampler of a batch's pixels, for rows of W columns."""
    like, clean = network.head.weight, conditions.t == 0
    if conditions.tilt == NO_TILT:
        return PixelSampler(B, network.config.model.mixtures, W, like, clean=clean)
    grid_V = make_grid(make_sde(network.config.sde), conditions.t)
    return TiltedPixelSampler(conditions.tilt, grid_V, like, clean=clean)


def make_grid(sde: SDE, t: float) -> Floats:
    """Return the centres of the cells, ascending, [V]: the grey levels at t = 0."""
    if t == 0:
        return (np.arange(256) - 127.5) / 127.5
    time = torch.tensor(t, dtype=torch.float64)
    sigma = float(sde.sigma(time))
    reach = float(sde.alpha(time)) + TAIL * sigma
    fewest, most = CELLS
    return np.linspace(-reach, reach, min(most, max(fewest, math.ceil(2 * reach / sigma * CELLS_PER_DEVIATION))))


class TiltedPixelSampler:
    """Samples the pixels of one position of each image, as `PixelSampler` does."""

    def __init__(self, tilt: Tilt, grid_V: Floats, like: Tensor, *, clean: bool) -> None:
        """clean: t = 0, where the first and last level include everything beyond them."""
        self.clean, self.device, self.rows_per_image = clean, like.device, tilt.rows_per_image
        self.grid_V = grid_V.astype(np.float64 if like.dtype == torch.float64 else np.float32)
        self.powers = (1 / tilt.temperature,)
        if tilt.rows_per_image == 2:
            self.powers = tilt.guidance / tilt.temperature, (1 - tilt.guidance) / tilt.temperature
        self.dither = float(grid_V[1] - grid_V[0]) / (2 * HALF_LEVEL)

    def __call__(self, j: int, logit_NK: Tensor, component_NK9: Tensor, draws: PixelDraws) -> Tensor:
        """Return the pixels of a column, [N, 3]; both rows of an image have the same, from the draws of the image."""
        H = self.rows_per_image
        B, K = len(logit_NK) // H, logit_NK.shape[1]
        logit_HBK = logit_NK.cpu().numpy().reshape(H, B, K)
        component_HBK9 = component_NK9.cpu().numpy().reshape(H, B, K, 9)
        logistic_BC, uniform_BC = (part[:B].cpu().numpy() for part in (draws.logistic_BC, draws.uniform_BC))
        x_BC = np.empty((B, 3), self.grid_V.dtype)
        with np.errstate(over="ignore", divide="ignore"):  # e^a overflows far from a component, where its mass is 0
            for start in range(0, B, CHUNK):
                part = slice(start, start + CHUNK)
                x_BC[part] = self._sample_images(
                    logit_HBK[:, part], component_HBK9[:, part], logistic_BC[part], uniform_BC[part]
                )
        return torch.from_numpy(x_BC).to(self.device).repeat(H, 1)

    def _sample_images(
        self, logit_HBK: Floats, component_HBK9: Floats, logistic_BC: Floats, uniform_BC: Floats
    ) -> Floats:
        """Sample one pixel of some images, [B, 3]."""
        mean_CHBK1, log_scale_CHBK1, coefficient_CHBK1 = component_HBK9.transpose(3, 0, 1, 2)[..., None].reshape(
            3, 3, *logit_HBK.shape, 1
        )
        inverse_CHBK1 = np.exp(-np.minimum(np.maximum(log_scale_CHBK1, LOG_SCALES[0]), LOG_SCALES[1]))
        delta_CHBK1 = HALF_LEVEL * inverse_CHBK1
        sinh_CHBK1, cosh_CHBK1 = 2 * np.sinh(delta_CHBK1), 2 * np.cosh(delta_CHBK1)
        red_green, red_blue, green_blue = np.tanh(coefficient_CHBK1)
        probability_BC = 1 / (1 + np.exp(-logistic_BC))
        # Probabilities are not normalised: the missing factors cancel in the end.
        joint_HBK1 = np.exp(logit_HBK - logit_HBK.max(2, keepdims=True))[..., None]
        x_BC = np.empty_like(probability_BC)
        for c in range(3):
            mean_HBK1 = mean_CHBK1[c]
            if c == 1:
                mean_HBK1 = mean_HBK1 + red_green * x_BC[:, 0, None, None]
            if c == 2:
                mean_HBK1 = mean_HBK1 + red_blue * x_BC[:, 0, None, None] + green_blue * x_BC[:, 1, None, None]
            # The mass of each component around every cell's centre v, F(v + d) - F(v - d). With a = (v - mean) / s and
            # delta = d / s it is sinh(delta) / (cosh(a) + cosh(delta)), which loses no digits in the tails.
            exp_HBKV = self.grid_V - mean_HBK1
            exp_HBKV *= inverse_CHBK1[c]
            np.exp(exp_HBKV, out=exp_HBKV)
            joint_HBKV = 1 / exp_HBKV
            joint_HBKV += exp_HBKV
            joint_HBKV += cosh_CHBK1[c]
            np.divide(joint_HBK1 * sinh_CHBK1[c], joint_HBKV, out=joint_HBKV)
            if self.clean:
                for cell, sign in ((0, 1), (-1, -1)):
                    a_HBK1 = sign * (self.grid_V[cell] - mean_HBK1) * inverse_CHBK1[c] + delta_CHBK1[c]
                    joint_HBKV[..., cell] = (joint_HBK1 / (1 + np.exp(-a_HBK1)))[..., 0]
            index_B = self._choose_cells(joint_HBKV.sum(2), probability_BC[:, c])
            x_BC[:, c] = self.grid_V[index_B]
            if not self.clean:
                x_BC[:, c] += self.dither * uniform_BC[:, c]
            joint_HBK1 = joint_HBKV[:, np.arange(len(index_B)), :, index_B].swapaxes(0, 1)[..., None]
        return x_BC

    def _choose_cells(self, mass_HBV: Floats, probability_B: Floats) -> NDArray[np.intp]:
        """Return the cell at which each image's tilted distribution function reaches a probability, [B]."""
        log_HBV = np.log(np.maximum(mass_HBV, np.finfo(mass_HBV.dtype).tiny))
        log_BV = self.powers[0] * log_HBV[0]
        if len(self.powers) == 2:
            log_BV += self.powers[1] * log_HBV[1]
        log_BV -= log_BV.max(1, keepdims=True)
        cumulative_BV = np.exp(log_BV).cumsum(1)
        reached_BV = cumulative_BV[:, :-1] >= (probability_B * cumulative_BV[:, -1])[:, None]
        return np.where(reached_BV.any(1), reached_BV.argmax(1), len(self.grid_V) - 1)
