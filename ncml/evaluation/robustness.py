"""Figure 4: the effect of flipped lowest bits on the likelihood at noise level t.

Delta log p(t) = abs(log p_t(x_t) - log p_t(flipped x_t)) of Eq. 9, averaged over images, in bits/dim: x_t is the image
noised to time t, flipped x_t the same with all lowest bits flipped first and the same noise. Beside it, the average
perturbation of a value at time t, compared with the one grey level of a flip.

Shapes: N images, B of them at once, C = 3 channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ncml.evaluation import bootstrap
from ncml.evaluation.flipped_bits import bits, flip
from ncml.evaluation.image_sets import SEED, ImageSet
from ncml.evaluation.inputs import Inputs
from ncml.evaluation.report import Cell, Figure, Section, Table, make_axes
from ncml.model import Model
from ncml.network.mixture import from_uint8
from ncml.network.sde import GREY_LEVEL, broadcast_to, make_sde
from ncml.ood.columns import noise_levels

LEVEL_FRACTIONS = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
"""Noise levels, as fractions of the model's largest."""


def add_noise(model: Model, x_BCHW: Tensor, t: float, first: int) -> Tensor:
    """Compute alpha(t) x + sigma(t) eps, eps a function of the image's position in its set."""
    sde = make_sde(model.config.sde)
    t_B = torch.full((len(x_BCHW),), t)
    generators = (torch.Generator().manual_seed(SEED + first + i) for i in range(len(x_BCHW)))
    eps_BCHW = torch.stack([torch.randn(x_BCHW.shape[1:], generator=generator) for generator in generators])
    return broadcast_to(sde.alpha(t_B), x_BCHW) * x_BCHW + broadcast_to(sde.sigma(t_B), x_BCHW) * eps_BCHW


def measure_level(inputs: Inputs, model: Model, images: ImageSet, level: float) -> dict[str, Any]:
    """Measure bits of each image and of its flipped copy, and its average perturbation in grey levels. [N] each."""
    t = make_sde(model.config.sde).time_of(level)

    def measure(start: int, stop: int) -> dict[str, Any]:
        pixels = images.pixels_NHWC[start:stop]
        x_BCHW, flipped_BCHW = from_uint8(torch.from_numpy(pixels)), from_uint8(torch.from_numpy(flip(pixels, 1.0)))
        x_t, flipped_t = (add_noise(model, x, t, start) for x in (x_BCHW, flipped_BCHW))
        moved_B = (x_t - x_BCHW).abs().mean((1, 2, 3), dtype=torch.float64) / GREY_LEVEL
        network = model.network
        return {"bits": bits(network, x_t, t), "flipped": bits(network, flipped_t, t), "moved": moved_B.numpy()}

    key = {"model": model.version, "data": images.digest, "level": level}
    return inputs.cache.rows("robustness", key, len(images), measure)


def robustness(inputs: Inputs) -> Section:
    """Measure Figure 4, a curve for each model."""
    plot, axes = make_axes(10, 3.4, 1, 3)
    rows: list[tuple[Cell, ...]] = []
    results: dict[str, dict[str, Any]] = {}
    for label, model in inputs.models.items():
        images = inputs.test_images(model, "robustness")
        levels = noise_levels(model.config, LEVEL_FRACTIONS)
        measurements = [measure_level(inputs, model, images, level) for level in levels]
        curves = {
            "bpd": [bootstrap.mean(m["bits"]) for m in measurements],
            "bpd_flipped": [bootstrap.mean(m["flipped"]) for m in measurements],
            "delta": [bootstrap.mean(np.abs(m["flipped"] - m["bits"])) for m in measurements],
            "perturbation": [bootstrap.mean(m["moved"]) for m in measurements],
        }
        rows += [(label, f"{level:g}", *row) for level, *row in zip(levels, *curves.values(), strict=True)]
        results[label] = {"grey_levels": levels} | {k: [m.to_json() for m in curve] for k, curve in curves.items()}
        (line,) = axes[0].plot(levels, [m.value for m in curves["bpd"]], marker="o", ms=3, label=label)
        colour = line.get_color()
        axes[0].plot(levels, [m.value for m in curves["bpd_flipped"]], "--", marker="o", ms=3, color=colour)
        for axis, name in zip(axes[1:], ("delta", "perturbation"), strict=True):
            curve = curves[name]
            axis.plot(levels, [m.value for m in curve], marker="o", ms=3, label=label, color=colour)
            axis.fill_between(levels, [m.low for m in curve], [m.high for m in curve], alpha=0.2, color=colour)
    axes[0].set(title="bits/dim (dashed: lowest bits flipped)")
    axes[1].set(title=r"$\Delta \log p(t)$, bits/dim", ylim=(0, None))
    axes[2].set(title="average perturbation, grey levels")
    axes[2].axhline(1, color="grey", lw=0.8, ls=":")
    axes[2].text(axes[2].get_xlim()[1], 1, "a flipped bit", ha="right", va="bottom", fontsize=8, color="grey")
    for axis in axes:
        axis.set_xlabel("noise at t, grey levels")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    count = next(iter(results.values()))["delta"][0]["n"]
    text = [
        "Images are noised to time t, once unchanged and once with all lowest bits flipped (pi = 1), with the same "
        "noise; Delta log p(t) is the mean over images of the absolute difference of their log-likelihoods under the "
        "noise-conditional model, in bits/dim. At t > 0 bits/dim are those of a density per grey level.",
        "Noise hides a flip of one grey level from every model, so Delta log p(t) falls with t even for a perfect one: "
        "compare models at the same noise.",
        f"Measured on {count:,} test images; brackets are 95% bootstrap intervals over them.",
    ]
    caption = (
        "Figure 4. Left: bits/dim of images noised to t. Middle: the effect of flipping the lowest bits, as it remains "
        "at t. Right: the average change of a value by the noise; the dotted line is the change of a flipped bit."
    )
    header = ("model", "noise", "bits/dim", "flipped, bits/dim", "Delta log p(t)", "perturbation")
    return Section(
        kind="robustness",
        title="Figure 4: robustness to flipped bits at noise level t",
        text=text,
        findings=[_finding(label, result) for label, result in results.items()],
        tables=[Table("robustness", "Figure 4 in numbers (noise and perturbation in grey levels)", header, rows)],
        figures=[Figure("figure4", caption, plot)],
        results=results,
        notes=inputs.notes,
    )


def _finding(label: str, result: Mapping[str, Any]) -> str:
    clean, *noisy = (bootstrap.format_json(delta) for delta in result["delta"])
    at_most = f", and by {noisy[-1]} at {result['grey_levels'][-1]:g} grey levels of noise" if noisy else ""
    return f"Flipping all lowest bits changes the bits/dim of the model {label} by {clean} without noise{at_most}."
