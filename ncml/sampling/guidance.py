"""Guidance and temperature: each channel is sampled on a grid, from its distribution raised to powers.

Let p(v | c) be the probability of level v of a channel, given the channels and pixels before it, for class c or for no
class (0). Guidance w and temperature tau sample from

    q(v) = softmax((log p(v | 0) + w (log p(v | c) - log p(v | 0))) / tau)

which is classifier-free guidance (Ho and Salimans, 2022) applied to each distribution of an autoregressive model. At
t = 0 the levels are the 256 grey levels, and q is exact. At t > 0 they are the cells of a grid, p(v) is the density at
a cell's centre, and the value is uniform in the cell; the grid ends where noised data does.

The class and no class are two rows of a batch (`Conditions.expand`) with the same pixels. Distributions that do not
change (w = 1 and tau = 1) are sampled without a grid, by `ncml.network.mixture.PixelSampler`.

The arithmetic is written once, in functions that NumPy and PyTorch share (`xp`). For a network on the CPU they are
NumPy's: a pixel takes a hundred small operations, which cost less there, and an element's bits do not depend on its
position in an array. On a GPU they are PyTorch's, so that no pixel waits for the CPU and a row can be recorded
(`ncml.sampling.cuda_graphs`).

Shapes: B images, H rows for each, 1, or 2 with guidance, N = H B rows in all, K components, V cells of the grid.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncml.network.mixture import HALF_LEVEL, LOG_SCALES, PixelDraws, PixelSampler, promote_to_fp32
from ncml.network.ncpn import NCPN
from ncml.network.sde import SDE, make_sde
from ncml.sampling.conditions import NO_TILT, Conditions, Tilt

TAIL = 4.5
"""Standard deviations of the noise that the grid reaches beyond the range of the data."""

CELLS_PER_DEVIATION, CELLS = 2, (128, 384)
"""Cells of the grid at t > 0 for each standard deviation of the noise, and their minimum and maximum number."""

CHUNK = 16
"""Images computed together on a CPU: more do not fit in its cache."""

Floats = NDArray[np.floating[Any]]

Array = Any
"""An array of NumPy for a network on the CPU, otherwise a tensor."""


def make_pixel_sampler(network: NCPN, B: int, W: int, conditions: Conditions) -> PixelSampler | TiltedPixelSampler:
    """Return the sampler of a batch's pixels, for rows of W columns."""
    like, clean = promote_to_fp32(network.head.weight), conditions.t == 0
    if conditions.tilt == NO_TILT:
        return PixelSampler(B, network.config.model.mixtures, W, like, clean=clean)
    return TiltedPixelSampler(B, conditions.tilt, grid_of(network, conditions), like, clean=clean)


def choose_library(device: torch.device) -> Any:
    """Return the library that computes for a network on a device: NumPy or PyTorch."""
    return np if device.type == "cpu" else torch


def grid_of(network: NCPN, conditions: Conditions) -> Floats:
    """Return the grid of a batch, [V]; empty without a tilt."""
    return np.empty(0) if conditions.tilt == NO_TILT else make_grid(make_sde(network.config.sde), conditions.t)


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

    def __init__(self, B: int, tilt: Tilt, grid_V: Floats, like: Tensor, *, clean: bool) -> None:
        """clean: t = 0, where the first and last level include everything beyond them. like: fp32 or fp64."""
        self.clean, self.rows_per_image = clean, tilt.rows_per_image
        self.xp = choose_library(like.device)
        self.chunk = CHUNK if self.xp is np else B
        self.buffers = like.new_empty(len(grid_V)), like.new_empty(tilt.rows_per_image, 1, 1), like.new_empty(())
        self.grid_V, self.power_H11, self.dither = (self._array(buffer) for buffer in self.buffers)
        self.image_B = self._array(torch.arange(B, device=like.device))
        self.set_tilt(tilt, grid_V)

    def set_tilt(self, tilt: Tilt, grid_V: Floats) -> None:
        """Change the tilt and the grid, but neither the number of rows of an image nor that of cells."""
        powers = [1 / tilt.temperature]
        if tilt.rows_per_image == 2:
            powers = [tilt.guidance / tilt.temperature, (1 - tilt.guidance) / tilt.temperature]
        dither = (grid_V[1] - grid_V[0]) / (2 * HALF_LEVEL)
        for buffer, values in zip(self.buffers, (grid_V, powers, dither), strict=True):
            buffer.copy_(torch.tensor(values, dtype=torch.float64).view(buffer.shape))

    def _array(self, x: Tensor) -> Array:
        return x.numpy() if self.xp is np else x

    def __call__(self, j: int, logit_NK: Tensor, component_NK9: Tensor, draws: PixelDraws) -> Tensor:
        """Return the pixels of a column, [N, 3]; both rows of an image have the same, from the draws of the image."""
        H = self.rows_per_image
        B, K = len(logit_NK) // H, logit_NK.shape[1]
        logit_HBK = self._array(logit_NK.reshape(H, B, K))
        component_CCHBK = self._array(component_NK9.reshape(H, B, K, 3, 3).permute(3, 4, 0, 1, 2))
        logistic_BC, uniform_BC = (self._array(part[:B]) for part in (draws.logistic_BC, draws.uniform_BC))
        x_BC = self.xp.empty_like(logistic_BC)
        with np.errstate(over="ignore", divide="ignore"):  # e^a overflows far from a component, where its mass is 0
            for start in range(0, B, self.chunk):
                part = slice(start, start + self.chunk)
                x_BC[part] = self._sample_images(
                    logit_HBK[:, part], component_CCHBK[:, :, :, part], logistic_BC[part], uniform_BC[part]
                )
        return torch.as_tensor(x_BC).repeat(H, 1)

    def _sample_images(self, logit_HBK: Array, component_CCHBK: Array, logistic_BC: Array, uniform_BC: Array) -> Array:
        """Sample one pixel of some images, [B, 3]. component: means, log-scales and coefficients of three channels."""
        xp = self.xp
        mean_CHBK1, log_scale_CHBK1, coefficient_CHBK1 = component_CCHBK[..., None]
        inverse_CHBK1 = xp.exp(-log_scale_CHBK1.clip(*LOG_SCALES))
        delta_CHBK1 = HALF_LEVEL * inverse_CHBK1
        sinh_CHBK1, cosh_CHBK1 = 2 * xp.sinh(delta_CHBK1), 2 * xp.cosh(delta_CHBK1)
        red_green, red_blue, green_blue = xp.tanh(coefficient_CHBK1)
        probability_BC = 1 / (1 + xp.exp(-logistic_BC))
        # Probabilities are not normalised: the missing factors cancel in the end.
        joint_HBK1 = xp.exp(logit_HBK - xp.amax(logit_HBK, 2, keepdims=True))[..., None]
        x_BC = xp.empty_like(probability_BC)
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
            xp.exp(exp_HBKV, out=exp_HBKV)
            joint_HBKV = 1 / exp_HBKV
            joint_HBKV += exp_HBKV
            joint_HBKV += cosh_CHBK1[c]
            xp.divide(joint_HBK1 * sinh_CHBK1[c], joint_HBKV, out=joint_HBKV)
            if self.clean:
                ends = slice(None, None, len(self.grid_V) - 1)  # the levels -1 and 1
                a_HBK2 = (self.grid_V[ends] * mean_HBK1 - 1) * inverse_CHBK1[c] + delta_CHBK1[c]
                joint_HBKV[..., ends] = joint_HBK1 / (1 + xp.exp(-a_HBK2))
            index_B = self._choose_cells(joint_HBKV.sum(2), probability_BC[:, c])
            x_BC[:, c] = self.grid_V[index_B]
            if not self.clean:
                x_BC[:, c] += self.dither * uniform_BC[:, c]
            joint_HBK1 = joint_HBKV[:, self.image_B[: len(index_B)], :, index_B].swapaxes(0, 1)[..., None]
        return x_BC

    def _choose_cells(self, mass_HBV: Array, probability_B: Array) -> Array:
        """Return the cell at which each image's tilted distribution function reaches a probability, [B]."""
        log_HBV = self.xp.log(mass_HBV.clip(torch.finfo(self.buffers[0].dtype).tiny))
        log_BV = (self.power_H11 * log_HBV).sum(0)
        cumulative_BV = self.xp.exp(log_BV - self.xp.amax(log_BV, 1, keepdims=True)).cumsum(1)
        return (cumulative_BV[:, :-1] < (probability_B * cumulative_BV[:, -1])[:, None]).sum(1)
