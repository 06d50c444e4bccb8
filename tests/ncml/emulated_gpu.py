"""A device whose memory and operations are those of the CPU, but which refuses what a GPU refuses.

A tensor left on the CPU, which would fail on a GPU, fails here on a machine without one; and results have values, which
those of a CPU must equal. PyTorch's own fake tensors have shapes only, so nothing that reads a value runs with them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.grad_mode import inference_mode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy:0")
"""A device that PyTorch can name and has no code for."""

COPIES = {"copy_", "_to_copy"}
"""Operations whose tensors may lie on different devices."""

INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""Operations on a device that take their second argument, the indices, also from the CPU."""

READING = {"_local_scalar_dense", "equal", "masked_select", "nonzero"}
"""Operations whose values the CPU reads."""


class DeviceTensor(Tensor):
    """A tensor on the device."""

    inner: Tensor
    """The same on the CPU, with the memory."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> DeviceTensor:
        """Wrap a tensor on the CPU."""
        x = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        x.inner = inner
        return x

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation in which a tensor of the device takes part."""
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        """Return the values, which PyTorch does for its own tensors only."""
        return self.cpu().tolist()


class _Operations(TorchDispatchMode):
    """Runs every operation, also one in which no tensor of the device takes part: it may create one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class NoTransfers(TorchDispatchMode):
    """Raises `RuntimeError` where values move between CPU and device, in a context within `emulated_gpu`.

    A CUDA graph cannot record such an operation, and the CPU would wait for those that read. Of an operand on the CPU,
    a graph keeps the value that it had when it was recorded.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        is_mixed = len({isinstance(x, DeviceTensor) for x in tensors}) == 2
        on_device = bool(args) and isinstance(args[0], DeviceTensor)
        has_mask = name in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])
        if is_mixed or (on_device and (has_mask or name in READING)):
            raise RuntimeError(f"{name}: values move between CPU and device")
        return out


class _Functions(TorchFunctionMode):
    """Replaces what creates tensors on the device below the level of operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            return func(*args, **kwargs | {"device": "cpu"}).to(DEVICE)
        if func == Tensor.new_tensor and isinstance(args[0], DeviceTensor):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype} | kwargs).to(DEVICE)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            x, index, *values = args
            of_tensors = tuple(map(_index, index)) if isinstance(index, tuple) else _index(index)
            return func(x, of_tensors, *values)
        return func(*args, **kwargs)


@contextlib.contextmanager
def emulated_gpu() -> Iterator[torch.device]:
    """Make the device usable, in the context."""

    def enter(self: Any) -> None:
        self.before = torch.is_grad_enabled()
        torch.set_grad_enabled(self.before and not self.mode)

    def leave(self: Any, *_: object) -> None:
        torch.set_grad_enabled(self.before)

    with pytest.MonkeyPatch.context() as patch, _Operations(), _Functions():
        # A tensor that wraps another has no views in inference mode.
        patch.setattr(inference_mode, "__enter__", enter)
        patch.setattr(inference_mode, "__exit__", leave)
        patch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know the device
        yield DEVICE


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the memory of the CPU; its results lie where a GPU's would."""
    name = func.overloadpacket.__name__
    of_device = {id(x.inner): x for x in tree_leaves((args, kwargs)) if isinstance(x, DeviceTensor)}
    if name in INDEXING and isinstance(args[0], DeviceTensor):
        _check_devices(name, (args[0], args[2:]))
    elif name not in COPIES:
        _check_devices(name, (args, kwargs))
    out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if kwargs.get("device") is not None:
        is_on_device = kwargs["device"] == DEVICE
    elif name in COPIES:
        is_on_device = isinstance(args[0], DeviceTensor)
    else:
        is_on_device = bool(of_device)

    def place(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if not is_on_device:
            return x.clone() if id(x) in of_device else x
        return of_device[id(x)] if id(x) in of_device else DeviceTensor(x)

    return tree_map(place, out)


def _check_devices(name: str, arguments: Any) -> None:
    """Raise `RuntimeError` for tensors on both devices; those without dimensions may lie on the CPU."""
    tensors = [x for x in tree_leaves(arguments) if isinstance(x, Tensor) and x.dim()]
    if len({isinstance(x, DeviceTensor) for x in tensors}) == 2:
        raise RuntimeError(f"{name}: tensors on two devices, of the shapes {[tuple(x.shape) for x in tensors]}")


def _inner(x: Any) -> Any:
    """Return an argument as the CPU gets it."""
    if isinstance(x, DeviceTensor):
        return x.inner
    return torch.device("cpu") if isinstance(x, torch.device) else x


def _index(index: Any) -> Any:
    """Return an index as a tensor, if it is a list or an array: PyTorch would create one on the device."""
    return torch.as_tensor(index) if isinstance(index, list | np.ndarray) else index
