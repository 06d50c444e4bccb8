"""The record of a job in Redis: RQ's fields and ours, how they are written, and the views and events read from them."""

import time
import uuid
import zlib
from collections.abc import Sequence
from typing import Any, TypedDict, Unpack

import pydantic_core
from pydantic import ValidationError
from rq.job import Job as RqJob
from rq.serializers import JSONSerializer

from worker.contract import JOB, Job, JobStatus, Priority, Task, batch_key, is_alone
from worker.job_results import Event, JobError, JobView, ModelRef, Timing, Webhook

VIEW_FIELDS = (
    "status", "outcome", "task", "model", "version", "priority", "request_id", "n", "submitted", "started", "ended",
    "timing", "error", "progress", "start_by", "origin", "fingerprint", "owner", "files", "digests", "format",
    "cancel", "webhook_id", "webhook_state", "webhook_attempts",
)  # fmt: skip
"""The fields that `read_view` reads."""

MAX_PAYLOAD_BYTES = 256 * 2**20
"""Maximum bytes of a job as JSON."""

MAX_PIXEL_BYTES = (MAX_PAYLOAD_BYTES - 2**20) // 4 * 3
"""Maximum bytes of the images of a job, which base64 makes a third longer."""

RQ_STATUS = {
    JobStatus.SUCCEEDED: "finished",
    JobStatus.FAILED: "failed",
    JobStatus.EXPIRED: "failed",
    JobStatus.CANCELED: "canceled",
}
"""RQ's name of each terminal state, and of the registry that lists it."""

_RQ_JOB: Any = RqJob  # RQ is not typed


class JobFacts(TypedDict, total=False):
    """What a submitter states about a job in its record. Under the same names, its view has all but the last two."""

    fingerprint: str
    """Digest of the request."""
    owner: str
    """Owner of the request."""
    files: Sequence[str]
    """Names of the image files."""
    digests: Sequence[str]
    """SHA-256 of each file that a detector judges."""
    format: str
    """Format of the result."""
    traceparent: str
    """Trace of the request, which the worker continues."""
    webhook: str
    """Address to which the end of the job is sent (`worker.deliveries`)."""


def make_record(
    job: Job, job_id: str, *, result_ttl_s: int, origin: str, client: Any, **facts: Unpack[JobFacts]
) -> dict[str, str | bytes | int | float]:
    """Return the fields of the record of a new job in the queue `origin`."""
    rq_job = _RQ_JOB.create(
        f"ncml.{job.task}",
        args=(JOB.dump_json(job).decode(),),
        id=job_id,
        origin=origin,
        timeout=max(1, round(job.timeout_s)),
        result_ttl=result_ttl_s,
        failure_ttl=result_ttl_s,
        description=f"{job.task} {job.n} with {job.model}",
        status="queued",
        serializer=JSONSerializer,
        connection=client,
    )
    fields = rq_job.to_dict() | {
        "status": "queued",
        "task": job.task,
        "model": job.model,
        "priority": job.priority,
        "request_id": job.request_id,
        "n": job.n,
        "batch_key": batch_key(job),
        "fingerprint": "",
        "owner": "",
    }
    for name, value in facts.items():
        if value:
            fields[name] = value if isinstance(value, str) else pydantic_core.to_json(value)
    if facts.get("webhook"):
        fields["webhook_id"] = f"msg_{uuid.uuid4().hex}"
    if job.version:
        fields["version"] = job.version
    if is_alone(job):
        fields["alone"] = "1"
    return fields


def parse_job(data: bytes) -> Job:
    """Return the job in the body of an RQ job. Raises `ValueError` if it is not a job of this version."""
    try:
        decompressor = zlib.decompressobj()
        text = decompressor.decompress(data, MAX_PAYLOAD_BYTES)
        if not decompressor.eof:
            raise ValueError(f"it is cut off or has more than {MAX_PAYLOAD_BYTES} bytes")
        return JOB.validate_json(pydantic_core.from_json(text)[2][0])
    except ValidationError as error:  # the input itself holds image data
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ValueError(f"the payload is not a job of this version: {faults}") from error
    except (zlib.error, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"the payload is not a job of this version: {error}") from error


def read_view(job_id: str, fields: dict[str, str]) -> JobView:
    """Return the public state of a job from the fields of its record."""
    status = _status(fields)
    # A claim stores the time also for a job that it finds too late.
    has_started = "started" in fields and status not in (JobStatus.QUEUED, JobStatus.EXPIRED)
    return JobView(
        id=job_id,
        status=status,
        task=Task(fields["task"]),
        model=ModelRef(name=fields["model"], version=fields["version"]) if "version" in fields else None,
        model_name=fields["model"],
        priority=Priority(fields["priority"]),
        request_id=fields["request_id"],
        fingerprint=fields.get("fingerprint", ""),
        owner=fields.get("owner", ""),
        files=pydantic_core.from_json(fields.get("files", "[]")),
        digests=pydantic_core.from_json(fields.get("digests", "[]")),
        format=fields.get("format", ""),
        n=int(fields.get("n", 1)),
        created_at=float(fields["submitted"]),
        started_at=float(fields["started"]) if has_started else None,
        start_by=float(fields["start_by"]) if "start_by" in fields else None,
        ended_at=float(fields["ended"]) if "ended" in fields else None,
        timing=_timing(fields),
        progress=read_event(fields["progress"]).progress if "progress" in fields else None,
        error=JobError.model_validate_json(fields["error"]) if "error" in fields else None,
        webhook=_webhook(fields),
        is_canceling="cancel" in fields and not status.is_terminal,
    )


def status_event(status: JobStatus, error: JobError | None = None) -> str:
    """Return the stream entry for a change of state, without its id."""
    return write_event(Event(id="", kind="status", status=status, error=error))


def write_event(event: Event) -> str:
    """Return an event as JSON, without its id, which the stream assigns."""
    return event.model_dump_json(exclude={"id"}, exclude_none=True)


def read_event(entry: str, event_id: str = "") -> Event:
    """Return the event of a stream entry. Raises `ValueError` if it is damaged."""
    try:
        return Event.model_validate({"id": event_id} | pydantic_core.from_json(entry), strict=False)
    except TypeError as error:
        raise ValueError("the entry is not an event") from error


def _status(fields: dict[str, str]) -> JobStatus:
    if fields.get("outcome"):
        return JobStatus(fields["outcome"])
    by_rq_status = {"queued": JobStatus.QUEUED, "started": JobStatus.RUNNING, "canceled": JobStatus.CANCELED}
    return by_rq_status.get(fields.get("status", ""), JobStatus.FAILED)


def _webhook(fields: dict[str, str]) -> Webhook | None:
    if "webhook_id" not in fields:
        return None
    return Webhook.model_validate(
        {
            "id": fields["webhook_id"],
            "state": fields.get("webhook_state", "waiting"),
            "attempts": int(fields.get("webhook_attempts", 0)),
        }
    )


def _timing(fields: dict[str, str]) -> Timing:
    if "timing" in fields:
        return Timing.model_validate_json(fields["timing"])
    if "started" in fields and fields["status"] != "queued":
        waited_until = float(fields["started"])
    else:
        waited_until = float(fields.get("ended", time.time()))
    return Timing(queue_s=max(0.0, waited_until - float(fields["submitted"])))
