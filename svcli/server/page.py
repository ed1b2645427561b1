"""The page at `/`: three plain files that load nothing from elsewhere. What the page asks, the API answers."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
PATHS = tuple(_FILES)
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # or else an old page would ask a new server
}


def page_routes() -> list[Route]:
    """GET and HEAD of each file; none of them is part of the API."""
    return [_route(path, name, kind) for path, (name, kind) in _FILES.items()]


def _route(path: str, name: str, kind: str) -> Route:
    content = (files("svcli.server") / "page" / name).read_bytes()

    async def show(_request: Request) -> Response:
        return Response(content, headers=_HEADERS, media_type=kind)

    return Route(path, show, methods=["GET"], include_in_schema=False)
