"""Processes that share a run."""

import contextlib

import pytest
from torch import distributed

from ncml.training.distributed import local_device, process_group


def test_each_process_of_torchrun_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert local_device("cuda") == "cuda"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    assert [local_device(name) for name in ("cuda", "cpu")] == ["cuda:1", "cpu"]


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
@pytest.mark.parametrize("error", [None, RuntimeError("out of memory")], ids=["ended", "failed"])
def test_a_failed_process_does_not_wait_for_the_others(
    monkeypatch: pytest.MonkeyPatch, backend: str, error: Exception | None
) -> None:
    """The shutdown of NCCL would, and torchrun ends the others once this process has ended."""
    destroyed: list[str] = []
    for name, value in {
        "is_torchelastic_launched": True, "init_process_group": None, "get_rank": 0, "get_world_size": 2,
        "get_backend": backend,
    }.items():  # fmt: skip
        monkeypatch.setattr(distributed, name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: destroyed.append(backend))
    with contextlib.suppress(RuntimeError), process_group("cpu"):
        if error:
            raise error
    assert bool(destroyed) == (error is None or backend == "gloo")
