"""Chat requests of an endpoint's grader: some at a time, at a pace, again after a failure.

Legend: ``P`` pairs.
"""

import asyncio
import math
import random
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from embeddings.labeling.endpoint import Endpoint
from embeddings.labeling.endpoint_requests import (
    Completion,
    MalformedError,
    base_url,
    chat_body,
    connect,
    cost,
    grades_of,
    input_tokens,
    is_of_the_pair,
    is_passing,
    parse_json,
    read_completion,
    refusal,
    shown,
)
from embeddings.labeling.grades import Grades, Pairs
from embeddings.labeling.ledger import BudgetReachedError
from embeddings.labeling.pace import back_off, retry_after
from features.console import say
from features.errors import BadInputError

_DRAIN_SECONDS = 10.0
_LONGEST_WAIT = 600.0
_TOLD_WAIT = 20.0


def grade_by_chat(endpoint: Endpoint, pairs: Pairs) -> Iterator[Grades]:
    """Yield the grades of all pairs as they arrive; see `Endpoint.grade`."""
    # The loop runs only within `run`: nothing arrives unseen while the caller stores grades.
    with asyncio.Runner() as runner:
        chat = _Chat(endpoint, pairs)
        try:
            while True:
                runner.run(chat.wait())
                if (grades := chat.take()) is None:
                    break
                yield grades
        except KeyboardInterrupt:
            with suppress(KeyboardInterrupt):
                runner.run(chat.drain())
            if (grades := chat.take()) is not None:
                yield grades
            raise
        finally:
            runner.run(chat.close())
        if isinstance(chat.error, BudgetReachedError):
            raise BudgetReachedError(
                f"{chat.taken:,} of {len(pairs):,} pairs are graded: {chat.error}"
            )
        if chat.error:
            raise chat.error


class _FailedError(Exception):
    """A request that may succeed later.

    Attributes:
        cause: what went wrong.
        limited: whether the endpoint says that it is asked too fast.
        wait: how many seconds it asks to wait; ``None`` where it does not say.
    """

    def __init__(
        self, cause: Exception, *, limited: bool = False, wait: float | None = None
    ) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.limited = limited
        self.wait = wait


class _Chat:
    """The requests of one call of `Endpoint.grade`: some workers that share a list of pairs."""

    def __init__(self, endpoint: Endpoint, pairs: Pairs) -> None:
        self.error: Exception | None = None
        self._endpoint = endpoint
        self._pairs = pairs
        self._left = iter(range(len(pairs)))
        self._ready: list[tuple[int, int | None, float]] = []
        self.taken = 0
        self._news = asyncio.Event()
        self._stopped = asyncio.Event()
        self._resume_at = 0.0
        self._client: Any = None
        self._workers: list[asyncio.Task[None]] = []

    async def wait(self) -> None:
        """Wait until something has arrived, or nothing more will."""
        if self._client is None:
            self._client = connect(self._endpoint.config)
            count = min(self._endpoint.config.concurrency, len(self._pairs))
            self._workers = [asyncio.create_task(self._work()) for _ in range(count)]
        while not self._ready and not all(worker.done() for worker in self._workers):
            await self._news.wait()
            self._news.clear()

    def take(self) -> Grades | None:
        """Return what has arrived, ``None`` where nothing has."""
        if not self._ready:
            return None
        grades = grades_of(self._ready)
        self.taken += len(self._ready)
        self._ready = []
        return grades

    async def drain(self) -> None:
        """Send no more, and wait some seconds for what is under way."""
        self._stopped.set()
        if self._workers:
            await asyncio.wait(self._workers, timeout=_DRAIN_SECONDS)

    async def close(self) -> None:
        """End whatever still runs."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        if self._client is not None:
            await self._client.close()

    async def _work(self) -> None:
        try:
            for position in self._left:
                answer = await self._ask(position)
                if answer is None:
                    return
                self._ready.append((position, *answer))
                self._news.set()
        except Exception as error:
            self.error = self.error or error
            self._stopped.set()
        finally:
            # The task is done a moment later than this.
            asyncio.get_running_loop().call_soon(self._news.set)

    async def _ask(self, position: int) -> tuple[int | None, float] | None:
        """Return a pair's label and its probability, ``None`` where the run stops before."""
        endpoint, query = self._endpoint, self._pairs.queries[position]
        attempt = _Attempts(endpoint)
        while True:
            body = chat_body(
                endpoint.config,
                endpoint.prompt,
                query,
                self._pairs.titles[position],
                again=attempt.again,
            )
            if not await self._may_go(input_tokens(body) + endpoint.config.max_output_tokens):
                return None
            try:
                completion = await self._request(body)
            except _FailedError as failure:
                wait = attempt.after_failure(failure)
                if failure.limited:
                    self._resume_at = max(self._resume_at, _now() + (wait or 0.0))
                if wait is None:
                    return None, math.nan
                await self._sleep(wait)
                continue
            if completion is None or not attempt.after_answer(completion):
                return None, math.nan
            if completion.label is not None:
                return completion.label, completion.probability

    async def _may_go(self, tokens: int) -> bool:
        """Wait until a request keeps the limits; returns whether the run still goes on."""
        endpoint = self._endpoint
        await self._sleep(max(endpoint.requests_pace.take(1), endpoint.tokens_pace.take(tokens)))
        while not self._stopped.is_set() and (left := self._resume_at - _now()) > 0:
            # Not all at the same moment.
            await self._sleep(left * random.uniform(1.0, 1.25))
        return not self._stopped.is_set()

    async def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), seconds)

    async def _request(self, body: dict[str, Any]) -> Completion | None:
        """Send one request; ``None`` where the endpoint refuses to grade this pair.

        Raises:
            _FailedError: it may succeed later.
            BadInputError: it never will, or the ledger does not allow it.
        """
        from openai import APIConnectionError, APIStatusError

        endpoint, config = self._endpoint, self._endpoint.config
        expected = input_tokens(body)
        reserved = cost(config, expected, config.max_output_tokens)
        endpoint.ledger.reserve(reserved)
        try:
            async with asyncio.timeout(config.timeout_seconds):
                create = self._client.chat.completions.with_raw_response.create
                response = await create(**body)
            completion = read_completion(parse_json(response.text))
        except (TimeoutError, APIConnectionError, MalformedError) as error:
            # It may have been answered and cost money: what was reserved stays counted.
            endpoint.counts.failed += 1
            cause = error if str(error) else TimeoutError(f"{config.timeout_seconds:g} s passed")
            raise _FailedError(cause) from None
        except APIStatusError as error:
            endpoint.counts.failed += 1
            endpoint.ledger.settle(reserved, 0.0)
            if is_of_the_pair(error):
                endpoint.give_up(str(error))
                return None
            if not is_passing(error):
                raise refusal(config, error) from None
            wait = retry_after(error.response.headers)
            raise _FailedError(error, limited=error.status_code == 429, wait=wait) from None
        read = expected if completion.input_tokens is None else completion.input_tokens
        written = completion.output_tokens or 0
        endpoint.ledger.settle(
            reserved,
            cost(config, read, written),
            input_tokens=read,
            output_tokens=written,
            unreadable=completion.label is None,
        )
        endpoint.tokens_pace.take(read + written - expected - config.max_output_tokens)
        endpoint.note_answer(completion)
        return completion


class _Attempts:
    """Decides how often one pair is asked about."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.again = False
        self._endpoint = endpoint
        self._used = 0
        self._answered: int | None = None

    def after_failure(self, failure: _FailedError) -> float | None:
        """Return how long to wait for the next attempt, ``None`` where the pair is given up.

        A pair is given up if the endpoint answers others; being asked too fast does not count
        then.

        Raises:
            BadInputError: the endpoint gives no answers at all, or asks to wait too long.
        """
        endpoint = self._endpoint
        if self._answered is None:
            self._answered = endpoint.counts.answered
        others_are_answered = endpoint.counts.answered > self._answered
        if failure.limited and others_are_answered:
            self._answered = endpoint.counts.answered
        else:
            self._used += 1
        if self._used > endpoint.config.retries:
            if not others_are_answered:
                raise refusal(endpoint.config, failure.cause)
            endpoint.give_up(str(failure.cause))
            return None
        wait = back_off(max(self._used, 1)) if failure.wait is None else failure.wait
        if wait > _LONGEST_WAIT:
            raise BadInputError(
                f"{base_url(endpoint.config)} asks to wait for {wait:,.0f} s: "
                f"{shown(failure.cause)}; give the same command again then"
            )
        if wait >= _TOLD_WAIT:
            say(f"waiting for {wait:.0f} s: {shown(failure.cause)}")
        return wait

    def after_answer(self, completion: Completion) -> bool:
        """Return whether the answer counts or another is asked for; not where it is given up."""
        if completion.label is not None:
            return True
        self._used += 1
        self.again = True
        if self._used <= self._endpoint.config.retries:
            return True
        self._endpoint.give_up(completion.text)
        return False


def _now() -> float:
    return asyncio.get_running_loop().time()
