"""The address of the queue, with a password read from a file: secrets in environment variables leak easily."""

from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from ncml.errors import NcmlError

MAX_PASSWORD_BYTES = 4096


class AddressError(NcmlError):
    """The password of the queue cannot be read."""


def with_password(url: str, password_file: str | Path | None) -> str:
    """Return an address of the queue with the password from a file, unless it already has one.

    A Unix socket needs none. Raises `AddressError` if the file cannot be read or has no password.
    """
    try:
        parts = urlsplit(url)
    except ValueError:  # its message quotes the address; the queue refuses it without doing so
        return url
    credentials, _, host = parts.netloc.rpartition("@")
    user, _, own_password = credentials.partition(":")
    if not password_file or own_password or parts.scheme not in ("redis", "rediss"):
        return url
    try:
        with Path(password_file).open("rb") as file:
            password = file.read(MAX_PASSWORD_BYTES + 1).decode().strip()
    except OSError as error:
        raise AddressError(f"{password_file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise AddressError(f"{password_file} is not UTF-8 text") from None
    if not password or len(password) > MAX_PASSWORD_BYTES:
        raise AddressError(f"{password_file} must contain the password, at most {MAX_PASSWORD_BYTES} bytes")
    return urlunsplit(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}"))
