"""Every refusal in one form: `application/problem+json` (RFC 9457) with `errors` by field and the request's id."""

import logging
from collections.abc import Collection, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match

from ncml.errors import InputError, TooLarge
from worker.queue import JobNotFound

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"

RETRY_AFTER_S = 5
"""When to come back, in seconds, to a service whose pace is not known or which is not there yet."""


_SHOWN = 100

_RETRY_AFTER = {"description": "Seconds after which to come back.", "schema": {"type": "integer"}}


class FieldError(BaseModel):
    """One thing wrong with one field."""

    field: str = Field(description="The parameter, form field or JSON member at fault.")
    detail: str = Field(description="What is wrong with it and what would be right.")


class ProblemDetails(BaseModel):
    """A refusal as RFC 9457 describes it."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "type": "urn:ncml:problem:invalid-input",
                "title": HTTPStatus.UNPROCESSABLE_ENTITY.phrase,
                "status": 422,
                "detail": "n is 0; it must be at least 1.",
                "request_id": "01JDH4Z0M6V8",
                "errors": [{"field": "n", "detail": "n is 0; it must be at least 1."}],
            }
        }
    )

    type: str = Field(description="A URN that names this kind of problem, or about:blank.")
    title: str = Field(description="The status in words.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="One sentence: what happened and what to do.")
    request_id: str = Field(description="The id of the request, as in the header X-Request-Id and the log.")
    errors: list[FieldError] = Field(default_factory=list[FieldError], description="The fields at fault, if any are.")


class Problem(Exception):
    """Raised anywhere below a route to answer with a problem document.

    `kind` names the sort of problem in `type`; `headers` go into the response. 429 and 503 say when to come back.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        kind: str | None = None,
        errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.kind = kind
        self.errors = list(errors)
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers.setdefault("Retry-After", str(RETRY_AFTER_S))


def sentence(words: str, field: str | None = None) -> str:
    """What another room says of a fault, as a sentence of its own; a field that it begins with keeps its spelling."""
    named = field and words.startswith(field)
    return (words if named else words[0].upper() + words[1:]).rstrip(".") + "."


def shown(text: str) -> str:
    """What a client sent, cut to what is worth repeating to it."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def invalid(field: str, detail: str) -> Problem:
    """The 422 for one field."""
    return Problem(422, detail, kind="invalid-input", errors=[FieldError(field=field, detail=detail)])


def invalid_fields(errors: Sequence[FieldError]) -> Problem:
    """The 422 for several fields; its detail is what is wrong with all of them."""
    return Problem(422, " ".join(error.detail for error in errors), kind="invalid-input", errors=errors)


def no_worker(lane: str) -> Problem:
    """The 503 for a lane that nobody serves."""
    return Problem(503, f"No worker of the lane {lane} is running; start one, or try again later.", kind="no-worker")


def response(problem: Problem, request_id: str) -> JSONResponse:
    """The problem document as a response."""
    return JSONResponse(_document(problem, request_id).model_dump(), problem.status, problem.headers, MEDIA_TYPE)


def _document(problem: Problem, request_id: str) -> ProblemDetails:
    return ProblemDetails(
        type=f"urn:ncml:problem:{problem.kind}" if problem.kind else "about:blank",
        title=HTTPStatus(problem.status).phrase,
        status=problem.status,
        detail=problem.detail,
        request_id=request_id,
        errors=problem.errors,
    )


_EXAMPLES: dict[int, dict[str | None, str]] = {
    400: {"malformed": "The body is not valid JSON: expected value at line 1 column 1."},
    401: {"unauthorized": "An API key is needed; send yours as Authorization: Bearer KEY, or as X-API-Key."},
    404: {
        "no-such-job": "There is no such job, or its time to live is over; ask again.",
        "result-expired": "The result of the job 0b6a3c1e9d has expired; ask again.",
        "no-preview": "The job 0b6a3c1e9d has no preview now.",
        "no-such-model": "model: 'mnist' is not served here; there are cifar10, cifar10@9f2c61d07be3.",
    },
    406: {"media-type": "Accept asks for 'text/html'; this is offered as application/json or application/x-npz."},
    409: {"running": "The job 0b6a3c1e9d is being canceled but has not ended yet; delete it again."},
    410: {"job-canceled": "The job was canceled on request."},
    413: {"too-large": "image is 8000 x 8000 pixels; at most 33554432 pixels are accepted, so make it smaller first."},
    415: {"media-type": "This endpoint does not take the type 'text/plain'; send multipart/form-data or image/*."},
    422: {
        "invalid-input": "n is 0; it must be at least 1.",
        "job-input": "class: there is no class 'x'; the classes are cat, dog.",
    },
    429: {
        "queue-full": "512 jobs are waiting in the score lane already; ask again in 12 s.",
        "quota-exceeded": "The quota of 60 requests a minute is used up; ask again in 20 s.",
    },
    500: {
        "job-engine": "The engine died twice while computing the job.",
        "job-model": "There is no model 'mnist' here; there are cifar10.",
        "job-worker": "The worker vanished 5 times while computing the job.",
        None: "Something went wrong here; the log has it under this request's id.",
    },
    503: {
        "no-worker": "No worker of the lane score is running; start one, or try again later.",
        "no-model": "The workers are still loading their model; try again in a few seconds.",
        "not-ready": "No worker with a loaded model serves the lane generate yet.",
        "queue-down": "The queue cannot be reached; try again in a few seconds.",
        "no-room": "There is no room for another upload now; try again in a few seconds.",
    },
    504: {
        "job-timeout": "The job ran for more than 600 s; ask for less in one request.",
        "job-expired": "No worker started the job in time; ask again later.",
    },
}
"""The kinds of problem behind each status, each with what it may say."""

OF_WORK = (400, 401, 404, 406, 410, 413, 415, 422, 429, 500, 503, 504)
KINDS_OF_WORK = ("result-expired", "no-worker", "no-model", "queue-down", "no-room")
"""The refusals of the routes that make jobs; of 404 and 503 these kinds."""

_FIELDS = {"too-large": "image", "invalid-input": "n", "job-input": "class"}


def documented(*statuses: int, kinds: Collection[str] = ()) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route in the OpenAPI document for these statuses, with examples of their kinds.

    `kinds` are the only ones of a status that a route has, where it does not have them all.
    """

    def example(status: int, kind: str | None, detail: str) -> dict[str, Any]:
        errors = [FieldError(field=_FIELDS[kind], detail=detail)] if kind in _FIELDS else []
        return _document(Problem(status, detail, kind=kind, errors=errors), "5f0c1a7be2d94c38").model_dump()

    def examples(status: int) -> dict[str, Any]:
        known = _EXAMPLES[status]
        chosen = {kind: known[kind] for kind in known if kind in kinds} or known
        return {
            kind or "defect": {"summary": detail, "value": example(status, kind, detail)}
            for kind, detail in chosen.items()
        }

    content = {"schema": {"$ref": "#/components/schemas/ProblemDetails"}}
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {MEDIA_TYPE: content | {"examples": examples(status)}},
            **({"headers": {"Retry-After": _RETRY_AFTER}} if status in (429, 503) else {}),
        }
        for status in statuses
    }


def install(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Answer what a route or the routing raises on purpose; defects are for `service.middleware`.

    `routes` are the application's endpoints.
    """

    def answer(request: Request, problem: Problem) -> JSONResponse:
        return response(problem, str(request.state.request_id))

    async def on_problem(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Problem)
        return answer(request, error)

    async def on_input(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, InputError)
        problem = invalid(error.field, sentence(error.detail, error.field))
        if isinstance(error, TooLarge):
            problem = Problem(413, problem.detail, kind="too-large", errors=problem.errors)
        return answer(request, problem)

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        detail, headers = str(error.detail), dict(error.headers or {})
        if error.status_code == 404:
            detail = f"There is nothing at {shown(request.url.path)}; /docs lists what there is."
        elif error.status_code == 405:
            headers["Allow"] = ", ".join(_methods(request, routes))
            path, method = shown(request.url.path), shown(request.method)
            detail = f"{path} does not take {method}; it takes {headers['Allow']}."
        return answer(request, Problem(error.status_code, detail, headers=headers))

    async def on_validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return answer(request, invalid_fields(field_errors(error.errors())))

    async def on_no_job(request: Request, error: Exception) -> JSONResponse:
        detail = "There is no such job, or its time to live is over; ask again."
        return answer(request, Problem(404, detail, kind="no-such-job"))

    async def on_redis(request: Request, error: Exception) -> JSONResponse:
        log.error("the queue cannot be reached: %s", error)
        detail = "The queue cannot be reached; try again in a few seconds."
        return answer(request, Problem(503, detail, kind="queue-down"))

    app.add_exception_handler(Problem, on_problem)
    app.add_exception_handler(InputError, on_input)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(JobNotFound, on_no_job)
    app.add_exception_handler(RedisError, on_redis)


def _methods(request: Request, routes: Sequence[BaseRoute]) -> list[str]:
    """What may be done at a path, by all its routes: the framework names only the first one's methods."""
    matching = (route for route in routes if route.matches(request.scope)[0] is Match.PARTIAL)
    methods = {method for route in matching for method in getattr(route, "methods", None) or ()}
    methods = methods or {"GET"}  # below a mount lie files
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)


_RULES = {
    "greater_than_equal": "it must be at least {ge:g}",
    "greater_than": "it must be more than {gt:g}",
    "less_than_equal": "it must be at most {le:.16g}",
    **dict.fromkeys(("int_parsing", "int_parsing_size", "int_type", "int_from_float"), "it must be a whole number"),
    **dict.fromkeys(("float_parsing", "float_type"), "it must be a number"),
    "finite_number": "it must be a finite number",
    **dict.fromkeys(("bool_parsing", "bool_type"), "it must be 1 or 0"),
    **dict.fromkeys(("enum", "literal_error"), "it must be {expected}"),
    "string_type": "it must be text",
    "string_too_long": "it must have at most {max_length} characters",
    "string_pattern_mismatch": "it must match {pattern}",
}
"""What is right, by pydantic's name for what is wrong; for others pydantic's own words are used."""


def field_errors(errors: Sequence[Mapping[str, Any]]) -> list[FieldError]:
    """Pydantic's errors, each as a sentence that begins with the field's name."""
    found: list[FieldError] = []
    for error in errors:
        places = [str(place) for place in error["loc"] if place not in ("body", "query", "path", "header")]
        field = ".".join(places) or "body"
        given = error.get("input")
        shown = f" is {given!r};" if isinstance(given, (str, int, float, bool)) and len(str(given)) <= 40 else ":"
        if rule := _RULES.get(error["type"]):
            words = rule.format_map(error.get("ctx", {}))
        else:
            words = str(error["msg"]).removeprefix("Value error, ")
            words = words[0].lower() + words[1:]
        found.append(FieldError(field=field, detail=f"{field}{shown} {words}."))
    return found
