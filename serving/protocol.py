"""The bodies of the service: what a request may say, what is answered, and how it is refused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NotRequired

import numpy as np
import numpy.typing as npt
import pydantic_core
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

# pydantic reads the TypedDict of typing only from Python 3.12 on.
from typing_extensions import TypedDict

Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Int64s = Annotated[list[Int64], Field(fail_fast=True)]

JSON = "application/json"
RETRY_AFTER_S = 1

# Unknown keys are let through and refused by name afterwards: forbidding them would make an error
# of each, and a hostile body holds a hundred thousand.
_ANY_KEY = ConfigDict(extra="allow", strict=True)


class RawCandidates(TypedDict):
    """The candidates of a request, columnar.

    Attributes:
        product_id: [C].
        features: name to [C] values; checked against the ranker's inputs when they are scored.
    """

    __pydantic_config__ = _ANY_KEY  # type: ignore[misc]
    product_id: Int64s
    features: NotRequired[dict[str, Any] | None]


class RawRequest(TypedDict):
    """One user, one query and its candidates, in raw ids and raw values."""

    __pydantic_config__ = _ANY_KEY  # type: ignore[misc]
    query: str
    user_id: NotRequired[Int64 | None]
    history: NotRequired[Int64s | None]
    history_age_days: NotRequired[Int64s | None]
    features: NotRequired[dict[str, Any] | None]
    candidates: RawCandidates


_REQUEST = TypeAdapter(RawRequest)
_REQUEST_KEYS = frozenset(RawRequest.__annotations__)
_CANDIDATE_KEYS = frozenset(RawCandidates.__annotations__)


class RefusedError(Exception):
    """A request that is not answered with probabilities.

    Attributes:
        status: of HTTP.
        code: one word for programs.
        message: one sentence for people.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message

    @property
    def body(self) -> bytes:
        """The body of the answer."""
        return pydantic_core.to_json({"error": {"code": self.code, "message": self.message}})

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the answer, in lower case."""
        own = {"content-type": JSON, "content-length": str(len(self.body))}
        if self.status == 401:
            own["www-authenticate"] = "Bearer"
        if self.status in (429, 503):
            own["retry-after"] = str(RETRY_AFTER_S)
        return own


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on one request.

    Attributes:
        candidates: the most.
        history: the most purchases.
    """

    candidates: int
    history: int


def read_request(body: bytes, limits: Limits) -> dict[str, Any]:
    """Parse the body of a request to rank.

    Keys that are ``null`` are left out. The values of features are not looked at.

    Raises:
        RefusedError: 400 where the body is not JSON, 422 where it breaks a rule.
    """
    try:
        raw: dict[str, Any] = _REQUEST.validate_json(body)  # type: ignore[assignment]
    except ValidationError as error:
        raise _refused(error) from None
    candidates: dict[str, Any] = raw["candidates"]
    _check_keys("", raw, _REQUEST_KEYS)
    _check_keys("candidates.", candidates, _CANDIDATE_KEYS)
    raw = {key: value for key, value in raw.items() if value is not None}
    raw["candidates"] = {key: value for key, value in candidates.items() if value is not None}
    _check_number("candidates.product_id", candidates["product_id"], limits.candidates)
    _check_number("history", raw.get("history", ()), limits.history)
    return raw


def _refused(error: ValidationError) -> RefusedError:
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return RefusedError(400, "bad_json", f"The body is not JSON: {first['ctx']['error']}.")
    place = ".".join(str(part) for part in first["loc"])
    return invalid(f"{place or 'the body'}: {first['msg'].lower()}")


def _check_keys(prefix: str, found: Mapping[str, Any], known: frozenset[str]) -> None:
    for key in found.keys() - known:
        raise invalid(f"{prefix}{key[:80]}: no such key; known are {', '.join(sorted(known))}")


def _check_number(name: str, values: Sequence[int], most: int) -> None:
    if len(values) > most:
        raise invalid(f"{name}: {len(values)} values, at most {most} are taken")


def invalid(message: str) -> RefusedError:
    """Return the refusal of a body that is JSON but breaks a rule."""
    return RefusedError(422, "invalid_request", message)


def too_late() -> RefusedError:
    """Return the refusal of a request whose deadline passed."""
    return RefusedError(504, "deadline_exceeded", "The request was not answered in time.")


def answer(
    *,
    request_id: str,
    model: str,
    bucket: str | None,
    probabilities: npt.NDArray[np.float32],
    order: npt.NDArray[np.int64],
) -> bytes:
    """Return the body of an answer.

    Args:
        request_id: of the request.
        model: fingerprint of the exported ranker.
        bucket: of the A/B test.
        probabilities: [C], all finite.
        order: [C] places of the candidates, best first.
    """
    return pydantic_core.to_json(
        {
            "request_id": request_id,
            "model": model,
            "bucket": bucket,
            "probabilities": probabilities.tolist(),
            "order": order.tolist(),
        }
    )


def best_first(probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Return the places [C] of the candidates, best first; equals keep their order."""
    return np.argsort(-probabilities, kind="stable")
