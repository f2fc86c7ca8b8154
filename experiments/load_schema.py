"""Requests that schemathesis makes from the service's own OpenAPI document."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from features.errors import BadInputError

BY_DESIGN = (429, 503, 504)
"""Answers that a busy or stopping service gives on purpose; they are counted apart."""
_SEED = 20240801
_TIMEOUT_S = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaRun:
    """What came of the generated requests.

    Attributes:
        operations: method and path of each operation in the document.
        statuses: how many answers by operation and status.
        server_errors: the answers of 5xx that are not by design, as curl commands.
        breaches: other ways in which answers depart from the document: an undocumented status or
            content type, a body that does not fit its schema; by operation.
    """

    operations: tuple[str, ...]
    statuses: dict[str, dict[str, int]]
    server_errors: tuple[str, ...]
    breaches: dict[str, int] = field(default_factory=dict)

    @property
    def requests(self) -> int:
        """How many requests were sent."""
        return sum(sum(counts.values()) for counts in self.statuses.values())


def exercise(schema: Any, *, examples: int, base_url: str | None = None) -> SchemaRun:
    """Send ``examples`` requests that fit the schema and as many that do not, for each operation.

    Args:
        schema: what a loader of ``schemathesis.openapi`` returned.
        examples: for each operation and each of the two modes.
        base_url: of the service; ``None`` for a schema that carries its application.
    """
    from schemathesis import GenerationMode

    statuses: dict[str, Counter[str]] = {}
    errors: list[str] = []
    breaches: Counter[str] = Counter()
    for found in schema.get_all_operations():
        operation = found.ok()
        name = operation.label
        counts = statuses.setdefault(name, Counter())

        def send(case: Any, name: str = name, counts: Counter[str] = counts) -> None:
            response = case.call(base_url=base_url, **_patience(base_url))
            counts[str(response.status_code)] += 1
            if response.status_code >= 500 and response.status_code not in BY_DESIGN:
                errors.append(case.as_curl_command())
            elif breach := _breach(case, response):
                breaches[f"{name}: {breach}"] += 1

        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            _generate(operation.as_strategy(generation_mode=mode), send, examples)
    return SchemaRun(
        operations=tuple(statuses),
        statuses={name: dict(counts) for name, counts in statuses.items()},
        server_errors=tuple(errors),
        breaches=dict(breaches),
    )


def _generate(strategy: Any, send: Callable[[Any], None], examples: int) -> None:
    """Call ``send`` with cases of ``strategy``; the same ones in every run."""
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis.errors import Unsatisfiable

    calm = settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=tuple(HealthCheck),
    )

    @seed(_SEED)
    @calm
    @given(case=strategy)
    def probe(case: Any) -> None:
        send(case)

    try:
        probe()
    except Unsatisfiable:  # nothing to get wrong in an operation without parameters
        return


def _breach(case: Any, response: Any) -> str | None:
    """Return how an answer departs from the document, in a word; ``None`` where it does not."""
    from schemathesis.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )
    from schemathesis.core.failures import Failure, FailureGroup

    kinds = [status_code_conformance, content_type_conformance, response_schema_conformance]
    try:
        case.validate_response(response, checks=kinds)
    except (Failure, FailureGroup) as failure:
        first = failure.exceptions[0] if isinstance(failure, FailureGroup) else failure
        return f"{response.status_code} {type(first).__name__}"
    return None


def _patience(base_url: str | None) -> dict[str, Any]:
    return {} if base_url is None else {"timeout": _TIMEOUT_S}


def schema_of(base_url: str) -> Any:
    """Return the schema of the service at ``base_url``.

    Raises:
        BadInputError: schemathesis is not installed; the message names the command.
    """
    try:
        import schemathesis
    except ImportError as error:
        raise BadInputError(
            "schemathesis is not installed; install it with: pip install 'dashclip-ranker[dev]'"
        ) from error
    return schemathesis.openapi.from_url(f"{base_url}/openapi.json")
