"""Problem documents (RFC 9457), the single format of error responses: fault, fields and remedy."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from service.http.validation import FieldError

MEDIA_TYPE = "application/problem+json"

RETRY_AFTER_S = 5
"""`Retry-After` in seconds where the waiting time cannot be estimated."""

_MAX_QUOTE = 100
"""Characters of a client's text that an error message repeats."""


class ProblemDetails(BaseModel):
    """An error response as defined by RFC 9457."""

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

    type: str = Field(description="URN of the kind of problem, or about:blank.")
    title: str = Field(description="The phrase of the HTTP status.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="One sentence: what happened and how to resolve it.")
    request_id: str = Field(description="The id of the request, as in the header X-Request-Id and in the logs.")
    errors: list[FieldError] = Field(default_factory=list[FieldError], description="The invalid fields, if any.")


class Problem(Exception):
    """Raised anywhere below a route to answer with a problem document.

    `kind` names the kind of problem in `type`, and `reason`, by default the kind, in the metric of refused requests;
    `headers` are added to the response. 429 and 503 always have a `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        kind: str | None = None,
        reason: str | None = None,
        errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.kind = kind
        self.reason = reason or kind or ""
        self.errors = list(errors)
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers.setdefault("Retry-After", str(RETRY_AFTER_S))

    @property
    def is_refusal(self) -> bool:
        """Whether the metric of refused requests counts it; readiness, which is probed all the time, is left out."""
        return self.status in (401, 429, 503) and self.kind != "not-ready"

    def document(self, request_id: str) -> ProblemDetails:
        """Return the problem document for a request."""
        return ProblemDetails(
            type=f"urn:ncml:problem:{self.kind}" if self.kind else "about:blank",
            title=HTTPStatus(self.status).phrase,
            status=self.status,
            detail=self.detail,
            request_id=request_id,
            errors=self.errors,
        )

    def response(self, request_id: str) -> JSONResponse:
        """Return the problem document as a response."""
        return JSONResponse(self.document(request_id).model_dump(), self.status, self.headers, MEDIA_TYPE)


def invalid_field(field: str, detail: str) -> Problem:
    """Return the 422 for one field."""
    return invalid_fields([FieldError(field=field, detail=detail)])


def invalid_fields(errors: Sequence[FieldError]) -> Problem:
    """Return the 422 for several fields; its detail joins theirs."""
    return Problem(422, " ".join(error.detail for error in errors), kind="invalid-input", errors=errors)


def as_sentence(text: str, field: str | None = None) -> str:
    """Return `text` with a full stop and a capital letter; the name of a field at its start keeps its spelling."""
    starts_with_field = field and text.startswith(field)
    return (text if starts_with_field else text[0].upper() + text[1:]).rstrip(".") + "."


def truncate(text: str) -> str:
    """Return a client's text, cut to the length that an error message may repeat."""
    return text if len(text) <= _MAX_QUOTE else f"{text[:_MAX_QUOTE]}..."
