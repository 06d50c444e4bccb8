"""Tiny networks, built in milliseconds, with weights large enough that every path matters; and small images."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ncml.config import Config, LevelConfig, ModelConfig, SDEConfig, TrainingConfig
from ncml.network.ncpn import NCPN
from ncml.sampling.conditions import Conditions

Levels = tuple[tuple[int, int], ...]


def config(
    levels: Levels = ((4, 1), (6, 1)),
    *,
    height: int = 8,
    width: int = 8,
    attention: bool = True,
    classes: tuple[str, ...] = ("a", "b"),
    orientations: bool = True,
    mixtures: int = 2,
    sde: Literal["ve", "vp", "sub-vp"] = "vp",
    training: TrainingConfig | None = None,
) -> Config:
    """Return a configuration; levels: (width, blocks) of each."""
    return Config(
        recipe="test",
        model=ModelConfig(
            height=height,
            width=width,
            levels=tuple(LevelConfig(width=w, blocks=b, attention=attention) for w, b in levels),
            mixtures=mixtures,
            heads=2,
            classes=classes,
            orientations=orientations,
            embedding=8,
        ),
        sde=SDEConfig(kind=sde),
        training=training or TrainingConfig(),
    )


def network(config: Config, *, dtype: torch.dtype = torch.float64, seed: int = 0, spread: float = 0.15) -> NCPN:
    """Return a network of random weights: the initial ones are near zero by design and would hide a wrong path."""
    torch.manual_seed(seed)
    net = NCPN(config).to(dtype=dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.add_(spread * torch.randn_like(parameter))
    return net


def conditions(count: int, t: float, config: Config, *, orientation: int = 0) -> Conditions:
    """Return conditions that cycle through every class and the null class."""
    class_B = torch.arange(count) % (len(config.model.classes) + 1)
    return Conditions(t, class_B, torch.full((count,), orientation))


def images(count: int, height: int = 8, width: int = 8, *, seed: int = 0) -> Tensor:
    """Return uint8 [N, H, W, 3], smooth enough to learn from."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 1, 1, 3, generator=generator)
    slope = torch.rand(count, 1, 1, 3, generator=generator) - 0.5
    ramp = torch.linspace(-1, 1, height)[:, None, None] + torch.linspace(-1, 1, width)[:, None]
    noise = 0.05 * torch.randn(count, height, width, 3, generator=generator)
    return ((corner + 0.4 * slope * ramp + noise) * 255).clamp(0, 255).to(torch.uint8)


def save_images(folder: Path, pixels_NHWC: np.ndarray) -> Path:
    """Write images into a folder as 000.png, 001.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(pixels_NHWC):
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return folder


FIT, RANK, NEW = (images(n, seed=seed).numpy() for n, seed in ((30, 1), (60, 2), (6, 3)))
"""Images for estimating statistics, for ranking, and new ones; uint8 [N, 8, 8, 3]."""
