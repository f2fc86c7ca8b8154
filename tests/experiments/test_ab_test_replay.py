import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.ab_test_replay import Impressions, Users, main, many_tests, replay, treated_users
from serving.ab_routing import Routing

WEEKS = (3, 4, 5)


def rows_of(requests):
    return pa.concat_tables(
        [pq.read_table(requests / f"week-{week:04d}.parquet") for week in WEEKS]
    ).to_pylist()


def test_impressions_are_those_of_the_records(tiny_requests):
    found = Impressions.read(tiny_requests, WEEKS)
    rows = rows_of(tiny_requests)
    assert found.request_id.tolist() == [row["request_id"] for row in rows]
    expected = [
        (place, product, clicked, price or 0)
        for place, row in enumerate(rows)
        for product, clicked, price in zip(
            row["product_id"], row["clicked"], row["price"], strict=True
        )
    ]
    columns = (found.request, found.product_id, found.clicked, found.price)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
    users = Users.of(found)
    assert users.impressions.sum() == len(expected)
    for user, clicks in zip(users.user_id, users.clicks, strict=True):
        assert clicks == sum(sum(row["clicked"]) for row in rows if row["user_id"] == user)


def test_a_replay_writes_what_was_shown_and_clicked(tiny_requests, tmp_path):
    impressions = Impressions.read(tiny_requests, WEEKS)
    routing = Routing(salt="replay", treatment_share=0.5)
    folder, outcomes = replay(impressions, tmp_path, routing, 0.0)
    folder, outcomes = replay(impressions, tmp_path, routing, 0.0)  # replaces the first
    (log,) = folder.iterdir()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line, row in zip(lines, rows_of(tiny_requests), strict=True):
        assert line["request_id"] == str(row["request_id"])
        assert line["bucket"] == routing.bucket(row["user_id"])
        assert line["candidates"] == row["product_id"]
        assert line["time"] == f"{row['requested_at'].isoformat()}+00:00"
    assert pq.read_table(outcomes)["clicked"].to_pylist() == impressions.clicked.tolist()


def test_a_lift_is_given_to_treated_users_only(tiny_requests):
    impressions = Impressions.read(tiny_requests, WEEKS)
    routing = Routing(salt="replay", treatment_share=0.5)
    clicked = impressions.with_lift(routing, 0.8, np.random.default_rng(0))
    treated = treated_users(routing, impressions.user_id)[impressions.request]
    assert (clicked[~treated] == impressions.clicked[~treated]).all()
    assert (clicked >= impressions.clicked).all()
    assert clicked[treated].mean() / impressions.clicked.mean() == pytest.approx(1.8, abs=0.3)


def test_tests_of_real_requests_are_told_apart(tiny_requests, tmp_path, capsys):
    arguments = [
        *("--requests", str(tiny_requests), "--weeks", *map(str, WEEKS)),
        *("--output", str(tmp_path), "--lift", "0.9", "--salts", "20"),
    ]
    assert main(arguments) == 0
    (a_a,) = (m for m in read(tmp_path / "aa")["metrics"] if m["name"] == "click_through_rate")
    low, high = a_a["relative_lift"]["interval"]
    assert low < 0 < high
    assert read(tmp_path / "aa")["warnings"] == [
        "The same ranker served both buckets: this is an A/A test."
    ]
    (a_b,) = (m for m in read(tmp_path / "ab")["metrics"] if m["name"] == "click_through_rate")
    low, high = a_b["relative_lift"]["interval"]
    assert 0 < low < high
    found = json.loads((tmp_path / "replay.json").read_text())
    assert found["weeks"] == list(WEEKS)
    assert [test["tests"] for test in found["tests"]] == [20, 20]
    assert found["tests"][0]["rejected"] <= 0.2
    assert found["tests"][1]["rejected"] >= 0.8
    assert "20 tests of the click-through rate" in capsys.readouterr().out


def read(folder):
    return json.loads((folder / "ab_test.json").read_text())


@pytest.mark.parametrize("lift", [0.0, 0.2])
def test_many_tests_of_many_users_keep_their_promises(lift):
    rng = np.random.default_rng(1)
    impressions = 1 + rng.poisson(30 * rng.gamma(1, 1, 600))
    users = Users(
        user_id=np.arange(600),
        impressions=impressions,
        clicks=rng.binomial(impressions, rng.beta(1, 15, 600)),
    )
    found = many_tests(users, 400, lift)
    assert found["held"] == pytest.approx(0.95, abs=0.035)  # 3 standard errors
    assert found["mean_lift"] == pytest.approx(lift, abs=4 * found["standard_error"])
    if lift == 0:  # two answers to one question
        assert found["rejected"] == pytest.approx(1 - found["held"], abs=0.02)


def test_weeks_must_be_there(tiny_requests, tmp_path, capsys):
    arguments = ["--requests", str(tiny_requests), "--output", str(tmp_path / "out"), "--weeks"]
    assert main([*arguments, "44"]) == 2
    assert "no requests of week 44; its weeks are 1 to 6" in capsys.readouterr().err
    assert main([*arguments, "3", "--lift", "1.5"]) == 2
    assert "--lift between 0 and 1, got 1000 and 1.5" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
