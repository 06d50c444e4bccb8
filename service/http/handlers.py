"""Exception handlers: turn what a route or the routing raises into problem documents.

Unexpected exceptions are left to `service.http.middleware`.
"""

import logging
from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from redis.exceptions import RedisError, ResponseError
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match

from ncml.errors import InputError, TooLarge
from service.http.problems import Problem, as_sentence, invalid_field, invalid_fields, truncate
from service.http.validation import field_errors
from service.service_metrics import Metrics
from worker.monitor import refusal_reason
from worker.queue import JobNotFound

log = logging.getLogger(__name__)


def add_exception_handlers(app: FastAPI, routes: Sequence[BaseRoute], metrics: Metrics) -> None:
    """Register the handlers. `routes` are all endpoints, from which the `Allow` of a 405 is derived."""

    def respond(request: Request, problem: Problem) -> JSONResponse:
        if problem.is_refusal:
            metrics.rejected.labels(reason=problem.reason).inc()
        return problem.response(str(request.state.request_id))

    async def on_problem(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Problem)
        return respond(request, error)

    async def on_input_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, InputError)
        problem = invalid_field(error.field, as_sentence(error.detail, error.field))
        if isinstance(error, TooLarge):
            problem = Problem(413, problem.detail, kind="too-large", errors=problem.errors)
        return respond(request, problem)

    async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        detail, headers = str(error.detail), dict(error.headers or {})
        path = truncate(request.url.path)
        if error.status_code == 404:
            detail = f"{path} does not exist; /docs lists the endpoints."
        elif error.status_code == 405:
            headers["Allow"] = ", ".join(_allowed_methods(request, routes))
            detail = f"{path} does not support {truncate(request.method)}; it supports {headers['Allow']}."
        return respond(request, Problem(error.status_code, detail, headers=headers))

    async def on_validation_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return respond(request, invalid_fields(field_errors(error.errors())))

    async def on_job_not_found(request: Request, error: Exception) -> JSONResponse:
        detail = "The job does not exist or has expired; send the request again."
        return respond(request, Problem(404, detail, kind="no-such-job"))

    async def on_redis_error(request: Request, error: Exception) -> JSONResponse:
        log.error("the queue fails: %s", error)
        detail = "The queue is unreachable; retry in a few seconds."
        if isinstance(error, ResponseError):
            detail = f"The queue refuses the request: {refusal_reason(error)}."
        return respond(request, Problem(503, detail, kind="queue-down"))

    app.add_exception_handler(Problem, on_problem)
    app.add_exception_handler(InputError, on_input_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(JobNotFound, on_job_not_found)
    app.add_exception_handler(RedisError, on_redis_error)


def _allowed_methods(request: Request, routes: Sequence[BaseRoute]) -> list[str]:
    """Return the methods of all routes of a path; the framework names only those of the first."""
    matches = (route for route in routes if route.matches(request.scope)[0] is Match.PARTIAL)
    methods = {method for route in matches for method in getattr(route, "methods", None) or ()}
    methods = methods or {"GET"}  # static files below a mount
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)
