"""`Client` for threads and `AsyncClient` for asyncio: they send what `exchange.py` yields."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Awaitable, Coroutine
from typing import Any, Literal, Self, TypeVar, Unpack

import httpx2

from ncml.client.documents import Generated, Job, Result
from ncml.client.exchange import Body, Call, Exchange, Exchanges, RetryPolicy
from ncml.client.job_options import (
    CalibrateOptions,
    CompleteOptions,
    GenerateOptions,
    ScanOptions,
    ScoreOptions,
    UpdateOptions,
)
from ncml.client.uploads import Upload
from ncml.errors import InputError
from ncml.images.reading import Image, Images
from ncml.results import Scan, Score

T = TypeVar("T")

TIMEOUT_S = 90.0
"""Seconds to wait for a response, or its next part; not for a job, whose result is requested until it is there."""


class Client:
    """A client of a service, which several threads may share.

    Its methods wait for the result of a job. Requests are retried after the service's `Retry-After`; each has an
    idempotency key, so that a retry creates no second job. A refusal raises `ServiceError`.
    """

    def __init__(
        self,
        url: str = "http://localhost:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        retries: int = RetryPolicy.retries,
        patience_s: float = RetryPolicy.patience_s,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        """Connect to the service at `url` on first use.

        timeout_s: longest wait for a response, or its next part; a job may take longer. retries: maximum retries after
        failed connections. patience_s: longest wait while the queue is full or a quota is exhausted. transport: sends
        the requests in place of the network, for tests.
        """
        self.url = _check_url(url)
        self._exchanges = Exchanges(self.url, RetryPolicy(retries, patience_s), timeout_s)
        self._closed = threading.Event()
        self._http = httpx2.Client(
            base_url=url, headers=_credentials(url, api_key), timeout=timeout_s, transport=transport
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; calls of other threads end with a RuntimeError instead of their next request."""
        self._closed.set()
        self._http.close()

    def score(self, images: Images, **options: Unpack[ScoreOptions]) -> list[Score]:
        """Return the likelihood and the verdict of each image; a detector judges images at their own sizes."""
        return self._run(self._exchanges.score(images, options))

    def scan(self, image: Image, **options: Unpack[ScanOptions]) -> Scan:
        """Return the verdict on an image larger than the model by its tiles."""
        return self._run(self._exchanges.scan(image, options))

    def generate(self, n: int = 1, **options: Unpack[GenerateOptions]) -> Generated:
        """Return new images."""
        return self._run(self._exchanges.generate(n, options))

    def complete(self, image: Image, n: int = 1, **options: Unpack[CompleteOptions]) -> Generated:
        """Return completions of half an image."""
        return self._run(self._exchanges.complete(image, n, options))

    def calibrate(self, images: Images, name: str, **options: Unpack[CalibrateOptions]) -> dict[str, Any]:
        """Make a model that is calibrated on good images or zips of them; return the document of POST /calibrate."""
        return self._run(self._exchanges.calibrate(images, name, options))

    def update(self, name: str, **options: Unpack[UpdateOptions]) -> dict[str, Any]:
        """Make a new version of the detector `model` with the reviews of this key; return its document."""
        return self._run(self._exchanges.update(name, options))

    def review(self, image: Image, verdict: Literal["good", "defective"], *, model: str) -> dict[str, Any]:
        """Have a detector judge an image, and keep what it is; return the document of the review."""
        return self._run(self._exchanges.review(image, verdict, model))

    def reviews(self, model: str) -> list[dict[str, Any]]:
        """Return the documents of the reviews of a model with this key."""
        return self._run(self._exchanges.reviews(model))

    def delete_review(self, model: str, review_id: str) -> None:
        """Delete a review with its image."""
        self._run(self._exchanges.delete_review(model, review_id))

    def models(self) -> list[dict[str, Any]]:
        """Return the documents of the models, as GET /models has them."""
        return self._run(self._exchanges.models())

    def model(self, name: str) -> dict[str, Any]:
        """Return the document of a model by name or name@version."""
        return self._run(self._exchanges.model(name))

    def version(self) -> str:
        """Return the release of the service."""
        return self._run(self._exchanges.version())

    def job(self, job_id: str) -> Job:
        """Return the state of a job."""
        return self._run(self._exchanges.job(job_id))

    def result(self, job_id: str) -> Result:
        """Return the result of a job, once it has ended, as the method does that creates such jobs."""
        return self._run(self._exchanges.result(job_id))

    def cancel(self, job_id: str) -> Job:
        """Cancel a job and return its state."""
        return self._run(self._exchanges.job(job_id, "POST", "/cancel"))

    def delete(self, job_id: str) -> None:
        """Delete a job with its input and result."""
        self._run(self._exchanges.delete(job_id))

    def _pause(self, seconds: float) -> None:
        self._closed.wait(seconds)

    def _run(self, exchange: Exchange[T]) -> T:
        answer: httpx2.Response | httpx2.RequestError | list[Upload] | None = None
        while True:
            try:
                step = exchange.send(answer)
            except StopIteration as end:
                return end.value
            answer = None
            if isinstance(step, Awaitable):
                if isinstance(step, Coroutine):
                    step.close()  # it would warn that it was never awaited
                raise InputError("on_progress", "on_progress must not be asynchronous, unless you use AsyncClient.")
            if callable(step):
                answer = step()
                continue
            if not isinstance(step, Call):
                self._pause(step)
                continue
            try:
                body = Body()
                with self._http.stream(**step.arguments()) as response:
                    for part in response.iter_bytes():
                        body.add(part)
                answer = body.complete(response)
            except httpx2.RequestError as error:
                answer = error


class AsyncClient:
    """A client of a service for asyncio; otherwise as `Client`."""

    def __init__(
        self,
        url: str = "http://localhost:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        retries: int = RetryPolicy.retries,
        patience_s: float = RetryPolicy.patience_s,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        """Connect to the service at `url` on first use; the arguments are those of `Client`."""
        self.url = _check_url(url)
        self._exchanges = Exchanges(self.url, RetryPolicy(retries, patience_s), timeout_s)
        self._http = httpx2.AsyncClient(
            base_url=url, headers=_credentials(url, api_key), timeout=timeout_s, transport=transport
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def score(self, images: Images, **options: Unpack[ScoreOptions]) -> list[Score]:
        """Return the likelihood and the verdict of each image."""
        return await self._run(self._exchanges.score(images, options))

    async def scan(self, image: Image, **options: Unpack[ScanOptions]) -> Scan:
        """Return the verdict on an image larger than the model by its tiles."""
        return await self._run(self._exchanges.scan(image, options))

    async def generate(self, n: int = 1, **options: Unpack[GenerateOptions]) -> Generated:
        """Return new images."""
        return await self._run(self._exchanges.generate(n, options))

    async def complete(self, image: Image, n: int = 1, **options: Unpack[CompleteOptions]) -> Generated:
        """Return completions of half an image."""
        return await self._run(self._exchanges.complete(image, n, options))

    async def calibrate(self, images: Images, name: str, **options: Unpack[CalibrateOptions]) -> dict[str, Any]:
        """Make a model that is calibrated on good images or zips of them; return the document of POST /calibrate."""
        return await self._run(self._exchanges.calibrate(images, name, options))

    async def update(self, name: str, **options: Unpack[UpdateOptions]) -> dict[str, Any]:
        """Make a new version of the detector `model` with the reviews of this key; return its document."""
        return await self._run(self._exchanges.update(name, options))

    async def review(self, image: Image, verdict: Literal["good", "defective"], *, model: str) -> dict[str, Any]:
        """Have a detector judge an image, and keep what it is; return the document of the review."""
        return await self._run(self._exchanges.review(image, verdict, model))

    async def reviews(self, model: str) -> list[dict[str, Any]]:
        """Return the documents of the reviews of a model with this key."""
        return await self._run(self._exchanges.reviews(model))

    async def delete_review(self, model: str, review_id: str) -> None:
        """Delete a review with its image."""
        await self._run(self._exchanges.delete_review(model, review_id))

    async def models(self) -> list[dict[str, Any]]:
        """Return the documents of the models, as GET /models has them."""
        return await self._run(self._exchanges.models())

    async def model(self, name: str) -> dict[str, Any]:
        """Return the document of a model by name or name@version."""
        return await self._run(self._exchanges.model(name))

    async def version(self) -> str:
        """Return the release of the service."""
        return await self._run(self._exchanges.version())

    async def job(self, job_id: str) -> Job:
        """Return the state of a job."""
        return await self._run(self._exchanges.job(job_id))

    async def result(self, job_id: str) -> Result:
        """Return the result of a job, once it has ended, as the method does that creates such jobs."""
        return await self._run(self._exchanges.result(job_id))

    async def cancel(self, job_id: str) -> Job:
        """Cancel a job and return its state."""
        return await self._run(self._exchanges.job(job_id, "POST", "/cancel"))

    async def delete(self, job_id: str) -> None:
        """Delete a job with its input and result."""
        await self._run(self._exchanges.delete(job_id))

    async def _run(self, exchange: Exchange[T]) -> T:
        answer: httpx2.Response | httpx2.RequestError | list[Upload] | None = None
        while True:
            try:
                step = exchange.send(answer)
            except StopIteration as end:
                return end.value
            answer = None
            if isinstance(step, Awaitable):
                await step
                continue
            if callable(step):
                answer = await asyncio.to_thread(step)
                continue
            if not isinstance(step, Call):
                await asyncio.sleep(step)
                continue
            try:
                body = Body()
                async with self._http.stream(**step.arguments()) as response:
                    async for part in response.aiter_bytes():
                        body.add(part)
                answer = body.complete(response)
            except httpx2.RequestError as error:
                answer = error


def _check_url(url: str) -> str:
    """Return the address of a service for messages, without a password in it and a final slash.

    Raises `InputError` if it is not an HTTP address.
    """
    public_url = re.sub(r"^([^/]*//)?[^/?#]*@", r"\1", url) if isinstance(url, str) else url
    message = f"{public_url!r} is not the address of a service: give one like http://localhost:8000."
    if not isinstance(url, str) or not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
        raise InputError("server", message)
    try:
        httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise InputError("server", message) from error
    return public_url.rstrip("/")


def _credentials(url: str, api_key: str | None) -> dict[str, str]:
    if not api_key:
        return {}
    if not (api_key.isascii() and api_key.isprintable()) or " " in api_key:
        raise InputError("api_key", "the API key has a space, a line break or a non-ASCII character: remove it.")
    if httpx2.URL(url).userinfo:  # which takes the header Authorization, such as for a proxy
        return {"X-API-Key": api_key}
    return {"Authorization": f"Bearer {api_key}"}
