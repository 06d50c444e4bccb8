"""NCPN: PixelCNN++ with axial attention, conditioned on the noise level, the class and the orientation.

Salimans et al., "PixelCNN++" (2017); Li and Kluger, "Autoregressive Generative Modeling with Noise Conditional Maximum
Likelihood Estimation" (2022), Appendix A.2.

Shapes: B batch, C = 3 channels, H rows, W columns, F filters, E embedding, P parameters of a pixel's mixture.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ncml.config import Config
from ncml.network.layers import (
    Activations,
    AxialAttention,
    CausalConv,
    FourierFeatures,
    GatedBlock,
    Grow,
    Pointwise,
    Stream,
)
from ncml.network.mixture import PARAMETERS, initial_bias, promote_to_fp32
from ncml.network.sde import GREY_LEVEL, broadcast_to, make_sde

CHANNELS = 3
ORIENTATIONS = 4

REACH = 1.0
"""Standard deviations of the noise that pixels may lie outside [-1, 1].

Clean values lie inside, so values further out add nothing about them: clamping leaves the bits/dim of noised test
images as they are (they fall by 0.0001).
"""


def shift_down(x_BFHW: Tensor) -> Tensor:
    """Row i becomes row i + 1; the first row is 0."""
    return F.pad(x_BFHW, (0, 0, 1, 0))[:, :, :-1]


def shift_right(x_BFHW: Tensor) -> Tensor:
    """Column j becomes column j + 1; the first column is 0."""
    return F.pad(x_BFHW, (1, 0, 0, 0))[:, :, :, :-1]


@dataclass(frozen=True)
class Streams:
    """The vertical and the horizontal stream at one depth."""

    u: Activations
    ul: Activations


class Stem(nn.Module):
    """From pixels to the two streams; the shift of its outputs keeps a pixel from seeing itself.

    It computes in fp32 under autocast as well. In bf16, it would round pixels by up to a quarter of a grey level, and
    would cause more than half of the loss in bits/dim that bf16 brings.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.u = CausalConv("u", CHANNELS + 1, width)
        self.ul_above = CausalConv("u", CHANNELS + 1, width, kernel=(1, 3))
        self.ul_left = CausalConv("ul", CHANNELS + 1, width, kernel=(2, 1))

    def forward(self, x_BCHW: Tensor) -> Streams:
        """[B, 3, H, W] -> [B, F, H, W] each. A channel of ones distinguishes the border from a grey of 0."""
        x_BCHW = F.pad(x_BCHW, (0, 0, 0, 0, 0, 1), value=1.0)
        with torch.autocast(x_BCHW.device.type, enabled=False):
            u_BFHW = shift_down(self.u(x_BCHW))
            ul_BFHW = shift_down(self.ul_above(x_BCHW)) + shift_right(self.ul_left(x_BCHW))
        return Streams(Activations.compute(u_BFHW), Activations.compute(ul_BFHW))


class Pair(nn.Module):
    """A gated block and attention on u, then on ul, which reads u (and, coming down, the skips of both streams)."""

    def __init__(self, config: Config, level: int, *, down: bool) -> None:
        super().__init__()
        model, width = config.model, config.model.levels[level].width

        def block(stream: Stream, extra: int) -> GatedBlock:
            return GatedBlock(stream, width, extra=extra, embedding=model.embedding, dropout=model.dropout)

        def attention(stream: Stream) -> nn.Module:
            return AxialAttention(stream, width, model.heads) if model.levels[level].attention else nn.Identity()

        self.u_block = block("u", width if down else 0)
        self.u_attention = attention("u")
        self.ul_block = block("ul", 2 * width if down else width)
        self.ul_attention = attention("ul")

    def forward(self, h: Streams, embedding_BE: Tensor, skip: Streams | None = None) -> Streams:
        """Both streams, [B, F, H, W] each -> the same; `skip`: coming down, the streams saved going up."""
        u = Activations.compute(self.u_attention(self.u_block(h.u, skip and skip.u.elu, embedding_BE)))
        extra = torch.cat([u.elu, skip.ul.elu], 1) if skip else u.elu
        ul = Activations.compute(self.ul_attention(self.ul_block(h.ul, extra, embedding_BE)))
        return Streams(u, ul)


class Resample(nn.Module):
    """Both streams to the next level: half the resolution going up the network, twice coming down."""

    def __init__(self, in_width: int, out_width: int, *, down: bool) -> None:
        super().__init__()
        if down:
            self.u, self.ul = Grow("u", in_width, out_width), Grow("ul", in_width, out_width)
        else:
            self.u = CausalConv("u", in_width, out_width, stride=2)
            self.ul = CausalConv("ul", in_width, out_width, stride=2)

    def forward(self, h: Streams) -> Streams:
        """[B, F, H, W] each -> [B, G, H/2, W/2] or [B, G, 2H, 2W]."""
        return Streams(Activations.compute(self.u(h.u.x)), Activations.compute(self.ul(h.ul.x)))


class Conditioning(nn.Module):
    """The conditioning vector: noise level, class and orientation."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.model.embedding
        self.sde = make_sde(config.sde)
        self.fourier = FourierFeatures(width)
        self.noise = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.null = len(config.model.classes)
        self.label = nn.Embedding(self.null + 1, width) if self.null else None
        self.orientation = nn.Embedding(ORIENTATIONS, width) if config.model.orientations else None
        for embedding in (self.label, self.orientation):
            if embedding is not None:  # 0 at first: training would have to unlearn a random vector
                nn.init.zeros_(embedding.weight)

    def forward(self, t_B: Tensor, class_B: Tensor | None, orientation_B: Tensor | None) -> Tensor:
        """[B] each -> [B, E]. No class means the null class; no orientation, the identity."""
        # log(1 + noise in grey levels) is finite at t = 0 and spreads small noise levels apart.
        level_B = torch.log1p(self.sde.sigma(t_B.double()) / GREY_LEVEL).to(self.fourier.frequencies.dtype)
        embedding_BE = self.noise(self.fourier(level_B))
        if self.label is not None:
            class_B = torch.full_like(t_B, self.null, dtype=torch.long) if class_B is None else class_B
            embedding_BE = embedding_BE + self.label(class_B)
        if self.orientation is not None:
            orientation_B = torch.zeros_like(t_B, dtype=torch.long) if orientation_B is None else orientation_B
            embedding_BE = embedding_BE + self.orientation(orientation_B)
        return F.silu(embedding_BE)


class NCPN(nn.Module):
    """The noise conditional pixel network."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        """Store only the activations between pairs for the backward pass, and recompute the others."""
        levels = config.model.levels
        widths = [level.width for level in levels]
        last = len(levels) - 1
        self.conditioning = Conditioning(config)
        self.stem = Stem(widths[0])
        self.up = nn.ModuleList(
            nn.ModuleList(Pair(config, index, down=False) for _ in range(level.blocks))
            for index, level in enumerate(levels)
        )
        self.shrink = nn.ModuleList(Resample(a, b, down=False) for a, b in pairwise(widths))
        self.down = nn.ModuleList(
            nn.ModuleList(Pair(config, index, down=True) for _ in range(level.blocks + (index < last)))
            for index, level in enumerate(levels)
        )
        self.grow = nn.ModuleList(Resample(b, a, down=True) for a, b in pairwise(widths))
        self.head = Pointwise(2 * widths[0], PARAMETERS * config.model.mixtures)
        with torch.no_grad(), torch.device("cpu"):  # linspace on the meta device imports PyTorch's compiler
            self.head.weight.mul_(0.1)
            self.head.bias.copy_(initial_bias(config.model.mixtures))

    def reach(self, t: Tensor) -> Tensor:
        """Return the largest magnitude of the pixels that the network reads at times t, of any shape, in fp64.

        Pixels are clamped to the range of data noised to t before the network reads them. The densities stay exact and
        unbounded, since only their context is clamped. Without this, one extreme draw at t > 0 leads the network
        outside the range of its training data, and the rest of the image becomes white noise.
        """
        return 1 + REACH * self.conditioning.sde.sigma(t.double())

    def channels_last(self) -> NCPN:
        """Lay the convolutions out for channels-last images, which is faster on every device; return the network."""
        return self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(
        self, x_BCHW: Tensor, t_B: Tensor, class_B: Tensor | None = None, orientation_B: Tensor | None = None
    ) -> Tensor:
        """Compute the parameters of every pixel's mixture given the pixels before it.

        x_BCHW: [B, 3, H, W] in [-1, 1] at t = 0, noised as in `ncml.network.sde` at t > 0.
        t_B: [B] times in [0, T]. class_B: [B] indices; the number of classes stands for the null class.
        orientation_B: [B] indices of `ncml.network.orientation`.
        Returns [B, P, H, W] in fp32 at least, read by `ncml.network.mixture`.
        """
        embedding_BE = self.conditioning(t_B, class_B, orientation_B)
        reach = broadcast_to(self.reach(t_B), x_BCHW)
        h = self.stem(x_BCHW.clamp(-reach, reach))
        skips = [h]
        for level, pairs in enumerate(self.up):
            if level:
                h = self.shrink[level - 1](h)
                skips.append(h)
            for pair in cast(nn.ModuleList, pairs):
                h = self._run_pair(pair, h, embedding_BE)
                skips.append(h)
        h = skips.pop()
        for level in reversed(range(len(self.down))):
            for pair in cast(nn.ModuleList, self.down[level]):
                h = self._run_pair(pair, h, embedding_BE, skips.pop())
            if level:
                h = self.grow[level - 1](h)
        with torch.autocast(x_BCHW.device.type, enabled=False):
            return promote_to_fp32(self.head(h.ul.elu.to(self.head.weight.dtype)))

    def _run_pair(self, pair: nn.Module, h: Streams, embedding_BE: Tensor, skip: Streams | None = None) -> Streams:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(pair, h, embedding_BE, skip, use_reentrant=False)
        return pair(h, embedding_BE, skip)
