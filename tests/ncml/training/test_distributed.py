"""Processes that share a run."""

import pytest

from ncml.training.distributed import local_device


def test_each_process_of_torchrun_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert local_device("cuda") == "cuda"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    assert [local_device(name) for name in ("cuda", "cpu")] == ["cuda:1", "cpu"]
