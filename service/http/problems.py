"""Problem documents (RFC 9457), the single format of error responses: fault, fields and remedy."""

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from worker.contract import MODEL_NAME

MEDIA_TYPE = "application/problem+json"

RETRY_AFTER_S = 5
"""`Retry-After` in seconds where the waiting time cannot be estimated."""

_MAX_QUOTE = 100
"""Characters of a client's text that an error message repeats."""


class FieldError(BaseModel):
    """One invalid field."""

    field: str = Field(description="The invalid parameter, form field or JSON member.")
    detail: str = Field(description="What is wrong with it and what would be valid.")


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

    `kind` names the kind of problem in `type`; `headers` are added to the response. 429 and 503 always have a
    `Retry-After`.
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


JOB_ID = r"^[A-Za-z0-9_-]{1,64}$"
EVENT_ID = r"^[0-9]{1,19}(-[0-9]{1,19})?$"
_PATTERNS = {
    MODEL_NAME: "it must have 1 to 64 letters, digits, dots, underscores and hyphens, beginning with a letter or digit",
    JOB_ID: "it must have 1 to 64 letters, digits, underscores and hyphens",
    EVENT_ID: "it must be the id of an event that this service sent, such as 1767268800115-0",
}
"""Requirements by pattern."""
_RULES = {
    "missing": "it is required; add it",
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
}
"""Requirements by pydantic's error type; other types keep pydantic's own message."""


def field_errors(errors: Sequence[Mapping[str, Any]]) -> list[FieldError]:
    """Convert pydantic's errors to sentences that begin with the field's name."""
    converted: list[FieldError] = []
    for error in errors:
        path = [str(part) for part in error["loc"] if part not in ("body", "query", "path", "header")]
        field = ".".join(path) or "body"
        value = error.get("input")
        is_short = isinstance(value, (str, int, float, bool)) and len(str(value)) <= 40
        shown = json.dumps(value) if isinstance(value, bool) else repr(value)
        subject = f"{field} is {shown};" if is_short else f"{field}:"
        context = error.get("ctx", {})
        if rule := _RULES.get(error["type"]) or _PATTERNS.get(context.get("pattern", "")):
            requirement = rule.format_map(context)
        else:
            message = str(error["msg"]).removeprefix("Value error, ")
            requirement = message[0].lower() + message[1:]
        converted.append(FieldError(field=field, detail=f"{subject} {requirement}."))
    return converted
