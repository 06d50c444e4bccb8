"""The sanity test of Section 3.1: the cost of flipped lowest bits (Figure 2), and compressed size.

At pi = 0.5 the lowest bits are uniform for every image, so the flipped data's entropy is that of its upper seven bits
plus one bit, and a model's seven-bit marginal (Eq. 6) plus one is a lower bound of its bits/dim, with equality for a
model whose lowest bits are uniform.

Shapes: N images, B of them at once, C = 3 channels, H rows, W columns, P parameters of a pixel's mixture.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ncml import codec
from ncml.evaluation import bootstrap
from ncml.evaluation.flipped_bits import PIS, flip, flipped_bits
from ncml.evaluation.image_sets import ImageSet
from ncml.evaluation.inputs import Inputs
from ncml.evaluation.report import Cell, Figure, Section, Table, draw_sheet
from ncml.model import Model
from ncml.network.mixture import bits_per_dim, from_uint8, log_prob
from ncml.network.ncpn import NCPN

COMPRESSED_COUNT = 64
"""Number of images that are compressed: one group of the coder."""
SHOWN_COUNT = 8
AMPLIFICATION = 100
"""Grey levels by which a flipped bit is shown."""


@torch.inference_mode()
def seven_bit_bits(network: NCPN, pixels_BHWC: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Compute -log2 of the mass of each pixel's upper seven bits given the pixels before it, per dimension. [B].

    The mass is summed over the eight settings of a pixel's lowest bits; contexts keep the image's own.
    """
    x_BCHW = from_uint8(torch.from_numpy(pixels_BHWC)).to(network.head.weight)
    clean_B = torch.ones(len(x_BCHW), dtype=torch.bool, device=x_BCHW.device)
    parameters_BPHW = network(x_BCHW, torch.zeros(len(x_BCHW), device=x_BCHW.device))
    upper = pixels_BHWC & np.uint8(254)
    log_probs = [
        log_prob(from_uint8(torch.from_numpy(upper | np.array(low, np.uint8))).to(x_BCHW), parameters_BPHW, clean_B)
        for low in itertools.product((0, 1), repeat=3)
    ]
    total_B = torch.logsumexp(torch.stack(log_probs), 0).sum((1, 2), dtype=torch.float64)
    return bits_per_dim(total_B, x_BCHW[0, 0].numel()).cpu().numpy()


def seven_bit_marginal(inputs: Inputs, model: Model, images: ImageSet) -> NDArray[np.float64]:
    """Measure bits per dimension of the seven-bit marginal of images with bits flipped at pi = 0.5. [N]."""

    def measure(start: int, stop: int) -> dict[str, Any]:
        return {"bits": seven_bit_bits(model.network, flip(images.pixels_NHWC[start:stop], 0.5, start))}

    key = {"model": model.version, "data": images.digest}
    return inputs.cache.rows("seven bits", key, len(images), measure)["bits"]


def compress(inputs: Inputs, model: Model, images: ImageSet) -> tuple[float, bool]:
    """Return bits per dimension of an archive of the images, and whether it decodes to exactly them."""

    def measure(start: int, stop: int) -> dict[str, Any]:
        pixels, on_progress = images.pixels_NHWC, inputs.cache.on_progress
        names = [f"{i}" for i in range(len(pixels))]
        archive = codec.compress(model, pixels, names, on_progress)
        _, decoded = codec.decompress(model, archive, on_progress)
        return {"bytes": np.array([len(archive)]), "exact": np.array([np.array_equal(pixels, decoded)])}

    key = {"model": model.version, "data": images.digest, "n": len(images)}
    row = inputs.cache.rows("compression", key, 1, measure)
    return 8 * float(row["bytes"][0]) / images.pixels_NHWC.size, bool(row["exact"][0])


def sanity(inputs: Inputs) -> Section:
    """Measure Figure 2, the seven-bit marginal against pi = 0.5, and compressed size against bits per dimension."""
    checks: list[tuple[Cell, ...]] = []
    sizes: list[tuple[Cell, ...]] = []
    figures: list[Figure] = []
    results: dict[str, dict[str, Any]] = {}
    for label, model in inputs.models.items():
        images = inputs.test_images(model, "sanity")
        half = flipped_bits(inputs, model, images, 0.5)
        marginal = seven_bit_marginal(inputs, model, images)
        gap = bootstrap.mean(half - marginal - 1)
        checks.append((label, bootstrap.mean(marginal), bootstrap.mean(marginal + 1), bootstrap.mean(half), gap))
        sample = images.first(COMPRESSED_COUNT)
        size, exact = compress(inputs, model, sample)
        expected = float(flipped_bits(inputs, model, sample, 0.0).mean())
        ratio = size / expected
        sizes.append((label, str(len(sample)), expected, size, f"{100 * (ratio - 1):+.2f}%", "yes" if exact else "NO"))
        figures.append(_figure_2(inputs, model, label, images.first(SHOWN_COUNT)))
        results[label] = {
            "bpd_half": bootstrap.mean(half).to_json(),
            "seven_bit_marginal": bootstrap.mean(marginal).to_json(),
            "gap": gap.to_json(),
            "compression": {
                "n": len(sample), "bpd": expected, "bits_per_dim": size, "ratio": ratio, "decodes_exactly": exact
            },
        }  # fmt: skip
    count = next(iter(results.values()))["gap"]["n"]
    text = [
        "At pi = 0.5 the lowest bits carry one bit per dimension, whatever the model. So bits/dim there cannot be less "
        "than the model's own seven-bit marginal (Eq. 6: the sum over the eight settings of a pixel's lowest bits, the "
        "context unchanged) plus 1. The excess is what the model wrongly predicts about the lowest bits.",
        "An arithmetic coder driven by the model's own distributions (`ncml compress`) must produce an archive of "
        "about as many bits/dim as the likelihood has, header included, that decodes to the same bytes. Likelihoods "
        "that do not form a distribution, or that depend on later pixels, would fail one of these two tests.",
        f"The check is measured on {count:,} test images, compression on the first {COMPRESSED_COUNT}. Brackets are "
        "95% bootstrap intervals over images.",
    ]
    return Section(
        kind="sanity",
        title="Figure 2 and Eq. 6: the sanity test, and compressed size",
        text=text,
        findings=[sentence for label, result in results.items() for sentence in _findings(label, result)],
        tables=[
            Table(
                "seven_bit", "Check of pi = 0.5 by the seven-bit marginal (bits/dim)",
                ("model", "7-bit marginal", "7-bit marginal + 1", "pi = 0.5", "difference"), checks, digits=4,
            ),
            Table(
                "compression", "Compressed size against bits/dim",
                ("model", "images", "bits/dim", "archive, bits/dim", "difference", "decodes exactly"), sizes, digits=4,
            ),
        ],
        figures=figures,
        results=results,
        notes=inputs.notes,
    )  # fmt: skip


def _findings(label: str, result: Mapping[str, Any]) -> list[str]:
    gap, compression = bootstrap.format_json(result["gap"], 4), result["compression"]
    difference = f"{100 * (compression['ratio'] - 1):+.2f}%"
    decodes = "decodes to the same bytes" if compression["decodes_exactly"] else "does NOT decode to the same bytes"
    return [
        f"On random lowest bits, the model {label} spends {gap} bits/dim more than necessary.",
        f"Its archive of {compression['n']} images differs from their bits/dim by {difference}, and {decodes}.",
    ]


def _figure_2(inputs: Inputs, model: Model, label: str, images: ImageSet) -> Figure:
    original = images.pixels_NHWC
    rows = [(f"pi = {pi:g}", flip(original, pi)) for pi in PIS]
    values = [[f"{value:.2f}" for value in flipped_bits(inputs, model, images, pi)] for pi in PIS]
    change = np.abs(rows[1][1].astype(int) - original) * AMPLIFICATION
    rows.append((f"change at 0.5, x{AMPLIFICATION}", change.astype(np.uint8)))
    caption = (
        f"Figure 2, {label}: images with lowest bits flipped with probability pi, bits/dim below each. The changes, "
        "shown amplified in the last row, are invisible, but raise the bits/dim."
    )
    return Figure(f"figure2_{label}", caption, draw_sheet(rows, below=[*values, []]))
