"""Request parsing: parameters from the query and the body; images from multipart forms, raw bodies or JSON."""

import base64
import binascii
import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import anyio.to_thread
from fastapi import Request
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from service.http.negotiation import JSON
from service.http.problems import Problem, invalid_field, invalid_fields, truncate
from service.http.validation import FieldError, field_errors

log = logging.getLogger(__name__)

P = TypeVar("P", bound=BaseModel)

FORM = "multipart/form-data"
URLENCODED = "application/x-www-form-urlencoded"
OCTETS = "application/octet-stream"

_MAX_NAME = 64
"""Characters of a field's name that an error message repeats."""
_MAX_FIELDS = 32
"""Fields of a request: more than any endpoint has."""
_MAX_FIELD_BYTES = 4096
"""Bytes of a text field: more than any parameter accepts."""
_MAX_PART_BYTES = 2**20
"""Bytes of a form's text field that are read, so that the error can name a field that is too long."""
_MAX_FILE_NAME = 255
"""Characters of a file's name that a response repeats."""
_MAX_VALUES = 1000
"""Values of a JSON body without images, estimated by its commas before it is parsed: parsing millions would block the
event loop."""


@dataclass(frozen=True)
class Upload:
    """The bytes of one image file, and the name of its field in error messages."""

    field: str
    data: bytes
    file: str = ""
    """The name that the client gave the file."""


@dataclass(frozen=True)
class ParsedRequest(Generic[P]):
    """Validated parameters and image files that are not decoded yet."""

    params: P
    uploads: list[Upload]

    @property
    def files(self) -> list[str]:
        """The names of several files; empty for one, or if the client named none."""
        names = [upload.file for upload in self.uploads]
        return names if len(names) > 1 and any(names) else []

    @functools.cached_property
    def digests(self) -> list[str]:
        """The SHA-256 of each file, in hexadecimal digits."""
        return [hashlib.sha256(upload.data).hexdigest() for upload in self.uploads]

    @property
    def format(self) -> str:
        """The format that the parameters name for the response; "" if they name none."""
        return getattr(self.params, "format", None) or ""

    def fingerprint(self, path: str) -> str:
        """Return a digest of the path, the parameters and the files, in whichever format they were sent."""
        digest = hashlib.sha256(f"{path} {self.params.model_dump_json(exclude={'format'})}".encode())
        for upload_digest in self.digests:
            digest.update(bytes.fromhex(upload_digest))
        return digest.hexdigest()


async def parse_request(request: Request, params: type[P], *, max_images: int) -> ParsedRequest[P]:
    """Parse the parameters and 1 to `max_images` images; with 0 the endpoint accepts none.

    Raises `Problem`: 400 for a malformed body, 415 for an unsupported media type or content coding, 422 for parameters
    that are unknown, repeated or out of range, and for too few or too many images.
    """
    coding = request.headers.get("content-encoding", "identity")
    if coding.strip().lower() not in ("", "identity"):
        detail = f"The content coding {truncate(coding)!r} is not accepted; send it without Content-Encoding."
        raise Problem(415, detail, kind="media-type", headers={"Accept-Encoding": "identity"})
    media = request.headers.get("content-type", "").split(";")[0].strip().lower()
    fields: dict[str, Any] = {}
    uploads: list[Upload] = []
    if media == FORM or (media == URLENCODED and not max_images):
        fields, uploads = await _parse_form(request, max_images)
    elif media == JSON:
        fields, uploads = await anyio.to_thread.run_sync(_parse_json, await request.body(), max_images)
    elif media.startswith("image/") or media == OCTETS:
        uploads = [Upload("image", await request.body())]
    elif media or await request.body():
        raise _unsupported_media_type(media, max_images)
    if uploads and not max_images:
        raise _too_many_images(max_images)
    query = _unique_fields(request.query_params.multi_items(), "the query")
    if max_images and "image" in query:
        raise invalid_field("image", "image is in the query; send it as a file (curl -F image=@cat.png).")
    for name in query.keys() | fields.keys():
        if len(name) > _MAX_NAME:
            raise invalid_field(name[:_MAX_NAME], f"{name[:_MAX_NAME]}... is not a parameter of this endpoint.")
    if repeated := sorted(query.keys() & fields.keys()):
        name = repeated[0]
        raise invalid_field(name, f"{name} is in the query and in the body; send it once.")
    try:
        validated = params.model_validate(query | fields)
    except ValidationError as error:
        raise invalid_fields(_parameter_errors(error, params, max_images)) from error
    if max_images and not uploads:
        raise invalid_field("image", "image is missing; send it as a form field, as the body, or in base64 in JSON.")
    if len(uploads) > max_images:
        raise _too_many_images(max_images)
    return ParsedRequest(validated, uploads)


def _unsupported_media_type(media: str, max_images: int) -> Problem:
    accepted = [FORM, JSON, "image/*"] if max_images else [JSON, FORM]
    subject = f"the type {truncate(media)!r}" if media else "a body without a Content-Type"
    hint = " (curl: -F image=@cat.png, or -H 'Content-Type: image/png')" if media == URLENCODED else ""
    detail = f"This endpoint does not accept {subject}; send {' or '.join(accepted)}{hint}."
    return Problem(415, detail, kind="media-type")


def _too_many_fields(place: str) -> Problem:
    detail = f"There are more than {_MAX_FIELDS} parameters in {place}; send only those of this endpoint."
    return invalid_field(place.removeprefix("the "), detail)


def _too_many_images(max_images: int) -> Problem:
    if not max_images:
        return invalid_field("image", "image: this endpoint accepts no image; omit it.")
    limit = "one image" if max_images == 1 else f"at most {max_images} images"
    return invalid_field("image", f"image: too many images were sent; this endpoint accepts {limit}.")


def _repeated_field(name: str, place: str) -> Problem:
    short_name = name[:_MAX_NAME]
    return invalid_field(short_name, f"{short_name} appears more than once in {place}; send it once.")


def _unique_fields(items: Iterable[tuple[str, str]], place: str) -> dict[str, Any]:
    """Return the fields by name, without empty ones, as forms send them for inputs that were not filled in."""
    fields: dict[str, Any] = {}
    for name, value in items:
        if not value:
            continue
        if name in fields:
            raise _repeated_field(name, place)
        fields[name] = value
        if len(fields) > _MAX_FIELDS:
            raise _too_many_fields(place)
    return fields


def _check_charset(content_type: str) -> None:
    """Refuse other charsets than UTF-8 and its subset ASCII.

    Starlette decodes the text of a form by any codec of Python; some take quadratic time, others always fail.
    """
    charset = parse_options_header(content_type)[1].get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in ("utf-8", "us-ascii"):
        detail = f"The charset {truncate(charset)!r} is not accepted; encode the form in UTF-8, and send no charset."
        raise Problem(400, detail, kind="malformed")


async def _parse_form(request: Request, max_images: int) -> tuple[dict[str, Any], list[Upload]]:
    _check_charset(request.headers["content-type"])
    try:
        form = await request.form(max_files=max_images + 1, max_fields=_MAX_FIELDS, max_part_size=_MAX_PART_BYTES)
    except HTTPException as error:
        if error.status_code != 400:
            raise
        raise _form_problem(str(error.detail), max_images) from error
    except OSError as error:  # the temporary folder holds the files of a form until all of it has arrived
        log.error("an upload cannot be stored: %s", error)
        detail = "There is no space for another upload; retry in a few seconds."
        raise Problem(503, detail, kind="no-room") from error
    try:
        uploads: list[Upload] = []
        text_fields: list[tuple[str, str]] = []
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                if len(value) > _MAX_FIELD_BYTES:
                    raise _field_too_long(name)
                text_fields.append((name, value))
            elif name != "image":
                short_name = name[:_MAX_NAME]
                raise invalid_field(short_name, f"{short_name} is a file; send images in the field image.")
            elif value.filename or value.size:  # a file input that was not filled in has neither
                file = (value.filename or "")[:_MAX_FILE_NAME].encode(errors="replace").decode()
                uploads.append(Upload("image", await value.read(), file))
    finally:
        await form.close()
    fields = _unique_fields(text_fields, "the form")
    if "image" in fields:
        raise invalid_field("image", "image is text; send it as a file (curl -F image=@cat.png).")
    return fields, _numbered(uploads)


def _field_too_long(name: str) -> Problem:
    short_name = name[:_MAX_NAME]
    hint = "; send an image as a file (curl -F image=@cat.png)" if name == "image" else ""
    detail = f"{short_name} has more than {_MAX_FIELD_BYTES} characters, the limit of a text field{hint}."
    return invalid_field(short_name, detail)


def _form_problem(message: str, max_images: int) -> Problem:
    """Return the problem for a form that Starlette refuses with this message."""
    if message.startswith("Too many files"):
        return _too_many_images(max_images)
    if message.startswith("Too many fields"):
        return _too_many_fields("the form")
    if "exceeded maximum size" in message:
        hint = "; send an image as a file (curl -F image=@cat.png)" if max_images else ""
        detail = f"A text field of the form has more than {_MAX_PART_BYTES} bytes{hint}."
        return invalid_field("image" if max_images else "body", detail)
    hint = "let the HTTP client set Content-Type" if "boundary" in message else "encode it as multipart/form-data"
    return Problem(400, f"The form cannot be parsed ({message.rstrip('.')}): {hint}.", kind="malformed")


def _parse_json(body: bytes, max_images: int) -> tuple[dict[str, Any], list[Upload]]:
    if not body:
        return {}, []
    max_values = max(_MAX_VALUES, 2 * max_images + _MAX_FIELDS)  # the data URL of an image contains a comma
    if body.count(b",") > max_values:
        detail = f"The body has more than {max_values} values; send only the parameters of this endpoint."
        raise invalid_field("body", detail)
    try:
        parsed = json.loads(body.decode(), object_pairs_hook=_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"The body is not valid JSON: {error}.", kind="malformed") from error
    if not isinstance(parsed, dict):
        raise invalid_field("body", "The body is JSON but not an object; send {...}.")
    fields = cast(dict[str, Any], parsed)
    if len(fields) > _MAX_FIELDS:
        raise _too_many_fields("the body")
    if "image" not in fields or not max_images:
        return fields, []
    value = fields.pop("image")
    texts = cast(list[Any], value) if isinstance(value, list) else [value]
    if len(texts) > max_images:
        raise _too_many_images(max_images)
    names = ["image"] if len(texts) == 1 else [f"image[{i}]" for i in range(len(texts))]
    return fields, [Upload(name, _decode_base64(text, name)) for name, text in zip(names, texts, strict=True)]


def _object(members: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object; refuse names that are not valid Unicode, and repeated names, which `dict` would merge."""
    "".join(name for name, _ in members).encode()
    fields: dict[str, object] = {}
    for name, value in members:
        if name in fields:
            raise _repeated_field(name, "the body")
        fields[name] = value
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


_STANDARD = bytes.maketrans(b"-_", b"+/")
"""Converts the URL-safe alphabet of base64 to the standard one."""


def _decode_base64(text: object, field: str) -> bytes:
    """Return the bytes of a base64 text or a data URL: in either alphabet, with or without line breaks and padding."""
    try:
        if not isinstance(text, str):
            raise TypeError
        # Bytes: the pieces of a text that is split at blanks could take 24 times its memory.
        compact = (text.partition("base64,")[2] or text).encode("ascii").translate(_STANDARD, b" \t\r\n\f\v")
        compact = compact.rstrip(b"=")
        return base64.b64decode(compact + b"=" * (-len(compact) % 4), validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        detail = f"{field} is not base64; send the file's bytes in base64, or a list of such texts."
        raise invalid_field(field, detail) from error


def _numbered(uploads: list[Upload]) -> list[Upload]:
    """Add the position to the field of each of several images."""
    if len(uploads) < 2:
        return uploads
    return [dataclasses.replace(upload, field=f"image[{i}]") for i, upload in enumerate(uploads)]


def _parameter_errors(error: ValidationError, params: type[BaseModel], max_images: int) -> list[FieldError]:
    """Convert pydantic's errors; for an unknown parameter list the valid ones."""
    names = ", ".join(field.alias or name for name, field in params.model_fields.items())
    names = f"image, {names}" if max_images else names
    errors = error.errors()
    return [
        FieldError(
            field=converted.field,
            detail=f"{converted.field} is not a parameter of this endpoint; the parameters are {names}.",
        )
        if raw["type"] == "extra_forbidden"
        else converted
        for raw, converted in zip(errors, field_errors(errors), strict=True)
    ]
