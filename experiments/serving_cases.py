"""What ``benchmark-serving`` measures: ways to serve, shapes of requests, rates of arrival.

A *variant* is one way to serve the ranker and has a process of its own. A *case* is a variant under
one shape of request, one popularity of ids and one kind of load.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Mode = Literal["fused", "fetched"]
Runtime = Literal["torchscript", "eager", "pt2"]
Client = Literal["", "redis-py", "thin"]
Popularity = Literal["zipf", "uniform"]

HEADLINE = (100, 300)
"""Candidates and purchases of the request that the headline figures are of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to serve the ranker.

    Attributes:
        mode: ``fused``, ids in and tables in the model, or ``fetched``, embeddings from Redis.
        runtime: what runs the model.
        table_dtype: of the tables in the model, or of the values in Redis.
        client: what talks to Redis; empty where nothing does.
    """

    mode: Mode
    runtime: Runtime
    table_dtype: str
    client: Client = ""

    @property
    def name(self) -> str:
        """Such as ``fused-torchscript-int8``."""
        parts = (self.mode, self.runtime, self.table_dtype, self.client)
        return "-".join(part for part in parts if part)


FUSED = Variant(mode="fused", runtime="torchscript", table_dtype="int8")
FETCHED = Variant(mode="fetched", runtime="torchscript", table_dtype="float16", client="redis-py")
THIN = Variant(mode="fetched", runtime="torchscript", table_dtype="float16", client="thin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A variant under one shape of request and one load.

    Attributes:
        variant: how the ranker is served.
        candidates: of a request.
        history: purchases of a request.
        popularity: how often each id is asked for: by Zipf's law, the k-th most popular one in
            proportion to ``1 / k``, or all alike.
        load: share of the variant's capacity at which requests arrive; ``None`` for one request
            after the other without a pause.
    """

    variant: Variant
    candidates: int
    history: int
    popularity: Popularity = "zipf"
    load: float | None = None

    @property
    def key(self) -> str:
        """A name of its own among all cases, fit for a file."""
        load = "" if self.load is None else f"-load-{self.load:g}"
        shape = f"{self.candidates}-{self.history}-{self.popularity}"
        return f"{self.variant.name}-{shape}{load}"

    @property
    def title(self) -> str:
        """A short text for a line of progress."""
        load = "" if self.load is None else f", at {self.load:.0%} of capacity"
        return (
            f"{self.variant.name}, {self.candidates:,} candidates, history {self.history}, "
            f"{self.popularity}{load}"
        )

    def about(self) -> dict[str, Any]:
        """Return what tells the case from others, as it stands in ``serving.json``."""
        return {
            **asdict(self.variant),
            "candidates": self.candidates,
            "history": self.history,
            "popularity": self.popularity,
            "load": self.load,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured.

    Attributes:
        rows: of the product and of the query table.
        candidates: of a request.
        histories: purchases of a request.
        loads: shares of a variant's capacity at which requests arrive in the open loop.
        requests: to time in each case, where the time allows.
        seconds: the most that a case takes.
        load_seconds: time over which requests arrive in an open loop.
        quality_requests: evaluation requests that the AUC is of.
        seed: of everything drawn.
    """

    rows: int = 400_000
    candidates: tuple[int, ...] = (1, 10, 100, 1000)
    histories: tuple[int, ...] = (0, 30, 300)
    loads: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9)
    requests: int = 5_000
    seconds: float = 15.0
    load_seconds: float = 12.0
    quality_requests: int = 20_000
    seed: int = 0

    def cases(self, variants: Sequence[Variant]) -> list[Case]:
        """Return the cases of some variants, variant by variant.

        The two ways that are compared are measured in all shapes and under load; the others in
        the headline's shape.
        """
        found = []
        for variant in variants:
            compared = variant in (FUSED, FETCHED)
            shapes = [(c, h) for h in self.histories for c in self.candidates]
            for candidates, history in shapes if compared else [self.headline]:
                found.append(Case(variant=variant, candidates=candidates, history=history))
            candidates, history = self.headline
            more: list[dict[str, Any]] = []
            if variant.runtime == "torchscript":
                more.append({"popularity": "uniform"})
            if compared:
                more += [{"load": load} for load in self.loads]
            found += [
                Case(variant=variant, candidates=candidates, history=history, **change)
                for change in more
            ]
        return found

    @property
    def headline(self) -> tuple[int, int]:
        """The shape of request that all variants are measured in."""
        if HEADLINE[0] in self.candidates and HEADLINE[1] in self.histories:
            return HEADLINE
        return self.candidates[-1], self.histories[-1]


QUICK = Plan(
    rows=2_000,
    candidates=(1, 100),
    histories=(0, 300),
    loads=(0.5,),
    requests=200,
    seconds=1.0,
    load_seconds=0.5,
    quality_requests=500,
)
"""Enough to see that everything works, with figures that mean nothing."""


def find_case(
    cases: list[dict[str, Any]], variant: Variant, shape: tuple[int, int], **more: Any
) -> dict[str, Any] | None:
    """Return the measured case of a variant and shape; by Zipf's law unless told otherwise."""
    wanted: Mapping[str, Any] = {
        **asdict(variant),
        "candidates": shape[0],
        "history": shape[1],
        "popularity": "zipf",
        "load": None,
        **more,
    }
    for case in cases:
        if all(case[name] == value for name, value in wanted.items()):
            return case
    return None
