"""The HTTP interface: paths, their documentation and their errors."""

import asyncio
import time
from typing import Any

import numpy as np
import pydantic_core
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

from features.errors import BadInputError
from serving.ab_routing import CONTROL
from serving.gate import EXPLAIN, RANK
from serving.occlusion import explain
from serving.openapi import EXPLAIN_DOCS, RANK_DOCS, READY_DOCS, document
from serving.page_routes import examples, page_router
from serving.protocol import JSON, RefusedError, invalid, too_late
from serving.rank_service import RankService
from serving.server_metrics import CONTENT_TYPE

_CODES = {404: "not_found", 405: "method_not_allowed"}


def create_app(service: RankService, *, key: bool = False) -> FastAPI:
    """Return the application that answers for a service; `serving.gate` stands in front of it.

    Args:
        service: ranks.
        key: whether callers need an API key, for the documentation.
    """
    app = FastAPI(title="dashclip-ranker", redoc_url=None, docs_url="/docs")
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _failed)
    _add_ranking(app, service)
    _add_operations(app, service)
    app.include_router(page_router())
    app.openapi = lambda: document(app, service.slots, service.limits, key=key)  # type: ignore[method-assign]
    return app


def _add_ranking(app: FastAPI, service: RankService) -> None:
    one_at_a_time = asyncio.Semaphore(1)  # an explanation costs as much as twenty answers

    @app.post(RANK, **RANK_DOCS)
    async def rank(request: Request) -> Response:
        """Return the probability of a click on each candidate, and their order, best first."""
        state = request.state
        _check_content_type(request)
        return _json(await service.rank(state.body, state.request_id, state.deadline))

    @app.post(EXPLAIN, **EXPLAIN_DOCS)
    async def explain_request(request: Request) -> Response:
        """Return the reason per feature group: what each candidate's score loses without it."""
        _check_content_type(request)
        deadline = request.state.deadline
        raw, ranker = await service.prepared(request.state.body, deadline)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                async with one_at_a_time:
                    reasons = await asyncio.to_thread(explain, ranker, raw)
        except TimeoutError:
            raise too_late() from None
        except BadInputError as error:
            raise invalid(str(error)) from None
        if not np.isfinite(reasons["probabilities"]).all():
            raise invalid("features: the model gives no finite probability for these values")
        return _json(pydantic_core.to_json(reasons))


def _check_content_type(request: Request) -> None:
    given = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
    if given != JSON:
        raise RefusedError(415, "not_json", f"The content type must be {JSON}.")


def _add_operations(app: FastAPI, service: RankService) -> None:
    @app.get("/healthz", tags=["operations"], **READY_DOCS)
    async def healthz() -> Response:
        """Tell whether the process works."""
        if not service.healthy:
            raise RefusedError(503, "broken", "The scoring thread has ended.")
        return _json(b'{"status":"ok"}')

    @app.get("/readyz", tags=["operations"], **READY_DOCS)
    async def readyz() -> Response:
        """Tell whether more requests should be sent here."""
        if service.stopping:
            raise RefusedError(503, "stopping", "The service is stopping.")
        return _json(b'{"status":"ready"}')

    @app.get("/metrics", tags=["operations"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return the metrics of all worker processes in Prometheus's text format."""
        return Response(await asyncio.to_thread(service.metrics.text), media_type=CONTENT_TYPE)

    @app.get("/v1/models", tags=["operations"])
    async def models() -> dict[str, Any]:
        """Tell which exported rankers answer, and how they came here."""
        return {"models": [slot.describe() for slot in service.slots.values()]}

    @app.get("/v1/examples", tags=["ranking"])
    async def example_requests() -> Response:
        """Return requests to try, and the features that the ranker reads."""
        return _json(pydantic_core.to_json(examples(service.slots[CONTROL].current)))


def _json(body: bytes) -> Response:
    return Response(body, media_type=JSON)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return Response(error.body, status_code=error.status, headers=error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, "http_error")
    refused = RefusedError(error.status_code, code, f"{error.detail}.")
    headers = {**refused.headers, **(error.headers or {})}
    return Response(refused.body, status_code=error.status_code, headers=headers)


async def _failed(request: Request, error: Exception) -> Response:
    return await _refused(
        request, RefusedError(500, "internal", "The request could not be answered.")
    )
