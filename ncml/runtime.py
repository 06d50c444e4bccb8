"""What a process computes with: whether a device can be used, and the memory that it keeps."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LIMIT = 2**30


def problem(device: str) -> str | None:
    """Why nothing can be computed on a device, in a line; None where something can."""
    import torch

    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # every kind of device has errors of its own, down to modules that are not there
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def reuse_freed_memory() -> None:
    """Have glibc keep the memory of freed activations, once for this process; elsewhere do nothing.

    By default it gives large blocks back to the system at once, and a pass then spends a sixth of its time having the
    same pages cleared anew. The process stays at its peak size instead.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LIMIT)
        libc.mallopt(M_TRIM_THRESHOLD, LIMIT)
