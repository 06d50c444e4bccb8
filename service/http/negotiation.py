"""Client preferences: `Accept` (RFC 9110) chooses the media type, `Prefer` (RFC 7240) how long to wait."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers

from service.http.problems import Problem, invalid_field, truncate

JSON = "application/json"
PNG = "image/png"
ZIP = "application/zip"
NPZ = "application/x-npz"

_MAX_MEMBERS = 100
"""Members of one header that are read; further ones are ignored."""


def negotiate(headers: Headers, offers: Sequence[str]) -> str:
    """Return the offer that `Accept` prefers, the first among equals. Raises the 406 `Problem` without one."""
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

    Raises the 422 `Problem` if the wait is not a number. Other preferences are ignored, as the RFC requires.
    """
    wait_s, applied = limit_s, list[str]()
    for member in _members(headers, "prefer"):
        name, _, value = (token.strip().strip('"').lower() for token in member.split(";")[0].partition("="))
        if name == "respond-async":
            wait_s = 0.0
            applied.append("respond-async")
        elif name == "wait" and "respond-async" not in applied:
            if not re.fullmatch(r"\d{1,9}", value):
                detail = f"Prefer: wait is {truncate(value)!r}; it must be a whole number of seconds."
                raise invalid_field("Prefer", detail)
            wait_s = min(float(value), limit_s)
            applied.append(f"wait={wait_s:.0f}")
    return WaitPreference(wait_s, ", ".join(applied) or None)


def _members(headers: Headers, name: str) -> list[str]:
    """Return the members of a list header, over all its lines (RFC 9110, 5.3)."""
    members = ",".join(headers.getlist(name)).split(",", _MAX_MEMBERS)[:_MAX_MEMBERS]
    return [member.strip() for member in members if member.strip()]


def _media_range(member: str) -> tuple[str, float]:
    """Return the media range and its quality."""
    media, *parameters = (part.strip() for part in member.split(";"))
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q" and re.fullmatch(r"\s*(0(\.\d*)?|1(\.0*)?)\s*", value):
            return media, float(value)
    return media, 1.0
