"""Traces with OpenTelemetry: from an HTTP request through the queue to the stages of the engine.

Traces are off, and the SDK is not imported, unless a standard variable requests them: OTEL_TRACES_EXPORTER (`otlp`,
`console`) or OTEL_EXPORTER_OTLP_ENDPOINT. The `traceparent` of a job's request (W3C Trace Context) is in the job's
record rather than its payload, so that workers without traces ignore it. `worker.spans` records the jobs.
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from ncml.errors import NcmlError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_EXPORTERS = {"otlp": "otlp_proto_http"}
"""Names of exporters in OTEL_TRACES_EXPORTER that are not those of their entry points."""


def are_requested() -> bool:
    """Return whether the environment requests traces."""
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "")
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    has_exporter = bool(exporter) or any(os.environ.get(name) for name in endpoints)
    return has_exporter and exporter != "none" and os.environ.get("OTEL_SDK_DISABLED", "").lower() != "true"


def make_tracer(component: str) -> Tracer | None:
    """Return the tracer of this process, None if traces are off; raise `NcmlError` if they cannot be exported.

    component: the service's name in the traces, unless OTEL_SERVICE_NAME is set.
    """
    if not are_requested():
        return None
    os.environ.setdefault("OTEL_SERVICE_NAME", component)
    try:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise NcmlError(
            "OTEL_* variables request traces: run pip install -e '.[traces]' in the clone of ncml."
        ) from None
    name = os.environ.get("OTEL_TRACES_EXPORTER", "") or "otlp"
    points = list(entry_points(group="opentelemetry_traces_exporter", name=_EXPORTERS.get(name, name)))
    if not points:
        raise NcmlError(f"OTEL_TRACES_EXPORTER is {name!r}, which is not installed: set otlp, console or none.")
    provider = TracerProvider()  # which reads the other OTEL_* variables: attributes, sampler, limits
    provider.add_span_processor(BatchSpanProcessor(points[0].load()()))
    atexit.register(provider.shutdown)  # sends the last spans
    return provider.get_tracer("ncml")


def trace_id(traceparent: str) -> str:
    """Return the trace's id in a `traceparent`; "" if it is not one."""
    match = _TRACEPARENT.fullmatch(traceparent)
    return match[1] if match else ""


def start_request(tracer: Tracer, headers: Mapping[str, str], method: str) -> Span:
    """Start the span of an HTTP request, within the trace of its client if it names one."""
    from opentelemetry.trace import SpanKind

    return tracer.start_span(
        method, parse_context(headers.get("traceparent", "")), SpanKind.SERVER, {"http.request.method": method}
    )


def end_request(span: Span, method: str, route: str, status: int, request_id: str) -> None:
    """End the span of an HTTP request."""
    from opentelemetry.trace import StatusCode

    span.update_name(f"{method} {route}")
    span.set_attributes({"http.route": route, "http.response.status_code": status, "ncml.request.id": request_id})
    if status >= 500:
        span.set_status(StatusCode.ERROR)
    span.end()


def format_traceparent(span: Span) -> str:
    """Return the `traceparent` with which other processes continue the trace of a span."""
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def parse_context(traceparent: str) -> Context | None:
    """Return the OpenTelemetry context of a `traceparent`; None if it is not one."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    if not trace_id(traceparent):
        return None
    return TraceContextTextMapPropagator().extract({"traceparent": traceparent})
