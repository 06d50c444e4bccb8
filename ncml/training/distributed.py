"""The processes that share a run: those that `torchrun` started, or this one alone.

Each draws the whole batch of a step, which is a function of the step, and takes its share. So a run of many processes
computes what a run of one does, up to rounding and the draws of dropout.
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

PATIENCE = timedelta(hours=6)
"""How long a process waits for the others: the first may be decoding pictures."""


@dataclass(frozen=True)
class Team:
    """This process among those of a run."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    joined_networks: list[DistributedDataParallel] = field(default_factory=list, repr=False)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Which of so many items are this process's."""
        return slice(self.rank, count, self.size)

    def total(self, value: float | Tensor) -> float:
        """The sum of a number over the processes, in fp64."""
        if self.size == 1:
            return float(value)
        sum_ = torch.as_tensor(value, dtype=torch.float64, device=self.device).detach().clone()
        distributed.all_reduce(sum_)
        return float(sum_)

    def any(self, value: bool) -> bool:
        """Whether it is true of any process."""
        return self.total(float(value)) > 0

    def wait(self) -> None:
        """Until all processes have come so far."""
        self.total(0.0)

    def joined(self, network: nn.Module) -> nn.Module:
        """The network with gradients that are averaged over the processes."""
        if self.size == 1:
            return network
        self.joined_networks.append(DistributedDataParallel(network))
        return self.joined_networks[-1]


@contextlib.contextmanager
def team(device: str) -> Generator[Team]:
    """The processes that `torchrun` started, NCCL on GPUs and gloo on CPUs; without it, this process alone.

    device: cpu, cuda or cuda:N; under `torchrun` cuda is each process's own.
    """
    if not distributed.is_torchelastic_launched():
        yield Team(device=device)
        return
    if torch.device(device).type == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # A gloo thread that frees a tensor while the interpreter exits aborts the process. Those threads end with the last
    # reference to the group, so none may remain: neither in default arguments of torch.distributed.nn, which DDP would
    # import only after the group exists, nor in networks that the frames of an exception keep alive.
    importlib.import_module("torch.distributed.nn")
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
    members = Team(distributed.get_rank(), distributed.get_world_size(), device)
    try:
        yield members
    finally:
        for network in members.joined_networks:
            vars(network).clear()
        distributed.destroy_process_group()


@contextlib.contextmanager
def apart(network: nn.Module, when: bool) -> Generator[None]:
    """Gradients of this process alone while `when`: they are averaged with the last piece of a batch."""
    parallel = isinstance(network, DistributedDataParallel) and when
    with cast(DistributedDataParallel, network).no_sync() if parallel else contextlib.nullcontext():
        yield
