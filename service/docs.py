"""/docs: the OpenAPI document in Swagger UI, whose files are served from here, so that it works offline."""

import functools
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles

from service.middleware import PAGE_POLICY
from service.problems import ProblemDetails

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<link rel="stylesheet" href="docs/assets/swagger-ui.css">
<link rel="icon" href="data:,">
<div id="page"></div>
<script src="docs/assets/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
"""

_START = """SwaggerUIBundle({
  url: "openapi.json", dom_id: "#page", deepLinking: true, tryItOutEnabled: true, validatorUrl: null,
});
"""


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the form of problems in place of FastAPI's own validation errors."""
    if not app.openapi_schema:
        document = get_openapi(
            title=app.title,
            version=app.version,
            summary=app.summary,
            description=app.description,
            license_info=app.license_info,
            routes=app.routes,
        )
        schemas = document["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        problem = ProblemDetails.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= problem.pop("$defs") | {"ProblemDetails": problem}
        app.openapi_schema = document
    return app.openapi_schema


def install(app: FastAPI) -> None:
    """Add the document and its page, whose script is a file of its own, as the Content-Security-Policy wants."""
    assets = Path(str(files("fastapi_offline"))) / "static"
    app.openapi = functools.partial(_openapi, app)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        # Swagger UI writes style attributes, which no other page needs
        policy = PAGE_POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
        return HTMLResponse(_PAGE.format(title=f"{app.title}: API"), headers={"Content-Security-Policy": policy})

    @app.get("/docs/start.js", include_in_schema=False)
    async def start() -> Response:
        return Response(_START, media_type="text/javascript")

    app.mount("/docs/assets", StaticFiles(directory=assets), name="docs-assets")
