"""The solvers, on Gaussian data, whose score and whose reverse trajectories are known in closed form."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from ncml.errors import InputError
from ncml.network.sde import VE, VP, Process, SubVP
from ncml.sampling import solvers

MEAN, DEVIATION = 0.3, 0.2
PROCESSES = {"ve": VE(), "vp": VP(), "sub-vp": SubVP()}
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


class Gaussian:
    """x_0 ~ N(MEAN, DEVIATION^2), noised."""

    def __init__(self, process: Process) -> None:
        self.process, self.evaluations = process, 0

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        time = torch.tensor(t, dtype=torch.float64)
        return float(self.process.alpha(time)), float(self.process.sigma(time))

    def mean(self, t: float) -> float:
        return self.alpha_sigma(t)[0] * MEAN

    def variance(self, t: float) -> float:
        alpha, sigma = self.alpha_sigma(t)
        return (alpha * DEVIATION) ** 2 + sigma**2

    def score(self, x: Tensor, t: float) -> Tensor:
        self.evaluations += 1
        return (self.mean(t) - x) / self.variance(t)

    def draw(self, t: float, count: int, *, seed: int = 0) -> Tensor:
        z = torch.randn(1, 3, count // 3, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return self.mean(t) + math.sqrt(self.variance(t)) * z


def normal_like(x: Tensor, seed: int = 1) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(x.shape, dtype=x.dtype, generator=generator)


def walk(solver: str, x: Tensor, times: list[float], data: Gaussian, normal: Callable[[], Tensor]) -> Tensor:
    for now, after in pairwise(times):
        x = solvers.SOLVERS[solver](x, now, after, process=data.process, score=data.score, normal=normal)
    return x


def order(errors: dict[int, float]) -> float:
    """Minus the slope of log error against log steps."""
    return -float(np.polyfit(np.log(list(errors)), np.log(list(errors.values())), 1)[0])


START, END = 0.4, 0.1


@each_process
def test_heun_is_of_second_order(process: Process) -> None:
    """Against the exact flow: a Gaussian is carried into a Gaussian, deviation by deviation."""
    data = Gaussian(process)
    x = data.draw(START, 30)
    exact = data.mean(END) + (x - data.mean(START)) * math.sqrt(data.variance(END) / data.variance(START))
    errors = {}
    for steps in (16, 32, 64, 128):
        found = walk("heun", x, torch.linspace(START, END, steps + 1).double().tolist(), data, normal_like(x))
        errors[steps] = float((found - exact).abs().max())
    assert order(errors) == pytest.approx(2, abs=0.15)


@each_process
def test_euler_maruyama_is_of_strong_order_one(process: Process) -> None:
    """The noise is additive, so order 1. Against 4096 steps of the same Brownian path, its increments summed."""
    data = Gaussian(process)
    x = data.draw(START, 3000)
    finest = 4096
    generator = torch.Generator().manual_seed(2)
    increments = torch.randn(finest, *x.shape, dtype=x.dtype, generator=generator)

    def by(steps: int) -> Tensor:
        merged = iter(increments.unflatten(0, (steps, -1)).sum(1) / math.sqrt(finest // steps))
        times = torch.linspace(START, END, steps + 1, dtype=torch.float64).tolist()
        return walk("euler-maruyama", x, times, data, lambda: next(merged))

    reference = by(finest)
    errors = {steps: float((by(steps) - reference).square().mean().sqrt()) for steps in (32, 64, 128, 256)}
    assert order(errors) == pytest.approx(1, abs=0.1)


@each_process
@pytest.mark.parametrize("solver", ["euler-maruyama", "heun", "predictor-corrector"])
def test_solvers_arrive_at_the_marginal(process: Process, solver: str) -> None:
    """60,000 draws from the exact marginal at START have the exact moments at END."""
    data = Gaussian(process)
    x = data.draw(START, 60_000)
    found = walk(solver, x, torch.linspace(START, END, 101).double().tolist(), data, normal_like(x))
    assert found.mean().item() == pytest.approx(data.mean(END), abs=4 * math.sqrt(data.variance(END) / 60_000) + 2e-3)
    # The corrector's finite Langevin step widens its target by SIGNAL_TO_NOISE^2.
    bias = 0.03 if solver == "predictor-corrector" else 0.0
    assert found.var().item() == pytest.approx((1 + bias) * data.variance(END), rel=0.04)


def test_the_corrector_corrects() -> None:
    """From draws that are twice too wide, its steps come nearer to the marginal than the predictor's alone."""
    data = Gaussian(VE())
    wide = data.mean(START) + 2 * (data.draw(START, 30_000) - data.mean(START))
    times = torch.linspace(START, START - 0.01, 41).double().tolist()
    off = {
        solver: abs(math.log(walk(solver, wide, times, data, normal_like(wide)).var() / data.variance(times[-1])))
        for solver in ("euler-maruyama", "predictor-corrector")
    }
    assert off["predictor-corrector"] < 0.5 * off["euler-maruyama"]


@each_process
def test_tweedie_is_the_posterior_mean(process: Process) -> None:
    data = Gaussian(process)
    x = data.draw(START, 30)
    alpha, sigma = data.alpha_sigma(START)
    gain = alpha * DEVIATION**2 / data.variance(START)
    exact = MEAN + gain * (x - alpha * MEAN)
    found = solvers.tweedie(x, START, process=process, score=data.score)
    assert sigma > 0
    assert torch.allclose(found, exact, rtol=1e-12)


def refined(solver: str, steps: int, data: Gaussian, **options: object) -> Tensor:
    x = data.draw(START, 30)
    return solvers.refine(
        x, START, t_end=END, steps=steps, solver=solver, process=data.process, score=data.score,
        normal=normal_like(x), **options,
    )  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_one_step_of_any_solver_is_tweedie_s(solver: str) -> None:
    data = Gaussian(VP())
    expected = solvers.tweedie(data.draw(START, 30), START, process=data.process, score=data.score)
    assert torch.equal(refined(solver, 1, data), expected)


@pytest.mark.parametrize("solver", [name for name in solvers.SOLVERS if name != "tweedie"])
def test_the_cost_is_as_stated(solver: str) -> None:
    data = Gaussian(VP())
    refined(solver, 7, data)
    assert data.evaluations == (7 if solver == "euler-maruyama" else 13)


def test_tweedie_takes_one_step() -> None:
    with pytest.raises(InputError, match="exactly 1 step"):
        refined("tweedie", 2, Gaussian(VP()))


def test_refinement_says_where_it_stands_and_stops_when_told() -> None:
    seen: list[int] = []
    refined("heun", 5, Gaussian(VP()), on_step=lambda step, x: seen.append(step))
    assert seen == [1, 2, 3, 4, 5]
    seen.clear()

    def stop_at_2(step: int, x: Tensor) -> bool:
        seen.append(step)
        return step == 2

    refined("heun", 5, Gaussian(VP()), on_step=stop_at_2)
    assert seen == [1, 2]


def test_what_is_held_is_put_back_after_every_step() -> None:
    """At its noised value for each time, and exactly at the end."""
    times: list[float] = []

    def hold(x: Tensor, t: float) -> Tensor:
        times.append(t)
        return torch.full_like(x, t)

    assert (refined("euler-maruyama", 4, Gaussian(VP()), hold=hold) == 0).all()
    assert times == pytest.approx([0.3, 0.2, 0.1, 0.0])


def test_a_start_below_the_end_goes_straight_to_tweedie() -> None:
    data = Gaussian(VP())
    x = data.draw(0.05, 30)
    options = {"process": data.process, "score": data.score}
    found = solvers.refine(x, 0.05, t_end=END, steps=4, solver="heun", normal=normal_like(x), **options)  # type: ignore[arg-type]
    assert torch.equal(found, solvers.tweedie(x, 0.05, **options))  # type: ignore[arg-type]
