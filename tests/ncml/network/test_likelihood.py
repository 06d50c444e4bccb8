"""The mixture of logistics: its mass is one, its samples have the stated density, and its gradient is correct.

Seeds are fixed; a statistical test fails by chance with the probability that it states.
"""

import math
from itertools import product

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from ncml.config import Config
from ncml.network import mixture
from ncml.network.mixture import (
    HALF_LEVEL,
    PixelDraws,
    PixelSampler,
    group_by_component,
    log_mixture,
    log_prob,
    to_grid,
)
from ncml.network.ncpn import NCPN
from ncml.network.sde import make_sde
from ncml.ood.measurements import locate_peak, measure_level
from ncml.sampling.cached import sample_cached
from ncml.sampling.conditions import Conditions
from ncml.sampling.sample import BatchDraws, make_grad_log_prob
from ncml.training.batches import Batch
from ncml.training.objective import loss_bits
from tests.ncml import nets

GREYS = (torch.arange(256, dtype=torch.float64) - 127.5) / 127.5
SIGNIFICANCE = 1e-3


def parameters(
    logits: list[float], means: list[list[float]], log_scales: list[list[float]], coefficients: list[list[float]]
) -> Tensor:
    """Return one pixel's parameters [1, P], from lists by component (and channel)."""
    parts = [torch.tensor(part, dtype=torch.float64).flatten() for part in (logits, means, log_scales, coefficients)]
    return torch.cat(parts)[None]


def log_mixture_of(values: Tensor, pixel_1P: Tensor, *, clean: bool) -> Tensor:
    """Compute log p of colours [N, 3] under the mixture of one pixel. [N]."""
    x = values.t()[None, :, :, None]
    return log_mixture(x, pixel_1P[:, :, None, None].expand(-1, -1, len(values), 1), torch.tensor([clean]))[0, :, 0]


def log_prob_of(values: Tensor, pixel_1P: Tensor, *, clean: bool) -> Tensor:
    """Compute log p of colours [N, 3] under the mixture of one pixel and the outlier component. [N]."""
    x = values.t()[None, :, :, None]
    return log_prob(x, pixel_1P[:, :, None, None].expand(-1, -1, len(values), 1), torch.tensor([clean]))[0, :, 0]


def cells(*axes: Tensor) -> Tensor:
    """Return every combination of red, green and blue values, [N, 3]."""
    return torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], 1)


def sample_colours(pixel_1P: Tensor, count: int, *, clean: bool, seed: int = 0) -> Tensor:
    """Sample `count` colours from one pixel's parameters, [N, 3]."""
    K = pixel_1P.shape[1] // mixture.PARAMETERS
    draws = BatchDraws([seed], dtype=torch.float64, device=torch.device("cpu")).draw_pixels(K, count, 1)
    pixel_draws = (part[0, :, :, 0].t().contiguous() for part in (draws.gumbel_BK, draws.logistic_BC, draws.uniform_BC))
    sample = PixelSampler(count, K, 1, pixel_1P, clean=clean)
    return sample(0, *group_by_component(pixel_1P.expand(count, -1), K), PixelDraws(*pixel_draws))


TWO = parameters(
    [0.3, -0.4],
    [[-0.8, 0.1, 0.5], [0.6, -0.3, -0.2]],
    [[-1.5, -2.0, -0.7], [-3.0, -1.0, -2.5]],
    [[0.8, -0.5, 0.4], [-1.2, 0.3, 0.9]],
)
BROAD = parameters(
    [0.2, -0.3],
    [[-0.5, 0.2, 0.4], [0.5, -0.3, -0.1]],
    [[-1.0, -1.2, -1.0], [-1.2, -1.0, -1.1]],
    [[0.3, -0.2, 0.4], [-0.4, 0.3, 0.2]],
)
# A few grey levels at a corner of the colour cube: much of the mass is at each edge.
CORNER = parameters(
    [0.5, 0.0],
    [[-1.0, 1.0, -0.99], [-0.98, 0.99, -1.01]],
    [[-5.0, -4.8, -5.2], [-4.7, -5.1, -5.0]],
    [[0.01, -0.01, 0.02], [-0.02, 0.01, -0.01]],
)


def isolate_channel(pixel_1P: Tensor, channel: int) -> Tensor:
    """Return the parameters with the two other channels fixed at level 0."""
    pixel = pixel_1P.clone()
    K = pixel.shape[1] // mixture.PARAMETERS
    mean_KC, log_scale_KC = pixel[0, K : 4 * K].view(K, 3), pixel[0, 4 * K : 7 * K].view(K, 3)
    for other in {0, 1, 2} - {channel}:
        mean_KC[:, other], log_scale_KC[:, other] = -9, -7
    return pixel


@pytest.mark.parametrize("channel", range(3))
def test_the_mass_of_the_256_values_of_a_channel_is_one(channel: int) -> None:
    colours = torch.full((256, 3), -1.0, dtype=torch.float64)
    colours[:, channel] = GREYS
    total = log_mixture_of(colours, isolate_channel(TWO, channel), clean=True).exp().sum()
    assert abs(total - 1) < 1e-12


def test_the_masses_of_all_colours_sum_to_one() -> None:
    low, high = GREYS[:32], GREYS[-32:]
    total = log_mixture_of(cells(low, high, low), CORNER, clean=True).exp().sum()
    assert abs(total - 1) < 1e-9


def test_the_density_integrates_to_one() -> None:
    """By the trapezoid rule, which is exact to many digits for a smooth density; two-sided."""
    step = 0.25
    axis = torch.arange(-40, 41, dtype=torch.float64) * step
    density = log_mixture_of(cells(axis, axis, axis), BROAD, clean=False).exp() / (2 * HALF_LEVEL) ** 3
    assert abs(density.sum() * step**3 - 1) < 1e-6


def marginal_of_red(values: Tensor, pixel_1P: Tensor) -> Tensor:
    """Compute P(red) at t = 0 by differences of cdfs, for any green and blue. [N]."""
    parts = mixture.split_parameters(pixel_1P)
    z = (values[:, None] - parts.mean_BKC[0, :, 0]), parts.log_scale_BKC[0, :, 0].exp()
    upper, lower = torch.sigmoid((z[0] + HALF_LEVEL) / z[1]), torch.sigmoid((z[0] - HALF_LEVEL) / z[1])
    upper[values > 1 - HALF_LEVEL], lower[values < -1 + HALF_LEVEL] = 1, 0
    return ((upper - lower) * torch.softmax(parts.logit_BK[0], 0)).sum(1)


@pytest.mark.parametrize("red", [0, 1, 77, 255])
def test_red_depends_on_neither_green_nor_blue(red: int) -> None:
    """Summed over green and blue, the mass of a colour is the marginal of red."""
    colours = cells(GREYS[red : red + 1], GREYS, GREYS)
    assert torch.allclose(
        log_mixture_of(colours, TWO, clean=True).exp().sum(), marginal_of_red(GREYS[red : red + 1], TWO)[0], rtol=1e-10
    )


@pytest.mark.parametrize("coefficient", range(3), ids=["green on red", "blue on red", "blue on green"])
def test_each_coefficient_couples_its_pair_of_channels(coefficient: int) -> None:
    """With one non-zero coefficient, log p has a mixed derivative in exactly the pair of channels that it couples."""
    means, scales = [[0.1, -0.2, 0.3]], [[-2.0, -2.0, -2.0]]
    only = [[0.0, 0.0, 0.0]]
    only[0][coefficient] = 0.9
    x = torch.tensor([[0.2, 0.1, 0.0]], dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(
        lambda x: log_mixture_of(x, parameters([0.0], means, scales, only), clean=False), x
    )
    coupled = [bool(hessian[0, a, 0, b].abs() > 1e-6) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert coupled == [coefficient == 0, coefficient == 1, coefficient == 2]


def test_clean_draws_have_the_stated_mass() -> None:
    """Chi-square test over joint colours, including the edge bins."""
    count = 200_000
    colours = ((sample_colours(CORNER, count, clean=True) * 127.5) + 127.5).round().long()
    low, high = range(12), range(244, 256)
    mass = log_mixture_of(cells(GREYS[:12], GREYS[244:], GREYS[:12]), CORNER, clean=True).exp().numpy()
    where = {colour: i for i, colour in enumerate(product(low, high, low))}
    actual = np.bincount([where.get(tuple(c), len(where)) for c in colours.tolist()], minlength=len(where) + 1)
    expected = count * np.append(mass, 1 - mass.sum())
    frequent = expected >= 5
    assert frequent.sum() > 100
    observed = np.append(actual[frequent], actual[~frequent].sum())
    assert stats.chisquare(observed, np.append(expected[frequent], expected[~frequent].sum())).pvalue > SIGNIFICANCE


def smooth_cdf(x: np.ndarray, mean: float, scale: float) -> np.ndarray:
    """Return the CDF of logistic + U(-d, d): the mean of F over (x - d, x + d)."""
    upper, lower = np.logaddexp(0, (x + HALF_LEVEL - mean) / scale), np.logaddexp(0, (x - HALF_LEVEL - mean) / scale)
    return scale * (upper - lower) / (2 * HALF_LEVEL)


def test_noisy_draws_have_the_stated_density_in_red() -> None:
    """Kolmogorov-Smirnov, against the mixture of smoothed logistics. Scales down to a tenth of a grey level."""
    pixel = parameters([0.3, -0.4], [[-0.8, 0, 0], [0.6, 0, 0]], [[-1.5, 0, 0], [-6.5, 0, 0]], [[0.0] * 3] * 2)
    weight = torch.softmax(pixel[0, :2], 0).tolist()

    def cdf(x: np.ndarray) -> np.ndarray:
        return weight[0] * smooth_cdf(x, -0.8, math.exp(-1.5)) + weight[1] * smooth_cdf(x, 0.6, math.exp(-6.5))

    red = sample_colours(pixel, 50_000, clean=False)[:, 0].numpy()
    assert stats.kstest(red, cdf).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("channel", [1, 2])
def test_noisy_draws_follow_the_channels_before(channel: int) -> None:
    pixel = parameters([0.0], [[0.1, -0.2, 0.3]], [[-2.0, -3.0, -2.5]], [[0.8, -0.6, 0.5]])
    x = sample_colours(pixel, 50_000, clean=False).numpy()
    c = np.tanh([0.8, -0.6, 0.5])
    shift = c[0] * x[:, 0] if channel == 1 else c[1] * x[:, 0] + c[2] * x[:, 1]
    mean, scale = [0.1, -0.2, 0.3][channel], math.exp([-2.0, -3.0, -2.5][channel])
    assert stats.kstest(x[:, channel] - shift, lambda v: smooth_cdf(v, mean, scale)).pvalue > SIGNIFICANCE


def test_the_log_density_of_draws_has_the_stated_mean() -> None:
    """-E log p is the entropy, found by quadrature: checks the sampler in all channels together."""
    step = 0.25
    axis = torch.arange(-40, 41, dtype=torch.float64) * step
    log_cell = 3 * math.log(2 * HALF_LEVEL)
    log_density = log_mixture_of(cells(axis, axis, axis), BROAD, clean=False) - log_cell
    expected = float((log_density.exp() * log_density).sum() * step**3)
    actual = log_mixture_of(sample_colours(BROAD, 50_000, clean=False), BROAD, clean=False) - log_cell
    assert abs(actual.mean() - expected) < 4 * actual.std() / math.sqrt(len(actual))
    assert actual.std() / math.sqrt(len(actual)) < 0.02


def exact(value: float, mean: float, log_scale: float, *, edge: int | None = None) -> mpmath.mpf:
    """Return the log mass of one channel to 60 digits."""
    with mpmath.workdps(900):  # cdfs differ from 1 by e^-1100 in the far tail
        s, x, m = mpmath.exp(mpmath.mpf(log_scale)), mpmath.mpf(value), mpmath.mpf(mean)
        d = mpmath.mpf(1) / 255
        above = 1 if edge == 255 else 1 / (1 + mpmath.exp(-(x + d - m) / s))
        below = 0 if edge == 0 else 1 / (1 + mpmath.exp(-(x - d - m) / s))
        return mpmath.log(above - below)


@pytest.mark.parametrize("log_scale", [-7.0, -4.0, -1.0, 3.0])
@pytest.mark.parametrize("value", [-1.0, -0.25, 0.0, 1.0])
@pytest.mark.parametrize("clean", [True, False])
def test_the_log_mass_is_stable_in_fp32(value: float, log_scale: float, clean: bool) -> None:
    """The mass has four decimals, or six digits, of the 900-digit value, and a gradient even in the farthest tail."""
    mean = 0.0
    pixel = parameters([0.0], [[mean] * 3], [[log_scale] * 3], [[0.0] * 3]).float()
    x = torch.full((1, 3), value, requires_grad=True)
    actual = log_mixture_of(x, pixel, clean=clean).sum()
    edge = {-1.0: 0, 1.0: 255}.get(value) if clean else None
    expected = 3 * float(exact(value, mean, log_scale, edge=edge))
    assert actual.item() == pytest.approx(expected, rel=1e-6, abs=1e-4)
    (grad,) = torch.autograd.grad(actual, x)
    assert torch.isfinite(grad).all()
    assert (grad.sign() == -np.sign(value)).all()  # towards the mean


@pytest.mark.parametrize(("beyond", "bound"), [(-20.0, -7.0), (123.0, 7.0)])
def test_scales_out_of_range_are_clamped(beyond: float, bound: float) -> None:
    """This holds for the likelihood and for the sampler."""
    colour = torch.tensor([[0.2, 0.1, 0.0]], dtype=torch.float64)
    extreme, clamped = (parameters([0.0], [[0.2] * 3], [[s] * 3], [[0.0] * 3]) for s in (beyond, bound))
    assert torch.equal(log_mixture_of(colour, extreme, clean=False), log_mixture_of(colour, clamped, clean=False))
    assert torch.equal(sample_colours(extreme, 100, clean=False), sample_colours(clamped, 100, clean=False))


@pytest.mark.parametrize("log_scale", [-1e4, -123.0, 123.0, 1e4])
@pytest.mark.parametrize("clean", [True, False])
def test_extreme_scales_have_finite_values_and_gradients(log_scale: float, clean: bool) -> None:
    """In fp32; without the clamp the gradient is NaN above about 100."""
    pixel = parameters([0.0], [[0.2] * 3], [[log_scale] * 3], [[0.1] * 3]).float().requires_grad_()
    log_mass = log_mixture_of(torch.tensor([[0.2, -1.0, 1.0]]), pixel, clean=clean).sum()
    (grad,) = torch.autograd.grad(log_mass, pixel)
    assert log_mass.isfinite()
    assert grad.isfinite().all()


# The outlier component.

LOST = parameters([0.0] * 2, [[60.0, -60.0, 60.0]] * 2, [[-7.0] * 3] * 2, [[0.9] * 3] * 2)
"""All of the mass lies far outside the range."""


@pytest.mark.parametrize("clean", [True, False])
def test_the_outlier_component_has_its_share_and_density(clean: bool) -> None:
    """Compare log p with the sum of both masses to 60 digits."""
    colour = [-1.0, 0.25, 1.0]
    edges = [0, None, 255] if clean else [None] * 3
    mixture = parameters([0.0], [[-0.5, 0.2, 0.4]], [[-1.0, -3.0, -2.0]], [[0.0] * 3])
    inside = [(-0.5, -1.0), (0.2, -3.0), (0.4, -2.0)]
    log_inside = sum(exact(v, *p, edge=edge) for v, p, edge in zip(colour, inside, edges, strict=True))
    log_outlier = sum(exact(v, 0.0, math.log(0.5), edge=edge) for v, edge in zip(colour, edges, strict=True))
    expected = mpmath.log((1 - mpmath.mpf("1e-6")) * mpmath.exp(log_inside) + mpmath.exp(log_outlier) / 10**6)
    actual = log_prob_of(torch.tensor([colour], dtype=torch.float64), mixture, clean=clean).item()
    assert actual == pytest.approx(float(expected), rel=1e-12)
    assert log_prob_of(torch.tensor([colour], dtype=torch.float64), LOST, clean=clean).item() == pytest.approx(
        float(log_outlier - 6 * mpmath.log(10)), rel=1e-12
    )


@pytest.mark.parametrize("channel", range(3))
def test_with_outliers_the_mass_is_still_one(channel: int) -> None:
    """The mixture's mass is at the colour (0, 0, 0), and the masses of a channel's outliers sum to one."""
    colours = torch.full((256, 3), -1.0, dtype=torch.float64)
    colours[:, channel] = GREYS
    pixel = parameters([0.0], [[-9.0] * 3], [[-7.0] * 3], [[0.0] * 3])
    of_both_others = stats.logistic.cdf(-1 + HALF_LEVEL, scale=0.5) ** 2
    total = log_prob_of(colours, pixel, clean=True).exp().sum()
    assert total.item() == pytest.approx(1 - 1e-6 + 1e-6 * of_both_others, abs=1e-12)


def test_no_image_costs_more_than_16_bits_per_dimension() -> None:
    """In fp32, for levels at, near and between the ends, even if the mass lies far outside the range."""
    greys = GREYS[[0, 1, 2, 77, 128, 253, 254, 255]].float()
    colours = cells(greys, greys, greys)
    bits = -log_prob_of(colours, LOST.float(), clean=True) / math.log(2) / 3
    assert 15 < bits.max() < 16
    assert log_mixture_of(colours, LOST.float(), clean=True).min() < -1e5


def test_images_survive_conversion_in_both_directions() -> None:
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    x = mixture.from_uint8(image)
    assert torch.equal(mixture.to_uint8(x), image)
    assert torch.equal(to_grid(x), x)
    assert x.min() == -1
    assert x.max() == 1


def test_bits_per_dim_counts_every_value() -> None:
    """A uniform distribution over 256 values is 8 bits for each of H W 3 dimensions."""
    nats = torch.tensor([-math.log(256) * 3 * 40])
    assert mixture.bits_per_dim(nats, 40).item() == pytest.approx(8)


# The gradient of the log-density.

SMALL = nets.config(((4, 1), (6, 1)), height=4, width=4)


def lost_network(config: Config = SMALL) -> NCPN:
    """Return a network that predicts LOST for every pixel."""
    net = nets.network(config)
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.copy_(LOST[0])
    return net


def test_the_outlier_component_changes_neither_the_loss_nor_gradients() -> None:
    """Under it, the loss would be at most 16 bits/dim, and a gradient at most 2 per value."""
    net = lost_network()
    x = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    conditions = nets.conditions(1, 0.0, SMALL)
    batch = Batch(x, conditions.t_B, conditions.class_B, conditions.orientation_B, torch.zeros(1))
    assert loss_bits(net, batch, bf16=False) > 1e4
    assert make_grad_log_prob(net, conditions)(x, 0.0).abs().min() > 100
    measurement = measure_level(net, np.full((1, 4, 4, 3), 128, np.uint8), 0.0, ["bits", "norm", "direct"])
    assert 14 < measurement.values["bits"] < 16
    for kind in ("norm", "direct"):
        assert measurement.values[kind] > math.log(100 * math.sqrt(48))


@pytest.mark.parametrize("level", [0.0, 2.5])
def test_the_outlier_component_does_not_hide_differences_between_pixels(level: float) -> None:
    """Under it, the costs of two pixels of these grey levels would differ by less than one bit per dimension."""
    pixels = np.full((8, 8, 3), 160, np.uint8)
    pixels[2:7, 3:8] = 100
    net = lost_network(nets.config(((4, 1), (6, 1)), height=8, width=8))
    time = make_sde(net.config.sde).time_of(level)
    measurement = measure_level(net, pixels[None], time, ["fine", "coarse", "peak"])
    bits_HW = -measurement.log_prob_BHW[0] / math.log(2) / 3
    assert 13 < bits_HW.min() < bits_HW.max() < bits_HW.min() + 1
    assert measurement.values["fine"] > math.log(20)
    assert measurement.values["coarse"] > math.log(20)
    assert measurement.values["peak"] > 20
    assert locate_peak(net, pixels, level) == (2, 3, 5)


@pytest.mark.parametrize("t", [0.0, 0.01])
def test_the_gradient_agrees_with_finite_differences(t: float) -> None:
    net = nets.network(SMALL)
    conditions = nets.conditions(2, t, SMALL)
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1

    def density(x: Tensor) -> Tensor:
        out = net(x, conditions.t_B, conditions.class_B, conditions.orientation_B)
        return log_mixture(x, out, torch.zeros(len(x), dtype=torch.bool)).sum((1, 2))

    actual = make_grad_log_prob(net, conditions)(x, t)
    h = 1e-6
    for index in np.ndindex(3, 4, 4):
        step = torch.zeros_like(x)
        step[(slice(None), *index)] = h
        difference = (density(x + step) - density(x - step)) / (2 * h)
        assert torch.allclose(actual[(slice(None), *index)], difference, rtol=1e-5, atol=1e-5)


def test_the_gradient_has_its_moments_on_the_models_own_samples() -> None:
    """E[s] = 0 and E[x . s] = -d at t > 0, within four standard errors (the largest of 48 for the first)."""
    net = nets.network(SMALL, spread=0.1)
    count, t, d = 2048, 0.01, 48
    conditions = Conditions(t, torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long))
    draws = BatchDraws(list(range(count)), dtype=torch.float64, device=torch.device("cpu")).draw_pixels(2, 4, 4)
    x = torch.zeros(count, 3, 4, 4, dtype=torch.float64)
    with torch.inference_mode():
        sample_cached(net, x, conditions, draws, lambda row: False)

    def density(x: Tensor) -> Tensor:
        out = net(x, conditions.t_B, conditions.class_B, conditions.orientation_B)
        return log_mixture(x, out, torch.zeros(count, dtype=torch.bool))

    s = mixture.grad_log_prob(density, x)
    error = s.flatten(1).std(0) / math.sqrt(count)
    assert (s.flatten(1).mean(0).abs() < 4 * error).all()
    inner = (x * s).flatten(1).sum(1)
    error = inner.std() / math.sqrt(count)
    assert error < 1
    assert abs(inner.mean() + d) < 4 * error


def normal_scores_of(values: Tensor, pixel_1P: Tensor) -> Tensor:
    """Compute the normal scores of colours [N, 3] under one pixel's parameters. [N, 3]."""
    x = values.t()[None, :, :, None]
    parameters_BPHW = pixel_1P[:, :, None, None].expand(-1, -1, len(values), 1)
    return mixture.normal_scores(x, parameters_BPHW)[0, :, :, 0].t()


@pytest.mark.parametrize("pixel_1P", [TWO, BROAD, CORNER])
@pytest.mark.parametrize("channel", range(3))
def test_normal_scores_are_quantiles_of_the_masses(pixel_1P: Tensor, channel: int) -> None:
    """Sum the masses of smaller values, and half of the value's own."""
    colours = torch.full((256, 3), -1.0, dtype=torch.float64)
    if channel == 0:
        pixel_1P = isolate_channel(pixel_1P, 0)  # else all 2^24 colours would have to be summed
    colours[:, :channel] = GREYS[torch.tensor([200, 77])[:channel]]
    colours[:, channel] = GREYS
    if channel == 1:
        every_blue = cells(GREYS[200:201], GREYS, GREYS)
        mass = log_mixture_of(every_blue, pixel_1P, clean=True).exp().view(256, 256).sum(1)
    else:
        mass = log_mixture_of(colours, pixel_1P, clean=True).exp()
    u = ((mass.cumsum(0) - mass / 2) / mass.sum()).clamp(mixture.TAIL, 1 - mixture.TAIL)
    assert normal_scores_of(colours, pixel_1P)[:, channel].numpy() == pytest.approx(stats.norm.ppf(u.numpy()), abs=1e-6)


def test_normal_scores_of_samples_are_white() -> None:
    inner = parameters(  # hardly any mass is at the edges, where many values have one score
        [0.2, -0.3],
        [[-0.3, 0.2, 0.1], [0.3, -0.2, -0.1]],
        [[-3.0, -2.8, -3.1], [-3.2, -2.9, -3.0]],
        [[0.6, -0.2, 0.7], [-0.7, 0.5, 0.2]],
    )
    z = normal_scores_of(sample_colours(inner, 20_000, clean=True), inner).numpy()
    for channel in range(3):
        # A level has one score, in the middle of its mass: half of the largest is added to the distance at 0.001.
        largest = np.unique(z[:, channel], return_counts=True)[1].max() / len(z)
        assert stats.kstest(z[:, channel], "norm").statistic < largest / 2 + 1.95 / math.sqrt(len(z))
    assert abs(np.corrcoef(z.T) - np.eye(3)).max() < 4 / math.sqrt(len(z))
