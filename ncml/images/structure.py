"""Cheap checks of a file before a decoder opens it: limits on parts that cost far more than their size suggests.

Ordinary files have few such parts. A file that passes can still be expensive to decode; a service that decodes
untrusted files also limits CPU time and memory (`service.decoders`).
"""

import re
import struct

from ncml.errors import TooCostly

MAX_JPEG_SEGMENTS = 4096
"""Segments, and bytes between them before the first scan: Pillow reads each of the latter in Python."""
MAX_JPEG_SCANS = 128
"""Each scan may cost as much as decoding the whole image. Encoders write about ten."""
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
MAX_PNG_CHUNKS = 2**15
MAX_GIF_BLOCKS = 4096
"""Comment and extension blocks before the first frame: Pillow's memory grows with their number times their size."""
MAX_BMP_RLE_BYTES = 2**20
"""Pillow decodes a run-length encoded bitmap in Python."""


def check(raw: bytes, field: str) -> None:
    """Raise `TooCostly` for a file with more parts than a decoder should have to visit."""
    if raw.startswith(b"\xff\xd8"):
        _check_jpeg(raw, field)
    elif raw.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(raw, field)
    elif raw.startswith((b"GIF87a", b"GIF89a")):
        _check_gif(raw, field)
    elif raw.startswith(b"BM") and len(raw) > MAX_BMP_RLE_BYTES and raw[30:34] in (b"\1\0\0\0", b"\2\0\0\0"):
        raise _too_many(field, "BMP", "run-length encoded bytes", MAX_BMP_RLE_BYTES)


def _too_many(field: str, form: str, parts: str, limit: int) -> TooCostly:
    return TooCostly(
        field,
        f"{field} is a {form} file with more than {limit} {parts}, the most that are accepted; save it again as an "
        "ordinary PNG or JPEG.",
    )


def _check_jpeg(raw: bytes, field: str) -> None:
    position, scans = 2, 0
    for _ in range(MAX_JPEG_SEGMENTS):
        if scans:  # skip the data of a scan, where 0xFF is followed by 0 or by a restart marker
            next_marker = _JPEG_MARKER.search(raw, position)
            position = next_marker.start() if next_marker else len(raw)
        marker = raw[position : position + 2]
        if len(marker) < 2 or (scans and marker == b"\xff\xd9"):
            return  # what follows the image, such as the video of a motion photo, is not decoded
        scans += marker == b"\xff\xda"
        if scans > MAX_JPEG_SCANS:
            raise _too_many(field, "JPEG", "scans", MAX_JPEG_SCANS)
        # As Pillow does, skip bytes one at a time until a segment begins.
        is_segment = marker[0] == 0xFF and 0xC0 <= marker[1] <= 0xFE and not 0xD0 <= marker[1] <= 0xD9
        position += 2 + int.from_bytes(raw[position + 2 : position + 4], "big") if is_segment else 1
    raise _too_many(field, "JPEG", "segments", MAX_JPEG_SEGMENTS)


def _check_png(raw: bytes, field: str) -> None:
    position = 8
    for _ in range(MAX_PNG_CHUNKS):
        if position + 8 > len(raw):
            return
        length, kind = struct.unpack_from(">I4s", raw, position)
        if kind == b"IEND":
            return  # what follows the image is not decoded
        position += 12 + length
    raise _too_many(field, "PNG", "chunks", MAX_PNG_CHUNKS)


def _check_gif(raw: bytes, field: str) -> None:
    flags = raw[10] if len(raw) > 10 else 0
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    blocks = 0
    while raw[position : position + 1] == b"!":  # an extension: its label, then blocks until an empty one
        position += 2
        while position < len(raw):
            size = raw[position]
            position += 1 + size
            blocks += 1
            if blocks > MAX_GIF_BLOCKS:
                raise _too_many(field, "GIF", "blocks before its first frame", MAX_GIF_BLOCKS)
            if not size:
                break
