"""API keys. Only digests are stored; a key itself appears once, when `ncml key` creates it.

The file named by NCML_API_KEYS_FILE has one line `name:digest` per key, where the digest is SHA-256 in 64 hexadecimal
digits; lines that begin with `#` are comments. A name may have several keys, so that a key can be replaced without an
interruption. Keys are long and random, so a plain digest cannot be reversed.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from ncml.errors import NcmlError

log = logging.getLogger(__name__)

PREFIX = "ncml_"
"""The prefix of every key, by which scanners for leaked secrets recognise one."""

_LINE = re.compile(r"([A-Za-z0-9._-]{1,64}):([0-9a-f]{64})")


class KeyFileError(NcmlError):
    """A file of API keys is invalid."""


def digest(key: str) -> str:
    """Return the digest that is stored for a key."""
    return hashlib.sha256(key.encode()).hexdigest()


class KeyFile:
    """The keys of a file, reloaded when it changes. Raises `KeyFileError` for a file that is invalid at the start.

    If the file is later emptied or deleted, no key is valid. If it becomes unreadable or invalid, the keys stay as they
    were until it can be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, ...] | None = self._current_stamp()
        self._names = _read_names(path)
        self._fault = ""
        if not self._names:
            raise KeyFileError(f"{path} contains no key; create one with: ncml key NAME >> {path}")

    def owner(self, key: str) -> str | None:
        """Return the owner of a key, None for an unknown key, in constant time."""
        self._reload_if_changed()
        key_digest, owner = digest(key), None
        for stored_digest, name in self._names.items():
            if hmac.compare_digest(key_digest, stored_digest):
                owner = name
        return owner

    def _current_stamp(self) -> tuple[int, ...] | None:
        """Return the times of modification and change and the size of the file; None if it does not exist."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return None
        except OSError:
            return ()
        return status.st_mtime_ns, status.st_ctime_ns, status.st_size

    def _reload_if_changed(self) -> None:
        stamp = self._current_stamp()
        if stamp == self._stamp:
            return
        try:
            self._names = {} if stamp is None else _read_names(self._path)
        except KeyFileError as error:  # it may pass without a change of the file, so the next request tries again
            if self._fault != str(error):
                log.error("the former API keys stay valid, removed ones too: %s", error)
            self._fault = str(error)
            return
        self._stamp, self._fault = stamp, ""
        if not self._names:
            fault = "does not exist" if stamp is None else "contains none"
            log.error("no API key is valid: %s %s", self._path, fault)


def _read_names(path: Path) -> dict[str, str]:
    """Return the names by digest."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        user = f" for user {os.geteuid()}" if isinstance(error, PermissionError) else ""
        raise KeyFileError(f"{path} cannot be read: {reason}{user}") from error
    names: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if not match:
            raise KeyFileError(f"line {number} of {path} is not name:digest; create one with: ncml key NAME")
        names[match[2]] = match[1]
    return names


def main(name: Annotated[str, arg(metavar="OWNER")], /) -> None:
    """Create an API key. Prints its line for NCML_API_KEYS_FILE to stdout and the key itself to stderr.

    Args:
        name: Owner of the key: letters, digits, dots, hyphens and underscores.
    """
    key = PREFIX + secrets.token_urlsafe(32)
    line = f"{name}:{digest(key)}"
    if not _LINE.fullmatch(line):
        raise KeyFileError(f"the name {name!r} is invalid: use 1 to 64 letters, digits, dots, hyphens and underscores")
    print(f"ncml: the key of {name}, which cannot be shown again: {key}", file=sys.stderr)
    print(line)
