"""API keys: who a client is. Only digests are kept; a key itself is seen when it is made, and by whoever holds it.

The file that NCML_API_KEYS_FILE names has a line `name:digest` for each key, where the digest is SHA-256 in 64
hexadecimal digits; lines that begin with `#` say nothing. A name may have several keys, so that one can be replaced by
another without a gap. Keys are random and long, so that a plain digest of one cannot be turned back.
"""

import hashlib
import hmac
import logging
import re
import secrets
import sys
from pathlib import Path

from ncml.errors import NcmlError

log = logging.getLogger(__name__)

PREFIX = "ncml_"
"""What every key begins with, so that scanners for leaked secrets know one."""

_LINE = re.compile(r"([A-Za-z0-9._-]{1,64}):([0-9a-f]{64})")


class KeysError(NcmlError):
    """A file of keys cannot be used."""


def digest(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


class KeyRing:
    """The keys of a file, read again when it has changed. Raises `KeysError` for a file that cannot be used.

    Once it is in use, a file that is emptied or taken away means that no key is valid. One that cannot be read or is
    damaged leaves the keys as they were.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = self._look()
        self._digests = _read(path)
        if not self._digests:
            raise KeysError(f"{path} has no key; make one with: ncml key NAME >> {path}")

    def owner(self, key: str) -> str | None:
        """The name that a key belongs to; None for a key that is not known. Takes as long for any."""
        self._refresh()
        given, found = digest(key), None
        for known, name in self._digests.items():
            if hmac.compare_digest(given, known):
                found = name
        return found

    def _look(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return None
        except OSError:
            return 0, 0
        return status.st_mtime_ns, status.st_size

    def _refresh(self) -> None:
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._digests = _read(self._path) if stamp else {}
        except KeysError as error:
            log.error("the API keys stay as they were: %s", error)
            return
        if not self._digests:
            log.error("no API key is valid now: %s", f"{self._path} has none" if stamp else f"{self._path} is gone")


def _read(path: Path) -> dict[str, str]:
    """Names by digest."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KeysError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is not text'}") from error
    digests: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if not match:
            raise KeysError(f"line {number} of {path} is not name:digest; make one with: ncml key NAME")
        digests[match[2]] = match[1]
    return digests


def main(name: str, /) -> None:
    """Make an API key: its line for the file of NCML_API_KEYS_FILE on standard output, the key on standard error.

    Args:
        name: Whom the key is for: letters, digits, dot, dash and underscore.
    """
    key = PREFIX + secrets.token_urlsafe(32)
    line = f"{name}:{digest(key)}"
    if not _LINE.fullmatch(line):
        raise KeysError(f"the name {name!r} will not do: 1 to 64 letters, digits, dots, dashes and underscores")
    print(f"ncml: the key of {name}, shown this once: {key}", file=sys.stderr)
    print(line)
