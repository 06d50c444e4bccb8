"""Client preferences: `format` or `Accept` (RFC 9110) choose the media type, `Prefer` (RFC 7240) how long to wait."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from starlette.datastructures import Headers

from service.http.problems import Problem, invalid_field, truncate

JSON = "application/json"
PNG = "image/png"
ZIP = "application/zip"
NPZ = "application/x-npz"

Format = Literal["json", "png", "zip", "npz"]
MEDIA_TYPES: dict[str, str] = {"json": JSON, "png": PNG, "zip": ZIP, "npz": NPZ}
"""The media type of each value of the parameter `format`."""

_MAX_KEY = 255
"""Characters of an idempotency key."""
_MAX_MEMBERS = 100
"""Members of one header that are read; further ones are ignored."""


def negotiate(headers: Headers, offers: Sequence[str], requested: Format | None = None) -> str:
    """Return the media type of the requested format, or else the offer that `Accept` prefers, on a tie the first.

    Raises the 422 `Problem` if the format is not offered, and 406 if `Accept` matches no offer.
    """
    if requested:
        media = MEDIA_TYPES[requested]
        if media not in offers:
            names = " or ".join(name for name, offer in MEDIA_TYPES.items() if offer in offers)
            raise invalid_field("format", f"format is {requested!r}; here it must be {names}.")
        return media
    accept = _members(headers, "accept") or ["*/*"]
    ranges = [_media_range(member.lower()) for member in accept]
    best, best_quality = "", 0.0
    for offer in offers:
        main_type = offer.split("/")[0]
        specificities = {offer: 3, f"{main_type}/*": 2, "*/*": 1, "*": 1}
        matches = [(specificities[media], quality) for media, quality in ranges if media in specificities]
        quality = max(matches, default=(0, 0.0))[1]  # that of the most specific range
        if quality > best_quality:
            best, best_quality = offer, quality
    if not best:
        detail = f"Accept is {truncate(', '.join(accept))!r}; this endpoint offers {' or '.join(offers)}."
        raise Problem(406, detail, kind="media-type")
    return best


@dataclass(frozen=True)
class WaitPreference:
    """How long a client waits for its job; `applied` is echoed as Preference-Applied."""

    wait_s: float
    applied: str | None


def wait_preference(headers: Headers, limit_s: float) -> WaitPreference:
    """Read `respond-async` and `wait=N` (whole seconds) of `Prefer`; the wait is at most, and by default, `limit_s`.

    With both, the client waits N seconds (RFC 7240, 4.3); with `respond-async` alone, it does not wait. As the RFC
    requires, other and invalid preferences are ignored, and of repeated ones the first counts.
    """
    preferences: dict[str, str] = {}
    for member in _members(headers, "prefer"):
        name, _, value = (token.strip().strip('"').lower() for token in member.split(";")[0].partition("="))
        preferences.setdefault(name, value)
    applied = ["respond-async"] if "respond-async" in preferences else []
    wait_s = 0.0 if applied else limit_s
    if re.fullmatch(r"[0-9]+", preferences.get("wait", "")):
        wait_s = min(float(preferences["wait"]), limit_s)
        applied.append(f"wait={wait_s:.0f}")
    return WaitPreference(wait_s, ", ".join(applied) or None)


def idempotency_key(headers: Headers) -> str | None:
    """Return the value of `Idempotency-Key`, a string in quotes (draft-ietf-httpapi-idempotency-key-header) or bare.

    Raises the 422 `Problem` for an empty key, several keys, and characters that are not allowed.
    """
    lines = headers.getlist("idempotency-key")
    if not lines:
        return None
    quoted = re.fullmatch(r'"((?:[ !#-\[\]-~]|\\["\\])*)"(?:\s*;.*)?', lines[0].strip())
    key = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else lines[0].strip()
    pattern = "[ -~]+" if quoted else "[!#-~][!-~]*"
    if len(lines) > 1 or len(key) > _MAX_KEY or not re.fullmatch(pattern, key):
        detail = f'Idempotency-Key must be one string of 1 to {_MAX_KEY} ASCII characters, such as "order-17".'
        raise invalid_field("Idempotency-Key", detail)
    return key


def _members(headers: Headers, name: str) -> list[str]:
    """Return the members of a list header, over all its lines (RFC 9110, 5.3); commas in quotes do not separate."""
    text = ",".join(headers.getlist(name))
    members = itertools.islice(re.finditer(r'(?:"(?:[^"\\]|\\.)*"?|[^,"])+', text), _MAX_MEMBERS)
    return [member[0].strip() for member in members if member[0].strip()]


def _media_range(member: str) -> tuple[str, float]:
    """Return the media range and its quality."""
    media, *parameters = (part.strip() for part in member.split(";"))
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q" and re.fullmatch(r"\s*(0(\.\d*)?|1(\.0*)?)\s*", value):
            return media, float(value)
    return media, 1.0
