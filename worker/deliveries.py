"""Deliveries of webhooks: the ends of jobs that are to be sent, which the services claim, try and settle.

The script that ends a job records its delivery in the same step, so that none is lost. One of several services claims a
delivery with a lease, sends it and settles it; if it dies meanwhile, the lease lapses and another one repeats the
attempt. A delivery keeps its id, so that receivers can ignore repetitions.
"""

import logging
import secrets
from dataclasses import dataclass
from typing import Any, Literal

from worker.job_results import JobView
from worker.records import read_view
from worker.redis_keys import RECEIVERS, deliveries_key, delivery_key, script, sending_key

LEASE_S = 60.0
"""How long a claim holds: several times what an attempt may take."""

MAX_ATTEMPTS_AT_ONCE = 4
"""Attempts at one receiver at the same time, of all services together."""

log = logging.getLogger("ncml.queue")


@dataclass(frozen=True)
class Delivery:
    """One claimed attempt to send the end of a job."""

    id: str
    token: str
    receiver: str
    url: str
    attempts: int
    """Number of attempts, with this one."""
    view: JobView


def receiver_of(url: str) -> str:
    """Return the receiver of an address: scheme, host and port."""
    return "/".join(url.split("/", 3)[:3])


class Deliveries:
    """The deliveries on the queue's server. Raises `redis.exceptions.RedisError` if it does not answer. Thread-safe."""

    def __init__(self, client: Any) -> None:
        self._redis = client
        self._deliver = script(client, "deliver")
        self._settle = script(client, "settle")

    def claim(self, room: int) -> list[Delivery]:
        """Return at most `room` deliveries that are due, with a lease on each."""
        token = secrets.token_hex(8)
        answer: list[tuple[bytes, bytes, list[bytes]]] = self._deliver(
            keys=[RECEIVERS], args=[token, LEASE_S, room, MAX_ATTEMPTS_AT_ONCE]
        )
        deliveries: list[Delivery] = []
        for receiver, delivery_id, values in answer:
            texts = [value.decode(errors="replace") for value in values]
            fields = dict(zip(texts[::2], texts[1::2], strict=True))
            try:
                view = read_view(fields["job"], fields)
                delivery = Delivery(
                    delivery_id.decode(), token, receiver.decode(), fields["webhook"],
                    int(fields["webhook_attempts"]), view,
                )  # fmt: skip
            except (ValueError, KeyError):
                log.error("the record of the delivery %s is damaged", delivery_id.decode(errors="replace"))
                self._end(receiver.decode(), delivery_id.decode(), token, "failed", 0)
                continue
            deliveries.append(delivery)
        return deliveries

    def settle(
        self, delivery: Delivery, state: Literal["waiting", "delivered", "failed"], pause_s: float = 0.0
    ) -> bool:
        """End an attempt: a delivery that is still `waiting` is due again after the pause.

        Return False if the lease has lapsed, after which another attempt decides.
        """
        return self._end(delivery.receiver, delivery.id, delivery.token, state, pause_s)

    def _end(self, receiver: str, delivery_id: str, token: str, state: str, pause_s: float) -> bool:
        keys = [sending_key(receiver), deliveries_key(receiver), delivery_key(delivery_id)]
        return bool(self._settle(keys=keys, args=[delivery_id, token, state, pause_s]))

    def count(self, receiver: str) -> int:
        """Return how many deliveries to a receiver have not been settled."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.zcard(deliveries_key(receiver))
        pipe.zcard(sending_key(receiver))
        return sum(pipe.execute())

    def count_all(self) -> int:
        """Return how many deliveries have not been settled."""
        receivers: set[bytes] = self._redis.smembers(RECEIVERS)
        return sum(self.count(receiver.decode()) for receiver in receivers)
