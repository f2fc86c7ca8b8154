"""Batches of an endpoint's grader: files of requests that are answered within a day.

Every batch is noted, with the questions in it, before it is handed in, so that a run that was
killed finds its batches again: no question is handed in twice.

Legend: ``P`` pairs.
"""

import hashlib
import json
import math
import tempfile
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from embeddings.labeling.config import EndpointConfig
from embeddings.labeling.endpoint import BATCH_PAIRS, Endpoint
from embeddings.labeling.endpoint_batch_notes import BatchNotes, NotedBatch
from embeddings.labeling.endpoint_jobs import MARK, Jobs, News, looks
from embeddings.labeling.endpoint_requests import (
    OF_THE_PAIR,
    Completion,
    base_url,
    chat_body,
    cost,
    grades_of,
    input_tokens,
    read_completion,
    shown,
)
from embeddings.labeling.grades import Grades, Pairs
from embeddings.labeling.ledger import BudgetReachedError
from features.errors import BadInputError

FILE_BYTES = 200 * 10**6
"""The largest file of a batch."""

_CHAT: Literal["/v1/chat/completions"] = "/v1/chat/completions"
_GRADES_AT_ONCE = 4096
_TOLD_ERRORS = 3


def grade_in_batches(endpoint: Endpoint, pairs: Pairs) -> Iterator[Grades]:
    """Yield the grades of all pairs as their batches end; see `Endpoint.grade`.

    Questions without an answer, or with one that cannot be read, go into a further batch, up to
    the configuration's ``retries`` times.
    """
    work = _Work(endpoint, pairs)
    with Jobs(endpoint.config) as jobs, BatchNotes(endpoint.ledger.path) as notes:
        desk = _Desk(endpoint, jobs, notes)
        for attempt in range(endpoint.config.retries + 1):
            stopped = None
            try:
                desk.hand_in(work, attempt)
            except BudgetReachedError as error:
                stopped = error
            for batch in notes.batches_of(work.open_questions(attempt)):
                yield from _in_parts(work.take(desk.collect(batch), attempt))
            if stopped:
                done = len(pairs) - work.left()
                raise BudgetReachedError(f"{done:,} of {len(pairs):,} pairs are graded: {stopped}")
            if not work.left():
                return
        yield from _in_parts(work.give_up())


def _in_parts(answers: list[tuple[int, int | None, float]]) -> Iterator[Grades]:
    for first in range(0, len(answers), _GRADES_AT_ONCE):
        yield grades_of(answers[first : first + _GRADES_AT_ONCE])


class _Work:
    """The pairs of one call: which of them still want an answer.

    A question's name is a hash of the grader, the query and the title, and the number of the
    attempt; pairs of the same query and title are asked about once.
    """

    def __init__(self, endpoint: Endpoint, pairs: Pairs) -> None:
        self._endpoint = endpoint
        self._pairs = pairs
        self._unread = ""
        self._positions: dict[str, list[int]] = defaultdict(list)
        for position, (query, title) in enumerate(zip(pairs.queries, pairs.titles, strict=True)):
            content = json.dumps([endpoint.fingerprint, query, title]).encode()
            digest = hashlib.blake2b(content, digest_size=16).hexdigest()
            self._positions[digest].append(position)

    def left(self) -> int:
        """Return how many pairs have no grade yet."""
        return sum(len(positions) for positions in self._positions.values())

    def open_questions(self, attempt: int) -> list[str]:
        """Return the names of the questions without a label."""
        return [f"{digest}-{attempt}" for digest in self._positions]

    def line(self, question: str) -> tuple[bytes, float]:
        """Return a question's line of a batch's file, and the most that its answer can cost."""
        digest, _, attempt = question.partition("-")
        position = self._positions[digest][0]
        endpoint, config = self._endpoint, self._endpoint.config
        body = chat_body(
            config,
            endpoint.prompt,
            self._pairs.queries[position],
            self._pairs.titles[position],
            again=attempt != "0",
        )
        line = {"custom_id": question, "method": "POST", "url": _CHAT, "body": body}
        highest = cost(config, input_tokens(body), config.max_output_tokens)
        return json.dumps(line, ensure_ascii=False).encode() + b"\n", highest

    def take(
        self, completions: dict[str, Completion], attempt: int
    ) -> list[tuple[int, int | None, float]]:
        """Take what was answered; returns positions, labels and probabilities."""
        answers: list[tuple[int, int | None, float]] = []
        for digest in list(self._positions):
            completion = completions.get(f"{digest}-{attempt}")
            if completion is None:
                continue
            self._endpoint.note_answer(completion)
            if completion.label is not None:
                label, probability = completion.label, completion.probability
                answers += [(at, label, probability) for at in self._positions.pop(digest)]
            else:
                self._unread = completion.text
        return answers

    def give_up(self) -> list[tuple[int, int | None, float]]:
        """Return the pairs that stay without a label."""
        answers: list[tuple[int, int | None, float]] = []
        for positions in self._positions.values():
            self._endpoint.give_up(self._unread)
            answers += [(position, None, math.nan) for position in positions]
        return answers


class _Desk:
    """Hands batches in and fetches their answers."""

    def __init__(self, endpoint: Endpoint, jobs: Jobs, notes: BatchNotes) -> None:
        self._endpoint = endpoint
        self._jobs = jobs
        self._notes = notes

    def hand_in(self, work: _Work, attempt: int) -> None:
        """Hand in the open questions that are in no batch yet.

        Raises:
            BudgetReachedError: the ledger allows no more; what it did allow is handed in.
        """
        open_questions = work.open_questions(attempt)
        for batch in self._notes.batches_of(open_questions):
            self._find(batch)
        known = self._notes.known(open_questions)
        todo = [question for question in open_questions if question not in known]
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "requests.jsonl")
            while todo:
                count, highest = self._write(path, work, todo)
                self._hand_in(path, todo[:count], highest)
                todo = todo[count:]

    def _write(self, path: Path, work: _Work, questions: Sequence[str]) -> tuple[int, float]:
        """Write the first questions that one batch holds; returns their number and highest cost.

        Raises:
            BudgetReachedError: the ledger allows not even one.
        """
        size, highest, written = 0, 0.0, 0
        most = self._endpoint.ledger.affordable(min(len(questions), BATCH_PAIRS), 0.0)
        with path.open("wb") as file:
            for question in questions[:most]:
                line, price = work.line(question)
                fits = size + len(line) <= FILE_BYTES
                if written and not (fits and self._can_pay(written + 1, highest + price)):
                    break
                size, highest, written = size + len(line), highest + price, written + 1
                file.write(line)
        self._endpoint.ledger.reserve(highest, requests=max(written, 1))
        return written, highest

    def _can_pay(self, requests: int, highest: float) -> bool:
        return self._endpoint.ledger.affordable(requests, highest / requests) >= requests

    def _hand_in(self, path: Path, questions: Sequence[str], highest: float) -> None:
        name = uuid.uuid4().hex
        self._notes.add(name, highest, questions)
        file = self._jobs.upload(path, "batch")
        client = self._jobs.client
        batch = self._jobs.start(
            name,
            lambda: client.batches.create(
                input_file_id=file,
                endpoint=_CHAT,
                completion_window="24h",
                metadata={MARK: name},
            ),
            lambda: client.batches.list(limit=100),
        )
        self._notes.set_id(name, batch.id)

    def _find(self, batch: NotedBatch) -> None:
        """Ask the endpoint for a batch whose id is not known; it may never have got it."""
        if batch.id is not None:
            return
        jobs = self._jobs
        found = jobs.call(
            lambda: jobs.find(batch.name, lambda: jobs.client.batches.list(limit=100))
        )
        if found:
            self._notes.set_id(batch.name, found.id)
        else:
            self._withdraw(batch)

    def _withdraw(self, batch: NotedBatch) -> None:
        """Forget a batch that brings nothing, so that its questions are asked anew."""
        self._notes.forget(batch.name)
        if not batch.settled:
            self._endpoint.ledger.settle(batch.cost, 0.0, unsent=batch.requests)

    def collect(self, batch: NotedBatch) -> dict[str, Completion]:
        """Wait for a batch to end and return its answers by question.

        A batch that the endpoint has forgotten, as it does after some weeks, has none.

        Raises:
            BadInputError: the endpoint refuses the batch as a whole.
        """
        assert batch.id is not None
        identity, news = batch.id, News()
        for _ in looks():
            state = self._jobs.look(lambda: self._jobs.client.batches.retrieve(identity))
            if state is None:
                if not batch.settled:
                    self._withdraw(batch)
                return {}
            counts = state.request_counts
            done = f", {counts.completed:,} of {counts.total:,} answered" if counts else ""
            if not batch.settled:
                news.tell(f"batch {identity}: {state.status.replace('_', ' ')}{done}")
            if state.status in ("completed", "expired", "cancelled"):
                break
            if state.status == "failed":
                self._withdraw(batch)
                errors = (state.errors.data if state.errors else None) or []
                why = [str(error.message) for error in errors]
                raise _refused(self._endpoint.config, state, why)
        completions = self._read(batch, state)
        if not batch.settled:
            # First noted, then booked: in between, too much is counted rather than too little.
            self._notes.settle(batch.name)
            self._settle(batch, completions)
        return completions

    def _settle(self, batch: NotedBatch, completions: dict[str, Completion]) -> None:
        read = sum(completion.input_tokens or 0 for completion in completions.values())
        written = sum(completion.output_tokens or 0 for completion in completions.values())
        self._endpoint.ledger.settle(
            batch.cost,
            cost(self._endpoint.config, read, written),
            input_tokens=read,
            output_tokens=written,
            unreadable=sum(completion.label is None for completion in completions.values()),
        )

    def _read(self, batch: NotedBatch, state: Any) -> dict[str, Completion]:
        """Download and read a batch's answers; questions that met an error are left out.

        Raises:
            BadInputError: every question met one, and not for what it asks about.
        """
        completions: dict[str, Completion] = {}
        if state.output_file_id:
            for line in self._jobs.download(state.output_file_id).splitlines():
                read = _read_line(line)
                if isinstance(read, str):
                    self._endpoint.counts.failed += 1
                else:
                    completions[read[0]] = read[1]
        if state.error_file_id:
            lines = self._jobs.download(state.error_file_id).splitlines()
            self._endpoint.counts.failed += len(lines)
            errors = [error for error in map(_read_line, lines) if isinstance(error, str)]
            if state.status == "completed" and errors and not completions and any(errors):
                self._withdraw(batch)
                raise _refused(self._endpoint.config, state, [error for error in errors if error])
        return completions


def _read_line(line: bytes) -> tuple[str, Completion] | str:
    """Return a question and its answer, or what went wrong; empty if that is due to the pair."""
    try:
        content = json.loads(line)
        response, error = content.get("response") or {}, content.get("error")
        body = response.get("body") or {}
        if response.get("status_code") == 200 and not error:
            return str(content["custom_id"]), read_completion(body)
        error = error or body.get("error") or {}
        return "" if error.get("code") in OF_THE_PAIR else str(error.get("message") or error)
    except (AttributeError, KeyError, TypeError, ValueError):
        return "a line cannot be read"


def _refused(config: EndpointConfig, state: Any, why: Sequence[str]) -> BadInputError:
    told = "; ".join(dict.fromkeys(why[:_TOLD_ERRORS])) or "it does not say why"
    return BadInputError(f"{base_url(config)} refuses batch {state.id}: {shown(told)}")
