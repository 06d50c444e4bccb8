"""The precision of training: bf16 on hardware that computes in it, fp32 elsewhere."""

from __future__ import annotations

from dataclasses import replace

import torch

from ncml import runtime
from ncml.config import Config
from ncml.training.distributed import ProcessGroup

CPU_FEATURES = {"avx512_bf16", "amx_bf16"}
"""Instruction sets with which a CPU trains faster in bf16 than in fp32, as Linux names them."""


def is_faster_in_bf16(device: torch.device | str) -> bool:
    """Return whether training in bf16 is faster than in fp32 on a device; where bf16 is emulated, it is slower."""
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        features = runtime.CPU_INFO.read_text().split()
    except OSError:
        return False
    return not CPU_FEATURES.isdisjoint(features)


def without_emulation(config: Config, group: ProcessGroup) -> Config:
    """Return the configuration, with fp32 instead of bf16 if a process of the group would emulate bf16."""
    if not group.any(not is_faster_in_bf16(group.device)):
        return config
    return replace(config, training=replace(config.training, precision="fp32"))
