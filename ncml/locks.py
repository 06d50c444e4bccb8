"""Locks of files, by which one process refuses another. The kernel releases a lock however its process ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO


def acquire(path: Path, refusal: Exception) -> tuple[IO[str], bool]:
    """Open a file, which is made if there is none, and lock it until it is closed.

    Returns the file, and whether the lock is held: a file system without locks refuses nothing. Raises `refusal` if
    another process holds the lock, or has just removed the file; `OSError` if the file cannot be opened.
    """
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_held, is_refused = True, not os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (BlockingIOError, FileNotFoundError):
        is_held, is_refused = False, True
    except OSError:
        is_held, is_refused = False, False
    if is_refused:
        file.close()
        raise refusal
    return file, is_held
