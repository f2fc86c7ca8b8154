"""What all parts of the load tests share: the configuration, the requests and the service."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.load_bodies import Request, encode, golden_requests, sized_requests
from experiments.load_generator import http_request
from experiments.load_service import Service

RANK = "/v1/rank"
_DISTINCT = 64
_SEED = 20240801


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """One run of the load tests.

    Args:
        bundle: an exported ranker's folder.
        output: takes the results, the service's logs and its exposure logs.
        other: another exported ranker's folder, for the swaps.
        workers: worker processes of the service.
        candidates: of each request.
        history: purchases of each request.
        seconds: how long half load and overload last.
        swaps: how often the model is swapped.
        stops: how often the service is stopped under load.
        malformed: how many malformed bodies are sent.
        examples: how many requests schemathesis makes for each operation and mode.
    """

    bundle: Path
    output: Path
    other: Path | None = None
    workers: int = 2
    candidates: int = 100
    history: int = 300
    seconds: float = 60.0
    swaps: int = 1000
    stops: int = 10
    malformed: int = 100_000
    examples: int = 100

    def requests(self) -> list[Request]:
        """Return the distinct requests that are offered in turn.

        Raises:
            BadInputError: the bundle has no golden requests.
        """
        return sized_requests(
            golden_requests(self.bundle),
            candidates=self.candidates,
            history=self.history,
            count=_DISTINCT,
            seed=_SEED,
        )

    def service(
        self, name: str, *, bundle: Path | None = None, options: Sequence[str] = ()
    ) -> Service:
        """Return a service that starts when its block is entered; its log is ``name``.log."""
        return Service(
            bundle or self.bundle,
            self.output / "logs" / f"{name}.log",
            workers=self.workers,
            options=options,
        )


def payloads(target: tuple[str, int], requests: Sequence[Request]) -> list[bytes]:
    """Return ``requests`` as whole HTTP requests of ``POST /v1/rank``."""
    return [http_request(target, RANK, encode(request)) for request in requests]
