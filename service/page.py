"""/: the studio. Its files lie in `studio/` as a browser gets them: nothing is built, nothing is fetched elsewhere."""

import os
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from service.middleware import PAGE_POLICY

_STUDIO = Path(__file__).parent / "studio"
_POLICY = {"Content-Security-Policy": f"{PAGE_POLICY}; font-src 'self'"}
_FRESH = {"Cache-Control": "no-cache"}
"""Files are asked after each time (304 when unchanged), so that a page never runs on two versions' modules."""


class _Files(StaticFiles):
    """The files of the studio, each asked after before it is used again."""

    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        """A file, or 304 for one that the browser has."""
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(_FRESH)
        return response


def install(app: FastAPI) -> None:
    """Add the page and its files."""

    @app.get("/", include_in_schema=False)
    async def studio() -> FileResponse:
        return FileResponse(_STUDIO / "index.html", headers=_FRESH | _POLICY)

    app.mount("/studio", _Files(directory=_STUDIO), name="studio")
