"""Request bodies for the load tests: real requests at a fixed size."""

import copy
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from features.errors import BadInputError

Request = dict[str, Any]

GOLDEN = "golden.json"


def golden_requests(bundle: Path) -> list[Request]:
    """Return the raw requests of an exported ranker's golden file that have candidates.

    Raises:
        BadInputError: the file is not there, is no JSON, or holds no request with candidates.
    """
    file = bundle / GOLDEN
    try:
        requests = [golden["request"] for golden in json.loads(file.read_bytes())["requests"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInputError(f"{file}: not the golden requests of an exported ranker") from error
    real = [request for request in requests if request["candidates"]["product_id"]]
    if not real:
        raise BadInputError(f"{file}: no request with candidates")
    return real


def sized_requests(
    golden: Sequence[Request], *, candidates: int, history: int, count: int, seed: int = 0
) -> list[Request]:
    """Return ``count`` requests of ``candidates`` candidates and ``history`` purchases.

    Query, user and context are those of the golden requests in turn; candidates, with all their
    features, and purchases are drawn from those of all golden requests, so that each request looks
    up many different rows.

    Args:
        golden: raw requests with candidates.
        candidates: of each request.
        history: purchases of each request, most recent first.
        count: how many requests.
        seed: of the draws.
    """
    draw = random.Random(seed)
    pool = [
        (request["candidates"], place)
        for request in golden
        for place in range(len(request["candidates"]["product_id"]))
    ]
    products = [product for request in golden for product in request.get("history") or ()]
    products += [columns["product_id"][place] for columns, place in pool]
    longest = max(max(request.get("history_age_days") or (0,)) for request in golden)
    made = []
    for number in range(count):
        request = copy.deepcopy(golden[number % len(golden)])
        request["candidates"] = _columns(draw.choices(pool, k=candidates))
        request["history"] = draw.choices(products, k=history)
        request["history_age_days"] = sorted(draw.randint(0, longest) for _ in range(history))
        made.append(request)
    return made


def encode(request: Request) -> bytes:
    """Return ``request`` as a JSON body."""
    return json.dumps(request, separators=(",", ":")).encode()


def _columns(drawn: Sequence[tuple[dict[str, Any], int]]) -> dict[str, Any]:
    """Put single candidates together; a feature that one of them lacks is missing for it."""
    names = sorted({name for columns, _ in drawn for name in columns.get("features") or {}})
    ids = [columns["product_id"][place] for columns, place in drawn]
    features = {name: [_value(columns, name, place) for columns, place in drawn] for name in names}
    return {"product_id": ids, "features": features}


def _value(columns: dict[str, Any], name: str, place: int) -> Any:
    """Return one candidate's feature; ``None`` where its request leaves the feature out."""
    values = (columns.get("features") or {}).get(name)
    return None if values is None else values[place]
