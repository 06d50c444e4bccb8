"""Invalid uploads of many kinds. None may cause a 5xx, a hang, or high memory use.

python -m tests.service.hostile FOLDER    writes them to files
"""

import functools
import io
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

FORMS = (
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
    "TIFF",
    "GIF",
    "ICO",
    "PPM",
    "TGA",
    "PCX",
    "EPS",
    "PDF",
    "JPEG2000",
    "SGI",
    "DDS",
)


@functools.cache
def corpus() -> dict[str, bytes]:
    """Return the files by name; they are the same in every run."""
    return dict([*_damaged(), *_bombs(), *_other_files()])


def _damaged() -> Iterator[tuple[str, bytes]]:
    """Yield a small image in every format that Pillow writes: intact, truncated, altered and extended."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for form in FORMS:
        out = io.BytesIO()
        noise.save(out, form)
        intact = out.getvalue()
        yield f"{form}-whole", intact
        for share in (0.02, 0.1, 0.3, 0.6, 0.95):
            yield f"{form}-cut-{share}", intact[: int(len(intact) * share)]
        for i in range(6):
            broken = bytearray(intact)
            for position in rng.integers(0, len(broken), 1 + 3 * i):
                broken[position] = rng.integers(256)
            yield f"{form}-changed-{i}", bytes(broken)
        yield f"{form}-header-of-zeros", intact[:8] + bytes(len(intact))
        yield f"{form}-twice", intact + intact
        yield f"{form}-tail", intact + b"<script>alert(1)</script>" * 100


def _bombs() -> Iterator[tuple[str, bytes]]:
    """Yield small files that declare, or decompress to, large images."""
    zeros = zlib.compress(bytes(64 * 2**20), 9)
    for side in (16_384, 65_535, 2**31 - 1):
        yield f"png-{side}", _png(side, side, zeros[:2000])
    yield "png-flat", _png(2**31 - 1, 1, zeros[:2000])
    yield "png-text", _png(8, 8, zlib.compress(bytes(8 * 25)), (b"zTXt", b"Comment\0\0" + zeros))
    yield "png-international-text", _png(8, 8, zlib.compress(bytes(8 * 25)), (b"iTXt", b"XML\0\1\0\0\0" + zeros))
    yield "png-profile", _png(8, 8, zlib.compress(bytes(8 * 25)), (b"iCCP", b"icc\0\0" + zeros))
    yield "png-data-beyond-its-size", _png(8, 8, zeros)
    yield "png-chunk-without-end", b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s", 2**31 - 1, b"IHDR")
    yield "gif-65535", b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6) + b"," + bytes(40)
    yield (
        "jpeg-65535",
        b"\xff\xd8\xff\xc0\x00\x11\x08" + b"\xff\xff\xff\xff" + b"\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01",
    )
    yield "bmp-huge", b"BM" + struct.pack("<IHHIIiiHHIIiiII", 70, 0, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0)
    yield "bmp-negative", b"BM" + struct.pack("<IHHIIiiHHIIiiII", 70, 0, 0, 54, 40, -8, -8, 1, 24, 0, 0, 0, 0, 0, 0)
    tags = [(256, 4, 1, 10**9), (257, 4, 1, 10**9), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    yield "tiff-huge", b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 0)
    yield "tiff-loop", b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 8)
    yield "tiff-tag-without-end", b"II*\0" + struct.pack("<I", 8) + struct.pack("<HHHII", 1, 256, 4, 2**31, 2**31)
    tags = [
        (256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1),
        (322, 4, 1, 2**14), (323, 4, 1, 2**14), (324, 4, 1, 122), (325, 4, 1, len(zeros)),
    ]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    yield "tiff-tile", b"II*\0" + struct.pack("<I", 8) + directory + bytes(4) + zeros
    yield "webp-16383", b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f" + struct.pack("<I", 0x0FFFFFFF) + bytes(8)
    for form, options in (
        ("GIF", {}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {"compression": "tiff_deflate"}),
    ):
        out = io.BytesIO()
        frames = [Image.new("L", (64, 64), i % 256) for i in range(400)]
        frames[0].save(out, form, save_all=True, append_images=frames[1:], **options)
        yield f"{form}-400-frames", out.getvalue()


def _png(width: int, height: int, data: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *chunks, (b"IDAT", data), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body


def _other_files() -> Iterator[tuple[str, bytes]]:
    """Yield files that are not images."""
    yield from {
        "empty": b"",
        "nul": b"\0" * 1000,
        "text": b"this is no picture",
        "html": b"<html><script>alert(1)</script></html>",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "xxe": b"<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><a>&x;</a>",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9999 9999\n(/etc/passwd) (r) file",
        "imagetragick": b"push graphic-context\nfill 'url(https://localhost/x\"|ls \"-la)'\npop graphic-context",
        "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        "zip": b"PK\x03\x04" + bytes(100),
        "gzip": b"\x1f\x8b" + bytes(100),
        "elf": b"\x7fELF" + bytes(100),
        "utf16": "picture".encode("utf-16"),
        "random": np.random.default_rng(1).bytes(5000),
    }.items()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in corpus().items():
        (folder / name).write_bytes(data)
