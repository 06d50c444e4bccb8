"""The OpenAPI document: what FastAPI cannot derive itself, such as request bodies, problems and their examples."""

import functools
from collections.abc import Collection, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from service.http.examples import PROBLEM_FIELDS, PROBLEMS, REQUEST_ID, TINY_PNG, WITH_NULL
from service.http.negotiation import JSON
from service.http.origins import OPEN_PATHS
from service.http.problems import MEDIA_TYPE, Problem, ProblemDetails
from service.http.requests import FORM, OCTETS, URLENCODED
from service.http.validation import FieldError

BINARY = {"schema": {"type": "string", "format": "binary"}, "example": "(the bytes of the file)"}
"""The content of a file."""

JOB_STATUSES = (400, 401, 403, 404, 406, 410, 413, 415, 422, 429, 500, 503, 504)
JOB_PROBLEMS = (
    "result-expired", "no-worker", "no-model", "queue-down", "no-room", "queue-full", "quota-exceeded",
    "too-many-uploads", "priority", "cross-site", "stopping", "invalid-input", "job-input",
)  # fmt: skip
"""The error statuses of the routes that submit jobs; of 403, 404, 422, 429 and 503 only these kinds."""

_OMITTED = {
    "Score": {"file", "statistics", "sanity", "map", "detection"},
    "Detection": {"map"},
    "ScanAnswer": {"tiles"},
    "JobAnswer": {"webhook"},  # in the message to a webhook
}
"""The members of responses that can be missing, by schema. All others are sent, be they null or empty."""

_RETRY_AFTER = {
    "Retry-After": {"description": "Seconds to wait before the next attempt.", "schema": {"type": "integer"}}
}
_FAILED_JOB = {
    "X-Job-Id": {"description": "The id of the job, if one has ended without a result.", "schema": {"type": "string"}}
}
_PROBLEM_HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"description": "`Bearer`.", "schema": {"type": "string"}}},
    429: _RETRY_AFTER,
    503: _RETRY_AFTER,
}
"""The headers of problems by status."""

_REQUEST_HEADERS = {
    "Prefer": "`wait=N` waits up to N seconds for the result; `respond-async` does not wait (RFC 7240).",
    "Idempotency-Key": "Repeating a request with the same key does not create a second job.",
    "X-Request-Id": "Your own id for this request; responses and logs repeat it.",
}


def install_openapi(app: FastAPI) -> None:
    """Replace the application's `openapi` method with this module's."""
    app.openapi = functools.partial(_document, app)


def _document(app: FastAPI) -> dict[str, Any]:
    """Return the document, with problem documents in place of FastAPI's own validation errors."""
    if not app.openapi_schema:
        document = get_openapi(
            title=app.title,
            version=app.version,
            summary=app.summary,
            description=app.description,
            license_info=app.license_info,
            tags=app.openapi_tags,
            routes=app.routes,
            webhooks=app.webhooks.routes,
            servers=[{"url": ".", "description": "The service that this document comes from."}],
        )
        schemas = document["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        problem = ProblemDetails.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= problem.pop("$defs") | {"ProblemDetails": problem}
        for name, schema in schemas.items():
            if "properties" in schema:  # pydantic requires only the members without a default
                schema["required"] = [member for member in schema["properties"] if member not in _OMITTED.get(name, ())]
        for name, example in WITH_NULL.items():
            schemas[name]["example"] = example
        for path, operations in document["paths"].items():
            if path not in OPEN_PATHS:
                for operation in operations.values():
                    for problem_status, response in problem_responses(403, 421, kinds=("cross-site",)).items():
                        operation["responses"].setdefault(str(problem_status), response)
        app.openapi_schema = document
    return app.openapi_schema


def request_schema(
    params: type[BaseModel], *, max_images: int, file_kind: str = "image file", has_job: bool = True
) -> dict[str, Any]:
    """Return the `openapi_extra` of a route that calls `parse_request` with the same arguments.

    file_kind: what its files are.
    has_job: whether it creates a job, and so reads the headers of such requests.
    """
    schema = params.model_json_schema(ref_template="#/components/schemas/{model}")
    defs: dict[str, Any] = schema.get("$defs", {})
    json_fields: dict[str, Any] = {name: _inlined(field, defs) for name, field in schema["properties"].items()}
    text_fields = {name: _as_text(field) for name, field in json_fields.items()}
    query = [
        {"name": name, "in": "query", "required": False, "schema": field, "description": field["description"]}
        for name, field in text_fields.items()
    ]
    text = {"type": "string", "contentEncoding": "base64", "description": f"The {file_kind} in base64."}
    file = {"type": "string", "format": "binary", "description": f"The {file_kind}."}
    form_fields = dict(text_fields)
    if max_images == 1:
        json_fields["image"], form_fields["image"] = text, file
    elif max_images:
        json_fields["image"] = {
            "anyOf": [text, {"type": "array", "items": text, "minItems": 1, "maxItems": max_images}]
        }
        form_fields["image"] = {"type": "array", "items": file, "minItems": 1, "maxItems": max_images}
    names: list[str] = schema.get("required", [])
    values = {name: schema["properties"][name]["examples"][0] for name in names}
    options: dict[str, Any] = values or {"class": "cat", "n": 4, "seed": 7}
    json_example: dict[str, Any] = {"image": TINY_PNG} | values if max_images else options
    file_example: Any = "(the bytes of the file)" if max_images == 1 else ["(the bytes of the file)"]
    form_example = {"image": file_example} | (values or {"class": "cat"}) if max_images else json_example
    required = ["image", *names] if max_images else names
    json_body = {"schema": _object(json_fields, required), "example": json_example}
    form_body = {"schema": _object(form_fields, required), "example": form_example}
    content: dict[str, Any] = {JSON: json_body, FORM: form_body, URLENCODED: form_body}
    if max_images:
        content = {FORM: form_body, "image/*": BINARY, OCTETS: BINARY, JSON: json_body}
    return {
        "parameters": query + (header_parameters() if has_job else header_parameters("X-Request-Id")),
        "requestBody": {"required": bool(max_images), "content": content},
    }


def header_parameters(*names: str) -> list[dict[str, Any]]:
    """Return the parameters for request headers; without names, all that a route with a job accepts."""
    return [
        {"name": name, "in": "header", "required": False, "schema": {"type": "string"}, "description": description}
        for name, description in _REQUEST_HEADERS.items()
        if not names or name in names
    ]


def _object(fields: dict[str, Any], required: list[str]) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "properties": fields, "additionalProperties": False}
    return schema | {"required": required} if required else schema


def _inlined(field: dict[str, Any], defs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a field's schema with references to `$defs` replaced by their targets.

    Defaults appear in descriptions only: a page that prefills them would send them in the query and in the body.
    """
    name = str(field.get("$ref", "")).rsplit("/", 1)[-1]
    return defs.get(name, {}) | {key: value for key, value in field.items() if key not in ("$ref", "default")}


def _as_text(field: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a field in a query or a form, which is omitted or empty rather than null.

    Its example is empty, so that a page that prefills examples requests nothing that was not typed.
    """
    types = [option for option in field.get("anyOf", [{}]) if option.get("type") != "null"]
    return types[0] | {key: value for key, value in field.items() if key not in ("anyOf", "examples")} | {"example": ""}


def problem_responses(*statuses: int, kinds: Collection[str] = ()) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route for error statuses, with an example of each kind of problem.

    `kinds` restricts a status to those kinds; a status with none of them keeps all.
    """
    return {status: _problem_response(status, kinds) for status in statuses}


def _problem_response(status: int, kinds: Collection[str]) -> dict[str, Any]:
    details = PROBLEMS[status]
    details = {kind: detail for kind, detail in details.items() if kind in kinds} or details
    examples = {
        kind or "defect": {"summary": detail, "value": _problem_example(status, kind, detail)}
        for kind, detail in details.items()
    }
    schema = {"$ref": "#/components/schemas/ProblemDetails"}
    ends_job = any(kind and kind.startswith("job-") for kind in details)
    headers = _PROBLEM_HEADERS.get(status, {}) | (_FAILED_JOB if ends_job else {})
    return {
        "description": HTTPStatus(status).phrase,
        "content": {MEDIA_TYPE: {"schema": schema, "examples": examples}},
        **({"headers": headers} if headers else {}),
    }


def _problem_example(status: int, kind: str | None, detail: str) -> dict[str, Any]:
    errors = [FieldError(field=PROBLEM_FIELDS[kind], detail=detail)] if kind in PROBLEM_FIELDS else []
    return Problem(status, detail, kind=kind, errors=errors).document(REQUEST_ID).model_dump()
