"""Golden requests: real ones, in the form that clients send, with the answers they must get."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features import columns
from serving.inputs import InputSpec
from serving.manifest import Golden

_REAL = 8

Raw = dict[str, Any]


def raw_request(record: dict[str, Any], inputs: InputSpec) -> Raw:
    """Return a request record (a row of its table as a dict) as a client would send it."""
    return {
        "query": record[columns.QUERY],
        "history": list(record.get(columns.PURCHASE_HISTORY) or []),
        "history_age_days": list(record.get(columns.PURCHASE_AGE_DAYS) or []),
        "features": {item.name: _plain(record[item.name]) for item in inputs.request},
        "candidates": {
            "product_id": list(record[columns.PRODUCT_ID]),
            "features": {
                item.name: [_plain(value) for value in record[item.name]]
                for item in inputs.candidate
            },
        },
    }


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def golden_requests(
    records: pa.Table,
    inputs: InputSpec,
    score: Callable[[Raw], list[float]],
    catalog: Path,
) -> list[Golden]:
    """Return golden requests: records with a click, spread over the table, and edge cases.

    Args:
        records: request records.
        inputs: names and types of the features.
        score: gives the probabilities of a raw request.
        catalog: ``catalog.parquet``, for titles; where it is missing there are none.
    """
    clicked = records[columns.CLICKED].to_pylist()
    with_click = [row for row, clicks in enumerate(clicked) if any(clicks)]
    chosen = with_click[:: max(1, len(with_click) // _REAL)][:_REAL]
    real = [raw_request(records.slice(row, 1).to_pylist()[0], inputs) for row in chosen]
    cases = {f"request {place + 1}": raw for place, raw in enumerate(real)} | _edges(real[0])
    titles = _titles(catalog, {p for raw in real for p in raw["candidates"]["product_id"]})
    return [
        Golden(
            name=name,
            request=raw,
            probabilities=score(raw),
            titles=_titles_of(raw, titles),
        )
        for name, raw in cases.items()
    ]


def _edges(raw: Raw) -> dict[str, Raw]:
    """Return variations of a request."""
    candidates = raw["candidates"]

    def first(number: int) -> Raw:
        features = {name: values[:number] for name, values in candidates["features"].items()}
        return {"product_id": candidates["product_id"][:number], "features": features}

    unknown = [-1 - place for place in range(len(candidates["product_id"]))]
    bare = {"product_id": candidates["product_id"]}
    return {
        "unknown query and products": raw
        | {"query": "unbekannt: Käse ✓", "candidates": candidates | {"product_id": unknown}},
        "empty history": raw | {"history": [], "history_age_days": []},
        "no features": raw | {"features": {}, "candidates": bare},
        "one candidate": raw | {"candidates": first(1)},
        "no candidates": raw | {"candidates": first(0)},
    }


def _titles(catalog: Path, products: set[int]) -> dict[int, str]:
    if not catalog.is_file():
        return {}
    table = pq.read_table(
        catalog,
        columns=[columns.PRODUCT_ID, columns.TITLE],
        filters=pc.field(columns.PRODUCT_ID).isin(sorted(products)),
    )
    ids, titles = (table[name].to_pylist() for name in (columns.PRODUCT_ID, columns.TITLE))
    return {i: title for i, title in zip(ids, titles, strict=True) if title is not None}


def _titles_of(raw: Raw, titles: dict[int, str]) -> list[str] | None:
    if not titles:
        return None
    return [titles.get(product, "") for product in raw["candidates"]["product_id"]]
