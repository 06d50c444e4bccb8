"""Bits per dimension of test images whose lowest bits are flipped (Tables 1 and 3).

Eq. 5: every value of an image has its least significant bit flipped with probability pi, invisibly.

Shapes: N images, B of them at once, C = 3 channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncml.evaluation import bootstrap, published
from ncml.evaluation.image_sets import SEED, ImageSet
from ncml.evaluation.inputs import Inputs
from ncml.evaluation.report import OURS, PUBLISHED, Cell, Section, Table
from ncml.model import Model
from ncml.network.mixture import bits_per_dim, from_uint8, log_prob
from ncml.network.ncpn import NCPN

PIS = (0.0, 0.5, 1.0)


def flip(pixels_NHWC: NDArray[np.uint8], pi: float, first: int = 0) -> NDArray[np.uint8]:
    """Flip each value's lowest bit with probability pi; `first` is the position of the first image in its set."""
    flips = [
        np.random.default_rng((SEED, first + i)).random(image.shape, np.float32) < pi
        for i, image in enumerate(pixels_NHWC)
    ]
    return pixels_NHWC ^ np.array(flips, np.uint8)


@torch.inference_mode()
def bits(network: NCPN, x_BCHW: Tensor, t: float = 0.0) -> NDArray[np.float64]:
    """Compute bits per dimension of images x, already noised to time t, under no class. [B]."""
    x_BCHW = x_BCHW.to(network.head.weight)
    t_B = torch.full((len(x_BCHW),), t, device=x_BCHW.device)
    total_B = log_prob(x_BCHW, network(x_BCHW, t_B), t_B == 0).sum((1, 2), dtype=torch.float64)
    return bits_per_dim(total_B, x_BCHW[0, 0].numel()).cpu().numpy()


def flipped_bits(inputs: Inputs, model: Model, images: ImageSet, pi: float) -> NDArray[np.float64]:
    """Measure bits per dimension of every image with bits flipped with probability pi. [N]."""

    def measure(start: int, stop: int) -> dict[str, Any]:
        flipped = flip(images.pixels_NHWC[start:stop], pi, start)
        return {"bits": bits(model.network, from_uint8(torch.from_numpy(flipped)))}

    key = {"model": model.version, "data": images.digest, "pi": pi}
    return inputs.cache.rows("likelihood", key, len(images), measure)["bits"]


def likelihood(inputs: Inputs) -> Section:
    """Measure Table 1 or 3: bits per dimension at pi = 0, 0.5 and 1, with the paper's."""
    rows: list[tuple[Cell, ...]] = []
    results: dict[str, dict[str, Any]] = {}
    for label, model in inputs.models.items():
        images = inputs.test_images(model, "likelihood")
        estimates = {f"{pi:g}": bootstrap.mean(flipped_bits(inputs, model, images, pi)) for pi in PIS}
        rows.append((label, OURS, *estimates.values()))
        results[label] = {"bpd": {pi: estimate.to_json() for pi, estimate in estimates.items()}}
    size = next(iter(inputs.models.values())).height
    table, published_rows = published.bits(inputs.data_name, size)
    rows += [(name, PUBLISHED, *(f"{value:.2f}" for value in values)) for name, values in published_rows]
    header = ("model", "source", *(f"pi = {pi:g}" for pi in PIS))
    caption = f"Bits/dim of {inputs.data_name} with lowest bits flipped with probability pi (lower is better)"
    count = next(iter(results.values()))["bpd"]["0"]["n"]
    text = [
        f"Exact -log2 p(x) per dimension at t = 0 under no class, averaged over {count:,} test "
        "images. Each value's lowest bit is flipped with probability pi; the flips are the same for every model. "
        "Brackets are 95% bootstrap intervals over images."
    ]
    if published_rows:
        text.append("Published rows are the paper's; its NCPN has 73 million parameters.")
    return Section(
        kind="likelihood",
        title=f"{table}: likelihood" if table else "Likelihood",
        text=text,
        findings=_findings(results, published_rows),
        tables=[Table("likelihood", f"{table}. {caption}" if table else caption, header, rows)],
        results=results,
        notes=inputs.notes,
    )


def _findings(results: Mapping[str, dict[str, Any]], rows: Sequence[published.Row]) -> list[str]:
    """Compare each model with the paper's: its most robust one, and all of them on unchanged images."""
    if not rows:
        return []
    findings: list[str] = []
    name, (_, lowest, _) = min(rows, key=lambda row: row[1][1])
    unchanged = [values[0] for _, values in rows]
    for label, result in results.items():
        bpd = result["bpd"]
        if bpd["0.5"]["interval"][0] > lowest:
            findings.append(
                f"The robustness at pi = 0.5 that the paper reports for {name}, {lowest:.2f}, is not reproduced: "
                f"the model {label} needs {bpd['0.5']['value']:.3f}."
            )
        findings.append(
            f"The model {label} needs {bootstrap.format_json(bpd['0'])} bits/dim for unchanged images; the published "
            f"models need {min(unchanged):.2f} to {max(unchanged):.2f}."
        )
    return findings
