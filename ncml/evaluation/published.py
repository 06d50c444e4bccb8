"""Numbers reported by the paper (Li and Kluger, 2022), printed next to ours. None of them was measured here."""

import re
from pathlib import Path

Row = tuple[str, tuple[float, float, float]]
"""A model and its bits/dim at pi = 0, 0.5 and 1."""

CIFAR10: tuple[Row, ...] = (
    ("PixelCNN++", (2.92, 3.85, 4.02)),
    ("PixelSNAIL", (2.85, 3.83, 3.99)),
    ("Sparse Transformer", (2.80, 3.82, 3.97)),
    ("VDM", (2.49, 3.76, 3.96)),
    ("ScoreFlow", (2.90, 3.83, 3.98)),
    ("VDVAE", (2.84, 3.89, 4.10)),
    ("Flow++", (3.09, 3.84, 4.09)),
    ("DenseFlow", (2.98, 3.79, 4.02)),
    ("NCPN (ML)", (2.91, 3.82, 3.99)),
    ("NCPN (NCML-VE)", (2.87, 3.73, 3.94)),
    ("NCPN (NCML-subVP)", (2.95, 3.68, 3.93)),
    ("NCPN (NCML-VP)", (3.20, 3.61, 3.89)),
)
IMAGENET64: tuple[Row, ...] = (
    ("NCPN (ML)", (3.49, 3.68, 3.90)),
    ("NCPN (NCML-VE)", (3.32, 3.67, 3.85)),
    ("NCPN (NCML-subVP)", (3.36, 3.66, 3.80)),
    ("NCPN (NCML-VP)", (3.43, 3.62, 3.76)),
)
CELEBA64: tuple[Row, ...] = (
    ("NCPN (ML)", (2.25, 3.72, 4.35)),
    ("NCPN (NCML-VE)", (2.22, 3.63, 4.21)),
    ("NCPN (NCML-subVP)", (2.31, 3.44, 3.98)),
    ("NCPN (NCML-VP)", (2.48, 3.14, 3.67)),
)

FID: dict[str, float] = {
    "PixelCNN++": 55.72,
    "PixelSNAIL": 36.62,
    "Sparse Transformer": 37.50,
    "VDM": 7.41,
    "ScoreFlow": 5.40,
    "DenseFlow": 48.15,
    "NCPN (ML)": 46.72,
    "NCPN (NCML-VE)": 32.71,
    "NCPN (NCML-subVP)": 23.42,
    "NCPN (NCML-VP)": 12.09,
}
"""CIFAR-10."""

AUROC: dict[str, dict[str, float]] = {
    "PixelCNN++": {"svhn": 0.32, "constant": 0.00, "uniform": 1.00, "average": 0.44},
    "Glow": {"svhn": 0.24, "constant": 0.00, "uniform": 1.00, "average": 0.41},
    "EBM": {"svhn": 0.63, "constant": 0.30, "uniform": 1.00, "average": 0.64},
    "AR-CSM": {"svhn": 0.68, "constant": 0.57, "uniform": 0.95, "average": 0.73},
    "NCPN (MLE)": {"svhn": 0.35, "constant": 0.10, "uniform": 1.00, "average": 0.48},
    "NCPN (NCML-VE)": {"svhn": 0.43, "constant": 0.56, "uniform": 1.00, "average": 0.66},
    "NCPN (NCML-subVP)": {"svhn": 0.65, "constant": 0.59, "uniform": 1.00, "average": 0.73},
    "NCPN (NCML-VP)": {"svhn": 0.74, "constant": 0.68, "uniform": 1.00, "average": 0.80},
}
"""Models of CIFAR-10, by out-of-distribution set."""


def is_cifar10(data: str) -> bool:
    """Return whether a data set's name is a spelling of CIFAR-10."""
    parts = Path(data.partition(":")[0].lower()).parts
    return any(re.fullmatch(r"cifar10(batchespy|png)?", re.sub(r"[-_]", "", part)) for part in parts)


def bits(data: str, size: int) -> tuple[str, tuple[Row, ...]]:
    """Return the paper's table for a data set at a size, and its rows; neither for a set that the paper does not have.

    size: of the side of the images in pixels, which distinguishes versions of one data set.
    """
    if is_cifar10(data):
        return "Table 1", CIFAR10
    if size == 64 and "imagenet" in data.lower():
        return "Table 3", IMAGENET64
    return ("Table 3", CELEBA64) if size == 64 and "celeb" in data.lower() else ("", ())
