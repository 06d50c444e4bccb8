"""The objective: noise conditional maximum likelihood (Li and Kluger, 2022, Eq. 7-8).

    maximise  E_{t ~ mu} E_{x ~ p_t} log p_{theta, t}(x),

with mu uniform on (0, T] with a point mass at t = 0. With all of the mass at 0 this is plain maximum likelihood.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ncml.data.dataset import Dataset
from ncml.network.mixture import bits_per_dim, from_uint8, log_mixture, log_prob
from ncml.network.ncpn import NCPN
from ncml.progress import OnProgress, Progress, ignore_progress
from ncml.training.batches import Batch
from ncml.training.distributed import SINGLE_PROCESS, ProcessGroup


def loss_bits(network: torch.nn.Module, batch: Batch, *, bf16: bool) -> Tensor:
    """Return -log2 p_{theta, t}(x) of each item in bits per dimension, [B]."""
    with torch.autocast(batch.x_BCHW.device.type, torch.bfloat16, enabled=bf16):
        parameters_BPHW = network(batch.x_BCHW, batch.t_B, batch.class_B, batch.orientation_B)
    log_prob_B = log_mixture(batch.x_BCHW, parameters_BPHW, batch.t_B == 0).sum((1, 2))
    return bits_per_dim(log_prob_B, batch.x_BCHW[0, 0].numel())


def held_out_bits(network: NCPN, data: Dataset, *, batch_size: int = 64, group: ProcessGroup = SINGLE_PROCESS) -> float:
    """Return the bits per dimension of clean images (`measure_held_out`)."""
    return measure_held_out(network, data, batch_size=batch_size, group=group)[0]


@torch.inference_mode()
def measure_held_out(
    network: NCPN,
    data: Dataset,
    *,
    batch_size: int = 64,
    group: ProcessGroup = SINGLE_PROCESS,
    on_progress: OnProgress = ignore_progress,
) -> tuple[float, float]:
    """Return the mean bits per dimension of clean images under the null class, and its standard error over the images.

    The standard error of a single image is NaN. The processes of a group share the images, and all get the result.

    on_progress: counts images, in the stage "measure".
    """
    device = next(network.parameters()).device
    total, total_squares, done = 0.0, 0.0, 0
    count, pixels = len(data), math.prod(data.store_NHWC.shape[1:3])
    index_N = torch.arange(len(data))[group.shard(len(data))]
    for index_B in index_N.split(batch_size) if len(index_N) else ():  # a small part may not have one for each process
        x_BCHW = from_uint8(data.take(index_B).images_NHWC).to(device)
        t_B = torch.zeros(len(x_BCHW), device=device)
        log_prob_B = log_prob(x_BCHW, network(x_BCHW, t_B), t_B == 0).sum((1, 2), dtype=torch.float64)
        bits_B = bits_per_dim(log_prob_B, pixels)
        total, total_squares = total + float(bits_B.sum()), total_squares + float(bits_B.square().sum())
        done += len(x_BCHW)
        on_progress(Progress("measure", min(done * group.world_size, len(data)), len(data)))
    mean, mean_square = group.all_reduce(total) / count, group.all_reduce(total_squares) / count
    variance = max(0.0, mean_square - mean * mean)
    return mean, math.sqrt(variance / (count - 1)) if count > 1 else math.nan
