"""Refinement of a sample at noise level t to clean data, by the gradient of the network's own log-density.

All solvers of the reverse diffusion (Song et al., 2021) share a signature. Time falls evenly from t to `t_end` in
`steps` - 1 steps; the last step is always Tweedie's: x_0 = (x + sigma^2 s) / alpha, with the score s = grad log p(x).
With one step, every solver is Tweedie's step alone. Shapes: x_BCHW; times are floats.

Evaluations of s: tweedie 1; euler-maruyama `steps`; heun 2 `steps` - 1; predictor-corrector 2 `steps` - 1. Each costs a
forward and a backward pass of the network.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ncml.errors import InputError
from ncml.network.sde import SDE, broadcast_to

GradLogProb = Callable[[Tensor, float], Tensor]
"""(x_BCHW, t) -> s(x, t), the gradient of the log-density, [B, 3, H, W]."""

SIGNAL_TO_NOISE = 0.16
"""Size of the corrector's Langevin step (Song et al., Algorithm 5)."""


class Solver(Protocol):
    """One step of the reverse diffusion, from time t to the earlier time t_next."""

    def __call__(
        self,
        x: Tensor,
        t: float,
        t_next: float,
        *,
        sde: SDE,
        grad_log_prob: GradLogProb,
        draw_normal: Callable[[], Tensor],
    ) -> Tensor:
        """[B, 3, H, W] at t -> at t_next. `draw_normal` returns standard normal draws of x's shape, image by image."""
        ...


def refine(
    x_BCHW: Tensor,
    t: float,
    *,
    t_end: float,
    steps: int,
    solver: str,
    sde: SDE,
    grad_log_prob: GradLogProb,
    draw_normal: Callable[[], Tensor],
    set_known: Callable[[Tensor, float], Tensor] = lambda x, t: x,
    on_step: Callable[[int, Tensor], bool] = lambda step, x: False,
) -> Tensor:
    """Refine x at time t to clean data, [B, 3, H, W].

    set_known: sets known pixels to their noised values for a time (exact at 0); called after every step.
    on_step: called with the number of steps done and x after each; True stops the refinement.
    """
    solve_step = SOLVERS[solver]
    times = torch.linspace(t, min(t, t_end), steps, dtype=torch.float64).tolist()
    for step, (now, after) in enumerate(pairwise(times), 1):
        if after < now:
            x_BCHW = solve_step(x_BCHW, now, after, sde=sde, grad_log_prob=grad_log_prob, draw_normal=draw_normal)
            x_BCHW = set_known(x_BCHW, after)
        if on_step(step, x_BCHW):
            return x_BCHW
    x_BCHW = set_known(tweedie(x_BCHW, times[-1], sde=sde, grad_log_prob=grad_log_prob), 0.0)
    on_step(steps, x_BCHW)
    return x_BCHW


def tweedie(x_BCHW: Tensor, t: float, *, sde: SDE, grad_log_prob: GradLogProb) -> Tensor:
    """Compute E[x_0 | x_t] by Tweedie's formula."""
    time = _time(x_BCHW, t)
    return (x_BCHW + sde.sigma(time) ** 2 * grad_log_prob(x_BCHW, t)) / sde.alpha(time)


def euler_maruyama(
    x: Tensor, t: float, t_next: float, *, sde: SDE, grad_log_prob: GradLogProb, draw_normal: Callable[[], Tensor]
) -> Tensor:
    """Take a step of the reverse SDE dx = (f - g^2 s) dt + g dw."""
    time, dt = _time(x, t), t - t_next
    g2 = sde.diffusion_squared(time)
    return x - (sde.drift(x, time) - g2 * grad_log_prob(x, t)) * dt + torch.sqrt(g2 * dt) * draw_normal()


def heun(
    x: Tensor, t: float, t_next: float, *, sde: SDE, grad_log_prob: GradLogProb, draw_normal: Callable[[], Tensor]
) -> Tensor:
    """Take a second-order step of the probability-flow ODE dx = (f - g^2 s / 2) dt; deterministic."""

    def slope(x: Tensor, t: float) -> Tensor:
        time = _time(x, t)
        return sde.drift(x, time) - 0.5 * sde.diffusion_squared(time) * grad_log_prob(x, t)

    dt = t_next - t
    first = slope(x, t)
    return x + 0.5 * dt * (first + slope(x + dt * first, t_next))


def predictor_corrector(
    x: Tensor, t: float, t_next: float, *, sde: SDE, grad_log_prob: GradLogProb, draw_normal: Callable[[], Tensor]
) -> Tensor:
    """Take a reverse SDE step, then one of Langevin dynamics at t_next, scaled by alpha(t_next) (near 1 at small t)."""
    x = euler_maruyama(x, t, t_next, sde=sde, grad_log_prob=grad_log_prob, draw_normal=draw_normal)
    s, z = grad_log_prob(x, t_next), draw_normal()
    # One image at a time: a sum is split by the size of the whole.
    ratio_B = torch.stack([z_CHW.norm() / s_CHW.norm() for z_CHW, s_CHW in zip(z, s, strict=True)])
    step = broadcast_to(2 * sde.alpha(_time(x, t_next)) * (SIGNAL_TO_NOISE * ratio_B) ** 2, x)
    return x + step * s + torch.sqrt(2 * step) * z


def _tweedie_has_one_step(
    x: Tensor, t: float, t_next: float, *, sde: SDE, grad_log_prob: GradLogProb, draw_normal: Callable[[], Tensor]
) -> Tensor:
    raise InputError("steps", "the tweedie solver takes exactly 1 step; name another solver for more.")


SOLVERS: dict[str, Solver] = {
    "tweedie": _tweedie_has_one_step,
    "euler-maruyama": euler_maruyama,
    "heun": heun,
    "predictor-corrector": predictor_corrector,
}


def _time(x: Tensor, t: float) -> Tensor:
    return torch.tensor(t, dtype=x.dtype, device=x.device)
