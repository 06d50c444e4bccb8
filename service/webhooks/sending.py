"""One attempt to send a message: a signed POST with limits on its time, its response and its redirects (none)."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpcore2

from ncml.webhooks import Signer
from service.webhooks.addresses import CheckedNetwork, ForbiddenAddress, is_public
from service.webhooks.targets import Address, Receivers, Target

SEND_S = 15.0
"""Seconds that an attempt may take in all, as the specification suggests."""

MAX_RESPONSE_BYTES = 16 * 2**10
"""Bytes of a response that are read; they are discarded."""

RESOLVERS = 32
"""Names that are resolved at the same time. An attempt gives up after `SEND_S`, but its thread waits until the system
gives up, which takes up to two minutes: the attempts at one receiver whose name hangs must leave threads to others."""


@dataclass(frozen=True)
class Attempt:
    """How an attempt ended: with the status of a response, or a fault."""

    status: int | None = None
    fault: str = ""
    retry_after_s: float = 0.0
    """Pause that the receiver asks for."""

    @property
    def is_accepted(self) -> bool:
        """Whether the receiver has accepted the message."""
        return self.status is not None and 200 <= self.status < 300

    @property
    def is_gone(self) -> bool:
        """Whether the receiver wants no more attempts."""
        return self.status == 410


class Sender:
    """Sends messages to the receivers that the operator lists."""

    def __init__(self, receivers: Receivers, signer: Signer) -> None:
        self._receivers = receivers
        self._signer = signer
        self._tls = ssl.create_default_context()
        self._resolver = ThreadPoolExecutor(RESOLVERS, thread_name_prefix="webhook-resolver")

    def close(self) -> None:
        """End the threads that resolve names, without waiting for them."""
        self._resolver.shutdown(wait=False, cancel_futures=True)

    async def send(self, target: Target, message_id: str, body: str) -> Attempt:
        """Make one attempt; its faults are part of the result. A status counts, whether or not the rest follows it."""
        answer: Attempt | None = None
        fault = ""
        try:
            headers = self._signer.headers(message_id, body)
            async with asyncio.timeout(SEND_S), self._post(target, headers, body.encode()) as response:
                answer = Attempt(response.status, retry_after_s=_retry_after_s(response))
                await _discard(response)
        except TimeoutError:
            fault = f"it did not answer within {SEND_S:g} s"
        except (ForbiddenAddress, OSError, httpcore2.NetworkError, httpcore2.TimeoutException) as error:
            fault = str(error) or type(error).__name__
        except (httpcore2.ProtocolError, ssl.SSLError) as error:
            fault = f"it does not answer as an HTTP server does ({type(error).__name__})"
        return answer or Attempt(fault=fault)

    @contextlib.asynccontextmanager
    async def _post(self, target: Target, headers: dict[str, str], body: bytes) -> AsyncGenerator[httpcore2.Response]:
        def permits(address: Address) -> bool:  # without encryption, only where the operator knows the network
            return self._receivers.lists(address, target.port) or (target.scheme == "https" and is_public(address))

        url = httpcore2.URL(
            scheme=target.scheme.encode(), host=target.host.encode(), port=target.port, target=target.path.encode()
        )
        headers = {"Host": target.authority, "Content-Length": str(len(body)), "Connection": "close"} | headers
        network = CheckedNetwork(permits, self._resolver)
        async with (
            httpcore2.AsyncConnectionPool(ssl_context=self._tls, network_backend=network) as pool,
            pool.stream("POST", url, headers=list(headers.items()), content=body) as response,
        ):
            yield response


async def _discard(response: httpcore2.Response) -> None:
    """Read a response up to a limit: receivers log one that is not read as failed."""
    received = 0
    async for part in response.aiter_stream():
        received += len(part)
        if received > MAX_RESPONSE_BYTES:
            return


def _retry_after_s(response: httpcore2.Response) -> float:
    """Return the seconds of `Retry-After`; 0 if there is none, or a date."""
    value = next((value for name, value in response.headers if name.lower() == b"retry-after"), b"")
    return float(value) if value.isdigit() else 0.0
