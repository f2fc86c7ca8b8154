import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.ranking_results import EvaluationWeek, VariantResult
from experiments.ranking_slices import LEAST, make_slices
from features.errors import BadInputError


def make_week(number, clicks, *, others=LEAST, histories=(0, 5), seen=True) -> EvaluationWeek:
    """Return a week of as many requests as histories, each with the same clicks and others."""
    requests = len(histories)
    rows = clicks + others
    return EvaluationWeek(
        week=number,
        clicked=np.tile(np.arange(rows) < clicks, requests),
        lengths=np.full(requests, rows),
        user_id=np.arange(requests),
        history_lengths=np.array(histories),
        product_seen=np.full(requests * rows, seen),
    )


def by_name(weeks):
    return {part.name: part for part in make_slices(weeks)}


def test_slices_hold_the_rows_of_their_requests_and_products():
    week = EvaluationWeek(
        week=45,
        clicked=np.arange(120) % 2 == 0,
        lengths=np.array([60, 0, 59, 1]),
        user_id=np.array([1, 2, 3, 1]),
        history_lengths=np.array([0, 3, 9, 9]),
        product_seen=np.arange(120) >= 10,
    )
    slices = by_name([week])
    counts = {name: int(part.rows[45].sum()) for name, part in slices.items()}
    assert counts == {
        "all": 120,
        "with_history": 60,
        "without_history": 60,
        "unseen_products": 10,
        "short_history": 0,  # the request with 3 purchases has no candidate
        "middle_history": 60,
        "long_history": 0,
    }
    assert slices["without_history"].rows[45].tolist() == [True] * 60 + [False] * 60
    assert slices["unseen_products"].rows[45].tolist() == [True] * 10 + [False] * 110
    assert slices["all"].positives == 60
    assert slices["unseen_products"].positives == 5
    assert slices["short_history"].definition == "1 to 3 purchases"
    assert slices["middle_history"].definition == "4 to 9 purchases"
    assert slices["long_history"].definition == "no such history"


def test_thirds_are_of_the_requests_of_all_weeks_that_have_a_history():
    weeks = [
        make_week(45, LEAST, histories=[0, 0, 0, 10, 20, 30]),
        make_week(46, LEAST, histories=[40, 50, 1060]),
    ]
    slices = by_name(weeks)
    names = ("short_history", "middle_history", "long_history")
    assert [slices[name].definition for name in names] == [
        "1 to 20 purchases",
        "21 to 40 purchases",
        "41 to 1,060 purchases",
    ]
    assert [slices[name].count for name in names] == [120, 120, 120]


def test_users_without_any_history_leave_the_thirds_empty():
    slices = by_name([make_week(45, LEAST, histories=[0, 0])])
    assert slices["long_history"].definition == "no such history"
    assert slices["long_history"].shortage == "too few clicks: 0"


def test_each_week_is_a_slice_where_there_are_several():
    weeks = [make_week(45, LEAST), make_week(53, LEAST)]
    assert [name for name in by_name(weeks) if name.startswith("week")] == ["week_45", "week_53"]
    assert list(by_name(weeks)["week_53"].rows) == [53]
    assert not [name for name in by_name(weeks[:1]) if name.startswith("week")]


@pytest.mark.parametrize(
    ("clicks", "groups", "shortage"),
    [
        ((30, 30, 30), [(1,), (2,), (3,)], ""),
        ((30, 29, 30), [(1, 2, 3)], ""),
        ((10, 10, 10), [(1, 2, 3)], ""),
        ((10, 10, 9), [], "too few clicks: 29"),
        ((0, 0, 0), [], "too few clicks: 0"),
    ],
)
def test_weeks_are_measured_apart_pooled_or_not_at_all(clicks, groups, shortage):
    weeks = [make_week(n, c, histories=[0]) for n, c in enumerate(clicks, 1)]
    more = [make_week(n, LEAST, histories=[7]) for n in range(1, 4)]
    joined = [
        EvaluationWeek(
            week=a.week,
            **{
                name: np.concatenate([getattr(a, name), getattr(b, name)])
                for name in ("clicked", "lengths", "user_id", "history_lengths", "product_seen")
            },
        )
        for a, b in zip(weeks, more, strict=True)
    ]
    slices = by_name(joined)
    found = slices["without_history"]
    assert found.groups == groups
    assert found.shortage == shortage
    assert found.positives == sum(clicks)
    assert slices["all"].groups == [(1,), (2,), (3,)]


def test_too_few_rows_without_a_click_are_said_too():
    week = make_week(45, 40, others=20, histories=[0, 5])
    assert by_name([week])["with_history"].shortage == "too few non-clicks: 20"


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=8),
    st.lists(st.integers(0, 6), min_size=1, max_size=8),
)
def test_histories_part_the_rows(first, second):
    weeks = [make_week(1, 30, histories=first), make_week(2, 30, histories=second)]
    slices = by_name(weeks)
    for week in (1, 2):
        with_history = slices["with_history"].rows[week]
        thirds = [slices[f"{name}_history"].rows[week] for name in ("short", "middle", "long")]
        assert np.array_equal(np.sum(thirds, axis=0), with_history)
        assert np.array_equal(slices["without_history"].rows[week], ~with_history)


def test_bad_weeks_are_refused():
    with pytest.raises(BadInputError, match=r"each once, got \[45, 45\]"):
        make_slices([make_week(45, LEAST)] * 2)
    message = "needs 30 clicked and 30 unclicked rows; in weeks 45 there are too few clicks: 28"
    with pytest.raises(BadInputError, match=message):
        make_slices([make_week(45, 14)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"product_seen": np.ones(3, dtype=bool)}, "clicked and product_seen must have one value"),
        ({"clicked": np.ones(120)}, "must be bool, got float64"),
        ({"user_id": np.arange(3)}, "lengths and user_id must have one value"),
        ({"history_lengths": np.array([1])}, "lengths and history_lengths must have one value"),
        ({"history_lengths": np.array([1, -1])}, "history_lengths must be 0 or more"),
        ({"lengths": np.array([100, 19])}, r"sum to the number of candidates \(120\)"),
        ({"lengths": np.array([121, -1])}, "must be 0 or more"),
    ],
)
def test_weeks_of_other_shapes_are_refused(change, message):
    good = make_week(45, LEAST)
    names = ("week", "clicked", "lengths", "user_id", "history_lengths", "product_seen")
    parts = {name: getattr(good, name) for name in names}
    with pytest.raises(ValueError, match=f"week 45: .*{message}"):
        EvaluationWeek(**{**parts, **change})


@pytest.mark.parametrize(
    ("probability", "seeds", "message"),
    [
        ([[0.1, 0.2]], (), "seeds must be given, each once"),
        ([[0.1], [0.2]], (3, 3), "each once, got (3, 3)"),
        ([[0.1, 0.2]], (0, 1), "a row for each of 2 seeds, got shape (1, 2)"),
        ([0.1, 0.2], (0, 1), "a row for each of 2 seeds, got shape (2,)"),
        ([[0.1, 1.2]], (0,), "dcn, week 45: probability must be in [0, 1]"),
        ([[0.1, np.nan]], (0,), "dcn, week 45: probability must be in [0, 1]"),
    ],
)
def test_results_of_other_shapes_are_refused(probability, seeds, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        VariantResult(
            name="dcn",
            title="DCN baseline",
            baseline=None,
            probability={45: np.array(probability, dtype=np.float32)},
            seeds=seeds,
            facts={},
        )
