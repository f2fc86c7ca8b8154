"""What the service answers, in one process: rankings, refusals, documents."""

import json
import math
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from features.errors import BadInputError
from serving.exported import ExportedRanker
from serving.server_config import ServerConfig
from serving.worker import Worker

KEY = "a key"


@pytest.fixture(scope="module")
def ranker(tiny_exported):
    return ExportedRanker.open(tiny_exported)


@pytest.fixture(scope="module")
def raw(ranker):
    """A golden request with several candidates and a history."""
    return next(
        golden.request
        for golden in ranker.golden
        if len(golden.probabilities) > 1 and golden.request.get("history")
    )


def served(bundle, key=None, **changes):
    return TestClient(Worker(ServerConfig(bundle=bundle, **changes), key))


@pytest.fixture(scope="module")
def client(tiny_exported):
    with served(tiny_exported, max_candidates=50, max_history=40, max_body_kb=64) as client:
        yield client


def rank(client, request, **headers):
    content = request if isinstance(request, bytes) else json.dumps(request).encode()
    return client.post("/v1/rank", content=content, headers=headers)


def test_a_ranking_is_what_the_exported_ranker_says(client, ranker):
    for golden in ranker.golden:
        answer = rank(client, golden.request)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/json"
        found = answer.json()
        expected = ranker.score_raw([golden.request])
        assert np.array_equal(np.array(found["probabilities"], np.float32), expected)
        assert sorted(found["order"]) == list(range(len(expected)))
        in_order = [found["probabilities"][place] for place in found["order"]]
        assert in_order == sorted(in_order, reverse=True)
        assert found["model"] == ranker.manifest.fingerprint
        assert found["bucket"] is None
        assert found["request_id"] == answer.headers["x-request-id"]


def test_a_request_keeps_the_id_that_its_caller_gave_it(client, raw):
    assert rank(client, raw, **{"x-request-id": "cart-17.b"}).json()["request_id"] == "cart-17.b"
    for strange in ("", "a b", "x" * 65, "ü".encode()):
        given = rank(client, raw, **{"x-request-id": strange}).json()["request_id"]
        assert len(given) == 32


def test_null_is_the_same_as_left_out(client, raw):
    shorter = {key: value for key, value in raw.items() if "history" not in key}
    nulls = shorter | {"history": None, "history_age_days": None, "user_id": None}
    found = [rank(client, request).json()["probabilities"] for request in (shorter, nulls)]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (b"", 400, "EOF"),
        (b"{", 400, "EOF"),
        (b"\xff", 400, "expected value"),
        (b'{"query": "\xff"}', 400, "unicode"),
        (b'{"query": "\\ud800", "candidates": {"product_id": []}}', 400, "hex escape"),
        (b"[" * 60_000, 400, "recursion limit"),
        (b'\xef\xbb\xbf{"query": "a"}', 400, "expected value"),
        (b"9" * 5000, 400, "number out of range"),
        (b"[]", 422, "the body"),
        (b"NaN", 422, "the body"),
        (b"{}", 422, "query"),
        (b'{"query": 7, "candidates": {"product_id": []}}', 422, "query"),
        (b'{"query": "a"}', 422, "candidates"),
        (b'{"query": "a", "candidates": {}}', 422, "candidates.product_id"),
        (b'{"query": "a", "candidates": {"product_id": [1.5]}}', 422, "candidates.product_id.0"),
        (b'{"query": "a", "candidates": {"product_id": [1, true]}}', 422, "product_id.1"),
        (b'{"query": "a", "candidates": {"product_id": [9223372036854775808]}}', 422, "less than"),
        (b'{"query": "a", "candidates": {"product_id": [1e400]}}', 422, "product_id.0"),
        (b'{"query": "a", "quary": 1, "candidates": {"product_id": []}}', 422, "quary: no such"),
        (b'{"query": "a", "candidates": {"product_id": [], "x": 1}}', 422, "candidates.x"),
        (b'{"query": "a", "user_id": "7", "candidates": {"product_id": []}}', 422, "user_id"),
    ],
)
def test_a_malformed_body_is_refused_with_one_sentence(client, body, status, told):
    answer = rank(client, body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == {400: "bad_json", 422: "invalid_request"}[status]
    assert told in error["message"]
    assert "\n" not in error["message"]


def features(**given):
    return {"query": "a", "candidates": {"product_id": [1, 2], "features": given}}


@pytest.mark.parametrize(
    ("request_body", "told"),
    [
        (features(no_such=[1, 2]), "no_such"),
        (features(price=[1.0]), "price"),
        (features(price=1.0), "price"),
        (features(price=["1", 2]), "price"),
        (features(price=[math.nan, 2]), "price"),
        (features(price=[math.inf, 2]), "price"),
        (features(price=[1e300, 2]), "price"),
        (features(price=[10**400, 2]), "price"),
        (features(brand=[7, None]), "brand"),
        (features(price=[[[]], {}]), "price"),
        ({**features(), "features": {"hour": 1.5}}, "hour"),
        ({**features(), "features": []}, "features"),
        ({**features(), "history": [1], "history_age_days": []}, "history_age_days"),
        ({**features(), "history": [1], "history_age_days": [-1]}, "history_age_days"),
    ],
)
def test_a_wrong_feature_is_refused_by_name(client, request_body, told):
    answer = rank(client, request_body)
    assert answer.status_code == 422, answer.text
    assert told in answer.json()["error"]["message"]


def test_the_largest_finite_numbers_do_not_fail(client):
    # Whatever the model makes of them, it is a probability or a refusal.
    for number in (3.4e38, -3.4e38, 1e-45):
        assert rank(client, features(price=[number, 2])).status_code in (200, 422)


def test_requests_are_bounded(client):
    many = {"query": "a", "candidates": {"product_id": [1] * 51}}
    assert "at most 50" in rank(client, many).json()["error"]["message"]
    long = {"query": "a", "history": [1] * 41, "candidates": {"product_id": [1]}}
    assert "at most 40" in rank(client, long).json()["error"]["message"]
    most = {"query": "a", "history": [1] * 40, "candidates": {"product_id": [1] * 50}}
    assert rank(client, most).status_code == 200
    large = b" " * (64 * 1024 + 1)
    assert rank(client, large).status_code == 413
    chunked = client.post("/v1/rank", content=iter([large[:60_000], large[60_000:]]))
    assert chunked.status_code == 413
    assert chunked.json()["error"]["code"] == "too_large"


def test_a_body_of_another_type_is_refused(client, raw):
    assert rank(client, raw, **{"content-type": "text/plain"}).status_code == 415
    charset = {"content-type": "Application/JSON; charset=utf-8"}
    assert rank(client, raw, **charset).status_code == 200


def test_other_paths_and_methods_are_refused_alike(client):
    assert client.get("/v1/none").json()["error"]["code"] == "not_found"
    wrong = client.get("/v1/rank")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["code"] == "method_not_allowed"


def test_an_explanation_comes_with_the_same_probabilities(client, raw):
    answer = client.post("/v1/explain", json=raw)
    assert answer.status_code == 200, answer.text
    expected = rank(client, raw).json()["probabilities"]
    assert answer.json()["probabilities"] == pytest.approx(expected, abs=1e-6)
    assert client.post("/v1/explain", json=features(no_such=[1, 2])).status_code == 422


def test_the_service_tells_of_itself(client, ranker):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}
    (model,) = client.get("/v1/models").json()["models"]
    assert (model["name"], model["fingerprint"]) == ("control", ranker.manifest.fingerprint)
    tried = client.get("/v1/examples").json()["examples"]
    assert [e["request"] for e in tried] == [g.request for g in ranker.golden]
    assert "text/html" in client.get("/").headers["content-type"]


def test_the_openapi_document_describes_requests_that_are_answered(client, ranker):
    document = client.get("/openapi.json").json()
    schema = document["components"]["schemas"]["Request"]
    inputs = ranker.manifest.inputs
    candidate = schema["properties"]["candidates"]["properties"]["features"]["properties"]
    assert list(candidate) == [item.name for item in inputs.candidate]
    assert list(schema["properties"]["features"]["properties"]) == [i.name for i in inputs.request]
    assert schema["properties"]["history"]["maxItems"] == 40
    for example in schema["examples"]:
        assert rank(client, example).status_code == 200
    responses = document["paths"]["/v1/rank"]["post"]["responses"]
    assert {"200", "400", "413", "415", "422", "429", "503", "504"} <= responses.keys()


def test_every_path_but_the_probes_and_the_page_asks_for_the_key(tiny_exported, raw):
    with served(tiny_exported, KEY) as client:
        for path in ("/healthz", "/readyz", "/", "/page.js"):
            assert client.get(path).status_code == 200
        for path in ("/metrics", "/v1/models", "/v1/examples", "/openapi.json", "/none"):
            refused = client.get(path)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        for wrong in ("", "Bearer", "Bearer another", f"Basic {KEY}", f"Bearer {KEY} "[:-2]):
            assert rank(client, raw, authorization=wrong).status_code == 401
        right = {"authorization": f"Bearer {KEY}"}
        assert rank(client, raw, **right).status_code == 200
        document = client.get("/openapi.json", headers=right).json()
        assert document["paths"]["/v1/rank"]["post"]["security"] == [{"key": []}]
        assert "security" not in document["paths"]["/healthz"]["get"]


def test_a_deadline_that_cannot_be_met_is_504(tiny_exported, raw):
    with served(tiny_exported) as client:
        client.app._gate._deadline_s = 0.0
        late = rank(client, raw)
    assert (late.status_code, late.json()["error"]["code"]) in (
        (504, "deadline_exceeded"),
        (408, "body_too_slow"),
    )


def test_users_meet_the_ranker_of_their_bucket_and_it_is_logged(tiny_exported, raw, tmp_path):
    changes = {"treatment": tiny_exported, "salt": "spring", "exposures": tmp_path}
    with served(tiny_exported, **changes) as client:
        found = {user: rank(client, raw | {"user_id": user}).json() for user in range(40)}
        nobody = rank(client, {k: v for k, v in raw.items() if k != "user_id"}).json()
        metrics = client.get("/metrics").text
    buckets = [answer["bucket"] for answer in found.values()]
    assert set(buckets) == {"control", "treatment"}
    assert nobody["bucket"] is None
    treated = buckets.count("treatment")
    assert f'ranker_ranked_total{{slot="treatment"}} {treated}.0' in metrics
    assert f'ranker_ranked_total{{slot="control"}} {41 - treated}.0' in metrics
    lines = [
        json.loads(line)
        for file in sorted(tmp_path.glob("*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    assert len(lines) == 41
    for line in lines:
        answer = found.get(line["user_id"], nobody)
        assert (line["request_id"], line["bucket"]) == (answer["request_id"], answer["bucket"])
        ids = raw["candidates"]["product_id"]
        assert line["candidates"] == [ids[place] for place in answer["order"]]
        assert line["model"] == answer["model"]
        assert "query" not in line


def test_a_history_is_looked_up_by_user_unless_it_is_given(tiny_exported, raw, tmp_path):
    bought = {"user_id": [7, 7, 8], "product_id": raw["history"][:3]}
    times = pa.array([1_700_000_000_000_000] * 3, pa.timestamp("us"))
    pq.write_table(pa.table(bought | {"purchased_at": times}), tmp_path / "purchases.parquet")
    store = f"parquet:{tmp_path}/purchases.parquet?now=2023-11-16T00:00:00"
    plain = {k: v for k, v in raw.items() if k not in ("history", "history_age_days", "user_id")}
    with served(tiny_exported, store=store) as client:

        def probabilities(**more):
            return rank(client, plain | more).json()["probabilities"]

        looked_up = probabilities(user_id=7)
        given = {"history": sorted(raw["history"][:2]), "history_age_days": [1, 1]}
        assert looked_up == probabilities(**given)
        assert looked_up != probabilities()
        assert probabilities(user_id=7, history=[]) == probabilities()
        assert probabilities(user_id=9) == probabilities()  # never bought


def test_a_request_that_breaks_a_rule_spoils_no_other_of_its_batch(tiny_exported, raw):
    from concurrent.futures import ThreadPoolExecutor

    requests = [raw, features(no_such=[1, 2]), features(price=[1])] * 8
    with served(tiny_exported, batch_wait_ms=50) as client:
        with ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(lambda request: rank(client, request), requests))
        alone = rank(client, raw).json()["probabilities"]
    assert [answer.status_code for answer in answers] == [200, 422, 422] * 8
    for answer in answers[::3]:
        assert answer.json()["probabilities"] == pytest.approx(alone, abs=1e-6)


def test_a_full_queue_is_429_before_the_body_is_read(tiny_exported, raw):
    with served(tiny_exported, queue=1) as client:
        client.app._gate._pending = 1
        refused = rank(client, b"not JSON, and not looked at")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["code"] == "queue_full"
        assert client.get("/readyz").status_code == 200
        client.app._gate._pending = 0
        assert rank(client, raw).status_code == 200


def test_a_new_export_is_taken_up_and_counted(tiny_exported, tmp_path):
    link = tmp_path / "current"
    link.symlink_to(tiny_exported)
    with served(link, poll_seconds=0.02) as client:
        other = tmp_path / "other"
        other.mkdir()
        (other / "manifest.json").write_text("{}")
        (tmp_path / "next").symlink_to(other)
        (tmp_path / "next").replace(link)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            (model,) = client.get("/v1/models").json()["models"]
            if model["failed_loads"]:
                break
            time.sleep(0.02)
        assert model["failed_loads"] == 1
        assert 'ranker_failed_loads_total{slot="control"} 1.0' in client.get("/metrics").text
        example = client.get("/v1/examples").json()["examples"][0]["request"]
        assert rank(client, example).status_code == 200


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"treatment_share": 1.5}, "'treatment_share' must be from 0 to 1, got 1.5"),
        ({"port": 70_000}, "'port' must be 65535 or less, got 70000"),
        ({"workers": 0}, "'workers' must be 1 or more, got 0"),
        ({"salt": "spring"}, "'treatment' and 'salt' go together"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tiny_exported, changes, told):
    with pytest.raises(BadInputError, match=told):
        ServerConfig(bundle=tiny_exported, **changes).check()


def test_an_empty_key_is_refused(tiny_exported, monkeypatch):
    monkeypatch.setenv("RANKER_API_KEY", "")
    with pytest.raises(BadInputError, match="RANKER_API_KEY is empty"):
        ServerConfig(bundle=tiny_exported).check()


def test_settings_reach_the_workers(tiny_exported, tmp_path, monkeypatch):
    monkeypatch.setenv("RANKER_SETTINGS", "")  # restored afterwards
    config = ServerConfig(bundle=tiny_exported, exposures=tmp_path, salt="ü", deadline_ms=7)
    config.to_environment()
    assert ServerConfig.from_environment() == config
