"""Reads what a client prefers: `Accept` (RFC 9110) and `Prefer` (RFC 7240)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers

from service.problems import Problem, invalid, shown

JSON = "application/json"
PNG = "image/png"
ZIP = "application/zip"
NPZ = "application/x-npz"

BINARY = {"schema": {"type": "string", "format": "binary"}, "example": "(the bytes of the file)"}
"""A file in the OpenAPI document."""


_MAX_MEMBERS = 100
"""What one header may list; the rest says nothing."""


def members(headers: Headers, name: str) -> list[str]:
    """What a header lists, over all the lines that it has (RFC 9110, 5.3)."""
    listed = ",".join(headers.getlist(name)).split(",", _MAX_MEMBERS)[:_MAX_MEMBERS]
    return [member.strip() for member in listed if member.strip()]


def negotiate(headers: Headers, offers: Sequence[str]) -> str:
    """The offer that `Accept` likes best; among equals the first. Raises the 406 `Problem` when none will do."""
    wanted = members(headers, "accept") or ["*/*"]
    ranges = [_media_range(part.lower()) for part in wanted]
    best, best_quality = "", 0.0
    for offer in offers:
        main = offer.split("/")[0]
        fitting = [
            (specificity, quality)
            for media, quality in ranges
            if (specificity := {offer: 3, f"{main}/*": 2, "*/*": 1, "*": 1}.get(media, 0))
        ]
        quality = max(fitting, default=(0, 0.0))[1]
        if quality > best_quality:
            best, best_quality = offer, quality
    if not best:
        asked = shown(", ".join(wanted))
        raise Problem(406, f"Accept asks for {asked!r}; this is offered as {' or '.join(offers)}.", kind="media-type")
    return best


def _media_range(part: str) -> tuple[str, float]:
    media, *params = (word.strip() for word in part.split(";"))
    for param in params:
        name, _, value = param.partition("=")
        if name.strip() == "q" and re.fullmatch(r"\s*(0(\.\d*)?|1(\.0*)?)\s*", value):
            return media, float(value)
    return media, 1.0


@dataclass(frozen=True)
class Patience:
    """How long a client waits for its job; `applied` is echoed as Preference-Applied."""

    wait_s: float
    applied: str | None


def patience(headers: Headers, limit_s: float) -> Patience:
    """Read `respond-async` and `wait=N` (whole seconds) of `Prefer`; a longer wait than `limit_s` is cut to it.

    Raises the 422 `Problem` for a wait that is no number. Other preferences are ignored, as the RFC asks.
    """
    wait_s, applied = limit_s, list[str]()
    for part in members(headers, "prefer"):
        name, _, value = (word.strip().strip('"').lower() for word in part.split(";")[0].partition("="))
        if name == "respond-async":
            wait_s = 0.0
            applied.append("respond-async")
        elif name == "wait" and "respond-async" not in applied:
            if not re.fullmatch(r"\d{1,9}", value):
                raise invalid("Prefer", f"Prefer: wait is {shown(value)!r}; it must be a whole number of seconds.")
            wait_s = min(float(value), limit_s)
            applied.append(f"wait={wait_s:.0f}")
    return Patience(wait_s, ", ".join(applied) or None)
