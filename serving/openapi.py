"""The OpenAPI document: what the rankers in the slots read, with real requests as examples."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from serving.ab_routing import BUCKETS, CONTROL, Bucket
from serving.inputs import Input
from serving.protocol import JSON, Limits
from serving.slots import Slot

Schema = dict[str, Any]

_INT64: Schema = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
_GREATEST = float(np.finfo(np.float32).max)
_FLOAT32: Schema = {"type": "number", "minimum": -_GREATEST, "maximum": _GREATEST}
_EXAMPLES = 3

_REFUSALS = {
    400: "The body is not JSON.",
    401: "The API key is missing or wrong.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The content type is not JSON.",
    422: "The body breaks a rule, which the message names.",
    429: "Too many requests are waiting; the header Retry-After says when to come back.",
    503: "The service is stopping, or the feature store cannot answer.",
    504: "The request was not answered in time.",
}


def _refusals(*statuses: int) -> dict[int | str, Schema]:
    content = {JSON: {"schema": _ref("Error")}}
    return {status: {"description": _REFUSALS[status], "content": content} for status in statuses}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _queued(answer: str, description: str) -> Schema:
    content = {JSON: {"schema": _ref(answer)}}
    return {
        "tags": ["ranking"],
        "responses": {
            200: {"description": description, "content": content},
            **_refusals(*(status for status in _REFUSALS if status != 401)),
        },
        "openapi_extra": {
            "requestBody": {
                "required": True,
                "content": {JSON: {"schema": _ref("Request")}},
            }
        },
    }


RANK_DOCS = _queued("Ranking", "Probabilities and order of the candidates.")
EXPLAIN_DOCS = _queued("Explanation", "The reason per feature group.")
READY_DOCS: Schema = {"responses": _refusals(503)}
"""Keyword arguments of FastAPI's routes."""

_PRIVATE = ("/v1/", "/metrics")

_ANSWERS: dict[str, Schema] = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["code", "message"],
                "properties": {
                    "code": {"type": "string", "description": "One word for programs."},
                    "message": {"type": "string", "description": "One sentence for people."},
                },
            }
        },
    },
    "Ranking": {
        "type": "object",
        "required": ["request_id", "model", "bucket", "probabilities", "order"],
        "properties": {
            "request_id": {
                "type": "string",
                "description": "As in the header X-Request-Id, of the request or made up.",
            },
            "model": {"type": "string", "description": "Fingerprint of the exported ranker."},
            "bucket": {
                "enum": [*BUCKETS, None],
                "description": "Of the A/B test; null outside of one.",
            },
            "probabilities": {
                "type": "array",
                "items": {"type": "number", "minimum": 0, "maximum": 1},
                "description": "Of a click, in the order of the request's candidates.",
            },
            "order": {
                "type": "array",
                "items": {"type": "integer", "minimum": 0},
                "description": "Places of the candidates in the request, best first.",
            },
        },
    },
    "Explanation": {
        "type": "object",
        "required": ["groups", "probabilities", "contributions"],
        "properties": {
            "groups": {"type": "array", "items": {"type": "string"}},
            "probabilities": {"type": "array", "items": {"type": "number"}},
            "contributions": {
                "type": "array",
                "items": {"type": "array", "items": {"type": "number"}},
                "description": "Log odds with a group less log odds without it, "
                "for each candidate and group.",
            },
        },
    },
}


def document(app: FastAPI, slots: Mapping[Bucket, Slot], limits: Limits, *, key: bool) -> Schema:
    """Return the OpenAPI document.

    Args:
        app: its paths.
        slots: the rankers whose inputs are described; a request may hold those of all.
        limits: of a request.
        key: whether callers need an API key.
    """
    made = get_openapi(
        title=app.title,
        version=app.version,
        description="Ranks the candidates of a search by the probability of a click.",
        routes=app.routes,
    )
    components = made.setdefault("components", {})
    components["schemas"] = {**_ANSWERS, "Request": _request(slots, limits)}
    for path, operations in made["paths"].items():
        if key and path.startswith(_PRIVATE):
            for operation in operations.values():
                operation["security"] = [{"key": []}]
                operation["responses"] |= {str(k): v for k, v in _refusals(401).items()}
    if key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return made


def _request(slots: Mapping[Bucket, Slot], limits: Limits) -> Schema:
    specs = [slot.current.manifest.inputs for slot in slots.values()]
    request = _properties([item for spec in specs for item in spec.request])
    candidate = _properties([item for spec in specs for item in spec.candidate])
    columns = {
        name: _nullable(_list(value, limits.candidates)) for name, value in candidate.items()
    }
    age = {"type": "integer", "minimum": 0, "maximum": 2**15 - 1}
    golden = slots[CONTROL].current.golden[:_EXAMPLES]
    return _object(
        {
            "query": {"type": "string", "description": "What was searched for."},
            "user_id": {
                **_nullable(_INT64),
                "description": "Decides the bucket of an A/B test; the history is looked up by it "
                "where none is given.",
            },
            "history": {
                **_nullable(_list(_INT64, limits.history)),
                "description": "Ids of the products that the user bought, most recent first.",
            },
            "history_age_days": {
                **_nullable(_list(age, limits.history)),
                "description": "Whole days since each of these purchases.",
            },
            "features": _nullable(_object(request)),
            "candidates": _object(
                {
                    "product_id": _list(_INT64, limits.candidates),
                    "features": {
                        **_nullable(_object(columns)),
                        "description": "For each feature a list, one value a candidate.",
                    },
                },
                required=["product_id"],
            ),
        },
        required=["query", "candidates"],
    ) | {"examples": [example.request for example in golden]}


def _properties(items: Sequence[Input]) -> dict[str, Schema]:
    """Return the schema of one value of each feature; ``null`` is a missing one."""
    kinds: dict[str, Schema] = {
        "string": {"type": "string"},
        "int64": _INT64,
        "float32": _FLOAT32,
    }
    return {item.name: _nullable(kinds[item.type]) for item in items}


def _object(properties: Mapping[str, Schema], required: Sequence[str] = ()) -> Schema:
    made: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return made | ({"required": [*required]} if required else {})


def _list(items: Schema, most: int) -> Schema:
    return {"type": "array", "items": items, "maxItems": most}


def _nullable(schema: Schema) -> Schema:
    return {**schema, "type": [schema["type"], "null"]}
