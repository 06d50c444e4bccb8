"""The weights of a model folder: write those of a network, and read them into one after checking each tensor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ncml.config import Config
from ncml.errors import ModelError, NcmlError
from ncml.limits import MAX_HEADER_BYTES
from ncml.network.ncpn import NCPN

MAX_PARAMETERS = 2**31
"""Maximum parameters of a network: 8 GiB in fp32."""


def write(path: Path, network: NCPN, dtype: torch.dtype | None) -> None:
    """Write the weights of a network; raise OSError where that fails.

    dtype: the type in which parameters are stored; None: their own.
    """
    parameters = {name: parameter.detach().to(dtype) for name, parameter in network.named_parameters()}
    state = {name: tensor.contiguous() for name, tensor in (network.state_dict() | parameters).items()}
    try:
        save_file(state, path)
    except SafetensorError as error:
        raise OSError(f"{path.parent}: the weights cannot be written: {error}") from error


def read(path: Path, config: Config) -> NCPN:
    """Read weights into a network of this configuration, on the CPU; raise ModelError if they do not match it."""
    try:
        with torch.device("meta"), _SkipRandomWeights():
            network = NCPN(config)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, NcmlError) as error:
        reason = str(error).rstrip(".")
        raise ModelError(f"{path.parent} does not describe a model: {reason}.") from error
    state = _read_file(path, network.state_dict())
    _check(path, network.state_dict(), state)
    # Copied, because the file is mapped into memory: overwriting it in place would crash a process that reads it.
    network.load_state_dict({name: _upcast(tensor).clone() for name, tensor in state.items()}, assign=True)
    return network


class _SkipRandomWeights(TorchFunctionMode):
    """Skip random initialisation: on the meta device, PyTorch would import its compiler for it, which takes seconds."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_random = getattr(func, "__module__", None) == nn.init.__name__
        return kwargs["tensor"] if is_random else func(*args, **kwargs)


def _upcast(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _read_file(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read the weights if the file is not larger than the network that the configuration describes."""
    folder = path.parent
    count = sum(tensor.numel() for tensor in expected.values())
    if count > MAX_PARAMETERS:
        raise ModelError(f"{folder} describes a network of {count} weights; at most {MAX_PARAMETERS} are read.")
    if not path.is_file():
        pickled = [other.name for other in folder.glob("*") if other.suffix in {".pt", ".pth", ".bin", ".ckpt", ".pkl"}]
        hint = f": {pickled[0]} may be a pickle, which is never opened" if pickled else ""
        raise ModelError(f"{folder} has no {path.name}{hint}.")
    try:
        with path.open("rb") as file:
            size, header = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        # At most eight bytes per weight, whatever its type; a wrong type is reported later.
        if MAX_HEADER_BYTES < header < size or size > MAX_HEADER_BYTES + 8 * count:
            raise ModelError(f"{path} has {size} bytes, more than the {count} weights of its configuration need.")
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is not a complete safetensors file: {error}.") from error


def _check(path: Path, expected: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    for name in expected.keys() - state.keys():
        raise ModelError(f"{path} lacks the weight {name}.")
    for name in state.keys() - expected.keys():
        raise ModelError(f"{path} has a weight {name} that is not part of its configuration.")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
            raise ModelError(f"{path}: the weight {name} has shape {shapes}.")
        if _upcast(tensor).dtype != expected[name].dtype:
            raise ModelError(f"{path}: the weight {name} is {tensor.dtype} instead of {expected[name].dtype}.")
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{path}: the weight {name} has values that are not finite.")
