"""Malformed request bodies: good ones spoilt in many ways, and nonsense."""

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from experiments.load_bodies import Request, encode, sized_requests


def malformed(golden: Sequence[Request], count: int, seed: int = 0) -> list[tuple[str, bytes]]:
    """Return ``count`` bodies that are wrong somehow, each with the name of its kind.

    A few come out valid by chance: a changed digit of an id is another id.
    """
    draw = random.Random(seed)
    small = sized_requests(golden, candidates=3, history=4, count=20, seed=seed)
    kinds = sorted(KINDS)
    made = []
    for _ in range(count):
        kind = draw.choice(kinds)
        made.append((kind, KINDS[kind](draw, copy.deepcopy(draw.choice(small)))))
    return made


ODD_VALUES: tuple[Callable[[random.Random], str], ...] = (
    lambda _: "null",
    lambda _: "true",
    lambda _: "-1",
    lambda _: "1.5",
    lambda _: "-0",
    lambda _: str(2**31),
    lambda _: str(2**53 + 1),
    lambda _: str(2**63),
    lambda _: str(-(2**63) - 1),
    lambda _: str(2**64),
    lambda _: "1" + "0" * 400,
    lambda _: "9" * 5000,
    lambda _: "1e308",
    lambda _: "1e400",
    lambda _: "-1e400",
    lambda _: "1e-400",
    lambda _: "1e999999999",
    lambda _: "NaN",
    lambda _: "Infinity",
    lambda _: "-Infinity",
    lambda _: '""',
    lambda _: '"' + "x" * 20_000 + '"',
    lambda _: '"\\ud800"',
    lambda _: '"\\u0000"',
    lambda _: '"17"',
    lambda _: "[]",
    lambda _: "{}",
    lambda _: "[[]]",
    lambda _: '{"product_id":[1]}',
    lambda draw: "[" * 60 + "]" * 60 if draw.random() < 0.5 else "[" * 3000 + "]" * 3000,
    lambda draw: json.dumps([draw.randint(-9, 9)] * draw.randint(0, 2000)),
)
"""JSON texts of values that a field may not expect."""

_MARK = "\x07here\x07"
_SPOT = json.dumps(_MARK)


def _other_value(draw: random.Random, request: Request) -> bytes:
    """One value, at any depth, is another one."""
    return _replaced(draw, request, draw.choice(ODD_VALUES)(draw))


def _other_list(draw: random.Random, request: Request) -> bytes:
    """One list is cut, longer, or holds one value of another kind."""
    lists = [spot for spot in _spots(request) if isinstance(spot[0][spot[1]], list)]
    holder, key = draw.choice(lists)
    values = holder[key]
    how = draw.randrange(3)
    if how == 0:
        holder[key] = values[: len(values) // 2]
        return encode(request)
    if how == 1:
        holder[key] = values + values[:1] * draw.randint(1, 5)
        return encode(request)
    holder[key] = [*values, _MARK]
    return encode(request).replace(_SPOT.encode(), draw.choice(ODD_VALUES)(draw).encode())


def _left_out(draw: random.Random, request: Request) -> bytes:
    """One field or list item is gone."""
    holder, key = draw.choice(_spots(request))
    del holder[key]
    return encode(request)


def _unknown_field(draw: random.Random, request: Request) -> bytes:
    """One field more, somewhere."""
    holders = [request, request.get("features"), request["candidates"]]
    holders.append(request["candidates"].get("features"))
    name = draw.choice(
        ["", "x", "__class__", "product_id ", "a" * 1000, "\x00", "é", "constructor"]
    )
    draw.choice([h for h in holders if isinstance(h, dict)])[name] = _MARK
    return encode(request).replace(_SPOT.encode(), draw.choice(ODD_VALUES)(draw).encode())


def _field_twice(draw: random.Random, request: Request) -> bytes:
    """The same name twice in one object."""
    name = draw.choice(sorted(request))
    value = draw.choice(ODD_VALUES)(draw)
    return encode(request)[:-1] + f",{json.dumps(name)}:{value}}}".encode()


def _changed_bytes(draw: random.Random, request: Request) -> bytes:
    """Some bytes are others; often no UTF-8 any more."""
    body = bytearray(encode(request))
    for _ in range(draw.choice([1, 1, 2, 5, 50])):
        body[draw.randrange(len(body))] = draw.randrange(256)
    return bytes(body)


def _lost_bytes(draw: random.Random, request: Request) -> bytes:
    """A piece is gone from anywhere."""
    body = encode(request)
    start = draw.randrange(len(body))
    return body[:start] + body[start + draw.randint(1, 40) :]


def _repeated_bytes(draw: random.Random, request: Request) -> bytes:
    """A piece comes twice."""
    body = encode(request)
    start = draw.randrange(len(body))
    end = start + draw.randint(1, 40)
    return body[:end] + body[start:end] + body[end:]


def _truncated(draw: random.Random, request: Request) -> bytes:
    """The end is missing; the length says so."""
    body = encode(request)
    return body[: draw.randrange(len(body))]


def _bad_text(draw: random.Random, request: Request) -> bytes:
    """Bytes that are no UTF-8, lone surrogates or control bytes inside a text or a name."""
    piece = draw.choice([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82"])
    piece = draw.choice([piece, b"\\ud800", b"\\udfff\\ud800", b"\x00", b"\n", b"\\x41", b"\\u12"])
    return _marked(draw, request, b'"a' + piece + b'b"')


def _random_bytes(draw: random.Random, request: Request) -> bytes:
    """Anything."""
    del request
    return draw.randbytes(draw.choice([0, 1, 2, 10, 200, 5000]))


def _random_tokens(draw: random.Random, request: Request) -> bytes:
    """JSON's own pieces in any order."""
    pieces = ["{", "}", "[", "]", ",", ":", '"', "1", "-", "e9", "null", "true", " ", "\\", ".5"]
    pieces += [json.dumps(name) for name in request]
    return "".join(draw.choices(pieces, k=draw.randint(1, 60))).encode()


def _deep(draw: random.Random, request: Request) -> bytes:
    """Nesting far beyond what a request has, closed or not."""
    depth = draw.choice([100, 900, 1100, 10_000, 50_000])
    opening, closing = draw.choice([("[", "]"), ('{"a":', "}"), ('[{"query":', "}]")])
    text = opening * depth + "1" + closing * draw.choice([depth, 0])
    if draw.random() < 0.5:
        return text.encode()
    return _replaced(draw, request, text)


def _other_whole(draw: random.Random, request: Request) -> bytes:
    """The whole body is another JSON value, or two."""
    good = encode(request)
    wholes = [b"1", b'"x"', b"[]", b"null", b"true", b"{}", b"[" + good + b"]", good + good, b""]
    return draw.choice(wholes)


def _other_encoding(draw: random.Random, request: Request) -> bytes:
    """JSON, but not as UTF-8 JSON is written."""
    text = encode(request).decode()
    made = [
        text.encode("utf-16"),
        text.encode("utf-32-le"),
        b"\xef\xbb\xbf" + text.encode(),
        text.replace('"', "'").encode(),
        text.replace("]", ",]").encode(),
        ("/* */" + text).encode(),
        b"request=" + text.encode(),
    ]
    return draw.choice(made)


def _too_much(draw: random.Random, request: Request) -> bytes:
    """More candidates, purchases or text than anybody asks for."""
    many = draw.choice([1001, 5000])
    what = draw.randrange(3)
    if what == 0:
        request["candidates"] = {"product_id": [*range(many)]}
    elif what == 1:
        request["history"] = [1] * many * 2
        request.pop("history_age_days", None)
    else:
        request["query"] = "milk " * many
    return encode(request)


KINDS: dict[str, Callable[[random.Random, Request], bytes]] = {
    function.__name__.removeprefix("_"): function
    for function in (
        *(_other_value, _other_list, _left_out, _unknown_field, _field_twice, _changed_bytes),
        *(_lost_bytes, _repeated_bytes, _truncated, _bad_text, _random_bytes, _random_tokens),
        *(_deep, _other_whole, _other_encoding, _too_much),
    )
}
"""The kinds of malformed bodies: each takes a source of randomness and a request it may change."""


def _spots(value: Any) -> list[tuple[Any, Any]]:
    """Return (holder, key) of every value inside ``value``."""
    if isinstance(value, dict):
        keys: list[Any] = [*value]
    elif isinstance(value, list):
        keys = [*range(len(value))]
    else:
        return []
    return [(value, key) for key in keys] + [s for key in keys for s in _spots(value[key])]


def _marked(draw: random.Random, request: Request, piece: bytes) -> bytes:
    """Put ``piece``, as it is, in the place of one value."""
    holder, key = draw.choice(_spots(request))
    holder[key] = _MARK
    return encode(request).replace(_SPOT.encode(), piece)


def _replaced(draw: random.Random, request: Request, text: str) -> bytes:
    return _marked(draw, request, text.encode())
