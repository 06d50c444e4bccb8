"""Small valid or nearly valid image files that cost a decoder a thousand times more than their size suggests.

python -m tests.service.costly FOLDER    writes them to files
"""

import io
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image

MAX_BYTES = 16 * 2**20
SIDE = 5792
"""Side in pixels of the largest square image that the service accepts."""


def progressive_jpeg(side: int, scans: int) -> bytes:
    """Return a grey JPEG of empty blocks that each scan visits: one bit per block, then two bytes per 32,767 blocks."""
    blocks = ((side + 7) // 8) ** 2

    def segment(marker: int, content: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content

    def table(kind: int, symbol: int) -> bytes:
        return segment(0xC4, bytes([kind, 1, *bytes(15), symbol]))  # the code 0 stands for the only symbol

    header = segment(0xDB, bytes(1) + bytes([1]) * 64)
    header += segment(0xC2, struct.pack(">BHHBBBB", 8, side, side, 1, 1, 0x11, 0)) + table(0x00, 0) + table(0x10, 0xE0)
    dc = segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + bytes((blocks + 7) // 8)
    bits = "0" + "1" * 14  # the end of this block and of the next 32,766
    bits *= -(-blocks // 32_767)
    bits += "1" * (-len(bits) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
    ac = segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + data
    return b"\xff\xd8" + header + dc + ac * scans + b"\xff\xd9"


def fill(start: bytes, part: bytes) -> bytes:
    """Return a file of the largest size accepted: a start, followed by copies of one part."""
    return start + part * ((MAX_BYTES - len(start)) // len(part))


def run_length_bitmap() -> bytes:
    header = struct.pack("<IHHI", MAX_BYTES, 0, 0, 54 + 1024)
    info = struct.pack("<IiiHHIIiiII", 40, 4096, 4096, 1, 8, 1, 0, 0, 0, 256, 0)
    return fill(b"BM" + header + info + bytes(1024), b"\1\7")


def chunks() -> bytes:
    def chunk(kind: bytes, content: bytes = b"") -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    return fill(start, chunk(b"tEXt", b"a\0b"))


def tags() -> bytes:
    """Return a TIFF file in which each of many tags has the same megabytes."""
    count = 60_000
    entries = [(256, 4, 1, 8), (257, 4, 1, 8), *((tag, 7, 8 * 2**20, 2**20) for tag in range(1000, count))]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return fill(b"II*\0" + struct.pack("<I", 8) + directory + bytes(4), b"a")


def flat(form: str, mode: str = "RGB", **options: object) -> bytes:
    """Return the largest image accepted, of one colour."""
    file = io.BytesIO()
    Image.new(mode, (SIDE, SIDE), 0).save(file, form, **options)
    return file.getvalue()


def archive_of_flat_images() -> bytes:
    """Return a zip of 0.3 MB that unpacks to 562 of the largest flat images, 55 MB in all."""
    file = io.BytesIO()
    image = flat("PNG")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(562):
            archive.writestr(f"{i}.png", image)
    return file.getvalue()


GIF = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + bytes(6)

FILES: dict[str, Callable[[], bytes]] = {
    "jpeg-4000-scans": lambda: progressive_jpeg(4096, 4000),
    "jpeg-filled-with-ff": lambda: fill(b"\xff\xd8", b"\xff"),
    "jpeg-filled-with-ff00": lambda: fill(b"\xff\xd8\xff", b"\xff\x00"),
    "jpeg-filled-with-junk": lambda: fill(b"\xff\xd8\xff\xe0\x00\x02", b"a"),
    "jpeg-tiny-markers": lambda: fill(b"\xff\xd8", b"\xff\xfe\x00\x02"),
    "bmp-run-lengths": run_length_bitmap,
    "png-tiny-chunks": chunks,
    "gif-comment-of-one-byte-blocks": lambda: fill(GIF + b"!\xfe", b"\1a"),
    "gif-empty-comments": lambda: fill(GIF, b"!\xfe\1a\0"),
}
"""Files that the check of their structure refuses."""

LARGE_FILES: dict[str, Callable[[], bytes]] = {
    "jpeg-120-scans": lambda: progressive_jpeg(SIDE, 120),
    "jpeg-10-scans": lambda: progressive_jpeg(SIDE, 10),
    "tiff-tags": tags,
    "png-flat": lambda: flat("PNG"),
    "png-flat-rgba": lambda: flat("PNG", "RGBA"),
    "gif-flat": lambda: flat("GIF", "P"),
    "webp-flat": lambda: flat("WEBP", lossless=True, method=0),
    "tiff-flat": lambda: flat("TIFF", compression="tiff_adobe_deflate"),
}
"""Files that are decoded, as far as the limits allow."""


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in (FILES | LARGE_FILES).items():
        (folder / name).write_bytes(make())
