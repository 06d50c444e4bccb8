"""The batch of a training step: its images, their orientations and classes, and their noise.

A batch is a function of the data, the configuration and the step alone: its images follow from (seed, epoch), all else
from (seed, step). So a run that stops and resumes continues as if it had never stopped.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ncml.config import Config
from ncml.data.dataset import Dataset
from ncml.network import orientation
from ncml.network.mixture import from_uint8
from ncml.network.sde import broadcast_to, end_time, make_sde

LUMINANCE = torch.tensor([0.299, 0.587, 0.114])
"""Weights of red, green and blue in the brightness, as Pillow's conversion to grey has them."""


@dataclass(frozen=True)
class Batch:
    """The input of a training step."""

    x_BCHW: Tensor
    """Noised images, in their orientation."""
    t_B: Tensor
    class_B: Tensor
    orientation_B: Tensor
    index_B: Tensor
    """Position of each image in the dataset."""

    def __getitem__(self, items: slice) -> Batch:
        """Return these items of the batch."""
        return Batch(*(getattr(self, field.name)[items] for field in fields(self)))

    def to(self, device: str | torch.device) -> Batch:
        """Return the batch on another device."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


def draw_batch(data: Dataset, config: Config, step: int) -> Batch:
    """Return the batch of a step."""
    training, model = config.training, config.model
    B = training.batch_size
    index_B = torch.tensor([_image_at(step * B + i, len(data), training.seed) for i in range(B)])
    generator = torch.Generator().manual_seed(step_seed(training.seed, step))
    images = data.take(index_B)
    images_BHWC = images.images_NHWC
    if training.grey_share:
        is_grey_B = torch.rand(B, generator=generator) < training.grey_share
        images_BHWC = torch.where(is_grey_B[:, None, None, None], make_grey(images_BHWC), images_BHWC)
    x_BCHW = from_uint8(images_BHWC)
    if training.flip:
        flipped_B = torch.rand(B, generator=generator) < 0.5
        x_BCHW = torch.where(flipped_B[:, None, None, None], x_BCHW.flip(3), x_BCHW)
    probability = training.orientation_probability if model.orientations else 0.0
    orientation_B = orientation.draw_orientations(B, probability, model.height == model.width, generator)
    if model.height == model.width:
        x_BCHW = orientation.orient_each(x_BCHW, orientation_B)
    else:
        x_BCHW = orientation.orient(x_BCHW, int(orientation_B[0]))
    null_B = torch.rand(B, generator=generator) < training.class_dropout
    class_B = torch.where(null_B, len(model.classes), images.labels_N)
    return Batch(*_add_noise(x_BCHW, config, generator), class_B, orientation_B, index_B)


def make_grey(images_BHWC: Tensor) -> Tensor:
    """Return images of the same brightness without colour, uint8 [B, H, W, 3]."""
    brightness_BHW = (images_BHWC.float() @ LUMINANCE).round().to(torch.uint8)
    return brightness_BHW[..., None].expand_as(images_BHWC)


def step_seed(seed: int, step: int) -> int:
    """Return the seed of a step's generator. Seeds of two steps differ by 2 or more: `step_seed(...) ^ 1` is unused."""
    return (seed * 1_000_003 + step * 2) & (2**63 - 1)


def _add_noise(x_BCHW: Tensor, config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw t ~ mu and x ~ p_t; return x and t."""
    B = len(x_BCHW)
    t_B = (1 - torch.rand(B, generator=generator)) * end_time(config.sde)
    t_B[torch.rand(B, generator=generator) < config.training.clean_probability] = 0
    noise_BCHW = torch.randn(x_BCHW.shape, generator=generator)
    sde = make_sde(config.sde)
    alpha_B, sigma_B = sde.alpha(t_B), sde.sigma(t_B)
    return broadcast_to(alpha_B, x_BCHW) * x_BCHW + broadcast_to(sigma_B, x_BCHW) * noise_BCHW, t_B


def _image_at(position: int, count: int, seed: int) -> int:
    """Return the index of the image at a position of the endless stream of shuffled epochs."""
    epoch, offset = divmod(position, count)
    return int(_epoch_order(epoch, count, seed)[offset])


@functools.lru_cache(maxsize=2)  # a batch spans two epochs at most, unless the dataset is smaller than a batch
def _epoch_order(epoch: int, count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(step_seed(seed, -1 - epoch)))
