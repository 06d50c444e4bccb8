"""Sampling: noisy sampling at t > 0, then refinement (the paper's strategy 2); direct sampling at t = 0.

Every image has its own seed. All its random numbers come from its own generator on the CPU, in a fixed order: the draws
of its pixels, the noise on its known pixels, the draws of refinement. An image is therefore a function of the weights,
the conditions and its seed, and does not depend on the rest of its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncml.limits import KEEPS, Keep
from ncml.network.mixture import (
    HALF_LEVEL,
    PixelDraws,
    grad_log_prob,
    group_by_component,
    log_mixture,
    to_uint8,
)
from ncml.network.ncpn import NCPN
from ncml.network.orientation import orient, restore
from ncml.network.sde import GREY_LEVEL, SDE, VESDE, end_time, make_sde
from ncml.progress import OnProgress, Progress, ignore_progress
from ncml.sampling.batching import passes
from ncml.sampling.conditions import Conditions, OnRow, Tilt
from ncml.sampling.defaults import SamplingSettings
from ncml.sampling.guidance import make_pixel_sampler
from ncml.sampling.solvers import GradLogProb, refine

REFINE_END = 1.0
"""Grey levels of noise at which refinement takes its final Tweedie step (VE: at least its smallest noise, 1.275)."""


Sampler = Callable[[NCPN, Tensor, Conditions, PixelDraws, OnRow], None]
"""Samples the unknown pixels of x [B, 3, H, W], in raster order and in place."""


@dataclass(frozen=True)
class SamplerByTilt:
    """A `Sampler` that samples images of different tilts apart: guidance acts on those of a class only."""

    choose_sampler: Callable[[Tilt, list[int]], Sampler]
    """Returns the sampler for the images of one tilt, given their indices in the batch."""

    def __call__(self, network: NCPN, x_BCHW: Tensor, conditions: Conditions, draws: PixelDraws, on_row: OnRow) -> None:
        """Sample the unknown pixels of x, in place; `on_row` gets the mean of the rows of all parts."""
        parts: dict[Tilt, list[int]] = {}
        for index, class_index in enumerate(conditions.class_B.tolist()):
            has_class = class_index < len(network.config.model.classes)
            parts.setdefault(conditions.tilt.for_class(has_class=has_class), []).append(index)
        first_row, H = conditions.first_row, x_BCHW.shape[2]

        def sample_part(tilt: Tilt, indices: list[int], rows_before: int) -> bool:
            """Sample the images of one tilt; return whether `on_row` stopped the sampling."""
            index_G, stopped = torch.tensor(indices, device=x_BCHW.device), False
            x_GCHW = x_BCHW[index_G]

            def on_part_row(row: int) -> bool:
                nonlocal stopped
                x_BCHW[index_G] = x_GCHW
                stopped = on_row(first_row + (rows_before + row - first_row) // len(parts))
                return stopped

            part_conditions = replace(conditions.select(index_G), tilt=tilt)
            sampler = self.choose_sampler(tilt, indices)
            sampler(network, x_GCHW, part_conditions, draws.select(index_G), on_part_row)
            return stopped

        for part, (tilt, indices) in enumerate(parts.items()):
            if sample_part(tilt, indices, part * (H - first_row)):
                return


@dataclass(frozen=True)
class Plan:
    """A batch of images to sample."""

    seeds: list[int]
    class_B: Tensor
    """int64 [B]; the number of classes stands for no class."""
    settings: SamplingSettings
    known_BCHW: Tensor | None = None
    """Whole canvases of which the half `keep` is known, in [-1, 1]."""
    keep: Keep = "top"
    dropped: Collection[int] = ()
    """Indices of images that are no longer needed; more may be added while images are sampled."""

    @property
    def tilt(self) -> Tilt:
        """The tilt of the settings."""
        return Tilt(self.settings.guidance, self.settings.temperature)


class BatchDraws:
    """The random numbers of a batch: one generator for each image."""

    def __init__(self, seeds: list[int], *, dtype: torch.dtype, device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.dtype, self.device = dtype, device

    def draw_pixels(self, K: int, H: int, W: int) -> PixelDraws:
        """Return the draws of whole images: [B, K, H, W], [B, 3, H, W] and [B, 3, H, W]."""

        def draw_image(generator: torch.Generator) -> Tensor:
            uniform = torch.rand(K + 6, H, W, generator=generator, dtype=torch.float64)
            positive = uniform.clamp(min=2.0**-54)
            gumbel = -torch.log(-torch.log(positive[:K]))
            logistic = torch.logit(positive[K : K + 3])
            return torch.cat([gumbel, logistic, (2 * uniform[K + 3 :] - 1) * HALF_LEVEL])

        # Image by image, because the last bit of a logarithm depends on the layout of its tensor.
        draws_BPHW = self._draw_each(draw_image).to(self.device, torch.promote_types(self.dtype, torch.float32))
        return PixelDraws(*draws_BPHW.split([K, 3, 3], 1))

    def draw_normal(self, H: int, W: int) -> Tensor:
        """Return standard normal draws, [B, 3, H, W]."""
        return self._draw_each(lambda g: torch.randn(3, H, W, generator=g, dtype=torch.float64)).to(
            self.device, self.dtype
        )

    def _draw_each(self, draw_image: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.stack([draw_image(generator) for generator in self.generators])


def generate_images(
    network: NCPN, plan: Plan, sampler: Sampler, on_progress: OnProgress = ignore_progress
) -> NDArray[np.uint8]:
    """Sample the images of a plan, uint8 [B, H, W, 3]; those that are dropped are black."""
    weight, model = network.head.weight, network.config.model
    settings, B = plan.settings, len(plan.seeds)
    sde = make_sde(network.config.sde)
    t = sde.time_of(settings.noise)
    orientation = KEEPS.index(plan.keep)
    known_BCHW = torch.zeros(B, 3, model.height, model.width) if plan.known_BCHW is None else plan.known_BCHW
    known_BCHW = orient(known_BCHW.to(weight), orientation).contiguous(memory_format=torch.channels_last)
    _, _, H, W = known_BCHW.shape
    class_B, orientation_B = plan.class_B.to(weight.device), torch.full((B,), orientation, device=weight.device)
    draws = BatchDraws(plan.seeds, dtype=weight.dtype, device=weight.device)
    pixel_draws = draws.draw_pixels(model.mixtures, H, W)
    # If the number of rows is odd, a flipped half that comes first is the larger one, as `ncml.images` divides it.
    first_row = 0 if plan.known_BCHW is None else (H + orientation % 2) // 2
    conditions = Conditions(t, class_B, orientation_B, plan.tilt, first_row)
    set_known = _known_rows_setter(known_BCHW, draws, first_row, sde)
    x_BCHW = set_known(torch.zeros_like(known_BCHW), t)
    stopped = False

    def report(stage: str, done: int, total: int, x_BCHW: Tensor) -> bool:
        """Report progress; return whether every image is dropped."""
        nonlocal stopped
        progress = Progress(stage, done, total, preview=lambda: to_uint8(restore(x_BCHW, orientation)).cpu().numpy())
        with torch.inference_mode(False):  # the callback may sample images itself, whose refinement needs gradients
            on_progress(progress)
        stopped = len(plan.dropped) == B
        return stopped

    with torch.inference_mode():
        sampler(network, x_BCHW, conditions, pixel_draws, lambda row: report("noisy_sampling", row, H, x_BCHW))
    if t > 0 and not stopped:
        x_BCHW = refine(
            x_BCHW,
            t,
            t_end=_refine_end(network),
            steps=settings.steps,
            solver=settings.solver,
            sde=sde,
            grad_log_prob=make_grad_log_prob(network, conditions, plan.dropped),
            draw_normal=lambda: draws.draw_normal(H, W),
            set_known=set_known,
            on_step=lambda step, x: report("refine", step, settings.steps, x),
        )
    images = to_uint8(restore(x_BCHW, orientation)).cpu().numpy()
    images[sorted(plan.dropped)] = 0
    return images


def make_grad_log_prob(network: NCPN, conditions: Conditions, dropped: Collection[int] = ()) -> GradLogProb:
    """Return (x_BCHW, t) -> s(x, t), [B, 3, H, W]: the gradient of the log-density without edges; 0 for dropped images.

    With guidance w it is s(x | 0) + w (s(x | c) - s(x | 0)) for an image of class c, where 0 is no class. Temperature
    does not act on it: a flattened density is not that of noised data, to which Tweedie's formula applies.
    """
    guidance, null_class = conditions.tilt.guidance, len(network.config.model.classes)

    def log_density(x_BCHW: Tensor, conditions: Conditions) -> Tensor:
        parameters_BPHW = network(x_BCHW, conditions.t_B, conditions.class_B, conditions.orientation_B)
        return log_mixture(x_BCHW, parameters_BPHW, edges_B=None)

    def gradient(x_BCHW: Tensor, conditions: Conditions) -> Tensor:
        return grad_log_prob(lambda x: log_density(x, conditions), x_BCHW)

    def evaluate(x_BCHW: Tensor, t: float) -> Tensor:
        indices = [b for b in range(len(x_BCHW)) if b not in dropped]
        grad_BCHW = torch.zeros_like(x_BCHW)
        for group in passes(indices, x_BCHW.device.type):
            x_GCHW, group_conditions = x_BCHW[group], replace(conditions, t=t).select(group)
            grad_BCHW[group] = gradient(x_GCHW, group_conditions)
            if guidance != 1 and (group_conditions.class_B != null_class).any():
                null_GCHW = gradient(x_GCHW, group_conditions.without_class(null_class))
                grad_BCHW[group] = null_GCHW + guidance * (grad_BCHW[group] - null_GCHW)
        return grad_BCHW

    return evaluate


def _known_rows_setter(
    known_BCHW: Tensor, draws: BatchDraws, first_row: int, sde: SDE
) -> Callable[[Tensor, float], Tensor]:
    """Return (x_BCHW, t) -> x with its known rows noised to t: alpha(t) x_0 + sigma(t) eps, with one eps for all t."""
    if not first_row:
        return lambda x, t: x
    known_rows = known_BCHW[:, :, :first_row]
    eps = draws.draw_normal(*known_rows.shape[2:])

    def set_known(x_BCHW: Tensor, t: float) -> Tensor:
        time = torch.tensor(t, dtype=x_BCHW.dtype, device=x_BCHW.device)
        noised = sde.alpha(time) * known_rows + sde.sigma(time) * eps if t > 0 else known_rows
        return torch.cat([noised, x_BCHW[:, :, first_row:]], 2).contiguous(memory_format=torch.channels_last)

    return set_known


def _refine_end(network: NCPN) -> float:
    """Return the time at which refinement takes its final step."""
    sde = make_sde(network.config.sde)
    min_noise = sde.sigma_min / GREY_LEVEL if isinstance(sde, VESDE) else 0.0
    return min(sde.time_of(max(REFINE_END, min_noise)), end_time(network.config.sde))


def sample_naive(network: NCPN, x_BCHW: Tensor, conditions: Conditions, draws: PixelDraws, on_row: OnRow) -> None:
    """Sample with one pass of the whole network for each pixel: the reference."""
    B, _, H, W = x_BCHW.shape
    model, rows = network.config.model, conditions.tilt.rows_per_image
    row_conditions = conditions.expand(len(model.classes))
    sample_pixels = make_pixel_sampler(network, B, W, conditions)
    for i in range(conditions.first_row, H):
        for j in range(W):
            x_NCHW = x_BCHW.repeat(rows, 1, 1, 1)
            parameters_NPHW = network(x_NCHW, row_conditions.t_B, row_conditions.class_B, row_conditions.orientation_B)
            mixture = group_by_component(parameters_NPHW[:, :, i, j], model.mixtures)
            parts = (draws.gumbel_BK[..., i, j], draws.logistic_BC[..., i, j], draws.uniform_BC[..., i, j])
            x_BCHW[:, :, i, j] = sample_pixels(j, *mixture, PixelDraws(*parts))[:B]
        if on_row(i + 1):
            return
