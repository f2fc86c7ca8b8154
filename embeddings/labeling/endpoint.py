"""Grades by a language model behind an OpenAI-compatible HTTP interface (paper, Section 2.2).

Legend: ``P`` pairs.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from embeddings.labeling.config import EndpointConfig
from embeddings.labeling.endpoint_requests import (
    Completion,
    base_url,
    chat_body,
    cost,
    input_tokens,
    shown,
)
from embeddings.labeling.grades import Grades, Pairs
from embeddings.labeling.ledger import Ledger
from embeddings.labeling.pace import Pace
from embeddings.labeling.prompts import read_prompt
from features.errors import BadInputError

BATCH_PAIRS = 50_000
"""Requests that one file of a batch may hold."""

_CHUNK_ROUNDS = 128  # requests of each worker in a chunk: its last ones, when some idle, are few
_HOPELESS_PAIRS = 100
_ASSUMED_SECONDS = 1.0
_BATCH_SECONDS = 24 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What grading takes.

    Attributes:
        requests: sent, if each answer is read at once.
        input_tokens: read by the model.
        output_tokens: written by it, at most.
        cost: in the currency of the prices.
        seconds: by the limits of requests and tokens a minute, or by one second an answer.
    """

    requests: int
    input_tokens: int
    output_tokens: int
    cost: float
    seconds: float


@dataclass(slots=True)
class Counts:
    """What became of the requests of one process.

    Attributes:
        answered: responses that hold an answer.
        unreadable: answers among them that do not state exactly one label.
        failed: requests without an answer, for whatever reason.
        ungraded: pairs given up.
    """

    answered: int = 0
    unreadable: int = 0
    failed: int = 0
    ungraded: int = 0

    @property
    def readable(self) -> int:
        """Answers that state a label."""
        return self.answered - self.unreadable


class Endpoint:
    """A grader that asks an endpoint about each pair; see `Grader`.

    Every request is noted in the ledger before it is sent. Requests that fail in passing (429,
    5xx, time-outs, broken connections) and answers that cannot be read are asked again, up to the
    configuration's ``retries`` for a pair. An endpoint that keeps failing, or refuses how it is
    asked, ends the run.

    Args:
        config: which endpoint, and how to ask.
        folder: what the path of a prompt begins at.
        ledger: what may be spent; without limits, and forgotten, if not given.

    Raises:
        BadInputError: the prompt cannot be read.
    """

    def __init__(self, config: EndpointConfig, folder: Path, ledger: Ledger | None = None) -> None:
        self.config = config
        self.prompt = read_prompt(config.prompt, folder=folder)
        self.ledger = ledger or Ledger()
        self.counts = Counts()
        self.model = config.model
        self.prompt_version = self.prompt.version
        decides = [
            base_url(config),
            config.model,
            self.prompt_version,
            config.constraint,
            config.sampling,
            config.max_output_tokens,
            config.logprobs,
        ]
        self.fingerprint = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
        chat = config.mode == "chat"
        self.chunk_pairs = _CHUNK_ROUNDS * config.concurrency if chat else BATCH_PAIRS
        self.requests_pace = Pace(config.requests_per_minute)
        self.tokens_pace = Pace(config.tokens_per_minute)

    def grade(self, pairs: Pairs) -> Iterator[Grades]:
        """Yield the grades of all pairs as they arrive; see `Grader.grade`.

        At Ctrl-C, requests that are under way are waited for, some seconds, and what they bring is
        yielded before the interruption goes on.

        Raises:
            BadInputError: the endpoint cannot be reached or refuses, or none of many answers could
                be read; a `BudgetReachedError` where the ledger allows no further request.
        """
        # Imported here: both know this class.
        from embeddings.labeling.endpoint_batch import grade_in_batches
        from embeddings.labeling.endpoint_chat import grade_by_chat

        by_mode = {"batch": grade_in_batches, "chat": grade_by_chat}
        return by_mode[self.config.mode](self, pairs)

    def estimate(self, pairs: Pairs) -> Usage:
        """Return what grading the pairs takes at most, if no answer must be asked for again."""
        config = self.config
        read = sum(
            input_tokens(chat_body(config, self.prompt, query, title))
            for query, title in zip(pairs.queries, pairs.titles, strict=True)
        )
        written = config.max_output_tokens * len(pairs)
        minutes = [
            amount / limit
            for amount, limit in (
                (len(pairs), config.requests_per_minute),
                (read + written, config.tokens_per_minute),
            )
            if limit
        ]
        seconds = max(
            [len(pairs) * _ASSUMED_SECONDS / config.concurrency, *(60 * m for m in minutes)]
        )
        return Usage(
            requests=len(pairs),
            input_tokens=read,
            output_tokens=written,
            cost=cost(config, read, written),
            seconds=seconds if config.mode == "chat" else _BATCH_SECONDS,
        )

    def note_answer(self, completion: Completion) -> None:
        """Count an answer."""
        self.counts.answered += 1
        self.counts.unreadable += completion.label is None

    def give_up(self, reason: str) -> None:
        """Count a pair that stays without a label.

        Args:
            reason: the last answer, or why there is none.

        Raises:
            BadInputError: many pairs stay without, and not one has got a label.
        """
        self.counts.ungraded += 1
        if not self.counts.readable and self.counts.ungraded >= _HOPELESS_PAIRS:
            raise BadInputError(
                f"{base_url(self.config)}: no answer of {self.config.model!r} states a label, in "
                f"{self.counts.ungraded} pairs; the last: {shown(reason)!r}"
            )
