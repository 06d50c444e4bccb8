"""FastAPI dependencies that decide who may use the service and how often: API keys and rate limits."""

import math
import time
from collections.abc import Sequence
from typing import Annotated, Any

import anyio.to_thread
import redis
from fastapi import Request, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from limits import RateLimitItem
from limits.storage import RedisStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from service.http.client_limits import client_name
from service.http.problems import Problem
from service.keys import KeyFile

_BEARER = HTTPBearer(auto_error=False, scheme_name="bearer", description="`Authorization: Bearer KEY`")
_HEADER = APIKeyHeader(name="X-API-Key", auto_error=False, scheme_name="key", description="`X-API-Key: KEY`")


class ApiKeyAuth:
    """Requires an API key: stores its owner in `request.state.owner`, or raises the 401 `Problem`."""

    def __init__(self, keys: KeyFile) -> None:
        self._keys = keys

    async def __call__(
        self,
        request: Request,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)],
        header: Annotated[str | None, Security(_HEADER)],
    ) -> None:
        """Authenticate the request."""
        key = bearer.credentials if bearer else header
        owner = self._keys.owner(key) if key else None
        if owner is None:
            fault = "The API key is not valid" if key else "An API key is required"
            raise Problem(
                401,
                f"{fault}; send it as Authorization: Bearer KEY or X-API-Key, with ncml score --api-key, or with "
                "Client(api_key=...).",
                kind="unauthorized",
                headers={"WWW-Authenticate": "Bearer"},
            )
        request.state.owner = owner


class RateLimit:
    """Counts each client's requests for new jobs, and raises the 429 `Problem` above a limit.

    Windows slide: requests of the previous window count in part. The queue's server holds the counters, so that all
    instances share them.
    """

    def __init__(self, redis_url: str, limits: Sequence[RateLimitItem]) -> None:
        new_pool: Any = redis.BlockingConnectionPool  # redis-py's types are incomplete
        pool = new_pool.from_url(redis_url, max_connections=4, timeout=5, socket_timeout=5, socket_connect_timeout=5)
        storage = RedisStorage(redis_url, connection_pool=pool, key_prefix="ncml:quota")
        self._counters = SlidingWindowCounterRateLimiter(storage)
        self._limits = sorted(limits, key=lambda limit: limit.get_expiry())

    async def __call__(self, request: Request) -> None:
        """Count the request, and add the remaining quota to the response's headers."""
        request.state.headers = await anyio.to_thread.run_sync(self._count, client_name(request))

    def _count(self, client: str) -> dict[str, str]:
        exceeded = next((limit for limit in self._limits if not self._counters.hit(limit, client)), None)
        windows = [(limit, self._counters.get_window_stats(limit, client)) for limit in self._limits]
        now = time.time()
        # at the start of a window the library returns a reset time of 0 seconds, which is past if the server is slow
        resets_s = {
            limit: max(0, math.ceil(window.reset_time - now)) or limit.get_expiry() for limit, window in windows
        }
        policies = (f'"{_window_name(limit)}";q={limit.amount};w={limit.get_expiry()}' for limit in self._limits)
        quotas = (f'"{_window_name(limit)}";r={window.remaining};t={resets_s[limit]}' for limit, window in windows)
        headers = {"RateLimit-Policy": ", ".join(policies), "RateLimit": ", ".join(quotas)}
        if exceeded:
            headers["Retry-After"] = str(resets_s[exceeded])
            quota = f"{exceeded.amount} requests per {_window_name(exceeded)}"
            detail = f"The quota of {quota} is exhausted; retry in {resets_s[exceeded]} s."
            raise Problem(429, detail, kind="quota-exceeded", headers=headers)
        return headers


def _window_name(limit: RateLimitItem) -> str:
    """Return the name of a window, such as `minute` or `2-hour`."""
    return limit.GRANULARITY.name if limit.multiples == 1 else f"{limit.multiples}-{limit.GRANULARITY.name}"
