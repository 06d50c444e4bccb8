"""The images of requests, decoded in processes with limits on CPU time and memory."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Callable
from typing import TypeVar

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect

from ncml.images import open_resized
from service.decoder import Limits, OriginalImage, open_original, open_thumbnail
from service.decoders import DecoderPool, request_too_slow
from service.http.deferred import disconnected
from service.http.requests import Upload
from service.settings import Settings
from worker.descriptors import ModelDescriptor

T = TypeVar("T")

THUMBNAIL_SIDE = 128
"""Pixels of a thumbnail's longer side: twice as many as the studio shows, for screens of high density."""


class ImageDecoding:
    """Decodes images for the routes; one per application."""

    def __init__(self, settings: Settings) -> None:
        limits = Limits(cpu_s=settings.decode_cpu_s, memory_bytes=settings.decode_memory_bytes)
        self.pool = DecoderPool(settings.decode_threads, limits)
        self._image_limits = settings.image_limits
        self._request_s = settings.decode_request_s

    async def run(self, request: Request, field: str, call: Callable[[], T]) -> T:
        """Run a call that decodes an image in a limited process; kill it if the client disconnects."""
        decoding = asyncio.ensure_future(self.pool.run(field, call))
        disconnect = asyncio.ensure_future(disconnected(request.receive))
        try:
            await asyncio.wait({decoding, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if not decoding.done():
                raise ClientDisconnect
            return decoding.result()
        finally:
            for future in (decoding, disconnect):
                future.cancel()
            await asyncio.wait({decoding, disconnect})

    async def resized(self, request: Request, upload: Upload, model: ModelDescriptor) -> NDArray[np.uint8]:
        """Return an image at the model's size, uint8 (height, width, 3); raises as `ncml.images.open_resized` does."""
        return await self.run(request, upload.field, self.resizing(upload, model))

    async def original(self, request: Request, upload: Upload, model: ModelDescriptor) -> OriginalImage:
        """Return an image at its own and at the model's size; raises `InputError` for one that is too small, too."""
        size = model.height, model.width
        call = functools.partial(open_original, upload.data, *size, field=upload.field, **self._image_limits)
        return await self.run(request, upload.field, call)

    async def thumbnail(self, request: Request, upload: Upload) -> bytes:
        """Return a small JPEG of an image; raises as `original` does."""
        call = functools.partial(open_thumbnail, upload.data, THUMBNAIL_SIDE, field=upload.field, **self._image_limits)
        return await self.run(request, upload.field, call)

    @contextlib.asynccontextmanager
    async def time_limit(self) -> AsyncGenerator[None]:
        """Return the context in which the images of one request are decoded; raises `TooCostly` if they take long."""
        try:
            async with asyncio.timeout(self._request_s):
                yield
        except TimeoutError:
            raise request_too_slow(self._request_s) from None

    def resizing(self, upload: Upload, model: ModelDescriptor) -> Callable[[], NDArray[np.uint8]]:
        """Return the call that `resized` runs in a limited process."""
        size = model.height, model.width
        return functools.partial(open_resized, upload.data, *size, field=upload.field, **self._image_limits)
