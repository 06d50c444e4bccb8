"""Names of the queues and keys in Redis, and the Lua scripts that change them.

    rq:job:{id}              hash: the fields of RQ and of `worker.records`. The keys of a job have no time to live
                             before it ends, and expire `result_ttl_s` later
    rq:queue:ncml:{lane}:{priority}   list: ids of waiting jobs, oldest first
    rq:queue:ncml:{lane}:held         list: ids of jobs whose input the service is still preparing
    ncml:wake:{lane}         list of at most one entry: wakes an idle worker
    ncml:leases              sorted set: {id}:{token of the attempt} by the time the lease lapses (the server's clock)
    ncml:events:{id}         stream, capped: every change of state, and progress
    ncml:blob:{id}           images: uint8, NHWC
    ncml:blob:{id}:preview   a Preview
    ncml:waiting             hash: bytes of the jobs that wait, by lane
    ncml:changes:state, ncml:changes:progress   channels: ids of jobs, separated by spaces, that changed
    ncml:workers             sorted set: names of workers; ncml:worker:{name}: what a worker publishes, until it lapses
    ncml:serving:{lane}:{name}   set: the models that a worker serves, each as name and as name@version
    ncml:settling            exists while workers may not have published again what had lapsed
    ncml:descriptor:{digest} what workers publish about a model, as long as one serves it
    ncml:pictures:{digest}   the pictures of what a detector finds and misses, a JPEG, as long as a worker serves it
    ncml:delivery:{id}       hash: the record of an ended job that names a webhook, without its result, until it is sent
    ncml:receivers           set: receivers of webhooks, as https://host:port, for which there are deliveries
    ncml:deliveries:{receiver}   sorted set: ids of deliveries by the time they are due (the server's clock)
    ncml:sending:{receiver}      sorted set: {id}:{token of the attempt} by the time the lease lapses
    ncml:reviews             sorted set: {owner}:{id}:{bytes} of every review by the time it expires
    ncml:review:{owner}:{id} hash: a review with its image, until it expires
    ncml:probe               written by readiness checks
    ncml:erased              exists for an hour after the service has had the append-only file rewritten
    rq:wip:*, rq:finished:*, rq:failed:*, rq:canceled:*   RQ's registries, for RQ's tools; nothing here reads them

The scripts build key names themselves, so this needs one Redis (or Valkey) server rather than a cluster.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from worker.contract import Lane, Priority, queue_name

LEASES = "ncml:leases"
WORKERS = "ncml:workers"
PROBE = "ncml:probe"
ERASED = "ncml:erased"
SETTLING = "ncml:settling"
RECEIVERS = "ncml:receivers"
REVIEWS = "ncml:reviews"
STATE_CHANNEL = "ncml:changes:state"
PROGRESS_CHANNEL = "ncml:changes:progress"


def job_key(job_id: str) -> str:
    """Return the key of a job's hash."""
    return f"rq:job:{job_id}"


def queue_key(name: str) -> str:
    """Return the key of a queue's list."""
    return f"rq:queue:{name}"


def wake_key(lane: Lane) -> str:
    """Return the key of the list on which the idle workers of a lane block."""
    return f"ncml:wake:{lane}"


def events_key(job_id: str) -> str:
    """Return the key of a job's event stream."""
    return f"ncml:events:{job_id}"


def pictures_key(digest: str) -> str:
    """Return the key of the pictures of a detector's power."""
    return f"ncml:pictures:{digest}"


def blob_key(job_id: str) -> str:
    """Return the key of a job's images."""
    return f"ncml:blob:{job_id}"


def preview_key(job_id: str) -> str:
    """Return the key of the latest preview of a running job."""
    return f"{blob_key(job_id)}:preview"


def review_key(owner: str, review_id: str) -> str:
    """Return the key of a review, which contains the owner of its API key."""
    return f"ncml:review:{owner}:{review_id}"


def delivery_key(delivery_id: str) -> str:
    """Return the key of what a webhook is sent."""
    return f"ncml:delivery:{delivery_id}"


def deliveries_key(receiver: str) -> str:
    """Return the key of the deliveries to a receiver that are not being sent."""
    return f"ncml:deliveries:{receiver}"


def sending_key(receiver: str) -> str:
    """Return the key of the leases of deliveries to a receiver."""
    return f"ncml:sending:{receiver}"


def worker_key(name: str) -> str:
    """Return the key of what a worker publishes."""
    return f"ncml:worker:{name}"


def descriptor_key(digest: str) -> str:
    """Return the key of a model's descriptor."""
    return f"ncml:descriptor:{digest}"


def serving_key(lane: Lane, name: str) -> str:
    """Return the key of the models that a worker serves in a lane."""
    return f"ncml:serving:{lane}:{name}"


def queue_names(lanes: Sequence[Lane]) -> list[str]:
    """Return the queues of some lanes: every high-priority queue first."""
    return [queue_name(lane, priority) for priority in Priority for lane in lanes]


def script(client: Any, name: str) -> Any:
    """Register an atomic script of `lua/`; call it as `script(keys=..., args=..., client=...)`."""
    folder = Path(__file__).parent / "lua"
    text = (folder / f"{name}.lua").read_text()
    flags = "".join(re.findall(r"\A#![^\n]*\n", text))
    return client.register_script(flags + (folder / "common.lua").read_text() + text.removeprefix(flags))
