"""Batches are what waited, in order and within bounds; nothing is lost and nobody waits in vain."""

import asyncio
import threading
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.batching import Batcher, BatcherClosedError

SOON_S = 10.0


class Held:
    """Work that waits at a gate, so that items pile up behind its first batch."""

    def __init__(self):
        self.batches = []
        self.begun = threading.Event()
        self.gate = threading.Event()

    def __call__(self, items):
        self.batches.append(list(items))
        self.begun.set()
        assert self.gate.wait(SOON_S)
        return [item * 10 for item in items]


def soon():
    return time.monotonic() + SOON_S


async def submit_behind(batcher, work, sizes):
    """Submit item 0, and the rest while the model is busy with it; return all outcomes."""
    tasks = [asyncio.create_task(batcher.submit(0, 1, soon()))]
    while not work.begun.is_set():
        await asyncio.sleep(0.001)
    for item, size in enumerate(sizes, start=1):
        tasks.append(asyncio.create_task(batcher.submit(item, size, soon())))
    await asyncio.sleep(0.01)
    work.gate.set()
    return await asyncio.gather(*tasks)


def test_what_waits_goes_together_up_to_the_bound():
    async def run():
        work = Held()
        batcher = Batcher(work, most=lambda: 400)
        outcomes = await submit_behind(batcher, work, [100, 50, 300, 100, 900, 1])
        await batcher.close()
        return work.batches, outcomes

    batches, outcomes = asyncio.run(run())
    assert batches == [[0], [1, 2], [3, 4], [5], [6]]  # 5 is larger than the bound: alone
    assert outcomes == [0, 10, 20, 30, 40, 50, 60]


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), max_size=20), most=st.integers(1, 15))
def test_every_item_is_scored_once_in_order_and_no_batch_is_too_large(sizes, most):
    async def run():
        work = Held()
        batcher = Batcher(work, most=lambda: most)
        outcomes = await submit_behind(batcher, work, sizes)
        await batcher.close()
        return work.batches, outcomes

    batches, outcomes = asyncio.run(run())
    of = [1, *sizes]
    assert [item for batch in batches for item in batch] == list(range(len(of)))
    assert outcomes == [10 * item for item in range(len(of))]
    assert all(sum(of[i] for i in batch) <= most or len(batch) == 1 for batch in batches)
    # Nothing waits for no reason: each batch could not have taken the next one's first item.
    for batch, following in pairwise(batches[1:]):
        assert sum(of[i] for i in batch) + of[following[0]] > most


def test_a_batch_may_wait_for_more():
    async def run():
        batches = []
        batcher = Batcher(
            lambda items: batches.append(list(items)) or items, most=lambda: 3, wait_s=SOON_S
        )
        first = asyncio.create_task(batcher.submit(1, 1, soon()))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(batcher.submit(2, 2, soon()))
        await asyncio.gather(first, second)
        await batcher.close()
        return batches

    assert asyncio.run(run()) == [[1, 2]]  # full before the wait was over


def test_an_item_is_not_scored_once_its_deadline_has_passed():
    async def run():
        work = Held()
        batcher = Batcher(work, most=lambda: 100)
        first = asyncio.create_task(batcher.submit(0, 1, soon()))
        while not work.begun.is_set():
            await asyncio.sleep(0.001)
        with pytest.raises(TimeoutError):
            await batcher.submit(1, 1, time.monotonic() + 0.02)
        last = asyncio.create_task(batcher.submit(2, 1, soon()))
        await asyncio.sleep(0.01)
        work.gate.set()
        assert [await first, await last] == [0, 20]
        await batcher.close()
        return work.batches

    assert asyncio.run(run()) == [[0], [2]]


def test_an_item_can_fail_by_itself_or_with_its_batch():
    def work(items):
        if "break" in items:
            raise RuntimeError("broken")
        return [ValueError(item) if item == "bad" else item for item in items]

    async def run():
        batcher = Batcher(work, most=lambda: 1)
        with pytest.raises(ValueError, match="bad"):
            await batcher.submit("bad", 1, soon())
        with pytest.raises(RuntimeError, match="broken"):
            await batcher.submit("break", 1, soon())
        assert await batcher.submit("good", 1, soon()) == "good"  # the thread has survived
        assert batcher.alive
        await batcher.close()

    asyncio.run(run())


def test_closing_finishes_what_was_submitted_and_takes_no_more():
    async def run():
        work = Held()
        batcher = Batcher(work, most=lambda: 2)
        tasks = [asyncio.create_task(batcher.submit(item, 1, soon())) for item in range(5)]
        await asyncio.sleep(0.01)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.01)
        with pytest.raises(BatcherClosedError):
            await batcher.submit(9, 1, soon())
        assert not closing.done()
        work.gate.set()
        await closing
        assert not batcher.alive
        await batcher.close()  # again
        return await asyncio.gather(*tasks)

    assert asyncio.run(run()) == [0, 10, 20, 30, 40]
