"""One keep-alive HTTP connection of the load generator, on a raw socket.

A request that gets no answer is not always lost. What the server had not read when it closed the
connection it never accepted, and a client may send it again. The kernel tells the two apart:
closing a socket with unread bytes, or sending to a closed one, gives a reset; closing one whose
bytes were all read gives a plain end.
"""

import asyncio
import errno
import socket
from collections.abc import Callable
from enum import IntEnum
from typing import Protocol

import httptools

_RECEIVE = 1 << 16


class Outcome(IntEnum):
    """How one request ended."""

    ANSWERED = 0  # a whole answer came, of any status
    REFUSED = 1  # no connection was made
    UNREAD = 2  # the connection was reset before the server had read the request
    DROPPED = 3  # the server had read the request, and closed the connection without an answer
    CUT = 4  # the answer broke off, or was not HTTP
    UNANSWERED = 5  # no answer in the time given


class Owner(Protocol):
    """What a connection tells about the request that it carries; the load generator."""

    def sent(self, request: int, connection: "Connection") -> None:
        """``request`` is about to be written to ``connection``."""

    def ended(self, request: int, outcome: Outcome, status: int, body: bytes) -> None:
        """``request`` has its ``outcome``; ``status`` is 0 and ``body`` empty without an answer."""

    def free(self, connection: "Connection") -> None:
        """``connection`` can take the next request."""

    def closed(self, connection: "Connection") -> None:
        """``connection`` is no more."""


class Connection:
    """Carries one request after another; ``httptools`` reads the answers."""

    def __init__(self, address: tuple[str, int], owner: Owner) -> None:
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._request: int | None = None
        self._unsent = memoryview(b"")
        self._body: list[bytes] = []
        self._begun = False
        self._open = True
        self._connected = False
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        error = self._socket.connect_ex(address)
        if error not in (0, errno.EINPROGRESS):
            # Told from the loop: the owner does not have this connection in hand yet.
            self._loop.call_soon(self._lost, Outcome.REFUSED)
            return
        self._loop.add_writer(self._socket, self._connection_made)

    def send(self, request: int, payload: bytes) -> None:
        """Write ``payload``, a whole HTTP request, as ``request``; later if still connecting."""
        assert self._request is None, "one request at a time"
        self._request = request
        self._unsent = memoryview(payload)
        self._begun = False
        self._body.clear()
        if self._connected:
            self._owner.sent(request, self)
            self._write()

    def abandon(self) -> None:
        """Close the connection; a request on it counts as unanswered."""
        self._lost(Outcome.UNANSWERED)

    def on_message_begin(self) -> None:
        """An answer begins (called by the parser)."""
        self._begun = True

    def on_body(self, body: bytes) -> None:
        """A part of the answer's body came (called by the parser)."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """The answer is whole (called by the parser)."""
        request, self._request = self._request, None
        status = self._parser.get_status_code()
        keep = self._parser.should_keep_alive() and not self._unsent and request is not None
        if request is not None:
            self._owner.ended(request, Outcome.ANSWERED, status, b"".join(self._body))
        if not self._open:
            return
        if keep:
            self._owner.free(self)
        else:
            self._lost(Outcome.CUT)

    def _connection_made(self) -> None:
        self._loop.remove_writer(self._socket)
        if self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._lost(Outcome.REFUSED)
            return
        self._connected = True
        self._loop.add_reader(self._socket, self._readable)
        if self._request is None:
            self._owner.free(self)
        else:
            self._owner.sent(self._request, self)
            self._write()

    def _write(self) -> None:
        """Write as much as the socket takes; the rest once it takes more."""
        try:
            written = self._socket.send(self._unsent)
        except BlockingIOError:
            written = 0
        except OSError:
            # A refusal may lie there unread: the server answered early and closed.
            self._loop.remove_writer(self._socket)
            return
        self._unsent = self._unsent[written:]
        if self._unsent:
            self._loop.add_writer(self._socket, self._write)
        else:
            self._loop.remove_writer(self._socket)

    def _readable(self) -> None:
        try:
            data = self._socket.recv(_RECEIVE)
        except BlockingIOError:
            return
        except OSError:
            self._lost(Outcome.UNREAD)
            return
        if not data:
            reset = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            unread = reset or self._unsent
            self._lost(Outcome.UNREAD if unread else Outcome.DROPPED)
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._lost(Outcome.CUT)

    def _lost(self, outcome: Outcome) -> None:
        """Close the socket and tell what became of the request, if there is one."""
        if not self._open:
            return
        self._open = False
        self._loop.remove_writer(self._socket)
        self._loop.remove_reader(self._socket)
        self._socket.close()
        request, self._request = self._request, None
        self._owner.closed(self)
        if request is not None:
            cut = self._begun and outcome != Outcome.UNANSWERED
            self._owner.ended(request, Outcome.CUT if cut else outcome, 0, b"")


OnAnswer = Callable[[int, int, bytes], None]
"""Takes a request's number, its status and the answer's body."""
