"""The application: `create_app` assembles it, and `from_environment` creates it in a server process."""

import contextlib
import logging
import sys
from collections.abc import AsyncGenerator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, FastAPI
from starlette.middleware.cors import CORSMiddleware

from ncml.errors import NcmlError
from ncml.webhooks import SecretError, Signer
from service.auth import ApiKeyAuth, RateLimit
from service.decoders import check_temporary_folder
from service.http.bodies import BodyLimitMiddleware
from service.http.handlers import add_exception_handlers
from service.http.middleware import (
    RequestContextMiddleware,
    UnexpectedErrorMiddleware,
    log_to_stderr,
)
from service.http.openapi import install_openapi
from service.http.origins import OriginMiddleware
from service.http.pages import install_docs, install_studio
from service.http.stopping import Stop
from service.jobs import JobService, check_queue
from service.keys import KeyFile, KeyFileError
from service.routes import calibrate, generate, health, jobs, models, reviews, score
from service.service_metrics import Metrics
from service.settings import Settings, read_settings
from service.webhooks.deliverer import Deliverer
from service.webhooks.documentation import install_webhook
from service.webhooks.sending import Sender
from service.webhooks.targets import Receivers
from worker.address import AddressError
from worker.queue import JobQueue, QueueError
from worker.traces import make_tracer

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

log = logging.getLogger(__name__)

_DESCRIPTION = """Exact likelihoods, out-of-distribution scores and new images from a noise conditional pixel network.

Each request becomes a job in a queue and waits for its result (30 s by default; `Prefer: wait=5` shortens that,
`Prefer: respond-async` does not wait). If the job takes longer, the response is `202` with the job's `Location`.
Errors are `application/problem+json` (RFC 9457). Every response has the id of its request in `X-Request-Id`.
If the operator limits the rate, responses to requests for jobs have `RateLimit-Policy` and `RateLimit`.
"""

_TAGS = [
    {"name": "images", "description": "Score, generate and complete images."},
    {"name": "models", "description": "The models, and new ones from your images."},
    {"name": "jobs", "description": "Follow jobs, get their results, and cancel or delete them."},
    {"name": "reviews", "description": "What you know better than the verdicts of a detector."},
    {"name": "operations", "description": "For operators."},
]
"""The groups of endpoints, in the order of /docs."""

_EXPOSED_HEADERS = (
    "Location", "Retry-After", "X-Job-Id", "X-Seed", "X-Request-Id", "X-Progress", "Preference-Applied",
    "RateLimit", "RateLimit-Policy", "WWW-Authenticate",
)  # fmt: skip
"""Response headers that scripts of other origins may read."""


_VARIABLES: dict[type[NcmlError], str] = {
    AddressError: "NCML_REDIS_PASSWORD_FILE", QueueError: "NCML_REDIS_URL", KeyFileError: "NCML_API_KEYS_FILE",
    SecretError: "NCML_WEBHOOK_SECRET_FILE",
}  # fmt: skip
"""The environment variable that each kind of error is about."""


def create_app(settings: Settings, queue: JobQueue, tracer: "Tracer | None" = None) -> FastAPI:
    """Create the application on a queue, which it closes on shutdown; `tracer` records a trace of each request."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[dict[str, Any]]:
        jobs_service.start()
        if deliverer:
            deliverer.start()
        yield {"stop": stop, "metrics": metrics}  # which `service.server` and the protocol use
        if deliverer:
            await deliverer.close()
        await jobs_service.close()
        await queue.aclose()
        queue.close()

    app = FastAPI(
        title="ncml",
        version=version("ncml"),
        summary="Exact likelihoods, out-of-distribution verdicts and new images.",
        description=_DESCRIPTION,
        openapi_tags=_TAGS,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # an absolute address would leave the path below which a proxy serves this
        lifespan=lifespan,
    )
    metrics, stop = Metrics(queue, settings.ready_lanes), Stop()
    app.state.jobs = jobs_service = JobService(settings, queue, metrics, stop)
    deliverer = _make_deliverer(settings, queue, metrics)
    routers = _add_routers(app, settings)
    install_webhook(app)
    install_openapi(app)
    install_docs(app)
    install_studio(app)
    add_exception_handlers(app, [*app.routes, *(route for router in routers for route in router.routes)], metrics)
    app.add_middleware(  # the innermost comes first
        BodyLimitMiddleware,
        max_body_bytes=settings.max_body_bytes,
        max_receiving_bytes=settings.max_receiving_bytes,
    )
    app.add_middleware(UnexpectedErrorMiddleware, stop=stop)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=_EXPOSED_HEADERS,
        )
    app.add_middleware(OriginMiddleware, allowed_hosts=settings.allowed_hosts, origins=settings.cors_origins)
    app.add_middleware(RequestContextMiddleware, metrics=metrics, tracer=tracer)
    return app


def _make_deliverer(settings: Settings, queue: JobQueue, metrics: Metrics) -> Deliverer | None:
    """Return what sends webhooks, if the operator lists receivers; raises `SecretError`."""
    if settings.webhook_secret_file is None or not settings.webhook_hosts:
        return None
    receivers = Receivers(settings.webhook_hosts)
    sender = Sender(receivers, Signer.from_file(settings.webhook_secret_file))
    return Deliverer(queue, receivers, sender, metrics)


def _add_routers(app: FastAPI, settings: Settings) -> list[APIRouter]:
    """Add the endpoints with their authentication and rate limits; return their routers."""
    auth = [Depends(ApiKeyAuth(KeyFile(settings.api_keys_file)))] if settings.api_keys_file else []
    rate_limit = [Depends(RateLimit(settings.queue_url, settings.rate_limit))] if settings.rate_limit else []
    dependencies: tuple[tuple[APIRouter, list[Any]], ...] = (
        (score.router, auth + rate_limit),
        (generate.router, auth + rate_limit),
        (calibrate.router, auth + rate_limit),
        (jobs.router, [*auth, Depends(check_queue)]),
        (models.router, auth),
        (reviews.router, [*auth, Depends(check_queue)]),
        (health.router, []),
    )
    for router, router_dependencies in dependencies:
        app.include_router(router, dependencies=router_dependencies)
    return [router for router, _ in dependencies]


def from_environment() -> FastAPI:
    """Create the application in a process of `python -m service`; exit with status 2 for an invalid setting."""
    settings = read_settings()
    try:
        check_temporary_folder()
        queue = JobQueue.from_url(settings.queue_url)
        log_to_stderr(settings.log_level)
        if settings.is_open:  # also if the Compose file that sets the keys was left out
            log.warning("no API key is required: set NCML_API_KEYS_FILE unless a proxy decides who may use the service")
        return create_app(settings, queue, make_tracer("ncml-service"))
    except NcmlError as error:
        variable = _VARIABLES.get(type(error))
        print(f"ncml: {variable}: {error}" if variable else f"ncml: {error}", file=sys.stderr)
        sys.exit(2)
