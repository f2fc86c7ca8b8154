"""Swapping the model under load, and folders that must not be taken up."""

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import uvloop

from experiments.load_bad_exports import BAD
from experiments.load_bodies import Request
from experiments.load_checks import Part, at_least, equals
from experiments.load_connection import Connection
from experiments.load_generator import LoadGenerator, Results, fixed_rate, quantiles
from experiments.load_service import Service
from experiments.load_setting import LoadConfig, payloads
from features.console import say
from features.errors import BadInputError

TOLERANCE = 1e-6
_SHARE = 0.15  # of the saturation rate: loading a model takes processor time too
_LOWEST_RATE = 10.0
_CONNECTIONS = 12  # enough that every worker has some
_MOST_CONNECTIONS = 16
_SWAP_S = 30.0
_LONGEST_S = 3600.0
_POLL = ("--poll-seconds", "0.05")
_AGREE = 12  # fresh connections in a row that tell the same


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """An exported ranker and what it must answer; ``probabilities`` ``[R, C]``."""

    folder: Path
    fingerprint: str
    probabilities: npt.NDArray[np.float32]

    @classmethod
    def load(cls, folder: Path, requests: Sequence[Request]) -> "Model":
        """Score ``requests`` with the exported ranker in ``folder``, one at a time.

        Raises:
            BadInputError: the folder is not an exported ranker.
        """
        from serving.exported import ExportedRanker
        from serving.raw_requests import to_batch

        ranker = ExportedRanker.open(folder)
        scores = [ranker.score(to_batch([r], ranker.manifest.inputs)) for r in requests]
        return cls(
            folder=folder,
            fingerprint=ranker.manifest.fingerprint,
            probabilities=np.stack(scores),
        )


@dataclass(slots=True, kw_only=True)
class Verdict:
    """Compares every answer with the model that it says it is from.

    Attributes:
        models: by fingerprint.
        wrong: answers of an unknown model, or whose probabilities are another's.
        largest: the largest difference in probability from the model's own.
        last: fingerprint of the last answer.
        by_connection: fingerprint of the last answer on each connection.
        generator: offers the requests; set before the first answer.
    """

    models: dict[str, Model]
    wrong: int = 0
    largest: float = 0.0
    last: str = ""
    by_model: dict[str, int] = field(default_factory=dict)
    by_connection: dict[Connection, str] = field(default_factory=dict)
    generator: LoadGenerator | None = None

    def __call__(self, request: int, status: int, body: bytes) -> None:
        """Look at one answer (called by the load generator)."""
        if status != 200:
            return
        answer = json.loads(body)
        name = answer["model"]
        self.last = name
        assert self.generator is not None
        self.by_connection[self.generator.carrier(request)] = name
        self.by_model[name] = self.by_model.get(name, 0) + 1
        if name not in self.models:
            self.wrong += 1
            return
        expected = self.models[name].probabilities
        found = np.asarray(answer["probabilities"])
        row = expected[request % len(expected)]
        off = float(np.abs(found - row).max()) if found.shape == row.shape else 1.0
        self.largest = max(self.largest, off)
        self.wrong += off > TOLERANCE

    async def until(self, fingerprint: str) -> bool:
        """Wait until every connection's next answer is of ``fingerprint``; false after 30 s.

        A connection belongs to one worker process: then every worker has the model.
        """
        assert self.generator is not None
        self.by_connection.clear()
        give_up = time.perf_counter() + _SWAP_S
        while time.perf_counter() < give_up:
            found = [self.by_connection.get(one) for one in self.generator.open_connections]
            if found and {*found} == {fingerprint}:
                return True
            await asyncio.sleep(0.005)
        return False


def swaps(config: LoadConfig, rate: float) -> Part:
    """Swap between two models ``config.swaps`` times under load, then offer four bad folders.

    Raises:
        BadInputError: there is no other exported ranker, or it answers like the first one.
    """
    if config.other is None:
        raise BadInputError("the part 'swaps' needs a second exported ranker: give --other")
    requests = config.requests()
    models = [Model.load(folder, requests) for folder in (config.bundle, config.other)]
    apart = np.abs(models[0].probabilities - models[1].probabilities).max(axis=1)
    if models[0].fingerprint == models[1].fingerprint or (apart <= 2 * TOLERANCE).any():
        raise BadInputError(
            f"{config.other}: cannot be told from {config.bundle} by its answers, so swaps between "
            "the two would show nothing"
        )
    served = config.output / "served"
    served.parent.mkdir(parents=True, exist_ok=True)
    point(served, models[0].folder)
    with config.service("swaps", bundle=served, options=_POLL) as service:
        offered = max(_LOWEST_RATE, rate * _SHARE)
        run = SwapRun(config=config, service=service, models=models, served=served)
        return uvloop.run(run.go(payloads(service.target, requests), offered))


@dataclass(slots=True, kw_only=True)
class SwapRun:
    """One service whose model is swapped while it answers."""

    config: LoadConfig
    service: Service
    models: Sequence[Model]
    served: Path

    async def go(self, ready: Sequence[bytes], rate: float) -> Part:
        """Offer ``rate`` requests per second until all swaps and bad folders are through."""
        verdict = Verdict(models={model.fingerprint: model for model in self.models})
        generator = LoadGenerator(
            target=self.service.target,
            payloads=ready,
            connections=_CONNECTIONS,
            most_connections=_MOST_CONNECTIONS,
            on_answer=verdict,
        )
        verdict.generator = generator
        workers = self.service.workers()
        offering = asyncio.create_task(generator.offer(fixed_rate(rate, _LONGEST_S)))
        try:
            took = await self._swap(verdict, offering)
            told = await self._told()
            refused = {
                name: await self._offer_bad(name, spoil, verdict) for name, spoil in BAD.items()
            }
        finally:
            generator.stop()
            results = await offering
            generator.close()
        same = self.service.workers() == workers
        return self._part(results, verdict, took, refused, told=told, same=same)

    async def _swap(self, verdict: Verdict, offering: asyncio.Task[Results]) -> list[float]:
        """Swap by moving the link that is served; return the seconds that each swap took."""
        took = []
        for number in range(1, self.config.swaps + 1):
            model = self.models[number % 2]
            begun = time.perf_counter()
            point(self.served, model.folder)
            if offering.done() or not await verdict.until(model.fingerprint):
                say(f"  swap {number} was not taken up")
                break
            took.append(time.perf_counter() - begun)
            if number % max(1, self.config.swaps // 10) == 0:
                say(f"  {number} of {self.config.swaps} swaps")
        return took

    async def _offer_bad(
        self, name: str, spoil: Callable[[Path], None], verdict: Verdict
    ) -> dict[str, Any]:
        """Serve a spoilt copy of the model that is not loaded; return what the service did."""
        say(f"  a folder that must be refused: {name}")
        loaded = verdict.last
        other = next(m for m in self.models if m.fingerprint != loaded)
        mine = next((m for m in self.models if m.fingerprint == loaded), other)
        bad = self.config.output / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(other.folder, bad)
        spoil(bad)
        before = await self._told()
        point(self.served, bad)
        noticed = await self._wait_for_failures(before["failed_loads"] + 1)
        kept = await verdict.until(loaded)
        after = await self._told()
        point(self.served, mine.folder)
        back = await verdict.until(loaded)
        return {"noticed": noticed, "old_model_kept": kept and back, "said": after["last_error"]}

    async def _wait_for_failures(self, count: int) -> bool:
        give_up = time.perf_counter() + _SWAP_S
        while time.perf_counter() < give_up:
            if (await self._told())["failed_loads"] >= count:
                return True
            await asyncio.sleep(0.1)
        return False

    async def _told(self) -> dict[str, Any]:
        """Return the lowest counts that workers tell of themselves in ``/v1/models``."""
        answers = [
            await asyncio.to_thread(self.service.get_json, "/v1/models") for _ in range(_AGREE)
        ]
        return {
            "swaps": min(_found(answer, "swaps") for answer in answers),
            "failed_loads": min(_found(answer, "failed_loads") for answer in answers),
            "last_error": next(iter(_texts(answers, "last_error")), ""),
        }

    def _part(
        self,
        results: Results,
        verdict: Verdict,
        took: Sequence[float],
        refused: dict[str, dict[str, Any]],
        *,
        told: dict[str, Any],
        same: bool,
    ) -> Part:
        checks = (
            equals("swaps taken up by all workers", len(took), self.config.swaps),
            at_least("swaps that /v1/models tells", told["swaps"], self.config.swaps),
            equals("requests not answered 200", len(results.planned) - results.count(200), 0),
            equals("answers that are neither model's", verdict.wrong, 0),
            equals("same worker processes", same, True),
            *(
                equals(f"refused, and the old one served on: {name}", _good(found), True)
                for name, found in refused.items()
            ),
        )
        return Part(
            checks=checks,
            figures={
                "swaps": len(took),
                "swap_s": quantiles(np.array(took)),
                "answers_by_model": verdict.by_model,
                "largest_difference": verdict.largest,
                "bad_folders": refused,
                "load": results.summary(),
            },
        )


def _good(found: dict[str, Any]) -> bool:
    return bool(found["noticed"] and found["old_model_kept"])


def point(served: Path, folder: Path) -> None:
    """Make ``served`` a link to ``folder``, in one step."""
    scratch = served.with_name(f".{served.name}.next")
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(folder.resolve(), target_is_directory=True)
    scratch.replace(served)


def _values(document: Any, key: str) -> list[Any]:
    """Return every value of ``key`` at any depth of ``document``."""
    if isinstance(document, list):
        return [value for item in document for value in _values(item, key)]
    if not isinstance(document, dict):
        return []
    inner = [value for item in document.values() for value in _values(item, key)]
    return [document[key], *inner] if key in document else inner


def _found(document: Any, key: str) -> int:
    return sum(value for value in _values(document, key) if isinstance(value, int))


def _texts(document: Any, key: str) -> list[str]:
    return [value for value in _values(document, key) if isinstance(value, str)]
