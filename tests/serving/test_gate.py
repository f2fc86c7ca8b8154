"""The gate alone: what it refuses when waiting would take too long."""

import asyncio
from types import SimpleNamespace

import pytest

from serving.gate import RANK, Gate
from serving.server_config import ServerConfig
from serving.server_metrics import Metrics


class SlowApplication:
    """Answers each request after those before it, a tenth of a second each."""

    def __init__(self):
        self.one_at_a_time = asyncio.Lock()
        self.answered = 0

    async def __call__(self, scope, receive, send):
        async with self.one_at_a_time:
            await asyncio.sleep(0.1)
            self.answered += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


async def ask(gate):
    """Send one request to rank and return the status of the answer."""
    statuses = []

    async def receive():
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message):
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {"type": "http", "path": RANK, "method": "POST", "headers": [], "state": {}}
    await gate(scope, receive, send)
    return statuses[0]


@pytest.mark.parametrize(("deadline_ms", "some_refused"), [(400, True), (60_000, False)])
def test_a_wait_of_more_than_half_the_deadline_is_refused(tmp_path, deadline_ms, some_refused):
    """Requests take .1 s each: with a deadline of .4 s, those that would wait .2 s are refused."""

    async def run():
        application = SlowApplication()
        service = SimpleNamespace(metrics=Metrics(), stopping=False)
        config = ServerConfig(bundle=tmp_path, queue=30, deadline_ms=deadline_ms)
        gate = Gate(application, service, config, None)
        for _ in range(20):  # it learns how long one takes
            assert await ask(gate) == 200
        statuses = await asyncio.gather(*(ask(gate) for _ in range(8)))
        assert application.answered == 20 + statuses.count(200)
        return statuses

    statuses = asyncio.run(run())
    assert (429 in statuses) == some_refused
    if some_refused:
        assert 2 <= statuses.count(200) <= 5
    else:
        assert statuses == [200] * 8
