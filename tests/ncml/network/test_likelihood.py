"""The mixture of logistics: its mass is one, its draws have the density it states, and its gradient is true.

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

from ncml.network import likelihood
from ncml.network.likelihood import HALF, PixelNoise, log_prob, sample, to_grid
from ncml.sampling.cached import sample_cached
from ncml.sampling.sample import Conditions, Noise, score_function
from tests.ncml import nets

GREYS = (torch.arange(256, dtype=torch.float64) - 127.5) / 127.5
SIGNIFICANCE = 1e-3


def parameters(
    logits: list[float], means: list[list[float]], log_scales: list[list[float]], coefficients: list[list[float]]
) -> Tensor:
    """One pixel's parameters [1, P], from lists by component (and channel)."""
    parts = [torch.tensor(part, dtype=torch.float64).flatten() for part in (logits, means, log_scales, coefficients)]
    return torch.cat(parts)[None]


def at(values: Tensor, pixel_1P: Tensor, *, clean: bool) -> Tensor:
    """log p of colours [N, 3] under one pixel's parameters. [N]."""
    x = values.t()[None, :, :, None]
    return log_prob(x, pixel_1P[:, :, None, None].expand(-1, -1, len(values), 1), torch.tensor([clean]))[0, :, 0]


def cells(*axes: Tensor) -> Tensor:
    """Every combination of red, green and blue values, [N, 3]."""
    return torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], 1)


def draws(pixel_1P: Tensor, count: int, *, clean: bool, seed: int = 0) -> Tensor:
    """So many colours from one pixel's parameters, [N, 3]."""
    K = pixel_1P.shape[1] // likelihood.PARAMETERS
    noise = Noise([seed], dtype=torch.float64, device=torch.device("cpu")).pixels(K, count, 1)
    here = (part[0, :, :, 0].t().contiguous() for part in (noise.gumbel_BK, noise.logistic_BC, noise.uniform_BC))
    return sample(pixel_1P.expand(count, -1), PixelNoise(*here), clean=clean)


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
# A few grey levels at a corner of the colour cube: each edge owns much of the mass.
CORNER = parameters(
    [0.5, 0.0],
    [[-1.0, 1.0, -0.99], [-0.98, 0.99, -1.01]],
    [[-5.0, -4.8, -5.2], [-4.7, -5.1, -5.0]],
    [[0.01, -0.01, 0.02], [-0.02, 0.01, -0.01]],
)


def alone(pixel_1P: Tensor, channel: int) -> Tensor:
    """The same parameters with the two other channels certain to be 0."""
    pixel = pixel_1P.clone()
    K = pixel.shape[1] // likelihood.PARAMETERS
    mean_KC, log_scale_KC = pixel[0, K : 4 * K].view(K, 3), pixel[0, 4 * K : 7 * K].view(K, 3)
    for other in {0, 1, 2} - {channel}:
        mean_KC[:, other], log_scale_KC[:, other] = -9, -7
    return pixel


@pytest.mark.parametrize("channel", range(3))
def test_the_mass_of_the_256_values_of_a_channel_is_one(channel: int) -> None:
    colours = torch.full((256, 3), -1.0, dtype=torch.float64)
    colours[:, channel] = GREYS
    total = at(colours, alone(TWO, channel), clean=True).exp().sum()
    assert abs(total - 1) < 1e-12


def test_the_mass_of_all_colours_is_one() -> None:
    low, high = GREYS[:32], GREYS[-32:]
    total = at(cells(low, high, low), CORNER, clean=True).exp().sum()
    assert abs(total - 1) < 1e-9


def test_the_density_integrates_to_one() -> None:
    """By the trapezoid rule, which is exact to many digits for a smooth density; two-sided."""
    step = 0.25
    axis = torch.arange(-40, 41, dtype=torch.float64) * step
    density = at(cells(axis, axis, axis), BROAD, clean=False).exp() / (2 * HALF) ** 3
    assert abs(density.sum() * step**3 - 1) < 1e-6


def marginal_of_red(values: Tensor, pixel_1P: Tensor) -> Tensor:
    """P(red) at t = 0 by differences of cdfs, whatever green and blue. [N]."""
    mixture = likelihood.split(pixel_1P)
    z = (values[:, None] - mixture.mean_BKC[0, :, 0]), mixture.log_scale_BKC[0, :, 0].exp()
    upper, lower = torch.sigmoid((z[0] + HALF) / z[1]), torch.sigmoid((z[0] - HALF) / z[1])
    upper[values > 1 - HALF], lower[values < -1 + HALF] = 1, 0
    return ((upper - lower) * torch.softmax(mixture.logit_BK[0], 0)).sum(1)


@pytest.mark.parametrize("red", [0, 1, 77, 255])
def test_red_knows_neither_green_nor_blue(red: int) -> None:
    """Summed over green and blue, the colour's mass is red's own."""
    colours = cells(GREYS[red : red + 1], GREYS, GREYS)
    assert torch.allclose(
        at(colours, TWO, clean=True).exp().sum(), marginal_of_red(GREYS[red : red + 1], TWO)[0], rtol=1e-10
    )


@pytest.mark.parametrize("coefficient", range(3), ids=["green on red", "blue on red", "blue on green"])
def test_each_coefficient_joins_its_pair_of_channels(coefficient: int) -> None:
    """With one coefficient at work, log p has a mixed derivative in exactly the pair that it joins."""
    means, scales = [[0.1, -0.2, 0.3]], [[-2.0, -2.0, -2.0]]
    only = [[0.0, 0.0, 0.0]]
    only[0][coefficient] = 0.9
    x = torch.tensor([[0.2, 0.1, 0.0]], dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda x: at(x, parameters([0.0], means, scales, only), clean=False), x)
    joined = [bool(hessian[0, a, 0, b].abs() > 1e-6) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert joined == [coefficient == 0, coefficient == 1, coefficient == 2]


def test_clean_draws_have_the_stated_mass() -> None:
    """Chi-square over joint colours, the edge bins among them."""
    count = 200_000
    colours = ((draws(CORNER, count, clean=True) * 127.5) + 127.5).round().long()
    low, high = range(12), range(244, 256)
    mass = at(cells(GREYS[:12], GREYS[244:], GREYS[:12]), CORNER, clean=True).exp().numpy()
    where = {colour: i for i, colour in enumerate(product(low, high, low))}
    found = np.bincount([where.get(tuple(c), len(where)) for c in colours.tolist()], minlength=len(where) + 1)
    expected = count * np.append(mass, 1 - mass.sum())
    frequent = expected >= 5
    assert frequent.sum() > 100
    observed = np.append(found[frequent], found[~frequent].sum())
    assert stats.chisquare(observed, np.append(expected[frequent], expected[~frequent].sum())).pvalue > SIGNIFICANCE


def smooth_cdf(x: np.ndarray, mean: float, scale: float) -> np.ndarray:
    """Of logistic + U(-d, d): the mean of F over (x - d, x + d)."""
    upper, lower = np.logaddexp(0, (x + HALF - mean) / scale), np.logaddexp(0, (x - HALF - mean) / scale)
    return scale * (upper - lower) / (2 * HALF)


def test_noisy_draws_have_the_stated_density_in_red() -> None:
    """Kolmogorov-Smirnov, against the mixture of smoothed logistics. Scales down to a tenth of a grey level."""
    pixel = parameters([0.3, -0.4], [[-0.8, 0, 0], [0.6, 0, 0]], [[-1.5, 0, 0], [-6.5, 0, 0]], [[0.0] * 3] * 2)
    weight = torch.softmax(pixel[0, :2], 0).tolist()

    def cdf(x: np.ndarray) -> np.ndarray:
        return weight[0] * smooth_cdf(x, -0.8, math.exp(-1.5)) + weight[1] * smooth_cdf(x, 0.6, math.exp(-6.5))

    red = draws(pixel, 50_000, clean=False)[:, 0].numpy()
    assert stats.kstest(red, cdf).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("channel", [1, 2])
def test_noisy_draws_follow_the_channels_before(channel: int) -> None:
    pixel = parameters([0.0], [[0.1, -0.2, 0.3]], [[-2.0, -3.0, -2.5]], [[0.8, -0.6, 0.5]])
    x = draws(pixel, 50_000, clean=False).numpy()
    c = np.tanh([0.8, -0.6, 0.5])
    shift = c[0] * x[:, 0] if channel == 1 else c[1] * x[:, 0] + c[2] * x[:, 1]
    mean, scale = [0.1, -0.2, 0.3][channel], math.exp([-2.0, -3.0, -2.5][channel])
    assert stats.kstest(x[:, channel] - shift, lambda v: smooth_cdf(v, mean, scale)).pvalue > SIGNIFICANCE


def test_the_log_density_of_draws_has_the_stated_mean() -> None:
    """-E log p is the entropy, found by quadrature: ties the sampler to `log_prob` in all channels together."""
    step = 0.25
    axis = torch.arange(-40, 41, dtype=torch.float64) * step
    log_density = at(cells(axis, axis, axis), BROAD, clean=False) - 3 * math.log(2 * HALF)
    expected = float((log_density.exp() * log_density).sum() * step**3)
    found = at(draws(BROAD, 50_000, clean=False), BROAD, clean=False) - 3 * math.log(2 * HALF)
    assert abs(found.mean() - expected) < 4 * found.std() / math.sqrt(len(found))
    assert found.std() / math.sqrt(len(found)) < 0.02


def exact(value: float, mean: float, log_scale: float, *, edge: int | None = None) -> mpmath.mpf:
    """log mass of one channel, in 60 digits."""
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
    """To four decimals of the 900-digit value, or six digits; with a gradient that lives in the farthest tail."""
    mean = 0.0
    pixel = parameters([0.0], [[mean] * 3], [[log_scale] * 3], [[0.0] * 3]).float()
    x = torch.full((1, 3), value, requires_grad=True)
    found = at(x, pixel, clean=clean).sum()
    edge = {-1.0: 0, 1.0: 255}.get(value) if clean else None
    expected = 3 * float(exact(value, mean, log_scale, edge=edge))
    assert found.item() == pytest.approx(expected, rel=1e-6, abs=1e-4)
    (grad,) = torch.autograd.grad(found, x)
    assert torch.isfinite(grad).all()
    assert (grad.sign() == -np.sign(value)).all()  # towards the mean


@pytest.mark.parametrize(("beyond", "bound"), [(-20.0, -7.0), (123.0, 7.0)])
def test_scales_out_of_range_count_as_its_bounds(beyond: float, bound: float) -> None:
    """In the likelihood and in the sampler alike."""
    colour = torch.tensor([[0.2, 0.1, 0.0]], dtype=torch.float64)
    extreme, clamped = (parameters([0.0], [[0.2] * 3], [[s] * 3], [[0.0] * 3]) for s in (beyond, bound))
    assert torch.equal(at(colour, extreme, clean=False), at(colour, clamped, clean=False))
    assert torch.equal(draws(extreme, 100, clean=False), draws(clamped, 100, clean=False))


@pytest.mark.parametrize("log_scale", [-1e4, -123.0, 123.0, 1e4])
@pytest.mark.parametrize("clean", [True, False])
def test_extreme_scales_have_finite_values_and_gradients(log_scale: float, clean: bool) -> None:
    """In fp32; without the clamp the gradient is NaN from about 100 on."""
    pixel = parameters([0.0], [[0.2] * 3], [[log_scale] * 3], [[0.1] * 3]).float().requires_grad_()
    log_mass = at(torch.tensor([[0.2, -1.0, 1.0]]), pixel, clean=clean).sum()
    (grad,) = torch.autograd.grad(log_mass, pixel)
    assert log_mass.isfinite()
    assert grad.isfinite().all()


def test_pictures_survive_the_way_in_and_out() -> None:
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    x = likelihood.from_uint8(image)
    assert torch.equal(likelihood.to_uint8(x), image)
    assert torch.equal(to_grid(x), x)
    assert x.min() == -1
    assert x.max() == 1


def test_bits_per_dim_counts_every_value() -> None:
    """A uniform distribution over 256 values is 8 bits for each of H W 3 dimensions."""
    nats = torch.tensor([-math.log(256) * 3 * 40])
    assert likelihood.bits_per_dim(nats, 40).item() == pytest.approx(8)


# The score.

SMALL = nets.config(((4, 1), (6, 1)), height=4, width=4)


@pytest.mark.parametrize("t", [0.0, 0.01])
def test_the_score_is_the_gradient_by_finite_differences(t: float) -> None:
    net = nets.network(SMALL)
    given = nets.conditions(2, t, SMALL)
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1

    def density(x: Tensor) -> Tensor:
        out = net(x, given.t_B, given.class_B, given.orientation_B)
        return log_prob(x, out, torch.zeros(len(x), dtype=torch.bool)).sum((1, 2))

    found = score_function(net, given)(x, t)
    h = 1e-6
    for index in np.ndindex(3, 4, 4):
        step = torch.zeros_like(x)
        step[(slice(None), *index)] = h
        difference = (density(x + step) - density(x - step)) / (2 * h)
        assert torch.allclose(found[(slice(None), *index)], difference, rtol=1e-5, atol=1e-5)


def test_the_score_has_its_moments_on_the_model_s_own_samples() -> None:
    """E[s] = 0 and E[x . s] = -d at t > 0, within four standard errors (the largest of 48 for the first)."""
    net = nets.network(SMALL, spread=0.1)
    count, t, d = 2048, 0.01, 48
    given = Conditions(t, torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long))
    noise = Noise(list(range(count)), dtype=torch.float64, device=torch.device("cpu")).pixels(2, 4, 4)
    x = torch.zeros(count, 3, 4, 4, dtype=torch.float64)
    with torch.inference_mode():
        sample_cached(net, x, given, noise, first_row=0, on_row=lambda row: False)

    def density(x: Tensor) -> Tensor:
        out = net(x, given.t_B, given.class_B, given.orientation_B)
        return log_prob(x, out, torch.zeros(count, dtype=torch.bool))

    s = likelihood.grad_log_prob(density, x)
    error = s.flatten(1).std(0) / math.sqrt(count)
    assert (s.flatten(1).mean(0).abs() < 4 * error).all()
    inner = (x * s).flatten(1).sum(1)
    error = inner.std() / math.sqrt(count)
    assert error < 1
    assert abs(inner.mean() + d) < 4 * error
