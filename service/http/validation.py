"""Sentences for pydantic's errors: the field, its value, and what would be valid. Does not import FastAPI."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, Field

from worker.contract import EVENT_ID, JOB_ID, MODEL_NAME, REVIEW_ID

_PATTERNS = {
    MODEL_NAME: "it must have 1 to 64 letters, digits, dots, underscores and hyphens, beginning with a letter or digit",
    JOB_ID: "it must have 1 to 64 letters, digits, underscores and hyphens",
    REVIEW_ID: "it must have 16 hexadecimal digits, as in the list of reviews",
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


class FieldError(BaseModel):
    """One invalid field."""

    field: str = Field(description="The invalid parameter, form field or JSON member.")
    detail: str = Field(description="What is wrong with it and what would be valid.")


def field_errors(errors: Sequence[Mapping[str, Any]]) -> list[FieldError]:
    """Convert pydantic's errors to sentences that begin with the field's name."""
    converted: list[FieldError] = []
    for error in errors:
        path = [str(part) for part in error["loc"]]
        if len(path) > 1 and path[0] in ("body", "query", "path", "header"):
            path = path[1:]
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
