"""How work reports its progress."""

from typing import Protocol


class Bar(Protocol):
    """What draws progress."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Stage `stage` is `done` of `total`."""
        ...
