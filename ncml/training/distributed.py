"""The process group of a run: the processes that `torchrun` started, or this one alone.

Each process draws the whole batch of a step, which is a function of the step, and computes its share. So a run of many
processes computes what a run of one does, up to rounding and the draws of dropout.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Generator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = timedelta(hours=6)
"""How long a process waits for the others: rank 0 may be decoding images."""


@dataclass(frozen=True)
class ProcessGroup:
    """This process and the others that share a run."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    data_parallel_networks: list[DistributedDataParallel] = field(default_factory=list, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the process that writes files and logs."""
        return self.rank == 0

    def shard(self, count: int) -> slice:
        """Return which of `count` items this process computes."""
        return slice(self.rank, count, self.world_size)

    def all_reduce(self, value: float | Tensor) -> float:
        """Return the sum of a number over the processes, in fp64."""
        if self.world_size == 1:
            return float(value)
        total = torch.as_tensor(value, dtype=torch.float64, device=self.device).detach().clone()
        distributed.all_reduce(total)
        return float(total)

    def any(self, value: bool) -> bool:
        """Return whether it is true in any process."""
        return self.all_reduce(float(value)) > 0

    def barrier(self) -> None:
        """Wait until all processes have reached this call."""
        self.all_reduce(0.0)

    @contextlib.contextmanager
    def main_first(self) -> Generator[None]:
        """Run the block in rank 0, then in the other processes."""
        if not self.is_main:
            self.barrier()
        try:
            yield
        finally:
            if self.is_main:
                self.barrier()

    def data_parallel(self, network: nn.Module) -> nn.Module:
        """Return the network with gradients that are averaged over the processes."""
        if self.world_size == 1:
            return network
        self.data_parallel_networks.append(DistributedDataParallel(network))
        return self.data_parallel_networks[-1]


SINGLE_PROCESS = ProcessGroup()


def local_device(device: str) -> str:
    """Return the device of this process: under `torchrun`, each process that is to use CUDA has its own GPU."""
    if distributed.is_torchelastic_launched() and torch.device(device).type == "cuda":
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


@contextlib.contextmanager
def process_group(device: str) -> Generator[ProcessGroup]:
    """Join the processes that `torchrun` started, by NCCL on GPUs and gloo on CPUs; else yield this process alone.

    device: cpu, cuda or cuda:N; each process uses `local_device(device)`.
    """
    device = local_device(device)
    if not distributed.is_torchelastic_launched():
        yield ProcessGroup(device=device)
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    # A gloo thread that frees a tensor while the interpreter exits aborts the process. Those threads end with the last
    # reference to the group, so none may remain: neither in default arguments of torch.distributed.nn, which DDP would
    # import only after the group exists, nor in networks that the frames of an exception keep alive.
    importlib.import_module("torch.distributed.nn")
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
    group = ProcessGroup(distributed.get_rank(), distributed.get_world_size(), device)
    is_ended = False
    try:
        yield group
        is_ended = True
    finally:
        for network in group.data_parallel_networks:
            vars(network).clear()
        # After an error, NCCL would wait here for collectives that the other processes never finish, and torchrun would
        # never see this one end.
        if is_ended or distributed.get_backend() == "gloo":
            distributed.destroy_process_group()


@contextlib.contextmanager
def no_gradient_sync(network: nn.Module, enabled: bool) -> Generator[None]:
    """Do not average gradients over processes while `enabled`; those of the batch's last part include them."""
    parallel = isinstance(network, DistributedDataParallel) and enabled
    with cast(DistributedDataParallel, network).no_sync() if parallel else contextlib.nullcontext():
        yield
