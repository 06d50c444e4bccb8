"""Checks of the host that a request names and of the page that sends it: pages of other sites are refused.

A page of another site could otherwise send forms to a service on the user's machine, or read its data by pointing its
own name there (DNS rebinding). Programs other than browsers send neither `Origin` nor `Sec-Fetch-Site`.
"""

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.http.problems import Problem, truncate

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})
"""Paths that probes and Prometheus request under any host name; they contain nothing of use to a foreign page."""


class OriginMiddleware:
    """Refuses requests to hosts that are not allowed (421), and from pages of other origins (403)."""

    def __init__(self, app: ASGIApp, allowed_hosts: Sequence[str], origins: Sequence[str]) -> None:
        self.app = app
        self._hosts = [host.lower() for host in allowed_hosts]
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, or refuse it."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        problem = self._host_problem(headers) or self._origin_problem(headers, scope["method"])
        if problem:
            await problem.response(scope["state"]["request_id"])(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _host_problem(self, headers: Headers) -> Problem | None:
        host = _hostname(headers.get("host", ""))
        for pattern in self._hosts:
            if pattern in ("*", host) or (pattern.startswith("*.") and host.endswith(pattern[1:])):
                return None
        detail = f"The host {truncate(host)!r} is not served; name it in NCML_ALLOWED_HOSTS."
        return Problem(421, detail, kind="unknown-host")

    def _origin_problem(self, headers: Headers, method: str) -> Problem | None:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin in self._origins or site in ("same-origin", "none"):
            return None
        if site is None and (origin is None or origin.partition("://")[2] == headers.get("host")):
            return None
        if site and method == "GET" and headers.get("sec-fetch-mode") == "navigate":  # the user followed a link
            return None
        site_name = truncate(origin) if origin and origin != "null" else "other sites"
        detail = f"Pages of {site_name} are refused; name their origin in NCML_CORS_ORIGINS."
        return Problem(403, detail, kind="cross-site")


def _hostname(host: str) -> str:
    """Return the name in a `Host` header, without its port; an IPv6 address keeps its brackets."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()
