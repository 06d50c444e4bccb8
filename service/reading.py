"""Reads a request: parameters from the query and the body, pictures from multipart, raw bytes or JSON.

`read` does it, and `documented` describes the same to the OpenAPI document.
"""

import base64
import binascii
import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import anyio.to_thread
import pydantic_core
from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from service.negotiation import BINARY
from service.params import Params
from service.problems import FieldError, Problem, field_errors, invalid, invalid_fields, shown

log = logging.getLogger(__name__)

P = TypeVar("P", bound=Params)

FORM = "multipart/form-data"
URLENCODED = "application/x-www-form-urlencoded"
JSON = "application/json"

_NAME_LENGTH = 64
"""Characters of a field's name that are worth repeating to the client."""
_MAX_FIELDS = 32
_MAX_FIELD_BYTES = 4096
"""More than any endpoint has, and than any parameter takes."""
_MAX_VALUES = 1000
"""Of a JSON body, told by its commas before it is parsed: building millions of values stops everything else."""


@dataclass(frozen=True)
class Upload:
    """The bytes of one picture's file, and what the client calls it."""

    field: str
    data: bytes


@dataclass(frozen=True)
class Asked(Generic[P]):
    """A request that has been read: checked parameters, and pictures not yet decoded."""

    params: P
    uploads: list[Upload]

    def fingerprint(self, path: str) -> str:
        """Digest of what is asked of `path`: the checked parameters and the files' bytes, not how they were sent."""
        sha = hashlib.sha256(f"{path} {self.params.model_dump_json()}".encode())
        for upload in self.uploads:
            sha.update(hashlib.sha256(upload.data).digest())
        return sha.hexdigest()


async def read(request: Request, params: type[P], *, images: int) -> Asked[P]:
    """Read the request as `params` and up to `images` pictures (0: it takes none).

    Raises `Problem`: 400 for a body that does not parse, 415 for a media type that is not taken, 422 for parameters
    that are unknown, given twice or out of range, and for too few or too many pictures.
    """
    media = request.headers.get("content-type", "").split(";")[0].strip().lower()
    fields: dict[str, Any] = {}
    uploads: list[Upload] = []
    if media == FORM or (media == URLENCODED and not images):
        fields, uploads = await _form(request, images)
    elif media == JSON:
        fields, uploads = await anyio.to_thread.run_sync(_json, await request.body(), images)
    elif media.startswith("image/") or media == "application/octet-stream":
        uploads = [Upload("image", await request.body())]
    elif media or await request.body():
        taken = [FORM, JSON, "image/*"] if images else [JSON, FORM]
        what = f"the type {shown(media)!r}" if media else "a body without a Content-Type"
        hint = " (curl: -F image=@cat.png, or -H 'Content-Type: image/png')" if media == URLENCODED else ""
        raise Problem(415, f"This endpoint does not take {what}; send {' or '.join(taken)}{hint}.", kind="media-type")
    if uploads and not images:
        raise _too_many_pictures(images)
    query = _once(request.query_params.multi_items(), "the query")
    for name in query.keys() | fields.keys():
        if len(name) > _NAME_LENGTH:
            begun = name[:_NAME_LENGTH]
            raise invalid(begun, f"{begun}... is not a parameter here.")
    twice = sorted(query.keys() & fields.keys())
    if twice:
        raise invalid(twice[0], f"{twice[0]} is in the query and in the body; give it once.")
    try:
        checked = params.model_validate(query | fields)
    except ValidationError as error:
        raise invalid_fields(_explained(error, params)) from error
    if images and not uploads:
        raise invalid("image", "image is missing; send the picture as a form field, as the body, or as base64 in JSON.")
    if len(uploads) > images:
        raise _too_many_pictures(images)
    return Asked(checked, uploads)


def documented(params: type[Params], *, images: int) -> dict[str, Any]:
    """The `openapi_extra` of a route that uses `read` with the same arguments."""
    schema = params.model_json_schema(ref_template="#/components/schemas/{model}")
    defs: dict[str, Any] = schema.get("$defs", {})
    members: dict[str, Any] = {name: _inlined(member, defs) for name, member in schema["properties"].items()}
    texts = {name: _as_text(member) for name, member in members.items()}
    query = [
        {"name": name, "in": "query", "required": False, "schema": member, "description": member["description"]}
        for name, member in texts.items()
    ]
    headers = [
        {"name": name, "in": "header", "required": False, "schema": {"type": "string"}, "description": description}
        for name, description in _HEADERS.items()
    ]
    text = {"type": "string", "contentEncoding": "base64", "description": "The picture's file in base64."}
    file = {"type": "string", "format": "binary", "description": "The picture's file."}
    as_json, as_form = dict(members), dict(texts)
    required = {"required": ["image"]} if images else {}
    if images == 1:
        as_json["image"], as_form["image"] = text, file
    elif images:
        as_json["image"] = {"anyOf": [text, {"type": "array", "items": text, "minItems": 1, "maxItems": images}]}
        as_form["image"] = {"type": "array", "items": file, "minItems": 1, "maxItems": images}
    example: dict[str, Any] = {"image": _PIXEL} if images else {"class": "cat", "n": 4, "seed": 7}
    of_json = {
        "schema": {"type": "object", "properties": as_json, "additionalProperties": False, **required},
        "example": example,
    }
    of_form = {
        "schema": {"type": "object", "properties": as_form, "additionalProperties": False, **required},
        "example": {"image": "(the bytes of the file)", "class": "cat"} if images else example,
    }
    content: dict[str, Any] = {JSON: of_json, FORM: of_form}
    if images:
        content = {FORM: of_form, "image/*": BINARY, JSON: of_json}
    return {"parameters": query + headers, "requestBody": {"required": bool(images), "content": content}}


_HEADERS = {
    "Prefer": "`wait=N` waits N seconds for the result, `respond-async` not at all (RFC 7240).",
    "Idempotency-Key": "The same request under the same key is one job, however often it is sent.",
    "X-Request-Id": "An id of your own for this request; it comes back and is in the logs.",
}

_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGD4DwABBAEAfbLI3wAAAABJRU5ErkJggg=="


def _inlined(member: dict[str, Any], defs: Mapping[str, Any]) -> dict[str, Any]:
    """A property's schema with references to `$defs` replaced by what they name.

    Defaults stay in the descriptions: a page that fills them in would send them in the query and in the body.
    """
    name = str(member.get("$ref", "")).rsplit("/", 1)[-1]
    return defs.get(name, {}) | {key: value for key, value in member.items() if key not in ("$ref", "default")}


def _as_text(member: dict[str, Any]) -> dict[str, Any]:
    """The schema of a field in a query or a form: left out or empty rather than null.

    Its example is empty, so that a page which fills examples in asks for nothing that was not typed.
    """
    kinds = [kind for kind in member.get("anyOf", [{}]) if kind.get("type") != "null"]
    return (
        kinds[0] | {key: value for key, value in member.items() if key not in ("anyOf", "examples")} | {"example": ""}
    )


def _once(items: Iterable[tuple[str, str]], where: str) -> dict[str, Any]:
    """The fields by name; an empty one says nothing, as in a form that was not filled in."""
    found: dict[str, Any] = {}
    for name, value in items:
        if not value:
            continue
        if name in found:
            begun = name[:_NAME_LENGTH]
            raise invalid(begun, f"{begun} is given more than once in {where}; give it once.")
        found[name] = value
        if len(found) > _MAX_FIELDS:
            raise _too_many_fields(where)
    return found


def _too_many_fields(where: str) -> Problem:
    return invalid("body", f"There are more than {_MAX_FIELDS} parameters in {where}; send those that you mean alone.")


def _too_many_pictures(images: int) -> Problem:
    if not images:
        return invalid("image", "image: this endpoint takes no picture; leave it out.")
    wanted = "one picture" if images == 1 else f"at most {images} pictures"
    return invalid("image", f"image: too many pictures were sent; this endpoint takes {wanted}.")


async def _form(request: Request, images: int) -> tuple[dict[str, Any], list[Upload]]:
    try:
        form = await request.form(max_files=images + 1, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES)
    except HTTPException as error:
        if error.status_code != 400:
            raise
        raise _unread(str(error.detail), images) from error
    except OSError as error:  # files of a form are kept in the folder for temporary ones until all of it is there
        log.error("an upload cannot be kept: %s", error)
        detail = "There is no room for another upload now; try again in a few seconds."
        raise Problem(503, detail, kind="no-room") from error
    try:
        uploads: list[Upload] = []
        fields: list[tuple[str, str]] = []
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                fields.append((name, value))
            elif name != "image":
                begun = name[:_NAME_LENGTH]
                raise invalid(begun, f"{begun}: a file was sent in this field; pictures go in the field image.")
            elif value.filename or value.size:  # a file field that was not filled in has neither
                uploads.append(Upload("image", await value.read()))
    finally:
        await form.close()
    once = _once(fields, "the form")
    if "image" in once:
        raise invalid("image", "image: text was sent; send the picture as a file (curl -F image=@cat.png).")
    return once, _named(uploads)


def _unread(fault: str, images: int) -> Problem:
    """The refusal of a form that Starlette does not read, which says why in these words of its own."""
    if fault.startswith("Too many files"):
        return _too_many_pictures(images)
    if fault.startswith("Too many fields"):
        return _too_many_fields("the form")
    if "exceeded maximum size" in fault:
        hint = "; send a picture as a file (curl -F image=@cat.png)" if images else ""
        most = f"has more than {_MAX_FIELD_BYTES} bytes, which no parameter takes"
        return invalid("image" if images else "body", f"A text field of the form {most}{hint}.")
    return Problem(400, f"The form cannot be read: {fault}", kind="malformed")


def _json(body: bytes, images: int) -> tuple[dict[str, Any], list[Upload]]:
    if not body:
        return {}, []
    if body.count(b",") > _MAX_VALUES:
        raise invalid("body", f"The body has more than {_MAX_VALUES} values; send those that you mean alone.")
    try:
        given = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Problem(400, f"The body is not valid JSON: {error}.", kind="malformed") from error
    if not isinstance(given, dict):
        raise invalid("body", "The body is JSON but not an object; send {...}.")
    if len(given) > _MAX_FIELDS:  # pyright: ignore[reportUnknownArgumentType]
        raise _too_many_fields("the body")
    fields: dict[str, Any] = {str(name): value for name, value in given.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if "image" not in fields or not images:
        return fields, []
    value = fields.pop("image")
    texts: list[Any] = list(value) if isinstance(value, list) else [value]  # pyright: ignore[reportUnknownArgumentType]
    if len(texts) > images:
        return fields, [Upload("image", b"")] * len(texts)
    uploads: list[Upload] = []
    for text in texts:
        try:
            if not isinstance(text, str):
                raise TypeError
            uploads.append(Upload("image", base64.b64decode(text.partition("base64,")[2] or text, validate=True)))
        except (TypeError, ValueError, binascii.Error) as error:
            raise invalid(
                "image", "image is not base64; send the file's bytes in base64, or a list of such."
            ) from error
    return fields, _named(uploads)


def _named(uploads: list[Upload]) -> list[Upload]:
    """Several pictures get their position into their name."""
    if len(uploads) < 2:
        return uploads
    return [Upload(f"image[{i}]", upload.data) for i, upload in enumerate(uploads)]


def _explained(error: ValidationError, params: type[Params]) -> list[FieldError]:
    known = ", ".join(field.alias or name for name, field in params.model_fields.items())
    return [
        FieldError(field=found.field, detail=f"{found.field} is not a parameter here; there are {known}.")
        if raw["type"] == "extra_forbidden"
        else found
        for raw, found in zip(error.errors(), field_errors(error.errors()), strict=True)
    ]
