"""Processes that share a run end cleanly."""

import os
import subprocess
import sys

from tests.conftest import free_port

RUN = """
import contextlib
import psutil, torch
from ncml.training.distributed import process_group

before = psutil.Process().num_threads()
with contextlib.suppress(ZeroDivisionError), process_group("cpu") as group:
    network = group.data_parallel(torch.nn.Linear(2, 2))
    network(torch.ones(1, 2)).sum().backward()
    group.barrier()
    during = psutil.Process().num_threads()
    1 / 0
print(during > before, psutil.Process().num_threads() - before)
"""


def test_no_thread_of_the_process_group_outlives_a_run() -> None:
    """A thread that frees a tensor at the interpreter's exit aborts the process; this run keeps its network alive."""
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RUN],
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for stdout, stderr in [process.communicate(timeout=500) for process in processes]:
        assert stdout == "True 0\n", stderr
    assert [process.returncode for process in processes] == [0, 0]
