"""One HTTP connection: uvicorn's, with bounds on what a stranger can hold, and a gentle end.

uvicorn's own protocol keeps a connection that never sends a request for ever, takes headers of any
length, and closes idle connections the moment it stops, when a request may be on its way already.
"""

import asyncio
from functools import cache
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.protocol import RefusedError
from serving.server_config import ServerConfig

_HEADER_BYTES = 512 * 1024  # with what one read may bring of the body: 256 KB
_MESSAGE_S = 30.0  # from a request's first byte to its last
_LINGER_S = 1.0  # how long an idle connection may still ask after the stop
_TIMES_BODY = 4  # how much of a refused body is read for the sake of the answer being heard


@cache
def _bounds() -> tuple[int, int]:
    """Return the most connections, and the most bytes of a request."""
    config = ServerConfig.from_environment()
    return config.max_connections, _TIMES_BODY * config.max_body_bytes + _HEADER_BYTES


class Connection(HttpToolsProtocol):
    """A connection that is bounded in time and bytes, and lingers for a moment at the stop."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._most_connections, self._most_bytes = _bounds()
        self._received = 0  # bytes of the current request, with what came in the same pieces
        self._piece = 0
        self._in_message = False
        self._in_headers = False
        self._slow: asyncio.TimerHandle | None = None
        self._stopping = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, or turn it away where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self._most_connections:
            self._turn_away(
                RefusedError(503, "too_many_connections", "Too many connections are open.")
            )
        self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        self._stop_timer()
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        """Read a piece of a request."""
        if self.transport.is_closing():
            return
        self._piece = len(data)
        self._received += self._piece
        if self._in_headers and self._received > _HEADER_BYTES:
            self._turn_away(RefusedError(431, "headers_too_large", "The headers are too large."))
        elif self._received > self._most_bytes:
            self.transport.abort()
        else:
            super().data_received(data)
            self._wait_for_request()

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._received = self._piece
        self._in_message = self._in_headers = True
        self._stop_timer()
        self._slow = self.loop.call_later(_MESSAGE_S, self._too_slow)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; trailers behind a body are dropped."""
        if self._in_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Hand the request to the application."""
        self._in_headers = False
        super().on_headers_complete()
        if self._stopping:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """End the request's body."""
        self._in_message = False
        self._stop_timer()
        super().on_message_complete()

    def shutdown(self) -> None:
        """Answer what has come; an idle connection may bring one more request for a moment."""
        self._stopping = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
        else:
            self.loop.call_later(_LINGER_S, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if self._idle and not self.transport.is_closing():
            self.transport.close()

    @property
    def _idle(self) -> bool:
        answered = self.cycle is None or self.cycle.response_complete
        return answered and not self._in_message

    def _wait_for_request(self) -> None:
        """Close the connection if no request comes in the time that an idle one is kept."""
        if self._idle and self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _turn_away(self, refused: RefusedError) -> None:
        """Answer without the application, and close."""
        headers = {**refused.headers, "connection": "close"}
        lines = [f"HTTP/1.1 {refused.status} Refused", *(f"{n}: {v}" for n, v in headers.items())]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + refused.body)
        self.transport.close()

    def _too_slow(self) -> None:
        """End a connection whose request does not come to its end."""
        self.transport.abort()

    def _stop_timer(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None
