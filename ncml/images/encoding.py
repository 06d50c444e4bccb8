"""Encode arrays as PNG and HTML, and arrange several images in a grid."""

import base64
import html
import io
import math
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MIN_SIDE = 256
"""Minimum number of pixels of the shorter side of an enlarged image."""


def to_png(image: NDArray[np.uint8]) -> bytes:
    """Encode uint8 (H, W, 3) losslessly as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def reduced_jpeg(image: NDArray[np.uint8], longer_side: int, mode: str = "RGB") -> bytes:
    """Encode uint8 (H, W, 3), reduced to at most `longer_side` pixels, as the bytes of a JPEG file; mode L is grey."""
    reduced = Image.fromarray(image)
    reduced.thumbnail((longer_side, longer_side))
    file = io.BytesIO()
    reduced.convert(mode).save(file, "JPEG", quality=85)
    return file.getvalue()


def png_parts(height: int, width: int, bands: Iterable[NDArray[np.uint8]]) -> Iterator[bytes]:
    """Yield the file of a PNG of this size in parts, some of them empty: one for each band, uint8 (rows, width, 3).

    Rows are not filtered, which suits heat maps: they have few colours.
    """
    compressor = zlib.compressobj()
    yield b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    for band_HWC in bands:
        rows = np.zeros((len(band_HWC), 1 + 3 * width), np.uint8)  # a row begins with the number of its filter
        rows[:, 1:] = band_HWC.reshape(len(band_HWC), -1)
        compressed = compressor.compress(rows.tobytes())
        yield _png_chunk(b"IDAT", compressed) if compressed else b""
    yield _png_chunk(b"IDAT", compressor.flush()) + _png_chunk(b"IEND", b"")


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", len(content), kind) + content + struct.pack(">I", zlib.crc32(kind + content))


def to_html(image: NDArray[np.uint8], text: str) -> str:
    """Return an HTML element that holds an image, uint8 (H, W, 3), and its alternative text."""
    data = base64.b64encode(to_png(image)).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(text)}">'


def format_values(values: Mapping[str, Any]) -> dict[str, str]:
    """Return values as text for display: floats with six digits."""
    return {name: f"{value:.6g}" if isinstance(value, float) else repr(value) for name, value in values.items()}


def to_html_table(values: Mapping[str, Any]) -> str:
    """Return an HTML table with a row for each value."""
    rows = (f"<tr><th>{html.escape(n)}</th><td>{html.escape(v)}</td></tr>" for n, v in format_values(values).items())
    return f"<table>{''.join(rows)}</table>"


def enlarge(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Repeat the pixels of a small image, uint8 (H, W, 3), until no side is shorter than `MIN_SIDE`."""
    factor = -(-MIN_SIDE // min(image.shape[:2]))
    return image.repeat(factor, 0).repeat(factor, 1)


def grid(images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Arrange n images, uint8 (H, W, 3), row by row in a grid that is as square as possible; empty cells are black.

    Raises `ValueError` if there is no image.
    """
    stack = np.asarray(images, dtype=np.uint8)
    if stack.ndim != 4 or len(stack) == 0:
        raise ValueError(f"a grid needs images (n, H, W, 3) with n >= 1, not {stack.shape}")
    n, h, w, c = stack.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    cells = np.zeros((rows * columns, h, w, c), np.uint8)
    cells[:n] = stack
    return cells.reshape(rows, columns, h, w, c).swapaxes(1, 2).reshape(rows * h, columns * w, c)
