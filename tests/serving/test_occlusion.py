"""Occlusion against scoring requests from which a group was taken by hand."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logit

from features.batch import RequestBatch
from features.errors import BadInputError
from features.id_map import MISSING_ID
from ranking import attribution_groups
from serving import occlusion
from serving.exported import ExportedRanker
from serving.inputs import Input, InputSpec
from serving.occlusion import explain, groups_of, occluded
from serving.raw_requests import to_batch

Raw = dict[str, Any]


@pytest.fixture(scope="module")
def ranker(tiny_exported: Path) -> ExportedRanker:
    return ExportedRanker.open(tiny_exported)


@pytest.fixture
def request_(ranker: ExportedRanker) -> Raw:
    """A real request with a history and several candidates."""
    found = max(ranker.golden, key=lambda golden: len(golden.request.get("history") or ()))
    assert len(found.request["candidates"]["product_id"]) > 2
    return copy.deepcopy(found.request)


def without(request: Raw, inputs: InputSpec, group: str) -> Raw:
    """Return the request as somebody sends it who does not know the group."""
    left = copy.deepcopy(request)
    if group == "query embedding":
        left["query"] = "a query that no table knows"
    elif group == "product embedding":
        left["candidates"]["product_id"] = [-7] * len(request["candidates"]["product_id"])
    elif group == "purchase history":
        left["history"], left["history_age_days"] = [], []
    elif group in {item.name for item in inputs.request}:
        del left["features"][group]
    else:
        del left["candidates"]["features"][group]
    return left


def test_each_contribution_is_the_change_of_the_log_odds(
    ranker: ExportedRanker, request_: Raw
) -> None:
    inputs = ranker.manifest.inputs
    found = explain(ranker, request_)
    features = [item.name for item in (*inputs.request, *inputs.candidate)]
    embeddings = ["query embedding", "product embedding", "purchase history"]
    assert found["groups"] == [*embeddings, *features]
    whole = ranker.score(to_batch([request_], inputs))
    np.testing.assert_allclose(found["probabilities"], whole, atol=1e-6)
    contributions = np.array(found["contributions"])
    assert contributions.shape == (len(whole), len(found["groups"]))
    for column, group in enumerate(found["groups"]):
        score = ranker.score(to_batch([without(request_, inputs, group)], inputs))
        expected = logit(whole.astype(np.float64)) - logit(score.astype(np.float64))
        np.testing.assert_allclose(contributions[:, column], expected, atol=2e-4, err_msg=group)
    assert (np.abs(contributions).max(axis=0) > 1e-3).sum() > len(features) / 2
    assert found["model"] == ranker.manifest.fingerprint


def test_over_the_mean_of_the_request(ranker: ExportedRanker, request_: Raw) -> None:
    found = explain(ranker, request_)
    contributions, over_mean = np.array(found["contributions"]), np.array(found["over_mean"])
    np.testing.assert_allclose(over_mean, contributions - contributions.mean(axis=0), atol=2e-6)
    one = {name: values[:1] for name, values in request_["candidates"]["features"].items()}
    first = request_["candidates"]["product_id"][:1]
    alone = explain(ranker, request_ | {"candidates": {"product_id": first, "features": one}})
    np.testing.assert_allclose(alone["over_mean"], [[0] * len(found["groups"])], atol=1e-6)
    np.testing.assert_allclose(alone["contributions"][0], contributions[0], atol=2e-4)


def test_values_and_history_as_given(ranker: ExportedRanker, request_: Raw) -> None:
    found = explain(ranker, request_)
    candidates = request_["candidates"]
    for place, row in enumerate(found["values"]):
        values = dict(zip(found["groups"], row, strict=True))
        assert values.pop("query embedding") == request_["query"]
        assert values.pop("product embedding") == candidates["product_id"][place]
        assert values.pop("purchase history") == len(request_["history"])
        own = {name: column[place] for name, column in candidates["features"].items()}
        assert values == request_["features"] | own
    assert found["history"] == {
        "product_ids": request_["history"],
        "age_days": request_["history_age_days"],
    }
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_what_is_unknown_already_contributes_nothing(ranker: ExportedRanker, request_: Raw) -> None:
    bare = {
        "query": "a query that no table knows",
        "candidates": {"product_id": [-1, -2, -3]},
    }
    found = explain(ranker, bare)
    np.testing.assert_allclose(found["contributions"], 0, atol=1e-5)
    assert [row[0] for row in found["values"]] == [bare["query"]] * 3
    assert {value for row in found["values"] for value in row[3:]} == {None}
    assert found["history"] == {"product_ids": [], "age_days": None}


def test_no_candidates(ranker: ExportedRanker, request_: Raw) -> None:
    found = explain(ranker, request_ | {"candidates": {"product_id": []}})
    lists = ("probabilities", "contributions", "over_mean", "values")
    assert [found[name] for name in lists] == [[], [], [], []]


def test_a_request_that_breaks_a_rule(ranker: ExportedRanker, request_: Raw) -> None:
    with pytest.raises(BadInputError, match="no feature 'colour'"):
        explain(ranker, request_ | {"features": {"colour": 3}})


def test_one_copy_for_each_group() -> None:
    inputs = InputSpec(
        request=(Input(name="store", kind="sparse", type="int64"),),
        candidate=(
            Input(name="price", kind="dense", type="float32"),
            Input(name="brand", kind="sparse", type="int64"),
        ),
    )
    request = {
        "query": "milk",
        "history": [31, 17],
        "history_age_days": [0, 12],
        "features": {"store": 4},
        "candidates": {
            "product_id": [5, 6],
            "features": {"price": [1.5, 2.5], "brand": [8, 9]},
        },
    }
    one = to_batch([request], inputs)
    batch = occluded(
        one, groups_of(inputs, embeddings=True)
    )  # as it is, query, product, history, store, price, …
    assert len(groups_of(inputs, embeddings=False)) == 3
    milk = int(one.query[0])
    none, nan = MISSING_ID, float("nan")
    expected = RequestBatch(
        lengths=torch.tensor([2] * 7),
        query=torch.tensor([milk, none, *[milk] * 5]),
        history=torch.tensor([31, 17] * 6),
        history_age=torch.tensor([0, 12] * 6, dtype=torch.int16),
        history_lengths=torch.tensor([2, 2, 2, 0, 2, 2, 2]),
        request_sparse=torch.tensor([[4, 4, 4, 4, none, 4, 4]]),
        request_dense=torch.zeros(0, 7),
        product=torch.tensor([5, 6, 5, 6, none, none, *[5, 6] * 4]),
        candidate_sparse=torch.tensor([[*[8, 9] * 6, none, none]]),
        candidate_dense=torch.tensor([[*[1.5, 2.5] * 5, nan, nan, 1.5, 2.5]]),
        clicked=torch.zeros(0),
        weight=torch.ones(7),
    )
    for name in RequestBatch.__dataclass_fields__:
        torch.testing.assert_close(
            getattr(batch, name), getattr(expected, name), equal_nan=True, rtol=0, atol=0
        )


def test_the_names_are_those_of_the_offline_report() -> None:
    for name in ("QUERY_EMBEDDING", "PRODUCT_EMBEDDING", "PURCHASE_HISTORY"):
        assert getattr(occlusion, name) == getattr(attribution_groups, name)
