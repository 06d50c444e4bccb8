"""Devices, memory and numerical switches of a process. Entry points call these functions; importing has no effect."""

import ctypes
import os
import platform
import re
from pathlib import Path

from ncml.errors import InputError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`: the sizes from which freed memory is returned to the system."""

KEPT_BYTES = 2**30
"""Freed memory up to this size is kept."""

OUT_OF_MEMORY = re.compile(
    "out of memory|not enough memory|cannot allocate memory|can't allocate memory|failed to map segment|bad_alloc"
    "|can't start new thread|alloc_failed|allocation_failed",
    re.IGNORECASE,
)
"""Messages of PyTorch, CUDA's libraries and the system; their other errors have the same types."""

DEVICE = re.compile(r"(cpu|cuda)(:\d{1,3})?")
"""The names of devices."""

CPU_INFO = Path("/proc/cpuinfo")
"""Where Linux names the processor and its instruction sets."""


def check_device_name(device: str) -> None:
    """Raise `InputError` unless this is the name of a device; does not import torch."""
    if not isinstance(device, str) or not DEVICE.fullmatch(device):
        raise InputError("device", f"there is no device {device!r}: name cpu, cuda or cuda:N.")


def device_error(device: str) -> Exception | None:
    """Return the error that a device raises when it is used, or None. Raises `InputError` for an invalid name."""
    check_device_name(device)
    import torch

    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # each kind of device raises its own errors, missing modules among them
        return error
    return None


def first_line(error: Exception) -> str:
    """Return the first line of an error's text: those of PyTorch have many."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def reuse_freed_memory() -> None:
    """Let glibc keep the memory of freed activations for this process; do nothing without glibc.

    By default it returns large blocks to the system at once, and a pass then spends a sixth of its time on clearing
    the same pages again. The process stays at its peak size instead.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def wait_without_spinning() -> None:
    """Let OpenMP's threads sleep while they wait, unless OMP_WAIT_POLICY is set; no effect once torch is imported.

    By default they spin, which takes more processor time than scoring one image.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def use_full_precision() -> None:
    """Turn TF32 off for convolutions and matrix products on a GPU.

    TF32 keeps ten bits of each number. Scores must depend on the device by rounding only, and the sampler's products
    must not differ from the network's convolutions. PyTorch uses it for convolutions by default, and for products in
    images whose environment asks for it (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE).
    """
    import torch

    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the host or the device has no memory left."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, OSError | RuntimeError | ImportError) and bool(OUT_OF_MEMORY.search(str(error)))
