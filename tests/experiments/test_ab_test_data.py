import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.ab_test_data import read_observations
from features.errors import BadInputError
from serving.exposure_log import ExposureLog


def exposure(request, user, bucket, candidates, minute=0, model="m"):
    return {
        "request_id": request,
        "time": f"2024-08-01T09:{minute:02d}:00.250+00:00",
        "user_id": user,
        "bucket": bucket,
        "model": model,
        "candidates": candidates,
        "probabilities": [0.5] * len(candidates),
    }


def outcome(request, product, clicked=True, converted=False, revenue=0.0):
    return {
        "request_id": request,
        "product_id": product,
        "clicked": clicked,
        "converted": converted,
        "revenue": revenue,
    }


# User 1 sees 3 + 2 products and clicks 2; user 2 sees 2 and clicks none, user 3 sees 3, clicks 1.
EXPOSURES = [
    exposure("a", 1, "control", [10, 11, 12]),
    exposure("b", 1, "control", [10, 13], minute=5),
    exposure("c", 2, "control", [10, 11], minute=9),
    exposure("d", 3, "treatment", [12, 11, 10], minute=7, model="n"),
]
OUTCOMES = [
    outcome("a", 10),
    outcome("a", 11, clicked=False),
    outcome("b", 13, converted=True, revenue=2.5),
    outcome("d", 10, converted=True, revenue=4.0),
]


@pytest.fixture
def read(tmp_path):
    """A function that writes exposures and outcomes and reads them back."""

    def write_and_read(exposures=EXPOSURES, outcomes=OUTCOMES, **options):
        folder = tmp_path / "exposures"
        if exposures:
            with ExposureLog(folder) as log:
                for line in exposures:
                    log.write(line)
        path = tmp_path / "outcomes.parquet"
        pq.write_table(pa.Table.from_pylist(outcomes), path)
        return read_observations(folder, path, tmp_path / "out" / ".scratch", **options)

    return write_and_read


def totals(observations):
    return {name: values.tolist() for name, values in observations.totals.items()}


PLAIN = {
    "requests": [2, 1, 1],
    "impressions": [5, 2, 3],
    "clicks": [2, 0, 1],
    "conversions": [1, 0, 1],
    "revenue": [2.5, 0, 4],
}


def test_sums_by_user_checked_by_hand(read, tmp_path):
    found = read()
    assert found.treated.tolist() == [False, False, True]
    assert totals(found) == PLAIN
    assert found.counts == {
        "exposures": 4,
        "repeated": 0,
        "outside": 0,
        "torn": 0,
        "users_in_both": 0,
        "outcomes": 3,
        "outcomes_not_shown": 0,
        "conversions_without_click": 0,
    }
    assert found.models == {"control": ["m"], "treatment": ["n"]}
    assert found.period == ("2024-08-01T09:00:00.250000+00:00", "2024-08-01T09:09:00.250000+00:00")
    assert not (tmp_path / "out").exists()


def test_a_retry_counts_once_and_the_first_time_tells(read):
    retries = [
        exposure("a", 1, "control", [10, 99], minute=1),  # later, another list
        exposure("d", 3, "treatment", [12, 11, 10], minute=8, model="n"),
        exposure("d", 3, "treatment", [12, 11, 10], minute=9, model="n"),
    ]
    found = read([*retries, *EXPOSURES])
    assert totals(found) == PLAIN
    assert found.counts["exposures"] == 7
    assert found.counts["repeated"] == 3


def test_users_of_both_buckets_are_left_out(read):
    moved = exposure("e", 2, "treatment", [10], minute=20)
    found = read([*EXPOSURES, moved])
    assert found.treated.tolist() == [False, True]
    assert totals(found)["impressions"] == [5, 3]
    assert found.counts["users_in_both"] == 1
    # The retry of a request in the other bucket makes its user one of both, too.
    assert read([exposure("c", 2, "treatment", [10], minute=30)]).counts["users_in_both"] == 1


def test_requests_outside_of_the_test_are_left_out(read):
    others = [exposure("x", None, None, [10, 11]), exposure("y", 3, None, [10, 11])]
    found = read([*EXPOSURES, *others], [*OUTCOMES, outcome("x", 10), outcome("y", 11)])
    assert totals(found) == PLAIN
    assert found.counts["outside"] == 2
    assert found.counts["outcomes_not_shown"] == 0


def test_outcomes_of_what_was_not_shown_count_for_nothing(read):
    strays = [outcome("zzz", 10), outcome("a", 99, revenue=7.0)]
    found = read(outcomes=[*OUTCOMES, *strays])
    assert totals(found) == PLAIN
    assert found.counts["outcomes"] == 5
    assert found.counts["outcomes_not_shown"] == 2


def test_only_what_was_shown_of_the_candidates_counts(read):
    found = read(shown=2)
    assert totals(found)["impressions"] == [4, 2, 2]
    assert totals(found)["clicks"] == [2, 0, 0]  # of "d" the third was clicked
    assert found.counts["outcomes_not_shown"] == 1


def test_a_product_twice_in_a_request_is_one_impression(read):
    found = read([*EXPOSURES[1:], exposure("a", 1, "control", [10, 11, 10, 12])])
    assert totals(found) == PLAIN


def test_a_user_without_products_is_a_user(read):
    found = read([*EXPOSURES, exposure("e", 4, "treatment", [])])
    assert found.treated.tolist() == [False, False, True, True]
    assert totals(found)["impressions"] == [5, 2, 3, 0]
    assert totals(found)["requests"] == [2, 1, 1, 1]


def test_a_conversion_without_a_click_is_not_one(read):
    found = read(outcomes=[*OUTCOMES, outcome("c", 10, clicked=False, converted=True, revenue=1.0)])
    assert totals(found)["conversions"] == [1, 0, 1]
    assert totals(found)["revenue"] == [2.5, 1, 4]
    assert found.counts["conversions_without_click"] == 1


@pytest.mark.parametrize("optional", [[], ["converted"], ["revenue"]])
def test_conversions_and_revenue_may_be_unknown(read, optional):
    names = ["request_id", "product_id", "clicked", *optional]
    found = read(outcomes=[{name: row[name] for name in names} for row in OUTCOMES])
    told = {"converted": "conversions"}
    kept = ["requests", "impressions", "clicks", *(told.get(name, name) for name in optional)]
    assert totals(found) == {name: PLAIN[name] for name in kept}


def test_unknown_revenue_of_a_row_is_none(read):
    found = read(outcomes=[*OUTCOMES, outcome("c", 11, converted=None, revenue=None)])
    assert totals(found)["clicks"] == [2, 1, 1]
    assert totals(found)["revenue"] == [2.5, 0, 4]


@pytest.mark.parametrize("moment", ["text", "timestamp", "zoned"])
def test_parquet_exposures_are_read_beside_json_lines(read, tmp_path, moment):
    rows = EXPOSURES[2:]
    table = pa.Table.from_pylist(rows)
    if moment != "text":
        times = pa.array([np.datetime64(row["time"][:-6], "us") for row in rows])
        if moment == "zoned":
            times = times.cast(pa.timestamp("us", "America/New_York"))
        table = table.set_column(table.column_names.index("time"), "time", times)
    (tmp_path / "exposures").mkdir()
    pq.write_table(table, tmp_path / "exposures" / "old.parquet")
    found = read(EXPOSURES[:2])
    assert totals(found) == PLAIN
    assert found.period[1] == "2024-08-01T09:09:00.250000+00:00"


def test_whole_number_request_ids_are_the_same_as_text(read):
    found = read(
        [exposure("7", 1, "control", [1]), exposure("8", 2, "treatment", [1])],
        [outcome(7, 1), outcome(8, 1)],
    )
    assert totals(found)["clicks"] == [1, 1]


def test_a_torn_last_line_is_left_out(read, tmp_path):
    (tmp_path / "exposures").mkdir()
    (tmp_path / "exposures" / "killed.jsonl").write_text(
        json.dumps(exposure("e", 5, "control", [1])) + '\n{"request_id": "f", "ti'
    )
    found = read()
    assert found.counts["torn"] == 1
    assert found.counts["exposures"] == 5


@pytest.mark.parametrize("content", ['{"torn"\n{"torn"', "not json\n{}\n", "[1]\n"])
def test_other_broken_lines_are_refused(read, tmp_path, content):
    (tmp_path / "exposures").mkdir()
    (tmp_path / "exposures" / "broken.jsonl").write_text(content)
    with pytest.raises(BadInputError, match=r"broken\.jsonl: "):
        read()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"request_id": None}, "an exposure has no 'request_id'"),
        ({"time": "yesterday"}, "exposure 'e': 'time' is missing or is no time"),
        ({"candidates": [1, "x"]}, "exposure 'e': 'candidates' is no list of product ids"),
        ({"candidates": 5}, "exposure 'e': 'candidates' is no list of product ids"),
        ({"bucket": "Treatment"}, "exposure 'e': 'bucket' is neither of 'control', 'treatment'"),
        ({"user_id": "somebody"}, "exposure 'e' has a bucket and no 'user_id'"),
        ({"request_id": "a", "user_id": 9}, "'a': its 'request_id' is there again with another"),
    ],
)
def test_a_wrong_exposure_is_named(read, tmp_path, change, sentence):
    line = exposure("e", 5, "control", [1]) | change
    (tmp_path / "exposures").mkdir()
    (tmp_path / "exposures" / "wrong.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(BadInputError) as error:
        read()
    assert sentence in str(error.value)
    assert ".jsonl: " in str(error.value)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([outcome("a", 10), outcome("a", 10)], "request and product 'a, 10' have several outcomes"),
        ([outcome("a", 10, clicked=None)], "column 'clicked' is null"),
        ([outcome("a", None)], "column 'product_id' is null"),
        ([outcome("a", 10, revenue=float("nan"))], "column 'revenue' holds 'nan', not a finite"),
        ([{"request_id": "a", "clicked": True}], "column 'product_id' is missing"),
        ([outcome("a", "milk")], "Could not convert string 'milk' to INT64"),
    ],
)
def test_a_wrong_outcome_is_named(read, rows, sentence):
    with pytest.raises(BadInputError) as error:
        read(outcomes=rows)
    assert sentence in str(error.value)
    assert "outcomes.parquet: " in str(error.value)


def test_missing_exposures_are_named(read, tmp_path):
    with pytest.raises(BadInputError, match="exposures: no such file or folder of exposures"):
        read([])
    (tmp_path / "exposures").mkdir()
    with pytest.raises(BadInputError, match="the folder holds no exposures"):
        read([])
    pq.write_table(pa.table({"request_id": ["a"]}), tmp_path / "exposures" / "x.parquet")
    with pytest.raises(BadInputError, match=r"x\.parquet: column 'user_id' is missing"):
        read([])
    (tmp_path / "exposures" / "x.parquet").write_text("no")
    with pytest.raises(BadInputError, match=r"x\.parquet: not a readable Parquet file"):
        read([])
    (tmp_path / "exposures" / "x.parquet").unlink()
    with pytest.raises(BadInputError, match="no user who met one bucket only"):
        read([exposure("a", 1, None, [1])])
    assert not (tmp_path / "out").exists()
