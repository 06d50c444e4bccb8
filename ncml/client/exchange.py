"""The exchanges of a client with a service, without any I/O, so that both clients share them.

An exchange is a generator: it yields a request to send, and is resumed with the response or the transport's error; a
function that reads files, and is resumed with these; a coroutine of the caller's to await; or a number of seconds to
pause. Its return value is the result.
"""

from __future__ import annotations

import email.utils
import inspect
import itertools
import re
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast
from urllib.parse import quote

import httpx2
import numpy as np

from ncml.client.documents import Document, Generated, Job, JobProgress, Result, read_result, read_scan, read_scores
from ncml.client.job_options import (
    CalibrateOptions,
    CompleteOptions,
    GenerateOptions,
    JobOptions,
    OnJobProgress,
    ScanOptions,
    ScoreOptions,
    UpdateOptions,
)
from ncml.client.uploads import Upload, read_upload, read_uploads
from ncml.errors import InputError, ServiceError, suggestion
from ncml.images.reading import Image, Images, list_images, name_of
from ncml.limits import MAX_IMAGES_PER_REQUEST, MAX_JUDGED_IMAGES
from ncml.results import Scan, Score

T = TypeVar("T")

WAIT_S = 30
"""Longest time that one request asks the service to wait for a result."""
POLL_S = 0.25
"""Interval at which a job is polled if its progress is reported, and pause before its result is requested again."""
OUTAGE_S = 60.0
"""Longest wait for a service that is unavailable (502, 503), or refuses connections after it has answered: it restarts,
which takes up to 45 s if it answers its requests first."""
FIRST_PAUSE_S = 0.5
"""Pause before the first retry without a `Retry-After`; it doubles with each retry."""

MAX_RESPONSE_BYTES = 512 * 2**20
"""Maximum bytes of a response when it is decompressed, twice what 64 generated images of 1024x1024 pixels have: what
sends more, such as a camera without end, is not a service, and would take all memory."""


@dataclass(frozen=True)
class Call:
    """One request."""

    method: str
    path: str
    params: Mapping[str, str] | None = None
    files: Sequence[Upload] = ()
    headers: Mapping[str, str] | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `httpx2.Client.stream`."""
        files = [("image", (name or "image", data)) for name, data in self.files]
        return {
            "method": self.method,
            "url": self.path,
            "params": self.params or None,
            "files": files or None,
            "headers": self.headers,
        }


class Body:
    """The body of a response, part by part."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, part: bytes) -> None:
        """Append a part; raise `httpx2.DecodingError` if there are too many bytes."""
        self._parts.append(part)
        self._size += len(part)
        if self._size > MAX_RESPONSE_BYTES:
            raise httpx2.DecodingError(f"the response has more than {MAX_RESPONSE_BYTES} bytes")

    def complete(self, response: httpx2.Response) -> httpx2.Response:
        """Return the response with this body, and those of its headers that an exchange reads."""
        headers = {name: response.headers[name] for name in ("content-type", "retry-after") if name in response.headers}
        return httpx2.Response(response.status_code, headers=headers, content=b"".join(self._parts))


ReadFiles: TypeAlias = Callable[[], list[Upload]]
"""Reads images as files, which can take long: the asynchronous client calls it in a thread."""

Exchange: TypeAlias = Generator[
    Call | ReadFiles | Awaitable[object] | float, "httpx2.Response | httpx2.RequestError | list[Upload] | None", T
]


@dataclass(frozen=True)
class RetryPolicy:
    """How often, and for how long, a client retries."""

    retries: int = 3
    """Maximum retries after failed connections."""
    patience_s: float = 60.0
    """Longest wait while the queue is full or a quota is exhausted (429)."""


@dataclass(frozen=True)
class Exchanges:
    """The operations of a service at an address, which messages name."""

    url: str
    policy: RetryPolicy
    timeout_s: float
    """How long the transport waits for a response, or its next part; requests ask the service to respond in half of
    that."""
    answered: threading.Event = field(default_factory=threading.Event)
    """Set once the service has answered: its address is right."""

    @property
    def _wait_s(self) -> int:
        return int(min(WAIT_S, self.timeout_s / 2))

    def score(self, images: Images, options: ScoreOptions) -> Exchange[list[Score]]:
        """Score images, in as many requests as their number and size need."""
        scores: list[Score] = []
        sources = list_images(images, "image")
        limit = MAX_IMAGES_PER_REQUEST
        while len(scores) < len(sources):
            start = len(scores)
            files = yield from _read_files(partial(read_uploads, sources[start : start + limit]))
            part = sources[start : start + len(files)]
            read = partial(read_scores, files=[name_of(image) for image in part])
            run = self._run("/score", options, ScoreOptions, read, images=part, files=files, start=start)
            try:
                scores += yield from run
            except ServiceError as error:
                if error.kind != "too-many-images" or len(part) == 1:
                    raise
                limit = MAX_JUDGED_IMAGES if len(part) > MAX_JUDGED_IMAGES else 1  # the model is a detector
        return scores

    def scan(self, image: Image, options: ScanOptions) -> Exchange[Scan]:
        """Score an image in tiles."""
        files = yield from _read_files(lambda: [read_upload(image)])
        return (yield from self._run("/score", options, ScanOptions, read_scan, images=[image], files=files, tile=True))

    def generate(self, n: int, options: GenerateOptions) -> Exchange[Generated]:
        """Generate images."""
        return (yield from self._run("/generate", options, GenerateOptions, Generated.from_document, n=n))

    def complete(self, image: Image, n: int, options: CompleteOptions) -> Exchange[Generated]:
        """Complete half an image."""
        files = yield from _read_files(lambda: [read_upload(image)])
        read = Generated.from_document
        return (yield from self._run("/complete", options, CompleteOptions, read, images=[image], files=files, n=n))

    def calibrate(self, images: Images, name: str, options: CalibrateOptions) -> Exchange[dict[str, Any]]:
        """Calibrate a copy of a model."""
        sources = list_images(images, "image")
        files = yield from _read_files(lambda: [read_upload(image) for image in sources])
        run = self._run("/calibrate", options, CalibrateOptions, dict, images=sources, files=files, name=name)
        return (yield from run)

    def update(self, name: str, options: UpdateOptions) -> Exchange[dict[str, Any]]:
        """Make a new version of a detector."""
        return (yield from self._run("/update", options, UpdateOptions, dict, name=name))

    def review(self, image: Image, verdict: str, model: str) -> Exchange[dict[str, Any]]:
        """Have a detector judge an image, and keep what it is."""
        files = yield from _read_files(lambda: [read_upload(image)])
        job_id = yield from self._run(
            "/score", {"model": model}, ScoreOptions, lambda document: str(document["id"]), images=[image], files=files
        )
        call = Call("POST", _reviews_path(model), {"job": job_id, "verdict": verdict}, files)
        try:
            response = yield from self._send(call)
        except ServiceError as error:
            raise _name_image(error, [image], 0) from error
        return self._read(response, dict)

    def reviews(self, model: str) -> Exchange[list[dict[str, Any]]]:
        """Get the reviews of a model."""
        response = yield from self._send(Call("GET", _reviews_path(model)))
        return self._read(response, lambda document: document["reviews"])

    def delete_review(self, model: str, review_id: str) -> Exchange[None]:
        """Delete a review."""
        yield from self._send(Call("DELETE", f"{_reviews_path(model)}/{quote(review_id, safe='')}"))

    def models(self) -> Exchange[list[dict[str, Any]]]:
        """Get the documents of all models."""
        response = yield from self._send(Call("GET", "/models"))
        return self._read(response, lambda document: document["models"])

    def model(self, name: str) -> Exchange[dict[str, Any]]:
        """Get the document of a model."""
        return self._read((yield from self._send(Call("GET", _model_path(name)))), dict)

    def version(self) -> Exchange[str]:
        """Get the release of the service."""
        response = yield from self._send(Call("GET", "/version"))
        return self._read(response, lambda document: str(document["version"]))

    def job(self, job_id: str, method: str = "GET", action: str = "") -> Exchange[Job]:
        """Get, or with an action change, the state of a job."""
        response = yield from self._send(Call(method, f"/jobs/{quote(job_id, safe='')}{action}"))
        return self._read(response, Job.from_document)

    def result(self, job_id: str) -> Exchange[Result]:
        """Get the result of a job, however long it takes to end."""
        while (response := (yield from self._fetch_result(job_id))).status_code == 202:
            yield POLL_S
        return self._read(response, read_result)

    def delete(self, job_id: str) -> Exchange[None]:
        """Delete a job."""
        yield from self._send(Call("DELETE", f"/jobs/{quote(job_id, safe='')}"))

    # -- one job

    def _run(
        self,
        path: str,
        options: JobOptions,
        allowed: type[JobOptions],
        read: Callable[[Document], T],
        *,
        images: Sequence[Image] = (),
        files: Sequence[Upload] = (),
        start: int = 0,
        **parameters: object,
    ) -> Exchange[T]:
        """Submit a job and return its result, however long that takes.

        allowed: the options of the method. read: converts the document of the result. files: those of the images.
        start: the position of the first image among those of the call.
        """
        _check_names(options, allowed)
        fields: dict[str, Any] = {**options, **parameters}
        on_progress: OnJobProgress | None = fields.pop("on_progress", None)
        key = fields.pop("idempotency_key", None) or uuid.uuid4().hex
        if not isinstance(key, str) or not (key.isascii() and key.isprintable()):
            raise InputError("idempotency_key", f"idempotency_key must be ASCII characters, not {key!r}.")
        headers = {
            "Accept": "application/json",
            "Prefer": "respond-async" if on_progress else f"wait={self._wait_s}",
            "Idempotency-Key": _quote(f"{key}-{start}" if start else key),
        }
        params = {name.rstrip("_"): _as_text(name, value) for name, value in fields.items() if value is not None}
        call = Call("POST", path, params, files, headers)
        try:
            try:
                response = yield from self._submit_and_fetch(call, on_progress)
            except ServiceError as error:
                if not error.is_lost_job:
                    raise
                # The queue has lost the job, as after a power failure: with the same key, a new one takes its place.
                response = yield from self._submit_and_fetch(call, on_progress)
        except ServiceError as error:
            raise _name_image(error, images, start) from error
        return self._read(response, read)

    def _submit_and_fetch(self, call: Call, on_progress: OnJobProgress | None) -> Exchange[httpx2.Response]:
        """Submit a job, report its progress, and return the response with its result."""
        response = yield from self._send(call)
        while response.status_code == 202:
            job_id = self._read(response, lambda document: str(document["id"]))
            if on_progress:
                yield from self._follow(job_id, on_progress)
            else:  # the service may have waited for less time than it was asked to, or not at all
                yield POLL_S
            response = yield from self._fetch_result(job_id)
        return response

    def _fetch_result(self, job_id: str) -> Exchange[httpx2.Response]:
        """Return the response with the result of a job, or a 202 if the job has not ended."""
        headers = {"Accept": "application/json", "Prefer": f"wait={self._wait_s}"}
        return (yield from self._send(Call("GET", f"/jobs/{quote(job_id, safe='')}/result", headers=headers)))

    def _follow(self, job_id: str, on_progress: OnJobProgress) -> Exchange[None]:
        """Report a job's progress until it ends."""
        latest: JobProgress | None = None
        while True:
            job = yield from self.job(job_id)
            if job.progress and job.progress != latest:
                latest = job.progress
                returned = on_progress(latest)
                if inspect.isawaitable(returned):
                    yield returned
            if job.has_ended:
                return
            yield POLL_S

    # -- one request

    def _send(self, call: Call) -> Exchange[httpx2.Response]:
        """Send a request until it is answered; raise `ServiceError` for a refusal, and when the policy is exhausted."""
        failures, waited_s = 0, {True: 0.0, False: 0.0}  # while the service is busy, or unavailable
        for attempt in itertools.count():
            pause_s = min(FIRST_PAUSE_S * 2 ** min(attempt, 10), 10.0)
            answer = yield call
            assert not isinstance(answer, list)  # of files
            if isinstance(answer, httpx2.Response):
                self.answered.set()
                was_deleted = answer.status_code == 404 and call.method == "DELETE" and failures > 0
                if answer.is_success or was_deleted:  # by the attempt whose response was lost
                    return answer
                error, is_busy = self._refusal(answer), answer.status_code == 429
                error.retry_after_s = _retry_after(answer)
                pause_s = error.retry_after_s or pause_s
                limit_s = self.policy.patience_s if is_busy else min(self.policy.patience_s, OUTAGE_S)
                waited_s[is_busy] += pause_s
                if answer.status_code not in (429, 502, 503) or waited_s[is_busy] > limit_s:
                    raise error
            elif isinstance(answer, httpx2.DecodingError):  # of the body, not of the connection
                raise self._not_a_service() from answer
            else:
                failures += 1
                waited_s[False] += pause_s
                is_restarting = isinstance(answer, httpx2.ConnectError) and self.answered.is_set()
                outage_s = min(self.policy.patience_s, OUTAGE_S) if is_restarting else 0.0
                if failures > self.policy.retries and waited_s[False] > outage_s:
                    reason = str(answer) or type(answer).__name__
                    remedy = "check the address, and that the service runs."
                    raise ServiceError(f"{self.url} cannot be reached ({reason}): {remedy}") from answer
            yield pause_s
        raise AssertionError("unreachable")

    def _refusal(self, response: httpx2.Response) -> ServiceError:
        """Return the error that a refused request raises."""
        if not response.headers.get("content-type", "").startswith("application/problem+json"):
            return self._not_a_service(response)
        return self._read(response, partial(_read_problem, status=response.status_code))

    def _read(self, response: httpx2.Response, read: Callable[[Document], T]) -> T:
        """Return what `read` makes of the JSON document of a response."""
        try:
            document = response.json()
            if not isinstance(document, dict):
                raise TypeError("the document is not an object")
            return read(document)
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise self._not_a_service(response) from error

    def _not_a_service(self, response: httpx2.Response | None = None) -> ServiceError:
        """Return the error for a response of something else; None: its body cannot be decoded, or is too large."""
        status = 0 if response is None else response.status_code
        answer = f"answered {status}" if status else "answered"
        detail = f"{self.url} {answer}, but not as an ncml service does: check the address."
        return ServiceError(detail, status=status)


def _read_files(read: ReadFiles) -> Exchange[list[Upload]]:
    """Read files; raises as `read` does."""
    files = yield read
    assert isinstance(files, list)
    return files


def _model_path(name: str) -> str:
    if not name or "/" in name:
        raise InputError("model", f"model must be the name of a model that the service has, not {name!r}.")
    return f"/models/{quote(name, safe='@')}"


def _reviews_path(model: str) -> str:
    return f"{_model_path(model)}/reviews"


def _check_names(options: JobOptions, allowed: type[JobOptions]) -> None:
    """Raise `InputError` for an option that the method does not have."""
    method, names = allowed.__name__.removesuffix("Options").lower(), list(allowed.__annotations__)
    for name in options.keys() - names:
        remedy = ": use scan" if name.startswith("tile") and method == "score" else suggestion(name, names)
        raise InputError(name, f"{name} is not an option of {method}{remedy}")


def _read_problem(problem: Document, status: int) -> ServiceError:
    """Return the error that a problem document (RFC 9457) describes."""
    errors = problem.get("errors") or [{}]
    return ServiceError(
        str(problem.get("detail") or problem["title"]),
        status=status,
        kind=str(problem.get("type", "")).removeprefix("about:blank").removeprefix("urn:ncml:problem:"),
        field=errors[0].get("field"),
        request_id=str(problem.get("request_id", "")),
    )


def _quote(text: str) -> str:
    """Return ASCII text as a string of a structured header field (RFC 9651, 3.3.3)."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _as_text(name: str, value: object) -> str:
    """Return a parameter as text in a query; numbers may be NumPy's. Raises `InputError` for another type."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, (str, int, float)):
        return str(value)
    parts = list(cast(Iterable[object], value)) if isinstance(value, Iterable) else [value]
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) < len(parts):
        raise InputError(name, f"{name} must be text, a number or a list of texts, not {value!r}.")
    return ",".join(texts)


def _name_image(error: ServiceError, images: Sequence[Image], start: int) -> ServiceError:
    """Return an error that names the faulty image by its path, or by its position in the call."""
    match = re.fullmatch(r"image(?:\[(\d+)\])?", error.field or "")
    index = int(match[1] or 0) if match else 0
    if match is None or index >= len(images) or not error.detail.startswith(f"{match[0]} "):
        return error
    name = name_of(images[index]) or (f"image[{start + index}]" if match[1] else match[0])
    detail = name + error.detail.removeprefix(match[0])
    return ServiceError(detail, status=error.status, kind=error.kind, field=name, request_id=error.request_id)


def _retry_after(response: httpx2.Response) -> float:
    """Return the seconds of `Retry-After`, which may be a date; 0 if there is none."""
    value = response.headers.get("retry-after", "")
    if value.isdecimal():
        return float(value)
    moment = email.utils.parsedate_tz(value)
    try:
        return max(0.0, email.utils.mktime_tz(moment) - time.time()) if moment else 0.0
    except (OverflowError, ValueError):  # of a year that no calendar has
        return 0.0
