"""The strips and tiles of a TIFF file, read from its first directory before a decoder opens it."""

import struct
from dataclasses import dataclass

_MAGIC = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0")
_BIG_ENDIAN_BIGTIFF = b"MM\0+"
"""A file that Pillow takes for a classic one, so that it reads the directory from another offset."""
_TILE_WIDTH, _TILE_HEIGHT = 322, 323
_OFFSETS = (273, 324)
"""Tags that list the offset of each strip or tile."""
_TYPE_BYTES = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4, 13: 4, 16: 8, 17: 8, 18: 8}
"""Bytes of an integer, by the type of its tag."""


@dataclass(frozen=True)
class Blocks:
    """The strips or tiles of a file."""

    count: int
    """Number of strips or tiles."""
    tile_width: int
    tile_height: int
    """Size of a tile in pixels; 0 for a file in strips."""


def read_blocks(raw: bytes) -> Blocks | None:
    """Return the blocks of a file's first image; None if it is not a TIFF file.

    Raises struct.error for a truncated file, ValueError for one that decoders read differently.

    A decoder allocates whole tiles even if the image is smaller (a strip is clipped to it), and opening a file lists
    its uncompressed blocks one by one. Of a repeated tag, some decoders read the first value and others the last, so
    the largest is returned.
    """
    if raw.startswith(_BIG_ENDIAN_BIGTIFF):
        raise ValueError("a big-endian BigTIFF file")
    if not raw.startswith(_MAGIC):
        return None
    endian, order = ("<", "little") if raw.startswith(b"II") else (">", "big")
    big = raw[2:3] == b"+"
    entry = struct.Struct(endian + ("HHQ8s" if big else "HHI4s"))
    (start,) = struct.unpack_from(endian + ("Q" if big else "I"), raw, 8 if big else 4)
    (entries,) = struct.unpack_from(endian + ("Q" if big else "H"), raw, start)
    start += 8 if big else 2
    complete = min(entries, (len(raw) - start) // entry.size)
    block_count, tile_side = 0, {_TILE_WIDTH: 0, _TILE_HEIGHT: 0}
    for tag, kind, count, value in entry.iter_unpack(raw[start : start + complete * entry.size]):
        if tag in _OFFSETS:
            block_count = max(block_count, count)
        elif tag in tile_side:
            size = _TYPE_BYTES.get(kind, 0)
            if size > len(value):
                offset = int.from_bytes(value, order)
                value = raw[offset : offset + size]
            tile_side[tag] = max(tile_side[tag], int.from_bytes(value[:size], order))
    return Blocks(block_count, tile_side[_TILE_WIDTH], tile_side[_TILE_HEIGHT])
