"""Paths in object storage, with the part of `pathlib.Path` that commands use on files of this machine."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from ncml.errors import AccessDenied, InputError, StorageError
from ncml.object_storage import filesystems
from ncml.object_storage.filesystems import PACKAGES, WRITABLE, Status

AHEAD = 8
"""Files that are read at the same time, and in memory before they are decoded."""


def is_address(text: str) -> bool:
    """Return whether a text names something by a URL, of whatever scheme."""
    return re.match(r"[A-Za-z][\w+.-]*://", text) is not None


class StoragePath:
    """A file or a folder in object storage.

    What a listing reports about it is kept, and not requested again. Methods that need a request raise `InputError` if
    this path is missing or refused, and `StorageError` if the storage cannot be used.
    """

    __slots__ = ("_contents", "_status", "url")

    def __init__(self, url: str, status: Status | None = None, contents: Future[bytes] | None = None) -> None:
        """contents: the contents up to a limit, if they are requested already."""
        self.url, self._status, self._contents = url, status, contents

    @classmethod
    def parse(cls, text: str) -> StoragePath:
        """Return the path of a URL, which is not checked."""
        scheme, _, location = text.partition("://")
        return cls(f"{scheme.lower()}://{location.rstrip('/')}")

    def check(self, field: str) -> None:
        """Raise `InputError` for a URL with another scheme, without a bucket, or that may contain a secret."""
        scheme, _, location = self.url.partition("://")
        host = location.partition("/")[0]
        if scheme not in PACKAGES:
            raise InputError(field, f"{scheme}:// is not supported: use s3://, gs://, hf:// or https://.")
        if "@" in host:
            remedy = "pass credentials in environment variables."
            raise InputError(field, f"an address must not contain a user name or a password: {remedy}")
        if scheme.startswith("http") and re.search("[?#]", location):
            remedy = "omit what follows it, which may be secret and would be written to tables."
            raise InputError(field, f"an address must not contain ? or #: {remedy}")
        if not host:
            raise InputError(field, f"{scheme}:// names no bucket or host: add it, as in s3://bucket/folder.")

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"StoragePath({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoragePath) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __lt__(self, other: object) -> bool:
        """Sort by the parts, as `pathlib.Path` does, so that a copy of a folder has the same order."""
        return self.url.split("/") < other.url.split("/") if isinstance(other, StoragePath) else NotImplemented

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The end of the name from the last dot, as of `pathlib.Path`."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> StoragePath:
        """The folder of the path."""
        return StoragePath(self.url.rpartition("/")[0])

    @property
    def is_writable(self) -> bool:
        """Whether a table can be written there."""
        return self.url.partition(":")[0] in WRITABLE

    def with_name(self, name: str) -> StoragePath:
        """Return the path of another file in the same folder."""
        return StoragePath(f"{self.parent}/{name}")

    def relative_to(self, folder: StoragePath) -> PurePosixPath:
        """Return the part of the path below a folder that contains it."""
        if not self.url.startswith(f"{folder}/"):
            raise ValueError(f"{self} is not in {folder}")
        # Keys may have two slashes in a row; joined to a folder of this machine, an absolute path would replace it.
        return PurePosixPath(self.url[len(folder.url) + 1 :].lstrip("/"))

    def is_dir(self) -> bool:
        """Return whether this is a folder; raise `InputError` if there is nothing of this name."""
        return self._known_status().is_folder

    def is_file(self) -> bool:
        """Return whether this is a file; raise `InputError` if there is nothing of this name."""
        return not self.is_dir()

    def state(self) -> tuple[str, str]:
        """Return the size in bytes and the time of the last change, or a digest; "" where it is not reported."""
        status = self._known_status(with_size=True)
        return "" if status.size is None else str(status.size), status.modified

    def has_changed(self) -> bool:
        """Return whether the file is gone, or has another state than the one that is kept, times compared in seconds.

        MinIO, Ceph and R2 list times with milliseconds, but report those of a single file in seconds. Raises
        `StorageError` also if its state is refused.
        """
        try:
            current = StoragePath(self.url).state()
        except AccessDenied as error:
            raise StorageError(error.detail, url=self.url) from error
        except InputError:
            return True
        return [_without_fraction(cell) for cell in current] != [_without_fraction(cell) for cell in self.state()]

    def list_files(self) -> Iterator[StoragePath]:
        """Yield the files below this folder in the order of their keys, without hidden ones, as they are listed."""
        for url, status in filesystems.list_folder(self.url):
            yield StoragePath(url, status)

    def read(self, limit: int) -> tuple[int, bytes]:
        """Return the size of the file and its contents, or only the size of one that has more than `limit` bytes."""
        size = self._known_status().size
        if size is not None and (size > limit or not size):
            return size, b""
        contents = filesystems.read(self.url, limit + 1) if self._contents is None else self._contents.result()
        return max(len(contents), size or 0), contents

    def download(self, target: Path) -> None:
        """Copy the file to this machine; raise `InputError` if there is none."""
        if not filesystems.download(self.url, target):
            raise InputError(self.url, f"{self} cannot be read: there is no such file.")

    def requested(self, pool: ThreadPoolExecutor, limit: int) -> StoragePath:
        """Return this path with its contents, which another thread reads."""
        fetched = StoragePath(self.url, self._status)
        return StoragePath(self.url, self._status, pool.submit(lambda: fetched.read(limit)[1]))

    def _known_status(self, *, with_size: bool = False) -> Status:
        status = self._status
        if status is None or (with_size and status.size is None and not status.modified):  # a list of links has neither
            status = self._status = filesystems.read_status(self.url)
        return status


def _without_fraction(time: str) -> str:
    return re.sub(r"(?<=T\d\d:\d\d:\d\d)\.\d+Z$", "Z", time)


def read_ahead(paths: Iterable[Path | StoragePath], limit: int) -> Iterator[Path | StoragePath]:
    """Yield the paths in their order; those in object storage with their contents, several of which are read at once.

    limit: bytes of a file; a larger one is not read.
    """
    pool: ThreadPoolExecutor | None = None
    window: deque[Path | StoragePath] = deque()
    try:
        for path in paths:
            if isinstance(path, StoragePath):
                pool = pool or ThreadPoolExecutor(AHEAD)
                path = path.requested(pool, limit)
            window.append(path)
            if len(window) == AHEAD:
                yield window.popleft()
        while window:
            yield window.popleft()
    finally:
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
