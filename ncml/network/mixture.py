"""The mixture of logistics over a pixel's three channels: log-probability, its gradient, sampling, bits per dimension.

Shapes: B batch, C = 3 channels, H rows, W columns, K components, P = 10 K parameters of a pixel.

A pixel is one mixture index shared by the channels; within a component red is logistic, green's mean depends on red,
blue's on red and green (PixelCNN++). Clean data (t = 0) has the mass of its grey level, with the open intervals at 0
and 255. Noisy data (t > 0) is continuous and unbounded: its density is the interval mass without edges,

    f(x) = [F(x + d) - F(x - d)] / (2 d),   d = 1/255,

exactly the density of logistic + U(-d, d). Both are counted per grey level (2 d on [-1, 1]), hence in the same bits.

Likelihoods (`log_prob`) also contain an outlier component: one wide logistic for each channel, with a fixed share of
one millionth. Far from its training data, a network can put almost all mass outside the range, so that a few pixels
dominate the likelihood of an image; with the component, no image costs more than 16 bits/dim at t = 0. Training,
samplers, score functions, the coder of archives, and the measurements of single pixels for OOD detection use the
mixture alone (`log_mixture`): the component would hide the worst errors from the gradient and from these measurements,
and put a random pixel into one image in a thousand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

PARAMETERS = 10
"""Parameters of one component: its logit, then mean, log-scale and coefficient for each of three channels."""

HALF_LEVEL = 1 / 255
"""d: half a grey level on the [-1, 1] scale."""

LOG_SCALES = (-7.0, 7.0)
"""Log-scales are clamped to this range: e^-7 is a ninth of a grey level, and e^7 is 500 times the whole range.

Beyond about 100 the gradient of the interval's mass is NaN, because exp(-log_scale) underflows.
"""

OUTLIER_SHARE = 1e-6
OUTLIER_LOG_SCALE = math.log(0.5)
"""At t = 0 a value costs 8.0 bits at the centre of the range, 9.2 near its ends and 3.1 at them. The share adds 6.6."""

TAIL = 1e-6
"""Normal scores are clamped to those of this probability and of its complement: -4.75 to 4.75."""


@dataclass(frozen=True)
class Mixture:
    """The mixture that the network's output describes; trailing dimensions are free."""

    logit_BK: Tensor
    mean_BKC: Tensor
    log_scale_BKC: Tensor
    coefficient_BKC: Tensor
    """Green on red, blue on red, blue on green; in (-1, 1)."""


def split_parameters(parameters: Tensor) -> Mixture:
    """[B, P, ...] -> the mixture, with K and C as dimensions 1 and 2."""
    K = parameters.shape[1] // PARAMETERS
    logit, channels = parameters[:, :K], parameters[:, K:].unflatten(1, (3, K, 3))
    return Mixture(logit, channels[:, 0], channels[:, 1].clamp(*LOG_SCALES), torch.tanh(channels[:, 2]))


def initial_bias(K: int) -> Tensor:
    """Return the head's initial bias: means spread over (-.9, .9), scales of e^-2. [P]."""
    mean_KC = torch.linspace(-0.9, 0.9, K)[:, None].expand(K, 3)
    return torch.cat([torch.zeros(K), mean_KC.flatten(), torch.full((3 * K,), -2.0), torch.zeros(3 * K)])


def log_prob(x_BCHW: Tensor, parameters_BPHW: Tensor, edges_B: Tensor | None) -> Tensor:
    """Return the log-probability of each pixel given those before it, in nats, with the outlier component. [B, H, W].

    The arguments are those of `log_mixture`.
    """
    return add_outliers(log_mixture(x_BCHW, parameters_BPHW, edges_B), x_BCHW, edges_B)


def add_outliers(log_mixture_BHW: Tensor, x_BCHW: Tensor, edges_B: Tensor | None) -> Tensor:
    """Return the log-probability of each pixel with the outlier component, from its `log_mixture`. [B, H, W]."""
    log_scale = x_BCHW.new_full((1, 1, 1, 1, 1), OUTLIER_LOG_SCALE)
    log_outlier_BHW = _log_masses(x_BCHW[:, None], x_BCHW, log_scale, edges_B).sum((1, 2))
    return torch.logaddexp(log_mixture_BHW + math.log1p(-OUTLIER_SHARE), log_outlier_BHW + math.log(OUTLIER_SHARE))


def log_mixture(x_BCHW: Tensor, parameters_BPHW: Tensor, edges_B: Tensor | None) -> Tensor:
    """Return the log-probability of each pixel given those before it under the network's mixture, in nats. [B, H, W].

    x_BCHW: [B, 3, H, W]. parameters_BPHW: the network's output for it, fp32 or fp64.
    edges_B: [B] bool; True for clean data (levels 0 and 255 include everything beyond them), False (or None) for the
    density.
    """
    # Channels first: of channels-last memory, processors vectorise the short innermost dimensions only, and a compiled
    # gradient takes four times as long.
    x_BCHW, mixture = x_BCHW.contiguous(), split_parameters(parameters_BPHW.contiguous())
    log_mass_BKCHW = _log_masses(_centre(x_BCHW, mixture), x_BCHW, mixture.log_scale_BKC, edges_B)
    return torch.logsumexp(log_mass_BKCHW.sum(2) + F.log_softmax(mixture.logit_BK, 1), 1)


def normal_scores(x_BCHW: Tensor, parameters_BPHW: Tensor) -> Tensor:
    """Return the normal scores of clean data: independent and standard normal if the model is right. [B, 3, H, W].

    z = Phi^-1(u), u the probability of a smaller value of the channel, given the channels and pixels before it, plus
    half of the probability of this one.
    """
    mixture = split_parameters(parameters_BPHW)
    centred_BKCHW = _centre(x_BCHW, mixture)
    edges_B = torch.ones(len(x_BCHW), dtype=torch.bool, device=x_BCHW.device)
    log_mass_BKCHW = _log_masses(centred_BKCHW, x_BCHW, mixture.log_scale_BKC, edges_B)
    # A component's weight for a channel is its posterior given the channels before.
    log_earlier_BKCHW = log_mass_BKCHW.cumsum(2) - log_mass_BKCHW
    weight_BKCHW = torch.softmax(mixture.logit_BK[:, :, None] + log_earlier_BKCHW, 1)
    inverse_scale = torch.exp(-mixture.log_scale_BKC)
    below = torch.sigmoid((centred_BKCHW - HALF_LEVEL) * inverse_scale).where(x_BCHW[:, None] > -1 + HALF_LEVEL, 0.0)
    up_to = torch.sigmoid((centred_BKCHW + HALF_LEVEL) * inverse_scale).where(x_BCHW[:, None] < 1 - HALF_LEVEL, 1.0)
    u_BCHW = (weight_BKCHW * (below + up_to) / 2).sum(1)
    return torch.special.ndtri(u_BCHW.clamp(TAIL, 1 - TAIL))


def _centre(x_BCHW: Tensor, mixture: Mixture) -> Tensor:
    """Subtract each component's mean, which depends on the channels before. [B, K, 3, H, W]."""
    r, g, _ = x_BCHW.unbind(1)
    c_rg, c_rb, c_gb = (c[:, :, None] for c in mixture.coefficient_BKC.unbind(2))
    shift_BKCHW = torch.cat(
        [torch.zeros_like(c_rg), c_rg * r[:, None, None], c_rb * r[:, None, None] + c_gb * g[:, None, None]], 2
    )
    return x_BCHW[:, None] - mixture.mean_BKC - shift_BKCHW


def _log_masses(centred_BKCHW: Tensor, x_BCHW: Tensor, log_scale_BKC: Tensor, edges_B: Tensor | None) -> Tensor:
    """Return the log-probability of each channel under each component. [B, K, 3, H, W]."""
    inverse_scale = torch.exp(-log_scale_BKC)
    a = (centred_BKCHW + HALF_LEVEL) * inverse_scale
    b = (centred_BKCHW - HALF_LEVEL) * inverse_scale
    log_below = -F.softplus(-a)  # log F(x + d)
    log_above = -F.softplus(b)  # log (1 - F(x - d))
    # log [F(x + d) - F(x - d)] without a difference of cdfs, so that neither value nor gradient vanishes in a tail.
    log_mass = log_below + log_above + torch.log(-torch.expm1(-2 * HALF_LEVEL * inverse_scale))
    if edges_B is not None:
        edges = edges_B.view(-1, 1, 1, 1, 1)
        at_0 = edges & (x_BCHW < -1 + HALF_LEVEL)[:, None]
        at_255 = edges & (x_BCHW > 1 - HALF_LEVEL)[:, None]
        log_mass = torch.where(at_0, log_below, torch.where(at_255, log_above, log_mass))
    return log_mass


@dataclass(frozen=True)
class PixelDraws:
    """The standardised random draws for one pixel of each image: sampling is a function of these.

    Draws for all pixels have H and W as further dimensions.
    """

    gumbel_BK: Tensor
    """Standard Gumbel: the component is the argmax of logit + gumbel."""
    logistic_BC: Tensor
    """Standard logistic."""
    uniform_BC: Tensor
    """Uniform on (-d, d); used at t > 0 only."""

    def select(self, index_B: Tensor) -> PixelDraws:
        """Return the draws of some images."""
        return PixelDraws(self.gumbel_BK[index_B], self.logistic_BC[index_B], self.uniform_BC[index_B])


def group_by_component(parameters_BP: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """[B, P] -> logits [B, K], and for each component its means, log-scales and coefficients side by side [B, K, 9]."""
    return parameters_BP[:, :K], parameters_BP[:, K:].unflatten(1, (3, K, 3)).transpose(1, 2).flatten(2)


class PixelSampler:
    """Samples one pixel of each image from its mixture, for the W positions of a row, one after another.

    At t = 0 (`clean`) values are rounded to the grid and clipped, which is exact ancestral sampling of the discretised
    mixture; at t > 0 they are continuous and unclipped.

    Results and intermediates are kept in buffers with precomputed views: for a single image, launching operations and
    creating views takes most of the time.
    """

    def __init__(self, B: int, K: int, W: int, like: Tensor, *, clean: bool) -> None:
        self.clean = clean
        like = promote_to_fp32(like)
        self.perturbed_BK = like.new_empty(B, K)
        self.component_index_B1 = torch.empty(B, 1, dtype=torch.long, device=like.device)
        self.gather_index_B19 = self.component_index_B1[:, :, None].expand(-1, -1, 9)
        self.component_B19 = like.new_empty(B, 1, 9)
        self.mean_BC, self.log_scale_BC, self.coefficient_BC = self.component_B19[:, 0].split(3, 1)
        self.on_red_B2, self.on_green_B1 = self.coefficient_BC.split_with_sizes((2, 1), 1)
        row_BWC = like.new_empty(B, W, 3)
        parts = (row_BWC, *row_BWC.split(1, 2), row_BWC[:, :, 1:])
        self.positions = list(zip(*(part.unbind(1) for part in parts), strict=True))
        """For every column: all channels; red, green, blue; green and blue."""

    def __call__(self, j: int, logit_BK: Tensor, component_BK9: Tensor, draws: PixelDraws) -> Tensor:
        """Return the pixels at column j, [B, 3], from parameters grouped by component; the next row overwrites them."""
        x_BC, red, green, blue, green_blue = self.positions[j]
        torch.add(logit_BK, draws.gumbel_BK, out=self.perturbed_BK)
        torch.argmax(self.perturbed_BK, 1, keepdim=True, out=self.component_index_B1)
        torch.gather(component_BK9, 1, self.gather_index_B19, out=self.component_B19)
        scale_BC = self.log_scale_BC.clamp_(*LOG_SCALES).exp_()
        torch.addcmul(self.mean_BC, scale_BC, draws.logistic_BC, out=x_BC)
        self.coefficient_BC.tanh_()
        if self.clean:
            red.copy_(to_grid(red))
        else:
            x_BC.add_(draws.uniform_BC)
        green_blue.addcmul_(self.on_red_B2, red)
        if self.clean:
            green.copy_(to_grid(green))
        blue.addcmul_(self.on_green_B1, green)
        if self.clean:
            blue.copy_(to_grid(blue))
        return x_BC


def promote_to_fp32(x: Tensor) -> Tensor:
    """Convert to fp32, or keep fp64: bf16 holds every grey level, but arithmetic on it loses some."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def to_grid(x: Tensor) -> Tensor:
    """Round to the nearest of the 256 grey levels, on [-1, 1], in fp32 or fp64."""
    return (promote_to_fp32(x) + 1).mul_(127.5).round_().clamp_(0, 255).sub_(127.5).div_(127.5)


def from_uint8(image: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in [-1, 1], channels last in memory."""
    return (image.permute(0, 3, 1, 2).float() - 127.5) / 127.5


def to_uint8(x_BCHW: Tensor) -> Tensor:
    """Float [B, 3, H, W] -> uint8 [B, H, W, 3], rounded to the grid and clipped."""
    return ((promote_to_fp32(x_BCHW) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def bits_per_dim(log_prob_B: Tensor, pixels: int) -> Tensor:
    """Convert the nats of an image with this number of pixels to bits for each of its 3 * pixels values."""
    return -log_prob_B / (math.log(2) * 3 * pixels)


def grad_log_prob(log_density: Callable[[Tensor], Tensor], x_BCHW: Tensor) -> Tensor:
    """Return grad_x log p(x), the score, through target and context. [B, 3, H, W], nats per unit of [-1, 1].

    log_density: x -> [B] or [B, H, W] nats, without edges (also at t = 0).
    """
    with torch.enable_grad():
        x_BCHW = x_BCHW.detach().requires_grad_()
        return torch.autograd.grad(log_density(x_BCHW).sum(), x_BCHW)[0]
