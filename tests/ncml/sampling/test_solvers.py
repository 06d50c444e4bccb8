"""The solvers, on Gaussian data, whose score and reverse trajectories are known in closed form."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from ncml.errors import InputError
from ncml.network.sde import SDE, VESDE, VPSDE, SubVPSDE
from ncml.sampling import solvers

MEAN, DEVIATION = 0.3, 0.2
SDES = {"ve": VESDE(), "vp": VPSDE(), "sub-vp": SubVPSDE()}
each_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)


class Gaussian:
    """x_0 ~ N(MEAN, DEVIATION^2), noised."""

    def __init__(self, sde: SDE) -> None:
        self.sde, self.evaluations = sde, 0

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        time = torch.tensor(t, dtype=torch.float64)
        return float(self.sde.alpha(time)), float(self.sde.sigma(time))

    def mean(self, t: float) -> float:
        return self.alpha_sigma(t)[0] * MEAN

    def variance(self, t: float) -> float:
        alpha, sigma = self.alpha_sigma(t)
        return (alpha * DEVIATION) ** 2 + sigma**2

    def grad_log_prob(self, x: Tensor, t: float) -> Tensor:
        self.evaluations += 1
        return (self.mean(t) - x) / self.variance(t)

    def sample(self, t: float, count: int, *, seed: int = 0) -> Tensor:
        z = torch.randn(1, 3, count // 3, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return self.mean(t) + math.sqrt(self.variance(t)) * z


def normal_like(x: Tensor, seed: int = 1) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(x.shape, dtype=x.dtype, generator=generator)


def solve(solver: str, x: Tensor, times: list[float], data: Gaussian, normal: Callable[[], Tensor]) -> Tensor:
    for now, after in pairwise(times):
        x = solvers.SOLVERS[solver](x, now, after, sde=data.sde, grad_log_prob=data.grad_log_prob, draw_normal=normal)
    return x


def order(errors: dict[int, float]) -> float:
    """Minus the slope of log error against log steps."""
    return -float(np.polyfit(np.log(list(errors)), np.log(list(errors.values())), 1)[0])


START, END = 0.4, 0.1


@each_sde
def test_heun_is_of_second_order(sde: SDE) -> None:
    """Compare with the exact flow, which maps a Gaussian to a Gaussian, deviation by deviation."""
    data = Gaussian(sde)
    x = data.sample(START, 30)
    exact = data.mean(END) + (x - data.mean(START)) * math.sqrt(data.variance(END) / data.variance(START))
    errors = {}
    for steps in (16, 32, 64, 128):
        actual = solve("heun", x, torch.linspace(START, END, steps + 1).double().tolist(), data, normal_like(x))
        errors[steps] = float((actual - exact).abs().max())
    assert order(errors) == pytest.approx(2, abs=0.15)


@each_sde
def test_euler_maruyama_is_of_strong_order_one(sde: SDE) -> None:
    """The noise is additive, so order 1. Against 4096 steps of the same Brownian path, its increments summed."""
    data = Gaussian(sde)
    x = data.sample(START, 3000)
    finest = 4096
    generator = torch.Generator().manual_seed(2)
    increments = torch.randn(finest, *x.shape, dtype=x.dtype, generator=generator)

    def solve_in(steps: int) -> Tensor:
        merged = iter(increments.unflatten(0, (steps, -1)).sum(1) / math.sqrt(finest // steps))
        times = torch.linspace(START, END, steps + 1, dtype=torch.float64).tolist()
        return solve("euler-maruyama", x, times, data, lambda: next(merged))

    reference = solve_in(finest)
    errors = {steps: float((solve_in(steps) - reference).square().mean().sqrt()) for steps in (32, 64, 128, 256)}
    assert order(errors) == pytest.approx(1, abs=0.1)


@each_sde
@pytest.mark.parametrize("solver", ["euler-maruyama", "heun", "predictor-corrector"])
def test_solvers_reach_the_marginal(sde: SDE, solver: str) -> None:
    """60,000 draws from the exact marginal at START have the exact moments at END."""
    data = Gaussian(sde)
    x = data.sample(START, 60_000)
    actual = solve(solver, x, torch.linspace(START, END, 101).double().tolist(), data, normal_like(x))
    assert actual.mean().item() == pytest.approx(data.mean(END), abs=4 * math.sqrt(data.variance(END) / 60_000) + 2e-3)
    # The corrector's finite Langevin step widens its target by SIGNAL_TO_NOISE^2.
    bias = 0.03 if solver == "predictor-corrector" else 0.0
    assert actual.var().item() == pytest.approx((1 + bias) * data.variance(END), rel=0.04)


def test_the_corrector_approaches_the_marginal() -> None:
    """Started from draws that are twice as wide, it comes closer to the marginal than the predictor alone."""
    data = Gaussian(VESDE())
    wide = data.mean(START) + 2 * (data.sample(START, 30_000) - data.mean(START))
    times = torch.linspace(START, START - 0.01, 41).double().tolist()
    off = {
        solver: abs(math.log(solve(solver, wide, times, data, normal_like(wide)).var() / data.variance(times[-1])))
        for solver in ("euler-maruyama", "predictor-corrector")
    }
    assert off["predictor-corrector"] < 0.5 * off["euler-maruyama"]


def test_the_corrector_takes_the_step_of_langevin_dynamics_at_the_later_time() -> None:
    """Its size is 2 alpha (r |z| / |s|)^2 (Song et al., Algorithm 5)."""
    data, x = Gaussian(VPSDE()), torch.full((1, 3, 2, 2), 0.5, dtype=torch.float64)
    normal = normal_like(x)
    predicted = solve("euler-maruyama", x, [START, END], data, normal)
    s, z = data.grad_log_prob(predicted, END), normal()
    step = 2 * data.alpha_sigma(END)[0] * (0.16 * z.norm() / s.norm()) ** 2
    corrected = solve("predictor-corrector", x, [START, END], data, normal_like(x))
    assert torch.allclose(corrected, predicted + step * s + torch.sqrt(2 * step) * z, rtol=1e-9)


@each_sde
def test_tweedie_computes_the_posterior_mean(sde: SDE) -> None:
    data = Gaussian(sde)
    x = data.sample(START, 30)
    alpha, sigma = data.alpha_sigma(START)
    gain = alpha * DEVIATION**2 / data.variance(START)
    exact = MEAN + gain * (x - alpha * MEAN)
    actual = solvers.tweedie(x, START, sde=sde, grad_log_prob=data.grad_log_prob)
    assert sigma > 0
    assert torch.allclose(actual, exact, rtol=1e-12)


def refined(solver: str, steps: int, data: Gaussian, **options: object) -> Tensor:
    x = data.sample(START, 30)
    return solvers.refine(
        x, START, t_end=END, steps=steps, solver=solver, sde=data.sde, grad_log_prob=data.grad_log_prob,
        draw_normal=normal_like(x), **options,
    )  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_one_step_of_any_solver_is_tweedie(solver: str) -> None:
    data = Gaussian(VPSDE())
    expected = solvers.tweedie(data.sample(START, 30), START, sde=data.sde, grad_log_prob=data.grad_log_prob)
    assert torch.equal(refined(solver, 1, data), expected)


@pytest.mark.parametrize("solver", [name for name in solvers.SOLVERS if name != "tweedie"])
def test_solvers_have_the_stated_cost(solver: str) -> None:
    data = Gaussian(VPSDE())
    refined(solver, 7, data)
    assert data.evaluations == (7 if solver == "euler-maruyama" else 13)


def test_tweedie_takes_one_step() -> None:
    with pytest.raises(InputError, match="exactly 1 step"):
        refined("tweedie", 2, Gaussian(VPSDE()))


def test_refinement_reports_steps_and_stops_on_request() -> None:
    steps_done: list[int] = []
    refined("heun", 5, Gaussian(VPSDE()), on_step=lambda step, x: steps_done.append(step))
    assert steps_done == [1, 2, 3, 4, 5]
    steps_done.clear()

    def stop_at_2(step: int, x: Tensor) -> bool:
        steps_done.append(step)
        return step == 2

    refined("heun", 5, Gaussian(VPSDE()), on_step=stop_at_2)
    assert steps_done == [1, 2]


def test_known_pixels_are_set_after_every_step() -> None:
    """They have their noised values at each time, and their exact ones at the end."""
    times: list[float] = []

    def set_known(x: Tensor, t: float) -> Tensor:
        times.append(t)
        return torch.full_like(x, t)

    assert (refined("euler-maruyama", 4, Gaussian(VPSDE()), set_known=set_known) == 0).all()
    assert times == pytest.approx([0.3, 0.2, 0.1, 0.0])


def test_a_start_below_the_end_is_one_tweedie_step() -> None:
    data = Gaussian(VPSDE())
    x = data.sample(0.05, 30)
    options = {"sde": data.sde, "grad_log_prob": data.grad_log_prob}
    actual = solvers.refine(x, 0.05, t_end=END, steps=4, solver="heun", draw_normal=normal_like(x), **options)  # type: ignore[arg-type]
    assert torch.equal(actual, solvers.tweedie(x, 0.05, **options))  # type: ignore[arg-type]
