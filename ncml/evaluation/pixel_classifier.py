"""A second classifier of generated images: a small convolutional network, trained on the pixels of real images.

`ncml tune` chooses sampling options with the probe of `ncml.evaluation.probe`, so the images that these options
generate may suit that probe. This network is used for nothing but measuring: no option may ever be chosen with it. It
shares neither features nor training with the probe, and its accuracy on real images is reported beside every other
figure.

Training takes a fixed number of images, in an order that follows from a seed: on one machine, with one number of
threads, the same images give the same network.

Shapes: N images, B images of a batch, K classes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ncml.evaluation.probe import Labels
from ncml.progress import OnProgress, Progress

EPOCHS, MAX_IMAGES = 40, 200_000
"""Passes over the training images, and images of all passes together, whichever are fewer."""

BATCH = 128
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, LABEL_SMOOTHING = 0.1, 0.9, 5e-4, 0.1
WARMUP = 0.2
"""Share of the steps during which the learning rate rises; it then falls to 0."""

SIDE = 32
"""Larger images are reduced until their longer side has as many pixels."""

MAX_SHIFT = 2
"""Pixels by which a batch is shifted at most, in each direction."""

WIDTHS = (24, 48, 96, 192)
"""Channels at the full size, and after each halving."""

SEED = 2022

Weights = dict[str, NDArray[Any]]


def _block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def make_network(classes: int) -> nn.Sequential:
    """Return the network with random weights: seven convolutions, the largest value of each channel, a linear layer."""
    layers = _block(3, WIDTHS[0])
    for narrow, wide in itertools.pairwise(WIDTHS):
        layers += _block(narrow, wide, 2) + _block(wide, wide)
    network = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], classes))
    return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _prepare(pixels_BHWC: NDArray[np.uint8]) -> Tensor:
    x_BCHW = (torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).float() - 127.5) / 64
    longer = max(x_BCHW.shape[2:])
    if longer > SIDE:
        size = [max(1, round(side * SIDE / longer)) for side in x_BCHW.shape[2:]]
        x_BCHW = F.interpolate(x_BCHW, size, mode="bilinear", antialias=True, align_corners=False)
    return x_BCHW.contiguous(memory_format=torch.channels_last)


def _augment(x_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images, and shift all of them alike."""
    mirrored_B = torch.rand(len(x_BCHW), generator=generator) < 0.5
    x_BCHW = torch.where(mirrored_B[:, None, None, None], x_BCHW.flip(3), x_BCHW)
    shifts = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (2,), generator=generator).tolist()
    return x_BCHW.roll(shifts, (2, 3)).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class PixelClassifier:
    """A trained network."""

    network: nn.Sequential

    @classmethod
    def train(
        cls, pixels_NHWC: NDArray[np.uint8], labels_N: Labels, classes: int, on_progress: OnProgress
    ) -> PixelClassifier:
        """Train on images and their classes, which are smaller than `classes`."""
        generator = torch.Generator().manual_seed(SEED)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            network = make_network(classes)
        optimizer = torch.optim.SGD(
            network.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
        )
        N = len(pixels_NHWC)
        batch, seen = min(BATCH, N), min(EPOCHS * N, MAX_IMAGES)
        order = torch.cat([torch.randperm(N, generator=generator) for _ in range(-(-seen // N))]).numpy()
        steps = seen // batch
        for step in range(steps):
            rate = min((step + 1) / (WARMUP * steps), (steps - step) / ((1 - WARMUP) * steps))
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, rate)
            rows_B = order[step * batch : (step + 1) * batch]
            logits_BK = network(_augment(_prepare(pixels_NHWC[rows_B]), generator))
            target_B = torch.from_numpy(labels_N[rows_B])
            loss = F.cross_entropy(logits_BK, target_B, label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            on_progress(Progress("training the classifier of pixels", (step + 1) * batch, steps * batch))
        return cls(network.eval())

    @classmethod
    def from_weights(cls, weights: Weights, classes: int) -> PixelClassifier:
        """Return the network with weights that `weights` returned."""
        network = make_network(classes)
        network.load_state_dict({name: torch.as_tensor(value) for name, value in weights.items()})
        return cls(network.eval())

    @property
    def weights(self) -> Weights:
        """The weights and the statistics of the normalisations."""
        return {name: value.numpy() for name, value in self.network.state_dict().items()}

    @torch.inference_mode()
    def recognised(self, pixels_NHWC: NDArray[np.uint8], labels_N: Labels) -> NDArray[np.bool_]:
        """Return whether the class of each image is recognised. [N]."""
        batches = range(0, len(pixels_NHWC), BATCH)
        predictions = [self.network(_prepare(pixels_NHWC[i : i + BATCH])).argmax(1).numpy() for i in batches]
        return np.concatenate(predictions) == labels_N
