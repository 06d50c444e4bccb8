"""The pages: / is the studio, /docs is Swagger UI. All files are served from here, so both work offline."""

import os
from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response
from starlette.responses import FileResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from service.http.middleware import PAGE_POLICY

_STUDIO = Path(__file__).parents[1] / "studio"
_STUDIO_POLICY = {"Content-Security-Policy": f"{PAGE_POLICY}; font-src 'self'"}
_NO_CACHE = {"Cache-Control": "no-cache"}
"""Browsers revalidate each file (304 when unchanged), so that a page never mixes modules of two versions."""

_DOCS_PAGE = """<!doctype html>
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

_DOCS_SCRIPT = """SwaggerUIBundle({
  url: "openapi.json", dom_id: "#page", deepLinking: true, tryItOutEnabled: true, validatorUrl: null,
});
"""


class _RevalidatedFiles(StaticFiles):
    """Static files that browsers revalidate before each use."""

    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        """Return a file, or 304 if the browser's copy is current."""
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(_NO_CACHE)
        return response


def install_studio(app: FastAPI) -> None:
    """Add the studio, whose files need no build step."""

    @app.get("/", include_in_schema=False)
    async def studio() -> FileResponse:
        return FileResponse(_STUDIO / "index.html", headers=_NO_CACHE | _STUDIO_POLICY)

    app.mount("/studio", _RevalidatedFiles(directory=_STUDIO), name="studio")


def install_docs(app: FastAPI) -> None:
    """Add Swagger UI. Its start script is a separate file, as the Content-Security-Policy requires."""
    assets = Path(str(files("fastapi_offline"))) / "static"

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        # Swagger UI writes style attributes, which no other page needs
        policy = PAGE_POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
        return HTMLResponse(_DOCS_PAGE.format(title=f"{app.title}: API"), headers={"Content-Security-Policy": policy})

    @app.get("/docs/start.js", include_in_schema=False)
    async def start() -> Response:
        return Response(_DOCS_SCRIPT, media_type="text/javascript")

    app.mount("/docs/assets", StaticFiles(directory=assets), name="docs-assets")
