"""What the strips and tiles of a TIFF file cost, read from its first directory before a decoder opens it."""

import struct
from dataclasses import dataclass

_MAGIC = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0")
_MISTAKEN = b"MM\0+"
"""Big-endian BigTIFF, which Pillow takes for a classic file, and so for another directory."""
_TILE_WIDTH, _TILE_HEIGHT = 322, 323
_OFFSETS = (273, 324)
"""Tags that list where each strip or tile lies."""
_WIDTHS = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4, 13: 4, 16: 8, 17: 8, 18: 8}
"""Bytes of a whole number, by the type of its tag."""


@dataclass(frozen=True)
class Blocks:
    """How a file is cut."""

    count: int
    """Strips or tiles."""
    tile_width: int
    tile_height: int
    """Pixels; 0 where it is cut into strips."""


def blocks(raw: bytes) -> Blocks | None:
    """How the first picture of a file is cut; None where it is no TIFF file.

    Raises struct.error where it is cut short, ValueError where decoders would not agree on it.

    Room is made for a whole tile however small the picture is (a strip is cut to it), and uncompressed blocks are
    listed one by one when a file is opened. Of a tag that occurs twice one reader takes the first and another the
    last, so the largest counts.
    """
    if raw.startswith(_MISTAKEN):
        raise ValueError("a big-endian BigTIFF file")
    if not raw.startswith(_MAGIC):
        return None
    endian, order = ("<", "little") if raw.startswith(b"II") else (">", "big")
    big = raw[2:3] == b"+"
    entry = struct.Struct(endian + ("HHQ8s" if big else "HHI4s"))
    (start,) = struct.unpack_from(endian + ("Q" if big else "I"), raw, 8 if big else 4)
    (entries,) = struct.unpack_from(endian + ("Q" if big else "H"), raw, start)
    start += 8 if big else 2
    whole = min(entries, (len(raw) - start) // entry.size)
    most, side = 0, {_TILE_WIDTH: 0, _TILE_HEIGHT: 0}
    for tag, kind, count, value in entry.iter_unpack(raw[start : start + whole * entry.size]):
        if tag in _OFFSETS:
            most = max(most, count)
        elif tag in side:
            width = _WIDTHS.get(kind, 0)
            if width > len(value):
                at = int.from_bytes(value, order)
                value = raw[at : at + width]
            side[tag] = max(side[tag], int.from_bytes(value[:width], order))
    return Blocks(most, side[_TILE_WIDTH], side[_TILE_HEIGHT])
