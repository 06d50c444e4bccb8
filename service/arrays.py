"""Arrays in responses: npz files, whole or in parts, and rows of rounded numbers in JSON."""

import io
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bands = tuple[tuple[int, int], Iterable[NDArray[np.float32]]]
"""The shape of a map, and its rows in bands."""


def rounded(map_HW: NDArray[Any]) -> list[list[float]]:
    """Return rows of numbers with four decimals."""
    return map_HW.astype(float).round(4).tolist()


def npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return an npz file of arrays."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def npz_parts(arrays: Mapping[str, NDArray[Any]], maps: Mapping[str, Bands]) -> Iterator[bytes]:
    """Yield the parts of an npz file of arrays and of maps that come in bands, some of them empty."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
        for name, (shape, bands) in maps.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for band_HW in bands:
                    file.write(band_HW.astype("<f4", copy=False).tobytes())
                    yield sink.take()
    yield sink.take()


class _Sink(io.RawIOBase):
    """A file that keeps what is written until it is taken."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: Any) -> int:
        """Keep a copy of the data."""
        self._parts.append(bytes(data))
        return len(self._parts[-1])

    def take(self) -> bytes:
        """Return what was written since the last call."""
        taken = b"".join(self._parts)
        self._parts.clear()
        return taken
