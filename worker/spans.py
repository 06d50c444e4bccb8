"""The spans of jobs: how long each waited, its computation, and the stages of its batch. See `worker.traces`."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from worker.job_results import JobEnding
from worker.running import RunningJob
from worker.traces import format_traceparent, parse_context

if TYPE_CHECKING:
    from opentelemetry.trace import Link, Tracer


def record_job(tracer: Tracer, entry: RunningJob, ending: JobEnding, batch: Collection[RunningJob]) -> None:
    """Record a job that has ended: how long it waited, and its computation with the stages of its batch.

    The computation links the requests of the other jobs in the batch. Its stages follow one another, each as long as
    all parts of the stage together.
    """
    from opentelemetry.trace import SpanKind, StatusCode

    parent = parse_context(entry.claim.traceparent)
    if parent is None:
        return
    started_ns, ended_ns = int(entry.started_at * 1e9), time.time_ns()
    attributes: dict[str, Any] = {
        "ncml.job.id": entry.claim.id,
        "ncml.job.task": str(entry.job.task),
        "ncml.job.attempt": entry.claim.attempts,
        "ncml.job.status": str(ending.status),
        "ncml.model": entry.job.model,
        "ncml.request.id": entry.job.request_id,
        "ncml.batch.jobs": len(batch),
    }
    if ending.timing and ending.timing.batch_size:
        attributes["ncml.batch.images"] = ending.timing.batch_size
    waiting = tracer.start_span("queue", parent, start_time=started_ns - int(entry.claim.waited_s * 1e9))
    waiting.end(started_ns)
    links = [link for other in batch if other is not entry for link in _links(other)]
    span = tracer.start_span(
        f"compute {entry.job.task}", parent, SpanKind.CONSUMER, attributes, links, start_time=started_ns
    )
    if ending.error:
        span.set_status(StatusCode.ERROR, ": ".join(ending.error.for_operators.values()))
    stage_ns, computation = started_ns, parse_context(format_traceparent(span))
    for stage, seconds in entry.stages.items():
        stage_span = tracer.start_span(stage, computation, start_time=stage_ns)
        stage_ns += int(seconds * 1e9)
        stage_span.end(stage_ns)
    span.end(max(ended_ns, stage_ns))


def _links(entry: RunningJob) -> list[Link]:
    from opentelemetry.trace import Link, get_current_span

    context = parse_context(entry.claim.traceparent)
    span_context = get_current_span(context).get_span_context()
    return [Link(span_context, {"ncml.job.id": entry.claim.id})] if context else []
