"""Locks of files between processes."""

import errno
import fcntl
from pathlib import Path

import pytest

from ncml import locks
from ncml.errors import InputError

REFUSAL = InputError("output", "another process writes the file: wait for it.")


def test_a_lock_is_held_until_its_file_is_closed(tmp_path: Path) -> None:
    file, is_held = locks.acquire(tmp_path / "lock", REFUSAL)
    assert is_held
    with pytest.raises(InputError, match="wait for it"):
        locks.acquire(tmp_path / "lock", REFUSAL)
    file.close()
    locks.acquire(tmp_path / "lock", REFUSAL)[0].close()


def test_a_file_that_another_process_removes_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: (tmp_path / "lock").unlink())
    with pytest.raises(InputError, match="wait for it"):
        locks.acquire(tmp_path / "lock", REFUSAL)


def test_a_file_system_without_locks_refuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    file, is_held = locks.acquire(tmp_path / "lock", REFUSAL)
    assert not is_held
    file.close()


def test_a_file_that_cannot_be_opened_is_reported(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        locks.acquire(tmp_path / "missing" / "lock", REFUSAL)
