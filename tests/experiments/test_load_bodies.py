import json
import random

import pytest

from experiments.load_bodies import encode, golden_requests, sized_requests
from experiments.load_malformed import KINDS, malformed
from experiments.load_wire import WIRE_KINDS, malformed_messages
from features.errors import BadInputError

FIRST = {
    "query": "milk",
    "user_id": 7,
    "history": [101, 102],
    "history_age_days": [0, 3],
    "features": {"hour": 13, "price_level": None},
    "candidates": {"product_id": [1, 2], "features": {"brand": ["a", "b"], "price": [1.5, None]}},
}
SECOND = {"query": "bread", "candidates": {"product_id": [3], "features": {"price": [3.5]}}}
EMPTY = {"query": "tea", "candidates": {"product_id": []}}
GOLDEN = [FIRST, SECOND]
PRICES = {1: 1.5, 2: None, 3: 3.5}
BRANDS = {1: "a", 2: "b", 3: None}


def test_sized_requests_keep_each_candidate_with_its_features():
    made = sized_requests(GOLDEN, candidates=50, history=30, count=5, seed=3)
    assert [request["query"] for request in made] == ["milk", "bread", "milk", "bread", "milk"]
    for request in made:
        ids = request["candidates"]["product_id"]
        features = request["candidates"]["features"]
        assert len(ids) == 50
        assert {*ids} == {1, 2, 3}
        assert features["price"] == [PRICES[product] for product in ids]
        assert features["brand"] == [BRANDS[product] for product in ids]
        assert len(request["history"]) == len(request["history_age_days"]) == 30
        assert {*request["history"]} <= {101, 102, 1, 2, 3}
        assert request["history_age_days"] == sorted(request["history_age_days"])
        assert {*request["history_age_days"]} <= {0, 1, 2, 3}
    assert FIRST["candidates"]["product_id"] == [1, 2]
    assert made == sized_requests(GOLDEN, candidates=50, history=30, count=5, seed=3)


def test_golden_requests_without_candidates_are_left_out(tmp_path):
    file = tmp_path / "golden.json"
    file.write_text(json.dumps({"requests": [{"request": r} for r in (FIRST, EMPTY, SECOND)]}))
    assert golden_requests(tmp_path) == [FIRST, SECOND]
    file.write_text(json.dumps({"requests": [{"request": EMPTY}]}))
    with pytest.raises(BadInputError, match="no request with candidates"):
        golden_requests(tmp_path)
    for text in ("[]", "{", '{"requests": [1]}'):
        file.write_text(text)
        with pytest.raises(BadInputError, match=r"golden\.json: not the golden requests"):
            golden_requests(tmp_path)
    file.unlink()
    with pytest.raises(BadInputError, match=r"golden\.json: not the golden requests"):
        golden_requests(tmp_path)


def test_malformed_bodies_are_the_same_for_a_seed_and_of_every_kind():
    made = malformed(GOLDEN, 800, seed=5)
    assert made == malformed(GOLDEN, 800, seed=5)
    assert made != malformed(GOLDEN, 800, seed=6)
    assert {kind for kind, _ in made} == {*KINDS}


@pytest.mark.parametrize("kind", ["truncated", "other_list", "left_out", "bad_text", "deep"])
def test_malformed_bodies_are_no_good_request(kind):
    draw = random.Random(0)
    (good,) = sized_requests(GOLDEN, candidates=3, history=4, count=1)
    for _ in range(200):
        body = KINDS[kind](draw, json.loads(encode(good)))
        assert body != encode(good)
        if kind == "truncated":
            with pytest.raises(ValueError, match=r"."):
                json.loads(body)


def test_odd_values_stand_where_a_value_stood():
    draw = random.Random(1)
    found = set()
    for _ in range(3000):
        found.add(KINDS["other_value"](draw, {"query": "milk"}))
    texts = {body.decode() for body in found}
    assert {'{"query":NaN}', '{"query":1e400}', '{"query":null}', '{"query":"\\ud800"}'} <= texts
    assert f'{{"query":{2**64}}}' in texts


def test_malformed_messages_are_of_every_kind():
    made = malformed_messages([encode(SECOND)], 400, seed=2)
    assert made == malformed_messages([encode(SECOND)], 400, seed=2)
    assert {kind for kind, _ in made} == {*WIRE_KINDS}
    assert all(message for _, (message, _) in made)
