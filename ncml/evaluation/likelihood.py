"""Bits per dimension of test images, and the sanity test of Section 3.1: what flipped lowest bits cost.

Eq. 5: every value of an image has its least significant bit flipped with probability pi, invisibly. At pi = 0.5 the
lowest bits are uniform whatever the image, so the flipped data's entropy is that of its upper seven bits plus one bit,
and a model's seven-bit marginal (Eq. 6) plus one bound its bits/dim there from below, with equality for a model whose
lowest bits are uniform.

Shapes: N images, B of them at once, H rows, W columns, P parameters of a pixel's mixture.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncml import codec
from ncml.evaluation import numbers, published
from ncml.evaluation.pictures import SEED, Pictures
from ncml.evaluation.report import OURS, PUBLISHED, Cell, Figure, Section, Table, sheet
from ncml.network.likelihood import bits_per_dim, from_uint8, log_prob
from ncml.network.ncpn import NCPN

if TYPE_CHECKING:
    from ncml.evaluation.context import Context
    from ncml.model import Model

PIS = (0.0, 0.5, 1.0)
CODED = 64
"""Images that are really compressed: one group of the coder."""
SHOWN = 8
AMPLIFIED = 100
"""Grey levels that a flipped bit is shown as."""


def flip(pixels_NHWC: NDArray[np.uint8], pi: float, first: int = 0) -> NDArray[np.uint8]:
    """Flip each value's lowest bit with probability pi; `first` is the position of the first image in its set."""
    flips = [
        np.random.default_rng((SEED, first + i)).random(image.shape, np.float32) < pi
        for i, image in enumerate(pixels_NHWC)
    ]
    return pixels_NHWC ^ np.array(flips, np.uint8)


@torch.inference_mode()
def bits(network: NCPN, x_BCHW: Tensor, t: float = 0.0) -> NDArray[np.float64]:
    """Bits per dimension of images at time t under no class, of which x is already noised. [B]."""
    x_BCHW = x_BCHW.to(network.head.weight)
    t_B = torch.full((len(x_BCHW),), t, device=x_BCHW.device)
    total_B = log_prob(x_BCHW, network(x_BCHW, t_B), t_B == 0).sum((1, 2), dtype=torch.float64)
    return bits_per_dim(total_B, x_BCHW[0, 0].numel()).cpu().numpy()


@torch.inference_mode()
def seven_bit_bits(network: NCPN, pixels_BHWC: NDArray[np.uint8]) -> NDArray[np.float64]:
    """-log2 of the mass of each pixel's upper seven bits given the pixels before it, per dimension. [B].

    The sum of the masses of all eight ways to set a pixel's lowest bits; contexts keep the image's own.
    """
    x_BCHW = from_uint8(torch.from_numpy(pixels_BHWC)).to(network.head.weight)
    clean_B = torch.ones(len(x_BCHW), dtype=torch.bool, device=x_BCHW.device)
    parameters_BPHW = network(x_BCHW, torch.zeros(len(x_BCHW), device=x_BCHW.device))
    upper = pixels_BHWC & np.uint8(254)
    each = [
        log_prob(from_uint8(torch.from_numpy(upper | np.array(low, np.uint8))).to(x_BCHW), parameters_BPHW, clean_B)
        for low in itertools.product((0, 1), repeat=3)
    ]
    total_B = torch.logsumexp(torch.stack(each), 0).sum((1, 2), dtype=torch.float64)
    return bits_per_dim(total_B, x_BCHW[0, 0].numel()).cpu().numpy()


def flipped_bits(context: Context, model: Model, pictures: Pictures, pi: float) -> NDArray[np.float64]:
    """Bits per dimension of every image with bits flipped with probability pi. [N]."""

    def measure(start: int, stop: int) -> dict[str, Any]:
        some = flip(pictures.pixels_NHWC[start:stop], pi, start)
        return {"bits": bits(model.network, from_uint8(torch.from_numpy(some)))}

    what = {"model": model.version, "data": pictures.digest, "pi": pi}
    return context.store.rows("likelihood", what, len(pictures), measure)["bits"]


def likelihood(context: Context) -> Section:
    """Table 1 or 3: bits per dimension at pi = 0, 0.5 and 1, beside the paper's."""
    rows: list[tuple[Cell, ...]] = []
    results: dict[str, dict[str, Any]] = {}
    for label, model in context.models.items():
        pictures = context.test(model, "likelihood")
        measured = {f"{pi:g}": numbers.mean(flipped_bits(context, model, pictures, pi)) for pi in PIS}
        rows.append((label, OURS, *measured.values()))
        results[label] = {"bpd": {pi: value.to_json() for pi, value in measured.items()}}
    table, known = published.bits(context.data_name)
    rows += [(name, PUBLISHED, *(f"{value:.2f}" for value in values)) for name, values in known]
    caption = f"{table}. Bits/dim of {context.data_name} with lowest bits flipped with probability pi (lower is better)"
    text = [
        "Exact -log2 p(x) per dimension at t = 0 under no class, averaged over images. Each value's lowest bit is "
        "flipped with probability pi, the flips being the same for every model. Brackets are 95 % bootstrap intervals "
        "over images. Published rows are the paper's: models of 50 million parameters and more, trained for days."
    ]
    return Section(
        kind="likelihood",
        title=f"{table}: likelihood",
        text=text,
        tables=[Table("likelihood", caption, ("model", "source", *(f"pi = {pi:g}" for pi in PIS)), rows)],
        results=results,
        notes=context.notes,
    )


def sanity(context: Context) -> Section:
    """Figure 2; the seven-bit marginal against pi = 0.5; and real compressed size against bits per dimension."""
    checks: list[tuple[Cell, ...]] = []
    sizes: list[tuple[Cell, ...]] = []
    figures: list[Figure] = []
    results: dict[str, dict[str, Any]] = {}
    for label, model in context.models.items():
        pictures = context.test(model, "sanity")
        half = flipped_bits(context, model, pictures, 0.5)
        marginal = seven_bit_marginal(context, model, pictures)
        gap = numbers.mean(half - marginal - 1)
        checks.append((label, numbers.mean(marginal), numbers.mean(marginal + 1), numbers.mean(half), gap))
        coded = pictures.first(CODED)
        size, exact = compressed(context, model, coded)
        expected = float(flipped_bits(context, model, coded, 0).mean())
        ratio = size / expected
        sizes.append((label, str(len(coded)), expected, size, f"{100 * (ratio - 1):+.2f} %", "yes" if exact else "NO"))
        figures.append(_figure_2(context, model, label, pictures.first(SHOWN)))
        results[label] = {
            "bpd_half": numbers.mean(half).to_json(),
            "seven_bit_marginal": numbers.mean(marginal).to_json(),
            "gap": gap.to_json(),
            "compression": {
                "n": len(coded), "bpd": expected, "bits_per_dim": size, "ratio": ratio, "decodes_exactly": exact
            },
        }  # fmt: skip
    text = [
        "At pi = 0.5 the lowest bits carry one bit per dimension, whatever the model. So bits/dim there cannot be less "
        "than the model's own seven-bit marginal (Eq. 6: the eight settings of a pixel's lowest bits summed out, the "
        "context as it is) plus 1. What is more is what the model wrongly believes to know of the lowest bits.",
        "An arithmetic coder driven by the model's own distributions (`ncml compress`) must come out as long as "
        "bits/dim say, and its archive, header included, must decode to the same bytes: likelihoods that were no "
        "distribution, or looked ahead, could do neither.",
    ]
    return Section(
        kind="sanity",
        title="Figure 2 and Eq. 6: the sanity test, and compressed size",
        text=text,
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
        notes=context.notes,
    )  # fmt: skip


def seven_bit_marginal(context: Context, model: Model, pictures: Pictures) -> NDArray[np.float64]:
    """Bits per dimension of the seven-bit marginal of images whose lowest bits were flipped at pi = 0.5. [N]."""

    def measure(start: int, stop: int) -> dict[str, Any]:
        return {"bits": seven_bit_bits(model.network, flip(pictures.pixels_NHWC[start:stop], 0.5, start))}

    what = {"model": model.version, "data": pictures.digest}
    return context.store.rows("seven bits", what, len(pictures), measure)["bits"]


def compressed(context: Context, model: Model, pictures: Pictures) -> tuple[float, bool]:
    """Bits per dimension of an archive of the images, and whether it decodes to exactly them."""

    def measure(start: int, stop: int) -> dict[str, Any]:
        pixels = pictures.pixels_NHWC
        names = [f"{i}" for i in range(len(pixels))]
        archive = codec.compress(model, pixels, names, context.store.on_progress)
        _, decoded = codec.decompress(model, archive, context.store.on_progress)
        return {"bytes": np.array([len(archive)]), "exact": np.array([np.array_equal(pixels, decoded)])}

    what = {"model": model.version, "data": pictures.digest, "n": len(pictures)}
    found = context.store.rows("compression", what, 1, measure)
    return 8 * float(found["bytes"][0]) / pictures.pixels_NHWC.size, bool(found["exact"][0])


def _figure_2(context: Context, model: Model, label: str, pictures: Pictures) -> Figure:
    original = pictures.pixels_NHWC
    rows = [(f"pi = {pi:g}", flip(original, pi)) for pi in PIS]
    values = [[f"{value:.2f}" for value in flipped_bits(context, model, pictures, pi)] for pi in PIS]
    change = np.abs(rows[1][1].astype(int) - original) * AMPLIFIED
    rows.append((f"change at 0.5, x{AMPLIFIED}", change.astype(np.uint8)))
    caption = (
        f"Figure 2, {label}: images with lowest bits flipped with probability pi, bits/dim below each. The changes, "
        "shown amplified in the last row, cannot be seen, and cost the model up to a bit per dimension."
    )
    return Figure(f"figure2_{label}", caption, sheet(rows, below=[*values, []]))
