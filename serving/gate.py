"""The door of the service: who may come in, how many, and how long it may take.

A pure ASGI layer in front of the application. What it refuses, it refuses before the body is read:
refusing costs little however large the bodies are, and what a worker holds is bounded by the
accepted requests::

    headers ─► key? ─► too large? ─► stopping? ─► full? ─► body, until the deadline ─► application
              401       413           503          429      408, 413
"""

import asyncio
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from serving.page_routes import OPEN_PATHS
from serving.protocol import RefusedError
from serving.rank_service import RankService
from serving.server_config import ServerConfig
from serving.server_log import describe

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

RANK = "/v1/rank"
EXPLAIN = "/v1/explain"
_QUEUED = (RANK, EXPLAIN)
_COUNTED = (RANK, EXPLAIN, "/healthz", "/readyz", "/metrics", "/v1/models", "/v1/examples")
_NO_KEY = ("/healthz", "/readyz", *OPEN_PATHS)
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_ALL_DIGITS = re.compile(rb"[0-9]{1,18}")

_PATIENCE = 0.5  # share of the deadline that a request may be expected to wait
_LATEST = 0.05  # weight of the latest request in the moving average

_log = logging.getLogger("serving.gate")


class Gate:
    """Admits requests to an application.

    Args:
        application: behind the gate.
        service: tells whether the process is stopping, and counts.
        config: bounds.
        key: that callers must know; ``None`` for none.
    """

    def __init__(
        self, application: Application, service: RankService, config: ServerConfig, key: str | None
    ) -> None:
        self._application = application
        self._service = service
        self._metrics = service.metrics
        self._key = None if key is None else b"bearer " + key.encode()
        self._queue = config.queue
        self._deadline_s = config.deadline_ms / 1000
        self._max_body = config.max_body_bytes
        self._pending = 0
        self._seconds_each = 0.0  # that a request spends for each one that is before it, and itself

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        assert scope["type"] == "http"
        headers = dict(scope["headers"])
        answer = _Answer(send, _request_id(headers.get(b"x-request-id")))
        try:
            await self._handle(scope, headers, receive, answer)
        except RefusedError as refused:
            await answer.refuse(refused)
        except Exception as error:
            _log.error("a request failed: %s", describe(error))
            await answer.refuse(RefusedError(500, "internal", "The request could not be answered."))
        path = scope["path"] if scope["path"] in _COUNTED else "other"
        self._metrics.requests.labels(path, answer.status).inc()

    async def _handle(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, answer: "_Answer"
    ) -> None:
        path = scope["path"]
        if path not in _NO_KEY:
            self._check_key(headers)
        scope["state"] = {"request_id": answer.request_id}
        if path not in _QUEUED or scope["method"] != "POST":
            await self._application(scope, receive, answer.send)
            return
        self._check_length(headers)
        # A full queue may last longer than the deadline, and all in it would come too late: what
        # would wait for more than a part of the deadline is refused at once.
        long_wait = self._pending * self._seconds_each > _PATIENCE * self._deadline_s
        if long_wait or self._pending >= self._queue:
            raise RefusedError(429, "queue_full", "Too many requests are waiting; try again later.")
        started = time.monotonic()
        self._pending += 1
        place = self._pending
        self._metrics.pending.set(self._pending)
        try:
            deadline = started + self._deadline_s
            body = await self._body(receive, deadline)
            scope["state"] |= {"deadline": deadline, "body": body}
            await self._application(scope, receive, answer.send)
        finally:
            self._pending -= 1
            self._metrics.pending.set(self._pending)
        seconds = time.monotonic() - started
        self._seconds_each += _LATEST * (seconds / place - self._seconds_each)
        self._metrics.seconds.observe(seconds)

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        if self._key is None:
            return
        given = headers.get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        if not hmac.compare_digest(scheme.lower() + b" " + key.strip(), self._key):
            raise RefusedError(401, "unauthorized", "The API key is missing or wrong.")

    def _check_length(self, headers: dict[bytes, bytes]) -> None:
        length = headers.get(b"content-length", b"0")
        if not _ALL_DIGITS.fullmatch(length) or int(length) > self._max_body:
            raise self._too_large()

    def _too_large(self) -> RefusedError:
        return RefusedError(
            413, "too_large", f"The body is larger than {self._max_body} bytes; send less."
        )

    async def _body(self, receive: Receive, deadline: float) -> bytes:
        """Return the whole body.

        Raises:
            RefusedError: it is too large, or has not come by the deadline.
        """
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _GoneError
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._max_body:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return parts[0] if len(parts) == 1 else b"".join(parts)
        except TimeoutError:
            raise RefusedError(408, "body_too_slow", "The body did not arrive in time.") from None


class _GoneError(RefusedError):
    """The caller left before it had sent its body; nobody hears the refusal."""

    def __init__(self) -> None:
        super().__init__(408, "gone", "The connection was closed before the body had arrived.")


class _Answer:
    """The answer to one request, begun or not."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self.status = 0

    async def send(self, message: Message) -> None:
        """Send an ASGI message of the application."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [
                *message.get("headers", ()),
                (b"x-request-id", self.request_id.encode()),
            ]
        await self._send(message)

    async def refuse(self, refused: RefusedError) -> None:
        """Send a refusal, unless there is an answer already."""
        if self.status:
            return
        await self.send(
            {
                "type": "http.response.start",
                "status": refused.status,
                "headers": [
                    (name.encode(), value.encode()) for name, value in refused.headers.items()
                ],
            }
        )
        await self._send({"type": "http.response.body", "body": refused.body})


def _request_id(given: bytes | None) -> str:
    """Return the caller's own id, so that a retry keeps it, or a new one."""
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode()
    return secrets.token_hex(16)
