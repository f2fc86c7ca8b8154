"""Requests of a batch do not disturb each other, whatever is in them."""

from types import SimpleNamespace

import numpy as np
import pytest

from serving.batch_scoring import BatchScoring, Job, Ranked
from serving.inputs import Input, InputSpec
from serving.protocol import RefusedError
from serving.server_metrics import Metrics


def spec(*candidate):
    return InputSpec(
        request=(Input(name="hour", kind="sparse", type="int64"),),
        candidate=tuple(Input(name=name, kind="dense", type="float32") for name in candidate),
    )


def slot(fingerprint, inputs, score):
    """Return a slot whose model is a function of the batch; its real one has tests of its own."""
    manifest = SimpleNamespace(inputs=inputs, fingerprint=fingerprint)
    return SimpleNamespace(current=SimpleNamespace(manifest=manifest, score=score))


def a_hundredth(batch):
    """Score each product by its id; 13 is fatal and 14 gives no number."""
    ids = batch.product.numpy()
    if 13 in ids:
        raise RuntimeError("13")
    return np.where(ids == 14, np.nan, ids / 100).astype(np.float32)


def job(*product_ids, slot="control", hour=None, **features):
    candidates = {"product_id": list(product_ids), "features": features}
    return Job(slot=slot, raw={"query": "a", "features": {"hour": hour}, "candidates": candidates})


def probabilities(outcome):
    assert isinstance(outcome, Ranked), outcome
    return [round(float(p), 4) for p in outcome.probabilities]


@pytest.fixture
def scoring():
    return BatchScoring({"control": slot("c", spec("price"), a_hundredth)}, Metrics())


def test_each_request_gets_the_probabilities_of_its_own_candidates(scoring):
    outcomes = scoring([job(1, 2, price=[1.0, None]), job(), job(3)])
    assert [probabilities(outcome) for outcome in outcomes] == [[0.01, 0.02], [], [0.03]]
    assert {outcome.model for outcome in outcomes} == {"c"}


def test_a_bad_request_is_refused_by_itself(scoring):
    outcomes = scoring([job(1), job(2, price=[]), job(3, brand=["x"]), job(4)])
    assert [probabilities(outcomes[place]) for place in (0, 3)] == [[0.01], [0.04]]
    for place, told in ((1, "price"), (2, "brand")):
        refused = outcomes[place]
        assert isinstance(refused, RefusedError)
        assert refused.status == 422
        assert told in refused.message
        assert not refused.message.startswith("request ")  # its place among others' is nobody's


def test_a_request_that_breaks_the_model_fails_by_itself(scoring):
    outcomes = scoring([job(1), job(12, 13), job(14, 2), job(4)])
    assert [probabilities(outcomes[place]) for place in (0, 3)] == [[0.01], [0.04]]
    assert isinstance(outcomes[1], RuntimeError)
    assert isinstance(outcomes[2], RefusedError)
    assert "no finite probability" in outcomes[2].message


def test_each_bucket_is_scored_by_its_own_ranker_with_the_features_that_this_reads():
    def counted(batch):
        """Tell how many features the ranker was given."""
        return np.full(len(batch.product), len(batch.candidate_dense), np.float32)

    slots = {
        "control": slot("c", spec("price"), counted),
        "treatment": slot("t", spec("price", "stars"), counted),
    }
    scoring = BatchScoring(slots, Metrics())
    both = {"price": [1.0], "stars": [5.0]}
    jobs = [job(1, slot=name, **both) for name in ("treatment", "control", "treatment")]
    outcomes = scoring([*jobs, job(1, **both, colour=["red"])])
    assert [outcome.model for outcome in outcomes[:3]] == ["t", "c", "t"]
    assert [probabilities(outcome) for outcome in outcomes[:3]] == [[2.0], [1.0], [2.0]]
    assert "colour" in outcomes[3].message  # neither reads it
