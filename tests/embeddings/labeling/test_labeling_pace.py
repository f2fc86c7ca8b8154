from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embeddings.labeling.pace import Pace, back_off, retry_after


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_requests_pass_at_the_rate():
    clock = Clock()
    pace = Pace(120, clock)  # two a second, two at once
    assert [pace.take(1) for _ in range(5)] == pytest.approx([0, 0, 0.5, 1.0, 1.5])
    clock.now = 10.0
    assert [pace.take(1) for _ in range(3)] == pytest.approx([0, 0, 0.5])


def test_what_was_taken_in_excess_is_given_back():
    clock = Clock()
    pace = Pace(60_000, clock)  # tokens: a thousand a second
    assert pace.take(3_000) == 0
    assert pace.take(1_000) == pytest.approx(3.0)
    pace.take(-2_500)
    assert pace.take(1_000) == pytest.approx(1.5)


def test_without_a_limit_nobody_waits():
    assert Pace(0).take(1e12) == 0


@given(
    per_minute=st.floats(1, 1e6),
    asked=st.lists(st.tuples(st.floats(0, 20), st.floats(0, 1e4)), min_size=1, max_size=30),
)
def test_no_window_lets_more_pass_than_rate_burst_and_one_amount(per_minute, asked):
    clock = Clock()
    pace = Pace(per_minute, clock)
    passed = []
    for idle, amount in asked:
        clock.now += idle
        passed.append((clock.now + pace.take(amount), amount))
    passed.sort()  # less may pass a little before more that was asked for earlier
    rate, burst = per_minute / 60, max(per_minute / 60, 1.0)
    for i, (start, _) in enumerate(passed):
        for end, _ in passed[i:]:
            inside = [amount for at, amount in passed if start <= at <= end]
            most = rate * (end - start) + burst + max(inside)
            assert sum(inside) <= most * (1 + 1e-6) + 1e-6


def test_waits_double_up_to_a_minute():
    for failures, longest in ((1, 0.5), (2, 1.0), (5, 8.0), (50, 60.0)):
        waits = [back_off(failures) for _ in range(50)]
        assert longest / 2 <= min(waits) < max(waits) <= longest


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9),
        ({"retry-after": "Fri, 01 Jan 2027 00:00:30 GMT"}, 30),
        ({"retry-after": "Fri, 01 Jan 2027 00:00:30 -0000"}, 30),
        ({"retry-after": "Thu, 31 Dec 2026 00:00:00 GMT"}, 0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "soon"}, None),
    ],
)
def test_what_a_response_asks_to_wait(headers, seconds):
    assert retry_after(headers, datetime(2027, 1, 1, tzinfo=UTC)) == seconds
