"""Requests to object storage: list files in the order of their keys, read them, write them; errors as sentences.

Credentials and endpoints come from the environment, as the package of each scheme reads them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import re
from collections.abc import Generator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ncml.errors import AccessDenied, InputError, NcmlError, StorageError

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "https": "aiohttp", "http": "aiohttp"}
"""The package that each scheme needs besides fsspec."""

WRITABLE = ("s3", "gs")

SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")
"""Environment variables whose values never appear in a message."""

DENIED = frozenset({"AccessDenied", "AllAccessDisabled", "InvalidObjectState", "403"})
"""Codes with which S3 refuses one object, such as an archived one; others refuse all, such as an expired token."""

MAX_REASON = 200
"""Characters of a server's message that are repeated."""


class Status(NamedTuple):
    """What storage reports about a path."""

    is_folder: bool
    size: int | None = None
    """In bytes; None if it is not reported."""
    modified: str = ""
    """Time of the last change, or else a digest of the contents; "" if neither is reported."""


@functools.cache
def open_filesystem(scheme: str) -> Any:
    """Return the filesystem of a scheme; raise ModuleNotFoundError if its package is not installed."""
    fsspec = importlib.import_module("fsspec")
    importlib.import_module(PACKAGES[scheme])
    for name in ("fsspec", PACKAGES[scheme]):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they log errors, with tracebacks, besides raising them
    filesystem = fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)
    if scheme == "s3":
        _read_keys_whole(filesystem)
    return filesystem


def _read_keys_whole(filesystem: Any) -> None:
    """Keep s3fs from taking `?versionId=` in a key, and what follows it, for a version: versions are not read."""
    split = filesystem.split_path

    def split_path(path: str) -> tuple[str, str, None]:
        path = path.removeprefix("s3://")
        bucket = split(path)[0]
        return bucket, path[len(bucket) + 1 :], None

    filesystem.split_path = split_path


@contextlib.contextmanager
def translated(url: str, action: Literal["read", "written"] = "read") -> Generator[None]:
    """Raise `InputError` if this path is missing or refused, and `StorageError` if storage cannot be used."""
    try:
        yield
    except (NcmlError, ImportError, MemoryError):
        raise
    except Exception as error:  # each package has its own errors, and those of its HTTP client
        raise _translate(error, url, action) from error


def read_status(url: str) -> Status:
    """Return what storage reports about a path."""
    filesystem, path = _locate(url)
    with translated(url):
        if _is_http(url):
            return _status(filesystem.info(path)) if Path(path).suffix else Status(is_folder=True)
        return _status(filesystem.info(path))


def list_folder(url: str) -> Iterator[tuple[str, Status]]:
    """Yield the files below a folder in the order of their keys, without hidden ones; raise as `read_status`.

    Of S3, a page of 1,000 keys is in memory at a time; of others, the names in one folder.
    """
    filesystem, path = _locate(url)
    start = len(path) + 1
    with translated(url):
        pages = _list_s3 if url.startswith("s3:") else _list_by_folder
        for entry in pages(filesystem, path):
            name = str(entry["name"])
            if not any(part.startswith(".") for part in name[start:].split("/")):
                yield url + name[len(path) :], _status(entry)


def read(url: str, limit: int) -> bytes:
    """Return the first `limit` bytes of a file, or all."""
    filesystem, path = _locate(url)
    with translated(url):
        if not _is_http(url):
            return bytes(filesystem.cat_file(path, start=0, end=limit))
        chunks, remaining = list[bytes](), limit
        with filesystem.open(path, block_size=0, size=1) as file:  # a stream, which needs no size: read to the limit
            while remaining and (chunk := file.read(remaining)):
                chunks.append(chunk)
                remaining -= len(chunk)
        return b"".join(chunks)


def download(url: str, path: Path) -> bool:
    """Copy a file to this machine; return False if there is none."""
    filesystem, source = _locate(url)
    with translated(url):
        try:
            filesystem.get_file(source, str(path))
        except FileNotFoundError:
            path.unlink(missing_ok=True)
            return False
    return True


def upload(path: Path, url: str) -> None:
    """Write a file of this machine as an object, whole or not at all."""
    filesystem, target = _locate(url)
    with translated(url, "written"):
        filesystem.put_file(str(path), target)


def remove(url: str) -> None:
    """Remove an object."""
    filesystem, path = _locate(url)
    with translated(url, "written"):
        filesystem.rm_file(path)


def _locate(url: str) -> tuple[Any, str]:
    """Return the filesystem of a URL, and the path by which it names it."""
    scheme, _, path = url.partition("://")
    return open_filesystem(scheme), url if _is_http(url) else path


def _is_http(url: str) -> bool:
    return url.startswith("http")


def _list_s3(filesystem: Any, path: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a bucket below a prefix, page by page; fsspec's own methods return all of them at once."""
    bucket, _, key = path.partition("/")
    position: dict[str, str] = {}
    while True:
        page = filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=key and f"{key}/", **position)
        for entry in page.get("Contents", ()):
            if not entry["Key"].endswith("/"):  # an empty object that marks a folder
                yield {"name": f"{bucket}/{entry['Key']}", "size": entry["Size"], **entry}
        if not page.get("IsTruncated"):
            return
        position = {"ContinuationToken": page["NextContinuationToken"]}


def _list_by_folder(filesystem: Any, path: str) -> Iterator[dict[str, Any]]:
    """Yield the files below a folder, as sorted as the keys of S3: a folder's name ends in a slash."""
    entries: dict[str, dict[str, Any]] = {}
    for entry in filesystem.ls(path, detail=True):
        name = entry["name"].rstrip("/")
        relative = name[len(path) :].strip("/")
        if relative and "/" not in relative and not (_is_http(path) and re.search("[?#]", relative)):
            entries[name + "/" * (entry["type"] == "directory")] = {**entry, "name": name}
    for key in sorted(entries):
        if not key.endswith("/"):
            yield entries[key]
        elif not key.rpartition("/")[0].rpartition("/")[2].startswith("."):
            yield from _list_by_folder(filesystem, key.rstrip("/"))


def _status(entry: dict[str, Any]) -> Status:
    modified = entry.get("LastModified") or entry.get("mtime")
    if isinstance(modified, datetime):
        modified = f"{modified.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%f}000Z"
    names = ("Last-Modified", "ETag", "blob_id", "oid")
    digest = next((str(entry[name]) for name in names if entry.get(name)), "")
    return Status(entry.get("type") == "directory", entry.get("size"), str(modified or digest))


def _translate(error: Exception, url: str, action: str) -> NcmlError:
    subject = f"{url} cannot be {action}"
    cause = error.__cause__
    if _is_http(url) and isinstance(cause, Exception) and getattr(cause, "status", None) not in (404, 410):
        error = cause  # of every error of its HTTP client, fsspec makes a missing file
    if isinstance(error, FileNotFoundError):
        kinds = "bucket, folder or file" if action == "read" else "bucket"
        return InputError(url, f"{subject}: there is no such {kinds}.")
    if isinstance(error, IsADirectoryError):
        return InputError(url, f"{subject}: it is a folder.")
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    code = response.get("Error", {}).get("Code", "") if isinstance(response, dict) else ""
    status = getattr(error, "status", None) or getattr(response, "status_code", None)
    is_denied = isinstance(error, PermissionError) or status in (401, 403) or str(error).startswith("Forbidden")
    if is_denied and (not code or code in DENIED):
        return AccessDenied(
            url, f"{subject}: access is denied ({_reason(error)}): check the credentials and their rights."
        )
    return StorageError(f"{subject}: {_reason(error)}: check the address, the credentials and the network.", url=url)


def _reason(error: Exception) -> str:
    """Return the first line of a message without secrets: of URLs in it, no password and no query."""
    text = (str(getattr(error, "strerror", None) or error).strip().splitlines() or [""])[0]
    text = re.sub(r"(?<=://)[^/\s@]*@", "", re.sub(r"\?[^\s\"']*", "", text))
    for name in SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    return text[:MAX_REASON].rstrip(" .:") or type(error).__name__
