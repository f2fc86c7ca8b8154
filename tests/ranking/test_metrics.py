import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle

from features.errors import BadInputError
from ranking.metrics import (
    Predictions,
    base_rate_entropy,
    metrics_document,
    reliability_bins,
    roc_points,
    score_histogram,
    slice_metrics,
    wilson_interval,
    within_request_auc,
)


def make(clicked, probability, lengths, with_history=None) -> Predictions:
    lengths = np.array(lengths, dtype=np.int64)
    if with_history is None:
        with_history = np.ones(len(lengths))
    return Predictions(
        clicked=np.array(clicked, dtype=bool),
        probability=np.array(probability, dtype=np.float64),
        lengths=lengths,
        with_history=np.array(with_history, dtype=bool),
    )


def rare_clicks(requests: int = 2_000) -> Predictions:
    rng = np.random.default_rng(7)
    lengths = rng.integers(1, 25, requests)
    log_odds = rng.normal(-4, 1.5, lengths.sum())
    probability = 1 / (1 + np.exp(-log_odds))
    return make(
        rng.random(len(probability)) < probability,
        probability,
        lengths,
        rng.random(requests) < 0.8,
    )


# Two requests with history, one without:
#   request 0: click .8, others .1 .3   -> AUC 1
#   request 1: click .3, others .3 .2   -> AUC 3/4 (one tie, one win)
#   request 2: click .5, other .5       -> AUC 1/2
SMALL = make(
    clicked=[1, 0, 0, 0, 1, 0, 1, 0],
    probability=[0.8, 0.1, 0.3, 0.3, 0.3, 0.2, 0.5, 0.5],
    lengths=[3, 3, 2],
    with_history=[1, 1, 0],
)


def test_hand_checked_numbers_by_slice():
    slices = slice_metrics(SMALL)
    assert list(slices) == ["all", "with_history", "without_history"]
    everything, having, lacking = slices.values()
    # Pairs (click, other) of all rows: .8 beats 5; .3 beats .1 .2 and ties .3 .3; .5 beats
    # .1 .3 .3 .2 and ties .5: 5 + 3 + 4.5 of 15.
    assert everything["auc"] == pytest.approx(12.5 / 15)
    assert everything["within_request_auc"] == pytest.approx((1 + 0.75 + 0.5) / 3)
    assert everything["mixed_requests"] == 3
    assert everything["calibration"] == pytest.approx(3.0 / 3)
    assert (everything["rows"], everything["positives"], everything["requests"]) == (8, 3, 3)

    assert having["auc"] == pytest.approx(7 / 8)
    assert having["calibration"] == pytest.approx(2.0 / 2)
    assert (having["rows"], having["positives"], having["requests"]) == (6, 2, 2)

    assert lacking["auc"] == 0.5
    assert lacking["log_loss"] == pytest.approx(math.log(2))
    assert lacking["normalized_log_loss"] == pytest.approx(1)
    assert lacking["average_precision"] == 0.5
    assert (lacking["rows"], lacking["positives"], lacking["requests"]) == (2, 1, 1)


def test_every_slice_agrees_with_scikit_learn_on_its_rows():
    predictions = rare_clicks()
    rows = np.repeat(predictions.with_history, predictions.lengths)
    slices = slice_metrics(predictions)
    everything = np.ones(len(rows), dtype=bool)
    for name, chosen in (("all", everything), ("with_history", rows), ("without_history", ~rows)):
        clicked, probability = predictions.clicked[chosen], predictions.probability[chosen]
        constant = np.full(len(clicked), clicked.mean())
        got = slices[name]
        assert got["auc"] == pytest.approx(oracle.roc_auc_score(clicked, probability))
        assert got["log_loss"] == pytest.approx(oracle.log_loss(clicked, probability))
        assert got["normalized_log_loss"] == pytest.approx(
            oracle.log_loss(clicked, probability) / oracle.log_loss(clicked, constant)
        )
        assert got["average_precision"] == pytest.approx(
            oracle.average_precision_score(clicked, probability)
        )
        assert got["rows"] == chosen.sum()
        assert got["positives"] == clicked.sum()


def test_float32_gives_the_figures_of_float64():
    wide = rare_clicks(200)
    narrow = Predictions(
        clicked=wide.clicked,
        probability=wide.probability.astype(np.float32),
        lengths=wide.lengths,
        with_history=wide.with_history,
    )
    for name, metrics in slice_metrics(wide).items():
        assert slice_metrics(narrow)[name] == pytest.approx(metrics, rel=1e-5)


def test_predicting_the_base_rate_has_normalised_log_loss_one_and_chance_auc():
    clicked = [1] + [0] * 9
    metrics = slice_metrics(make(clicked, [0.1] * 10, [5, 5]))["all"]
    assert metrics["normalized_log_loss"] == pytest.approx(1)
    assert metrics["calibration"] == pytest.approx(1)
    assert metrics["auc"] == 0.5
    assert base_rate_entropy(0.1) == pytest.approx(-0.1 * math.log(0.1) - 0.9 * math.log(0.9))


def test_certain_and_wrong_probabilities_have_a_finite_log_loss():
    metrics = slice_metrics(make([1, 0, 1, 0], [0.0, 1.0, 1.0, 0.0], [4]))["all"]
    assert metrics["log_loss"] == pytest.approx(-math.log(np.finfo(np.float64).eps) / 2)


def test_a_slice_of_one_class_or_without_rows_has_counts_and_no_metrics():
    one_class = slice_metrics(make([1, 0, 0, 0], [0.5, 0.1, 0.2, 0.3], [2, 2], [1, 0]))
    empty = slice_metrics(make([1, 0], [0.5, 0.1], [2], [1]))
    undefined = {
        "auc": None,
        "log_loss": None,
        "normalized_log_loss": None,
        "average_precision": None,
        "calibration": None,
        "within_request_auc": None,
        "positives": 0,
        "mixed_requests": 0,
    }
    assert one_class["without_history"] == {**undefined, "rows": 2, "requests": 1}
    assert empty["without_history"] == {**undefined, "rows": 0, "requests": 0}
    assert one_class["with_history"]["auc"] == 1.0


@pytest.mark.parametrize(
    ("clicked", "found"),
    [([0, 0], "of 2 rows none of them is"), ([1, 1], "of 2 rows all of them are")],
)
def test_evaluation_of_one_class_is_bad_input(clicked, found):
    with pytest.raises(BadInputError, match=found):
        slice_metrics(make(clicked, [0.1, 0.2], [2]))


def test_evaluation_without_rows_is_bad_input():
    with pytest.raises(BadInputError, match="of 0 rows"):
        slice_metrics(make([], [], []))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.01, 1.01])
def test_a_wrong_probability_is_named_by_row_and_request(value):
    with pytest.raises(ValueError, match=r"row 3 \(request 2\).*got " + str(value)):
        make([1, 0, 0, 1], [0.1, 0.2, 0.3, value], [2, 1, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probability": np.zeros(1)}, "one value per candidate"),
        ({"with_history": np.zeros(3, dtype=bool)}, "one value per request"),
        ({"lengths": np.array([1, 2])}, r"\(2\), got a sum of 3"),
        ({"lengths": np.array([3, -1])}, "0 or more"),
        ({"clicked": np.array([0, 1])}, "must be bool, got int64"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    parts = {
        "clicked": np.array([True, False]),
        "probability": np.array([0.5, 0.5]),
        "lengths": np.array([1, 1]),
        "with_history": np.array([True, False]),
    }
    with pytest.raises(ValueError, match=message):
        Predictions(**{**parts, **change})


def plain_within_request_auc(predictions: Predictions) -> tuple[float | None, int]:
    values = []
    start = 0
    for length in predictions.lengths:
        clicked = predictions.clicked[start : start + length]
        probability = predictions.probability[start : start + length]
        start += length
        if 0 < clicked.sum() < length:
            values.append(oracle.roc_auc_score(clicked, probability))
    return (sum(values) / len(values) if values else None), len(values)


@st.composite
def requests_with_ties(draw) -> Predictions:
    lengths = draw(st.lists(st.integers(0, 6), min_size=0, max_size=12))
    rows = st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0]))
    drawn = draw(st.lists(rows, min_size=sum(lengths), max_size=sum(lengths)))
    return make([row[0] for row in drawn], [row[1] for row in drawn], lengths)


@settings(max_examples=200, deadline=None)
@given(requests_with_ties())
def test_within_request_auc_equals_a_loop_over_requests(predictions):
    mean, counted = within_request_auc(predictions)
    expected, expected_counted = plain_within_request_auc(predictions)
    assert counted == expected_counted
    assert mean == (None if expected is None else pytest.approx(expected))


def test_within_request_auc_does_not_compare_across_requests():
    # Scores of the second request are all lower; inside each request the order is right.
    predictions = make([1, 0, 1, 0], [0.9, 0.8, 0.2, 0.1], [2, 2])
    assert within_request_auc(predictions) == (1.0, 2)
    assert slice_metrics(predictions)["all"]["auc"] == 0.75


def test_roc_points_are_few_ordered_and_keep_the_area():
    predictions = rare_clicks()
    false_rate, true_rate = roc_points(predictions, limit=300)
    assert len(false_rate) <= 300
    assert (false_rate[0], true_rate[0]) == (0, 0)
    assert (false_rate[-1], true_rate[-1]) == (1, 1)
    assert (np.diff(false_rate) >= 0).all()
    assert (np.diff(true_rate) >= 0).all()
    area = oracle.roc_auc_score(predictions.clicked, predictions.probability)
    assert oracle.auc(false_rate, true_rate) == pytest.approx(area, abs=2e-3)


def test_wilson_interval_of_known_counts():
    # 0 of 10: 0 to z² / (10 + z²) = .2775; 5 of 10: .2366 to .7634.
    low, high = wilson_interval(np.array([0, 5, 10]), np.array([10, 10, 10]))
    assert low == pytest.approx([0, 0.2366, 0.7225], abs=1e-4)
    assert high == pytest.approx([0.2775, 0.7634, 1], abs=1e-4)


def test_reliability_bins_hold_every_row_once_and_equal_scores_together():
    predictions = make([0, 0, 1, 0, 1, 1], [0.1, 0.1, 0.1, 0.1, 0.8, 0.9], [6])
    bins = reliability_bins(predictions, bins=2)
    # Shares of mass: 4 * (1/6 + .1/2.1) / 2 = .43 for the score .1, so half is reached at .8.
    assert bins.rows.tolist() == [4, 2]
    assert bins.predicted == pytest.approx([0.1, 0.85])
    assert bins.observed == pytest.approx([0.25, 1.0])

    many = rare_clicks()
    bins = reliability_bins(many)
    assert len(bins.rows) == 18
    assert bins.rows.sum() == len(many.clicked)
    assert bins.positives.sum() == many.clicked.sum()
    assert (np.diff(bins.predicted) > 0).all()
    assert bins.predicted @ bins.rows == pytest.approx(many.probability.sum())
    assert ((bins.low <= bins.observed) & (bins.observed <= bins.high)).all()


@pytest.mark.parametrize("score", [0.0, 0.3, 1.0])
def test_curves_of_a_constant_prediction(score):
    predictions = make([1, 0, 0, 0], [score] * 4, [4])
    bins = reliability_bins(predictions)
    assert bins.rows.tolist() == [4]
    assert bins.predicted == pytest.approx([score])
    assert bins.observed == pytest.approx([0.25])
    histogram = score_histogram(predictions)
    assert histogram.clicked.sum() == histogram.unclicked.sum() == 1
    assert roc_points(predictions)[0].tolist() == [0, 1]


def test_score_histogram_separates_the_labels():
    histogram = score_histogram(make([1, 1, 0, 0], [0.9, 0.9, 0.1, 0.6], [4]), bins=2)
    # The log odds of 0.1 and 0.9 are -2.197 and 2.197; those of 0.6, 0.405, are beyond the middle.
    assert histogram.log_odds == pytest.approx([-math.log(9), 0, math.log(9)], abs=0.01)
    assert histogram.clicked.tolist() == [0, 1]
    assert histogram.unclicked.tolist() == [0.5, 0.5]


TRAINING = {"rows": 8, "seconds": 2.0, "rows_per_second": 4.0, "peak_rss_mb": 100.0}


def document(**changes):
    parts = {"dataset": "tiny", "model": "dcn", "seed": 3, "training": TRAINING}
    return metrics_document(**{**parts, "slices": slice_metrics(SMALL), **changes})


def test_metrics_document_has_the_contract_s_structure():
    content = document()
    assert list(content) == ["dataset", "model", "seed", "slices", "training"]
    assert list(content["slices"]) == ["all", "with_history", "without_history"]
    for metrics in content["slices"].values():
        assert list(metrics)[:5] == ["auc", "log_loss", "normalized_log_loss", "rows", "positives"]
    assert content["training"] == TRAINING
    assert json.loads(json.dumps(content, allow_nan=False)) == content


def test_metrics_document_refuses_what_lacks_a_key_of_the_contract():
    slices = slice_metrics(SMALL)
    with pytest.raises(ValueError, match="training: missing peak_rss_mb; got rows"):
        document(training={key: TRAINING[key] for key in list(TRAINING)[:-1]})
    with pytest.raises(ValueError, match="slices: missing with_history, without_history"):
        document(slices={"all": slices["all"]})
    with pytest.raises(ValueError, match="slice 'all': missing auc"):
        document(slices={**slices, "all": {"log_loss": 0.1}})
