"""Drawing images: noisy sampling at t > 0, then refinement (the paper's strategy 2); direct sampling at t = 0.

Every image has its own seed. All noise an image needs comes from its own generator on the CPU, in a fixed order: the
sampling draws, the noise on its known pixels, the refinement draws. So a picture is a function of the weights, the
conditions and its seed, whatever shares its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncml.limits import KEEPS, Keep
from ncml.network.likelihood import HALF, PixelNoise, grad_log_prob, log_prob, sample, to_grid, to_uint8, wide
from ncml.network.ncpn import NCPN
from ncml.network.orientation import orient, restore
from ncml.network.sde import GREY_LEVEL, VE, end_time, process
from ncml.progress import OnProgress, Progress, ignore_progress
from ncml.sampling.options import SamplingSettings
from ncml.sampling.solvers import refine

REFINE_END = 1.0
"""Grey levels of noise at which refinement ends with its Tweedie step (or VE's least noise, 1.275, if that is more)."""


@dataclass(frozen=True)
class Conditions:
    """What a batch is drawn under."""

    t: float
    class_B: Tensor
    orientation_B: Tensor

    @property
    def t_B(self) -> Tensor:
        """The time of each image."""
        return torch.full(self.class_B.shape, self.t, device=self.class_B.device)

    def of(self, member_B: list[int] | slice | Tensor) -> Conditions:
        """The conditions of some members."""
        return Conditions(self.t, self.class_B[member_B], self.orientation_B[member_B])


class Sampler(Protocol):
    """Draws the pixels of x from row `first_row` on, in raster order, in place."""

    def __call__(
        self,
        network: NCPN,
        x_BCHW: Tensor,
        conditions: Conditions,
        noise: PixelNoise,
        *,
        first_row: int,
        on_row: Callable[[int], bool],
    ) -> None:
        """Rows before `first_row` are known. `on_row` is called with the number of rows done; True stops."""
        ...


@dataclass(frozen=True)
class Plan:
    """A batch of pictures to draw."""

    seeds: list[int]
    class_B: Tensor
    """int64 [B]; the number of classes stands for none."""
    settings: SamplingSettings
    known_BCHW: Tensor | None = None
    """Whole canvases of which the half `keep` is known; on [-1, 1]."""
    keep: Keep = "top"
    dropped: set[int] = field(default_factory=set)


class Noise:
    """The random draws of a batch: one generator for each image."""

    def __init__(self, seeds: list[int], *, dtype: torch.dtype, device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.dtype, self.device = dtype, device

    def pixels(self, K: int, H: int, W: int) -> PixelNoise:
        """The sampling draws of whole images: [B, K, H, W], [B, 3, H, W] and [B, 3, H, W]."""

        def draws(generator: torch.Generator) -> Tensor:
            uniform = torch.rand(K + 6, H, W, generator=generator, dtype=torch.float64)
            open_ = uniform.clamp(min=2.0**-54)
            gumbel = -torch.log(-torch.log(open_[:K]))
            logistic = torch.logit(open_[K : K + 3])
            return torch.cat([gumbel, logistic, (2 * uniform[K + 3 :] - 1) * HALF])

        # Each image's by itself: the last bit of a logarithm depends on the layout of the tensor that it stands in.
        return PixelNoise(*wide(self._each(draws).to(self.device, self.dtype)).split([K, 3, 3], 1))

    def normal(self, H: int, W: int) -> Tensor:
        """Standard normal draws, [B, 3, H, W]."""
        return self._each(lambda g: torch.randn(3, H, W, generator=g, dtype=torch.float64)).to(self.device, self.dtype)

    def _each(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.stack([draw(generator) for generator in self.generators])


def draw(network: NCPN, plan: Plan, sampler: Sampler, on_progress: OnProgress = ignore_progress) -> NDArray[np.uint8]:
    """Draw the pictures of a plan, uint8 [B, H, W, 3]; members that the callback drops come back black."""
    weight = network.head.weight
    process_ = process(network.config.sde)
    t = process_.time_of(plan.settings.noise)
    turn = KEEPS.index(plan.keep)
    B = len(plan.seeds)
    model = network.config.model
    laid_BCHW = torch.zeros(B, 3, model.height, model.width) if plan.known_BCHW is None else plan.known_BCHW
    laid_BCHW = orient(laid_BCHW.to(weight), turn).contiguous(memory_format=torch.channels_last)
    _, _, H, W = laid_BCHW.shape
    conditions = Conditions(t, plan.class_B.to(weight.device), torch.full((B,), turn, device=weight.device))
    noise = Noise(plan.seeds, dtype=weight.dtype, device=weight.device)
    pixel_noise = noise.pixels(model.mixtures, H, W)
    # Of an odd number of rows the half that is turned to come first is the larger one, as `ncml.images` cuts it.
    first_row = 0 if plan.known_BCHW is None else (H + turn % 2) // 2
    hold = _hold(laid_BCHW, noise, first_row, plan, network)
    x_BCHW = hold(torch.zeros_like(laid_BCHW), t)
    report = _reporter(plan, on_progress, turn)

    with torch.inference_mode():
        stopped = False

        def on_row(row: int) -> bool:
            nonlocal stopped
            stopped = report("noisy_sampling", row, H, x_BCHW)
            return stopped

        sampler(network, x_BCHW, conditions, pixel_noise, first_row=first_row, on_row=on_row)
    if t > 0 and not stopped:
        x_BCHW = refine(
            x_BCHW.clone(),
            t,
            t_end=_refine_end(network),
            steps=plan.settings.steps,
            solver=plan.settings.solver,
            process=process_,
            score=score_function(network, conditions, plan.dropped),
            normal=lambda: noise.normal(H, W),
            hold=hold,
            on_step=lambda step, x: report("refine", step, plan.settings.steps, x),
        )
        x_BCHW = hold(to_grid(x_BCHW), 0.0)
    pictures = to_uint8(restore(x_BCHW, turn)).cpu().numpy()
    pictures[sorted(plan.dropped)] = 0
    return pictures


def score_function(
    network: NCPN, conditions: Conditions, dropped: Collection[int] = ()
) -> Callable[[Tensor, float], Tensor]:
    """(x_BCHW, t) -> s(x, t), [B, 3, H, W]: the gradient of the log-density without edges; 0 for dropped members.

    On a CPU each image is evaluated by itself: libraries choose kernels by batch size, and the last bits of a gradient
    would tell what else was in the batch.
    """
    on_cpu = network.head.weight.device.type == "cpu"

    def density(x_BCHW: Tensor, given: Conditions) -> Tensor:
        parameters_BPHW = network(x_BCHW, given.t_B, given.class_B, given.orientation_B)
        return log_prob(x_BCHW, parameters_BPHW, edges_B=None)

    def score(x_BCHW: Tensor, t: float) -> Tensor:
        at = replace(conditions, t=t)
        wanted = [b for b in range(len(x_BCHW)) if b not in dropped]
        s_BCHW = torch.zeros_like(x_BCHW)
        for some in [[b] for b in wanted] if on_cpu else [wanted]:
            given = at.of(some)
            s_BCHW[some] = grad_log_prob(lambda x, given=given: density(x, given), x_BCHW[some])
        return s_BCHW

    return score


def _hold(
    laid_BCHW: Tensor, noise: Noise, first_row: int, plan: Plan, network: NCPN
) -> Callable[[Tensor, float], Tensor]:
    """Puts known rows back at their noised values: alpha(t) x_0 + sigma(t) eps, one eps for the whole trajectory."""
    if not first_row:
        return lambda x, t: x
    process_ = process(network.config.sde)
    known = laid_BCHW[:, :, :first_row]
    eps = noise.normal(*known.shape[2:])

    def hold(x_BCHW: Tensor, t: float) -> Tensor:
        time = torch.tensor(t, dtype=x_BCHW.dtype, device=x_BCHW.device)
        noised = process_.alpha(time) * known + process_.sigma(time) * eps if t > 0 else known
        return torch.cat([noised, x_BCHW[:, :, first_row:]], 2).contiguous(memory_format=torch.channels_last)

    return hold


def _refine_end(network: NCPN) -> float:
    process_ = process(network.config.sde)
    floor = process_.sigma_min / GREY_LEVEL if isinstance(process_, VE) else 0.0
    return min(process_.time_of(max(REFINE_END, floor)), end_time(network.config.sde))


def _reporter(plan: Plan, on_progress: OnProgress, turn: int) -> Callable[[str, int, int, Tensor], bool]:
    def report(stage: str, done: int, total: int, x_BCHW: Tensor) -> bool:
        progress = Progress(stage, done, total, preview=lambda: to_uint8(restore(x_BCHW, turn)).cpu().numpy())
        plan.dropped.update(on_progress(progress) or ())
        return len(plan.dropped) == len(plan.seeds)

    return report


def naive(
    network: NCPN,
    x_BCHW: Tensor,
    conditions: Conditions,
    noise: PixelNoise,
    *,
    first_row: int,
    on_row: Callable[[int], bool],
) -> None:
    """The reference sampler: one pass of the whole network for each pixel."""
    given = (conditions.t_B, conditions.class_B, conditions.orientation_B)
    _, _, H, W = x_BCHW.shape
    for i in range(first_row, H):
        for j in range(W):
            parameters_BP = network(x_BCHW, *given)[:, :, i, j]
            here = PixelNoise(noise.gumbel_BK[..., i, j], noise.logistic_BC[..., i, j], noise.uniform_BC[..., i, j])
            x_BCHW[:, :, i, j] = sample(parameters_BP, here, clean=conditions.t == 0)
        if on_row(i + 1):
            return
