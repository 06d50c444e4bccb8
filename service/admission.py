"""Who may ask, and how often: API keys, and a quota for each client."""

import math
import time
from collections.abc import Sequence
from typing import Annotated, Any

import anyio.to_thread
from fastapi import Request, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from limits import RateLimitItem
from limits.storage import RedisStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from service.keys import KeyRing
from service.metrics import Metrics
from service.problems import Problem

_BEARER = HTTPBearer(auto_error=False, scheme_name="bearer", description="`Authorization: Bearer KEY`")
_HEADER = APIKeyHeader(name="X-API-Key", auto_error=False, scheme_name="key", description="`X-API-Key: KEY`")


class Admission:
    """A dependency of the routes that want a key: notes its owner in `request.state.owner`, or raises the 401."""

    def __init__(self, keys: KeyRing, metrics: Metrics) -> None:
        self._keys = keys
        self._metrics = metrics

    async def __call__(
        self,
        request: Request,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)],
        header: Annotated[str | None, Security(_HEADER)],
    ) -> None:
        """Admit the request or refuse it."""
        key = bearer.credentials if bearer else header
        owner = self._keys.owner(key) if key else None
        if owner is None:
            self._metrics.rejected.labels(reason="unauthorized").inc()
            fault = "This API key is not known" if key else "An API key is needed"
            raise Problem(
                401,
                f"{fault}; send yours as Authorization: Bearer KEY, or as X-API-Key.",
                kind="unauthorized",
                headers={"WWW-Authenticate": "Bearer"},
            )
        request.state.owner = owner


class Quota:
    """A dependency of the routes that make jobs: counts a client's requests, or raises the 429.

    A client is the owner of a key or, where there are no keys, an address. Windows slide: what was used in the last one
    counts for less and less. Counters lie in the queue's server, so that several services count together.
    """

    def __init__(self, redis_url: str, limits: Sequence[RateLimitItem], metrics: Metrics) -> None:
        url = redis_url.replace("unix://", "redis+unix://") if redis_url.startswith("unix://") else redis_url
        options: dict[str, Any] = {"socket_timeout": 5, "socket_connect_timeout": 5}
        self._counters = SlidingWindowCounterRateLimiter(RedisStorage(url, key_prefix="ncml:quota", **options))
        self._limits = sorted(limits, key=lambda limit: limit.get_expiry())
        self._metrics = metrics

    async def __call__(self, request: Request) -> None:
        """Count the request; what is left goes into the response's headers."""
        owner = request.state.owner
        client = f"key:{owner}" if owner else f"address:{request.client.host if request.client else ''}"
        request.state.headers = await anyio.to_thread.run_sync(self._count, client)

    def _count(self, client: str) -> dict[str, str]:
        refused = next((limit for limit in self._limits if not self._counters.hit(limit, client)), None)
        standings = [(limit, self._counters.get_window_stats(limit, client)) for limit in self._limits]
        now = time.time()
        # 0 is what the library says in the very moment in which a window begins
        resets = {limit: math.ceil(standing.reset_time - now) or limit.get_expiry() for limit, standing in standings}
        policies = (f'"{_name(limit)}";q={limit.amount};w={limit.get_expiry()}' for limit in self._limits)
        left = (f'"{_name(limit)}";r={standing.remaining};t={resets[limit]}' for limit, standing in standings)
        headers = {"RateLimit-Policy": ", ".join(policies), "RateLimit": ", ".join(left)}
        if refused:
            self._metrics.rejected.labels(reason="quota").inc()
            headers["Retry-After"] = str(resets[refused])
            used_up = f"The quota of {refused.amount} requests a {_name(refused)} is used up"
            detail = f"{used_up}; ask again in {resets[refused]} s."
            raise Problem(429, detail, kind="quota-exceeded", headers=headers)
        return headers


def _name(limit: RateLimitItem) -> str:
    """A window in words, as `minute` or `2-hour`."""
    return limit.GRANULARITY.name if limit.multiples == 1 else f"{limit.multiples}-{limit.GRANULARITY.name}"
