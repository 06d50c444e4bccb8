"""Figure 4: how much of the sanity test's damage is left at noise level t.

Delta log p(t) = abs(log p_t(x_t) - log p_t(flipped x_t)) of Eq. 9, averaged over images and counted in bits/dim: x_t
is the image noised to time t, flipped x_t the same with all lowest bits flipped first and the same noise. Beside it,
the average perturbation of a value at time t, against the one grey level that a flip is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ncml.evaluation import numbers
from ncml.evaluation.likelihood import bits, flip
from ncml.evaluation.pictures import SEED, Pictures
from ncml.evaluation.report import Cell, Figure, Section, Table, plots
from ncml.evaluation.samples import noisy, shares
from ncml.network.likelihood import from_uint8
from ncml.network.sde import GREY_LEVEL, process, scale

if TYPE_CHECKING:
    from ncml.evaluation.context import Context
    from ncml.model import Model

FRACTIONS = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
"""Noise levels, as fractions of the largest that the model knows."""


def noised(model: Model, x_BCHW: Tensor, t: float, first: int) -> Tensor:
    """alpha(t) x + sigma(t) eps, eps a function of the image's position in its set."""
    process_ = process(model.config.sde)
    t_B = torch.full((len(x_BCHW),), t)
    generators = (torch.Generator().manual_seed(SEED + first + i) for i in range(len(x_BCHW)))
    eps_BCHW = torch.stack([torch.randn(x_BCHW.shape[1:], generator=generator) for generator in generators])
    return scale(process_.alpha(t_B), x_BCHW) * x_BCHW + scale(process_.sigma(t_B), x_BCHW) * eps_BCHW


def levels(model: Model) -> list[float]:
    """The noise levels of a model, in grey levels, as far as its process reaches them."""
    return shares(model, FRACTIONS) if noisy(model) else [0.0]


def at_level(context: Context, model: Model, pictures: Pictures, level: float) -> dict[str, Any]:
    """Bits of each image and of its flipped twin, and its average perturbation in grey levels. [N] each."""
    t = process(model.config.sde).time_of(level)

    def measure(start: int, stop: int) -> dict[str, Any]:
        pixels = pictures.pixels_NHWC[start:stop]
        x_BCHW, flipped_BCHW = (from_uint8(torch.from_numpy(some)) for some in (pixels, flip(pixels, 1.0)))
        x_t, flipped_t = (noised(model, x, t, start) for x in (x_BCHW, flipped_BCHW))
        moved_B = (x_t - x_BCHW).abs().mean((1, 2, 3), dtype=torch.float64) / GREY_LEVEL
        network = model.network
        return {"bits": bits(network, x_t, t), "flipped": bits(network, flipped_t, t), "moved": moved_B.numpy()}

    what = {"model": model.version, "data": pictures.digest, "level": level}
    return context.store.rows("robustness", what, len(pictures), measure)


def robustness(context: Context) -> Section:
    """Figure 4, a curve for each model."""
    plot, axes = plots(10, 3.4, 1, 3)
    rows: list[tuple[Cell, ...]] = []
    results: dict[str, dict[str, Any]] = {}
    for label, model in context.models.items():
        pictures = context.test(model, "robustness")
        at = levels(model)
        found = [at_level(context, model, pictures, level) for level in at]
        curves = {
            "bpd": [numbers.mean(each["bits"]) for each in found],
            "bpd_flipped": [numbers.mean(each["flipped"]) for each in found],
            "delta": [numbers.mean(np.abs(each["flipped"] - each["bits"])) for each in found],
            "perturbation": [numbers.mean(each["moved"]) for each in found],
        }
        rows += [(label, f"{level:g}", *row) for level, *row in zip(at, *curves.values(), strict=True)]
        results[label] = {"grey_levels": at} | {k: [m.to_json() for m in curve] for k, curve in curves.items()}
        (line,) = axes[0].plot(at, [m.value for m in curves["bpd"]], marker="o", ms=3, label=label)
        colour = line.get_color()
        axes[0].plot(at, [m.value for m in curves["bpd_flipped"]], "--", marker="o", ms=3, color=colour)
        for axis, name in zip(axes[1:], ("delta", "perturbation"), strict=True):
            curve = curves[name]
            axis.plot(at, [m.value for m in curve], marker="o", ms=3, label=label, color=colour)
            axis.fill_between(at, [m.low for m in curve], [m.high for m in curve], alpha=0.2, color=colour)
    axes[0].set(title="bits/dim (dashed: lowest bits flipped)")
    axes[1].set(title=r"$\Delta \log p(t)$, bits/dim", ylim=(0, None))
    axes[2].set(title="average perturbation, grey levels")
    axes[2].axhline(1, color="grey", lw=0.8, ls=":")
    axes[2].text(axes[2].get_xlim()[1], 1, "a flipped bit", ha="right", va="bottom", fontsize=8, color="grey")
    for axis in axes:
        axis.set_xlabel("noise at t, grey levels")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    text = [
        "Images are noised to time t, once as they are and once with all lowest bits flipped (pi = 1), under the same "
        "noise; Delta log p(t) is the mean over images of the absolute difference of their log-likelihoods under the "
        "noise-conditional model, in bits/dim. At t > 0 bits/dim are those of a density per grey level."
    ]
    caption = (
        "Figure 4. Left: bits/dim of images noised to t. Middle: what flipping the lowest bits still changes there. "
        "Right: how far the noise moves a value on average; at the dotted line, as far as a flipped bit does."
    )
    header = ("model", "noise", "bits/dim", "flipped, bits/dim", "Delta log p(t)", "perturbation")
    return Section(
        kind="robustness",
        title="Figure 4: robustness to flipped bits at noise level t",
        text=text,
        tables=[Table("robustness", "Figure 4 in numbers (noise and perturbation in grey levels)", header, rows)],
        figures=[Figure("figure4", caption, plot)],
        results=results,
        notes=context.notes,
    )
