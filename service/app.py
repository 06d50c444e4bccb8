"""The application: `create_app` puts the rooms' parts together, `from_environment` does so for a server process."""

import contextlib
import sys
from collections.abc import AsyncGenerator
from importlib.metadata import version

from fastapi import APIRouter, Depends, FastAPI
from PIL import Image
from pydantic import ValidationError
from starlette.middleware.cors import CORSMiddleware

from service import docs, page, problems
from service.admission import Admission, Quota
from service.asking import Desk
from service.keys import KeyRing, KeysError
from service.metrics import Metrics
from service.middleware import Around, Guard, log_to_stderr
from service.routes import health, jobs, models, pictures, score
from service.settings import Settings
from worker.queue import JobQueue, QueueError

_ABOUT = """Exact likelihoods, out-of-distribution scores and pictures from a noise conditional pixel network.

Requests become jobs in a queue. A request waits for its job (30 s by default; `Prefer: wait=5`, or
`Prefer: respond-async` not to wait); after that it is answered `202` with the job's `Location`.
Errors are `application/problem+json` (RFC 9457).
"""


EXPOSED = (
    "Location", "Retry-After", "X-Job-Id", "X-Seed", "X-Request-Id", "X-Progress", "Preference-Applied",
    "RateLimit", "RateLimit-Policy", "WWW-Authenticate",
)  # fmt: skip
"""Headers of a response that scripts of other origins may read."""


def create_app(settings: Settings, queue: JobQueue) -> FastAPI:
    """The application on a queue. It closes the queue when it ends."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        Image.init()  # the decoders' modules are loaded before the first request
        yield
        await queue.aclose()
        queue.close()

    app = FastAPI(
        title="ncml",
        version=version("ncml"),
        summary="How likely is this picture, and what would another look like?",
        description=_ABOUT,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    metrics = Metrics(queue)
    app.state.desk = Desk(settings, queue, metrics)
    admission = [Depends(Admission(KeyRing(settings.api_keys_file), metrics))] if settings.api_keys_file else []
    quota = [Depends(Quota(settings.redis_url, settings.rate_limit, metrics))] if settings.rate_limit else []
    routers: list[APIRouter] = []
    for modules, guards in (((score, pictures), admission + quota), ((jobs, models), admission), ((health,), [])):
        for module in modules:
            app.include_router(module.router, dependencies=guards)
            routers.append(module.router)
    docs.install(app)
    page.install(app)
    problems.install(app, [*app.routes, *(route for router in routers for route in router.routes)])
    app.add_middleware(Guard, max_body_bytes=settings.max_body_bytes)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
        )
    app.add_middleware(Around, metrics=metrics)
    return app


def from_environment() -> FastAPI:
    """The application of this process, for `uvicorn --factory service.app:from_environment`.

    Exits with status 2 and a line for each setting that cannot be.
    """
    try:
        settings = Settings()
    except ValidationError as error:
        for found in problems.field_errors(error.errors()):
            print(f"ncml: NCML_{found.field.upper()}{found.detail.removeprefix(found.field)}", file=sys.stderr)
        sys.exit(2)
    try:
        queue = JobQueue.from_url(settings.redis_url)
    except QueueError as error:
        print(f"ncml: NCML_REDIS_URL: {error}", file=sys.stderr)
        sys.exit(2)
    log_to_stderr(settings.log_level)
    try:
        return create_app(settings, queue)
    except KeysError as error:
        print(f"ncml: NCML_API_KEYS_FILE: {error}", file=sys.stderr)
        sys.exit(2)
