"""Zip files of images, unpacked in memory under limits. `read_archive` runs in a decoder process."""

import io
import lzma
import re
import sys
import zipfile
import zlib
from pathlib import PurePosixPath

from ncml.errors import InputError

SIGNATURE = b"PK\x03\x04"
_END, _END_BYTES, _MAX_COMMENT = b"PK\x05\x06", 22, 2**16
_ENTRY_BYTES = 512
"""Maximum size of a file's entry in the directory: more than any ordinary name needs."""
_OTHER_ENTRIES = 64
"""Folders and the like in a directory, besides a file and its hidden companion."""
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\]")
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, ValueError, NotImplementedError, RuntimeError,
)  # fmt: skip
"""What `zipfile` and its decompressors raise for damaged and encrypted zips."""


def is_archive(data: bytes) -> bool:
    """Return whether a file is a zip."""
    return data.startswith((SIGNATURE, _END))  # an empty zip begins with its end


def max_count(data: bytes) -> int:
    """Return at least the number of usable files in a zip, by its directory; 1 for a file that is not a zip.

    A zip without a readable directory may have any number: unpacking explains what is wrong with it.
    """
    if not is_archive(data):
        return 1
    directory = _directory(data)
    return directory[0] if directory else sys.maxsize


def read_archive(data: bytes, *, field: str, max_files: int, max_bytes: int) -> list[tuple[str, bytes]]:
    """Return name and content of each file of a zip, without folders and hidden files.

    The limits are what remains of those of the request. Raises `InputError` beyond them, for a damaged or encrypted
    zip, and for unsafe or repeated names.
    """
    _check_directory(data, field, max_files)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            _check_names([entry.filename for entry in entries], field)
            entries = [entry for entry in entries if not _is_hidden(entry.filename)]
            if len(entries) > max_files:
                raise _too_many(field, max_files)
            return _unpack(archive, entries, field, max_bytes)
    except InputError:
        raise
    except _DAMAGED as error:
        raise InputError(
            field, f"{field} is a zip that cannot be read ({error}); send an ordinary zip without a password."
        ) from error


def _check_directory(data: bytes, field: str, max_files: int) -> None:
    """Refuse a directory of too many files before it is parsed."""
    count, size = _directory(data) or (0, 0)
    max_entries = 2 * max_files + _OTHER_ENTRIES
    if count > max_entries or size > max_entries * _ENTRY_BYTES:
        raise _too_many(field, max_files)


def _directory(data: bytes) -> tuple[int, int] | None:
    """Return how many entries and bytes the directory of a zip has according to its end; None without an end."""
    end = data.rfind(_END, max(0, len(data) - _END_BYTES - _MAX_COMMENT))
    if end < 0:
        return None
    return int.from_bytes(data[end + 10 : end + 12], "little"), int.from_bytes(data[end + 12 : end + 16], "little")


def _too_many(field: str, max_files: int) -> InputError:
    return InputError(
        field, f"{field} is a zip of more than {max_files} files, the rest of the request's limit; send fewer."
    )


def _check_names(names: list[str], field: str) -> None:
    earlier: set[str] = set()
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or _UNSAFE.search(name):
            detail = f"{field} is a zip with the unsafe name {name[:64]!r}; rename the file and pack the folder again."
            raise InputError(field, detail)
        if name in earlier:
            raise InputError(field, f"{field} is a zip with two files {name[:64]!r}; pack the folder again.")
        earlier.add(name)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _unpack(
    archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo], field: str, max_bytes: int
) -> list[tuple[str, bytes]]:
    files: list[tuple[str, bytes]] = []
    remaining = max_bytes
    for entry in entries:
        with archive.open(entry) as file:
            content = file.read(remaining + 1)  # the size in the directory may be wrong
        remaining -= len(content)
        if remaining < 0:
            raise InputError(
                field,
                f"{field} is a zip of more than {max_bytes} bytes when unpacked, the rest of the request's limit; send "
                "fewer images.",
            )
        files.append((entry.filename, content))
    return files
