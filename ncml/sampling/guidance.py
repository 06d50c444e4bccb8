"""Guidance and temperature: each channel is sampled on a grid, from its distribution raised to powers.

Let p(v | c) be the probability of level v of a channel, given the channels and pixels before it, for class c or for no
class (0). Guidance w and temperature tau sample from

    q(v) = softmax((log p(v | 0) + w (log p(v | c) - log p(v | 0))) / tau)

which is classifier-free guidance (Ho and Salimans, 2022) applied to each distribution of an autoregressive model. At
t = 0 the levels are the 256 grey levels, and q is exact. At t > 0 they are the cells of a grid, p(v) is the density at
a cell's centre, and the value is uniform in the cell; the grid ends where noised data does.

The class and no class are two rows of a batch (`Conditions.expand`) with the same pixels. Distributions that do not
change (w = 1 and tau = 1) are sampled without a grid, by `ncml.network.likelihood.PixelSampler`.

Shapes: B images, N = B rows or 2 B with guidance, K components, V cells of the grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ncml.network.likelihood import HALF_LEVEL, LOG_SCALES, PixelDraws, PixelSampler, promote_to_fp32
from ncml.network.ncpn import NCPN
from ncml.network.sde import SDE, make_sde
from ncml.sampling.conditions import NO_TILT, Conditions, Tilt

CELLS = 384
"""Cells of the grid at t > 0. At 10 grey levels of noise a cell is .9 levels wide."""

TAIL = 4.5
"""Standard deviations of the noise that the grid reaches beyond the range of the data."""

ONE_THREAD = 32768
"""Elements up to which PyTorch computes an elementwise operation on one thread, so that every row is whole vectors."""

LOG2_E = 1 / math.log(2)
"""exp2 takes a tenth of the time of exp here."""


def make_pixel_sampler(network: NCPN, B: int, W: int, conditions: Conditions) -> PixelSampler | TiltedPixelSampler:
    """Return the sampler of a batch's pixels, for rows of W columns."""
    like, clean = network.head.weight, conditions.t == 0
    if conditions.tilt == NO_TILT:
        return PixelSampler(B, network.config.model.mixtures, W, like, clean=clean)
    grid_V = make_grid(make_sde(network.config.sde), conditions.t, like)
    return TiltedPixelSampler(conditions.tilt, grid_V, clean=clean)


def make_grid(sde: SDE, t: float, like: Tensor) -> Tensor:
    """Return the centres of the cells, ascending, fp32 or fp64 [V]: the grey levels at t = 0."""
    like = promote_to_fp32(like)
    if t == 0:
        return (torch.arange(256, dtype=like.dtype, device=like.device) - 127.5) / 127.5
    time = torch.tensor(t, dtype=torch.float64)
    reach = float(sde.alpha(time) + TAIL * sde.sigma(time))
    return torch.linspace(-reach, reach, CELLS, dtype=like.dtype, device=like.device)


class TiltedPixelSampler:
    """Samples the pixels of one position of each image, as `PixelSampler` does."""

    def __init__(self, tilt: Tilt, grid_V: Tensor, *, clean: bool) -> None:
        """clean: t = 0, where the first and last level include everything beyond them."""
        self.tilt, self.grid_V, self.clean = tilt, grid_V, clean
        self.dither = float(grid_V[1] - grid_V[0]) / (2 * HALF_LEVEL)
        self.ends_2 = grid_V[[0, -1]]
        self.outward_2 = torch.tensor([1.0, -1.0], dtype=grid_V.dtype, device=grid_V.device)

    def __call__(self, j: int, logit_NK: Tensor, component_NK9: Tensor, draws: PixelDraws) -> Tensor:
        """Return the pixels of a column, [N, 3]; both rows of an image have the same, from the draws of the first."""
        H, (N, K) = self.tilt.rows_per_image, logit_NK.shape
        parts = (
            logit_NK.view(H, -1, K),
            component_NK9.view(H, -1, K, 9),
            draws.logistic_BC[: N // H],
            draws.uniform_BC[: N // H],
        )
        elements = ONE_THREAD if torch.get_num_threads() > 1 else 2 * ONE_THREAD
        size = max(1, elements // (H * K * len(self.grid_V)))
        chunks = zip(*(part.split(size, axis) for part, axis in zip(parts, (1, 1, 0, 0), strict=True)), strict=True)
        return torch.cat([self._sample_images(*chunk) for chunk in chunks]).repeat(H, 1)

    def _sample_images(
        self, logit_HBK: Tensor, component_HBK9: Tensor, logistic_BC: Tensor, uniform_BC: Tensor
    ) -> Tensor:
        """Sample one pixel of some images, [B, 3]; H = 1, or 2 for the class and no class."""
        mean_HBKC, log_scale_HBKC, coefficient_HBKC = component_HBK9.split(3, 3)
        inverse_HBKC = torch.exp(-log_scale_HBKC.clamp(*LOG_SCALES))
        delta_HBKC = HALF_LEVEL * inverse_HBKC
        means = mean_HBKC.unbind(3)
        on_red_green, on_red_blue, on_green_blue = torch.tanh(coefficient_HBKC).unbind(3)
        weight_HBK = torch.softmax(logit_HBK, 2)
        channels: list[Tensor] = []
        for mean_HBK, inverse_HBK1, delta_HBK1, sinh_HBK1, cosh_HBK1, probability_B, uniform_B in zip(
            means,
            inverse_HBKC.split(1, 3),
            delta_HBKC.split(1, 3),
            (2 * torch.sinh(delta_HBKC)).split(1, 3),
            (2 * torch.cosh(delta_HBKC)).split(1, 3),
            torch.sigmoid(logistic_BC).unbind(1),
            uniform_BC.unbind(1),
            strict=True,
        ):
            match channels:
                case [red_B]:
                    mean_HBK = torch.addcmul(mean_HBK, on_red_green, red_B[:, None])
                case [red_B, green_B]:
                    mean_HBK = torch.addcmul(mean_HBK, on_red_blue, red_B[:, None])
                    mean_HBK = torch.addcmul(mean_HBK, on_green_blue, green_B[:, None])
            mean_HBK1, weight_HBK1 = mean_HBK[..., None], weight_HBK[..., None]
            # The mass of each component around every cell's centre v, F(v + d) - F(v - d). With a = (v - mean) / s and
            # delta = d / s it is sinh(delta) / (cosh(a) + cosh(delta)), which loses no digits in the tails.
            slope_HBK1 = inverse_HBK1 * LOG2_E
            exp_HBKV = (self.grid_V * slope_HBK1).sub_(mean_HBK1 * slope_HBK1).exp2_()
            joint_HBKV = (
                exp_HBKV.reciprocal().add_(exp_HBKV).add_(cosh_HBK1).reciprocal_().mul_(weight_HBK1 * sinh_HBK1)
            )
            if self.clean:
                ends_HBK2 = (self.ends_2 - mean_HBK1) * (self.outward_2 * inverse_HBK1)
                joint_HBKV[..., :: len(self.grid_V) - 1] = weight_HBK1 * torch.sigmoid(ends_HBK2 + delta_HBK1)
            index_B1 = self._choose_cells(joint_HBKV.sum(2), probability_B[:, None].contiguous())
            x_B = self.grid_V[index_B1[:, 0]]
            channels.append(x_B if self.clean else x_B + self.dither * uniform_B)
            joint_HBK = joint_HBKV.gather(3, index_B1[:, None].expand(*mean_HBK.shape, 1))[..., 0]
            weight_HBK = joint_HBK / joint_HBK.sum(2, keepdim=True)
        return torch.stack(channels, 1)

    def _choose_cells(self, mass_HBV: Tensor, probability_B1: Tensor) -> Tensor:
        """Return the cell at which each image's tilted distribution function reaches a probability. int64 [B, 1]."""
        log_HBV = mass_HBV.clamp(min=torch.finfo(mass_HBV.dtype).tiny).log()
        log_BV = log_HBV[0]
        if len(log_HBV) == 2:
            log_BV = log_HBV[1] + self.tilt.guidance * (log_HBV[0] - log_HBV[1])
        cumulative_BV = torch.softmax(log_BV / self.tilt.temperature, 1).cumsum(1)
        return torch.searchsorted(cumulative_BV, probability_B1).clamp_(max=len(self.grid_V) - 1)
