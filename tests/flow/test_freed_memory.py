"""The process keeps freed memory."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from ncml.runtime import reuse_freed_memory
if sys.argv[1] == "keep":
    reuse_freed_memory()
def touch():
    torch.ones(2**24)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(variant: str) -> int:
    command = [sys.executable, "-c", FAULTS, variant]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a matter of glibc")
def test_pages_of_freed_tensors_are_reused() -> None:
    """Eight times 64 MiB in pages of 4 KiB, or of 2 MiB at the best."""
    assert faults("keep") * 8 < faults("lose")
