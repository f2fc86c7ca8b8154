"""The page for people at ``/``: rank by hand and see why.

It is a few files without a build step and without anything from outside, so that a strict content
security policy holds. It shows nothing by itself: it calls ``v1/examples``, ``v1/rank`` and
``v1/explain`` and asks the person for the API key where they answer 401, so its own paths,
`OPEN_PATHS`, need no key.
"""

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import APIRouter, Request, Response

    from serving.exported import ExportedRanker

_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    **{
        f"/{name}": (name, "text/javascript; charset=utf-8")
        for name in ("page.js", "page_service.js", "page_view.js")
    },
}
OPEN_PATHS = tuple(_FILES)

_HEADERS = {
    "Cache-Control": "no-cache",  # ask each time; 304 where it is the same
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page_router() -> "APIRouter":
    """Return the routes of the page, its style and its scripts."""
    from fastapi import APIRouter

    router = APIRouter(include_in_schema=False)
    for path, (name, media_type) in _FILES.items():
        content = Path(__file__).with_name(name).read_bytes()
        router.add_api_route(path, _answer(content, media_type), methods=["GET", "HEAD"])
    return router


def _answer(content: bytes, media_type: str) -> "Callable[[Request], Awaitable[Response]]":
    """Return the function that answers with one file, or that the browser has it."""
    from fastapi import Request, Response

    headers = {**_HEADERS, "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return answer


def examples(ranker: "ExportedRanker") -> dict[str, Any]:
    """Return the answer of ``/v1/examples``: requests that the page suggests.

    They are the exported ranker's golden requests, each ``{"name", "request", "titles"}`` with
    the candidates' titles, or null; beside them the features that the ranker reads.
    """
    inputs = ranker.manifest.inputs
    return {
        "inputs": {
            level: [{"name": i.name, "kind": i.kind, "type": i.type} for i in of_level]
            for level, of_level in (("request", inputs.request), ("candidate", inputs.candidate))
        },
        "examples": [
            {"name": golden.name, "request": golden.request, "titles": golden.titles}
            for golden in ranker.golden
        ],
    }
