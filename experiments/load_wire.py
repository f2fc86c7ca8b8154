"""Malformed HTTP: what a body alone cannot spoil, each on a connection of its own."""

import asyncio
import random
import re
from collections.abc import Callable, Sequence

_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
_AT_ONCE = 32
_ANSWER_S = 5.0
_CLOSE_S = 2.0
_LARGE = 1 << 40

Message = tuple[bytes, bool]
"""What is sent, and whether an answer is due; else the client hangs up after sending."""


def _head(*lines: str, first: str = "POST /v1/rank HTTP/1.1", host: bool = True) -> bytes:
    return "\r\n".join([first, *(["Host: localhost"] if host else []), *lines, "", ""]).encode(
        "latin-1"
    )


def _hangs_up(draw: random.Random, body: bytes) -> Message:
    """The client closes in the middle of the body."""
    return _head(f"Content-Length: {len(body)}") + body[: draw.randrange(len(body))], False


def _hangs_up_early(draw: random.Random, body: bytes) -> Message:
    """The client closes in the middle of the head."""
    head = _head(f"Content-Length: {len(body)}")
    return head[: draw.randrange(1, len(head))], False


def _length_too_small(draw: random.Random, body: bytes) -> Message:
    """More follows than the length says; the rest is no request."""
    return _head(f"Content-Length: {draw.randrange(len(body))}") + body, True


def _odd_length(draw: random.Random, body: bytes) -> Message:
    """A length that is no length, or far too large."""
    length = draw.choice(["-1", "x", "1e3", "0x10", "", "+5", str(_LARGE), "9" * 40, "1, 1"])
    return _head(f"Content-Length: {length}") + body, length not in ("", str(_LARGE))


def _two_lengths(draw: random.Random, body: bytes) -> Message:
    """Two lengths that differ, or a length beside chunks."""
    other = draw.choice(["Content-Length: 1", "Transfer-Encoding: chunked"])
    return _head(f"Content-Length: {len(body)}", other) + body, True


def _odd_chunks(draw: random.Random, body: bytes) -> Message:
    """Chunks whose sizes are wrong, or that never end."""
    chunks = draw.choice([b"zz\r\n", b"-1\r\n", b"fffffffffffffffffff\r\n", b"5\r\n12", b"\r\n"])
    return _head("Transfer-Encoding: chunked") + chunks + body[:50], False


def _odd_first_line(draw: random.Random, body: bytes) -> Message:
    """No request line that HTTP knows, or another method, path or version."""
    line = draw.choice(
        [
            *("POST /v1/rank HTTP/9.9", "POST /v1/rank", "POST  HTTP/1.1", "\x00\x01 / HTTP/1.1"),
            *("BREW /v1/rank HTTP/1.1", "PUT /v1/rank HTTP/1.1", "DELETE / HTTP/1.1"),
            *(
                "POST /v1/rank/../../etc HTTP/1.1",
                "POST /%ff%00 HTTP/1.1",
                "POST //v1/rank HTTP/1.1",
            ),
            *("GET /v1/rank?" + "a" * 5000 + " HTTP/1.1", "OPTIONS * HTTP/1.1"),
        ]
    )
    return _head(f"Content-Length: {len(body)}", "Connection: close", first=line) + body, True


def _odd_headers(draw: random.Random, body: bytes) -> Message:
    """Headers that are too large, too many, or not what they should be."""
    lines = draw.choice(
        [
            [f"X-Large: {'a' * 200_000}"],
            [f"X-{number}: {number}" for number in range(3000)],
            ["Content-Type: text/plain"],
            ["Content-Type: application/json; charset=utf-16"],
            ["Content-Type: multipart/form-data; boundary=x"],
            ["Content-Encoding: gzip"],
            ["Accept: \xff\xfe"],
            ["Authorization: Bearer \xff"],
            ["Expect: 100-continue"],
            ["X-Request-Id: " + "\t" * 100],
            ["no colon here"],
            ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"],
        ]
    )
    closing = [] if any("Connection" in line for line in lines) else ["Connection: close"]
    return _head(f"Content-Length: {len(body)}", *lines, *closing) + body, True


def _no_host(draw: random.Random, body: bytes) -> Message:
    """HTTP/1.1 without a host."""
    del draw
    return _head(f"Content-Length: {len(body)}", "Connection: close", host=False) + body, True


def _noise(draw: random.Random, body: bytes) -> Message:
    """No HTTP at all."""
    del body
    return draw.randbytes(draw.randint(1, 3000)), False


WIRE_KINDS: dict[str, Callable[[random.Random, bytes], Message]] = {
    "http_" + function.__name__.removeprefix("_"): function
    for function in (
        *(_hangs_up, _hangs_up_early, _length_too_small, _odd_length, _two_lengths, _odd_chunks),
        *(_odd_first_line, _odd_headers, _no_host, _noise),
    )
}
"""The kinds of malformed messages: each takes a source of randomness and a good body."""


def malformed_messages(
    bodies: Sequence[bytes], count: int, seed: int = 0
) -> list[tuple[str, Message]]:
    """Return ``count`` malformed messages, each with the name of its kind."""
    draw = random.Random(seed)
    kinds = sorted(WIRE_KINDS)
    chosen = [draw.choice(kinds) for _ in range(count)]
    return [(kind, WIRE_KINDS[kind](draw, draw.choice(bodies))) for kind in chosen]


async def send_messages(
    target: tuple[str, int], messages: Sequence[Message]
) -> list[tuple[int, ...]]:
    """Send each message on its own connection; return the statuses of the answers to each.

    A connection that is closed without an answer has none: what is not HTTP need not get one.
    """
    turns = asyncio.Semaphore(_AT_ONCE)

    async def one(message: Message) -> tuple[int, ...]:
        async with turns:
            return await _exchange(target, *message)

    return list(await asyncio.gather(*(one(message) for message in messages)))


async def _exchange(target: tuple[str, int], data: bytes, due: bool) -> tuple[int, ...]:
    try:
        reader, writer = await asyncio.open_connection(*target)
    except OSError:
        return ()
    received = b""
    try:
        writer.write(data)
        await writer.drain()
        if due:
            received = await asyncio.wait_for(reader.read(1 << 16), timeout=_ANSWER_S)
        writer.write_eof()
        received += await asyncio.wait_for(reader.read(1 << 20), timeout=_CLOSE_S)
    except (OSError, TimeoutError):
        pass
    finally:
        writer.close()
    return tuple(int(status) for status in _STATUS.findall(received))
