import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    cohen_kappa_score,
    confusion_matrix,
    log_loss,
    mean_absolute_error,
    precision_recall_fscore_support,
)

from embeddings.labeling.calibration import calibration
from embeddings.labeling.scores import figures, score

LABELS = [0, 1, 2]
PAIRS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 5)), min_size=2, max_size=40
)


def columns(pairs):
    human, label, query = (np.array(column) for column in zip(*pairs, strict=True))
    return human.astype(np.int8), label.astype(np.int8), [f"query {number}" for number in query]


@settings(max_examples=30, deadline=None)
@given(PAIRS)
def test_figures_are_those_of_scikit_learn(pairs):
    human, label, queries = columns([*pairs, (0, 1, 0), (2, 2, 1)])  # never one label alone
    found = score(human, label, queries).figures()
    precision, recall, f1, _ = precision_recall_fscore_support(
        human, label, labels=LABELS, zero_division=0
    )
    assert found["accuracy"] == pytest.approx(accuracy_score(human, label))
    assert found["macro_f1"] == pytest.approx(f1.mean())
    for name, expected in (("precision", precision), ("recall", recall), ("f1", f1)):
        assert found[name] == pytest.approx(expected.tolist())
    assert found["kappa"] == pytest.approx(cohen_kappa_score(human, label, labels=LABELS))
    expected = cohen_kappa_score(human, label, labels=LABELS, weights="quadratic")
    assert found["quadratic_kappa"] == pytest.approx(expected)
    assert found["mean_absolute_error"] == pytest.approx(mean_absolute_error(human, label))
    assert found["confusion"] == confusion_matrix(human, label, labels=LABELS).tolist()


def test_a_pair_without_a_grade_counts_as_wrong():
    human = np.array([0, 1, 2, 2, 0, 1], np.int8)
    label = np.array([0, 1, 2, -1, -1, 0], np.int8)
    found = score(human, label, list("abcdef")).figures()
    assert (found["pairs"], found["ungraded"]) == (6, 2)
    assert found["accuracy"] == pytest.approx(3 / 6)
    assert found["recall"] == pytest.approx([1 / 2, 1 / 2, 1 / 2])
    assert found["precision"] == pytest.approx([1 / 2, 1, 1])
    # Scikit-learn takes -1 for a category of its own, as is done here.
    assert found["kappa"] == pytest.approx(cohen_kappa_score(human, label))
    assert found["mean_absolute_error"] == pytest.approx((0 + 0 + 0 + 2 + 2 + 1) / 6)
    assert found["confusion_ungraded"] == [1, 0, 1]
    # Of the six, two are 4 away and one 1. By chance 2/6 are ungraded, 4 away from anything; of the
    # others the distances of (0 1 2) x (0 0 1 2) are 0 0 1 4, 1 1 0 1, 4 4 1 0: 17 in 12.
    assert found["quadratic_kappa"] == pytest.approx(1 - (9 / 6) / (2 / 6 * 4 + 4 / 6 * 17 / 12))


def test_nothing_graded_is_no_agreement():
    found = score(np.array([0, 1, 2]), np.full(3, -1), list("abc")).figures()
    assert found["accuracy"] == found["macro_f1"] == 0
    assert found["kappa"] == found["quadratic_kappa"] == pytest.approx(0)


def test_one_label_everywhere_has_no_kappa():
    found = figures(np.array([[0, 0, 0, 0], [0, 5, 0, 0], [0, 0, 0, 0]]))
    assert found["accuracy"] == 1
    assert np.isnan(found["kappa"])
    assert np.isnan(found["quadratic_kappa"])
    intervals = score(np.ones(5, np.int8), np.ones(5, np.int8), list("abcde")).figures()[
        "intervals"
    ]
    assert intervals["accuracy"] == [1, 1]
    assert np.isnan(intervals["kappa"]).all()


def judged(seed=0, queries=80):
    """Return labels of pairs whose queries differ in how hard they are."""
    rng = np.random.default_rng(seed)
    texts = np.repeat([f"query {number}" for number in range(queries)], 8)
    human = rng.integers(0, 3, len(texts))
    wrong = rng.random(len(texts)) < np.repeat(rng.random(queries), 8)
    label = np.where(wrong, rng.integers(0, 3, len(texts)), human)
    return human, label, texts.tolist()


def test_intervals_are_those_of_a_bootstrap_over_queries():
    human, label, texts = judged()
    found = score(human, label, texts).figures()
    rng = np.random.default_rng(5)
    right = (human == label).reshape(-1, 8)
    drawn = [right[rng.integers(0, len(right), len(right))].mean() for _ in range(2000)]
    expected = np.percentile(drawn, [2.5, 97.5])
    assert found["intervals"]["accuracy"] == pytest.approx(expected, abs=0.01)
    low, high = found["intervals"]["accuracy"]
    apart = score(human, label, [str(i) for i in range(len(texts))]).figures()["intervals"]
    assert high - low > 1.2 * (apart["accuracy"][1] - apart["accuracy"][0])
    assert all(low <= found[n] <= high for n, (low, high) in found["intervals"].items())


def test_a_lead_is_paired():
    human, label, texts = judged()
    better = label.copy()
    better[::40] = human[::40]
    one, other = score(human, better, texts), score(human, label, texts)
    found = one.less(other)
    mended = (label[::40] != human[::40]).sum()
    assert found["accuracy"]["difference"] == pytest.approx(mended / len(human))
    assert found["accuracy"]["interval"][0] >= 0  # never worse on any query, so in no draw
    assert one.less(one)["quadratic_kappa"] == {"difference": 0, "interval": [0, 0]}


def test_log_loss_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    human = rng.integers(0, 3, 200)
    probability = rng.dirichlet(np.ones(3), 200)
    found = calibration(human, probability.argmax(1), probability)
    assert found["log_loss"] == pytest.approx(log_loss(human, probability))
    assert found["pairs"] == sum(row["pairs"] for row in found["reliability"]) == 200


def test_calibration_error_by_hand():
    # Two at 0.75 of which one is right, two at 1.0 that are both right: the error is 2/4 of 0.25.
    probability = np.array([[0.75, 0.25, 0], [0.75, 0.25, 0], [0, 1, 0], [0, 0, 1]])
    found = calibration(np.array([0, 1, 1, 2]), np.array([0, 0, 1, 2]), probability)
    assert found["expected_calibration_error"] == pytest.approx(0.125)
    assert found["reliability"] == [
        {"from": 0.7, "to": 0.8, "pairs": 2, "confidence": 0.75, "accuracy": 0.5},
        {"from": 0.9, "to": 1.0, "pairs": 2, "confidence": 1.0, "accuracy": 1.0},
    ]


def test_a_certain_error_costs_much_but_not_infinitely():
    found = calibration(np.array([1]), np.array([0]), np.array([[1.0, 0, 0]]))
    assert found["log_loss"] == pytest.approx(-np.log(1e-7))


def test_pairs_without_grade_or_probabilities_are_left_out():
    nothing = [np.nan] * 3
    probability = np.array([[0.2, 0.5, 0.3], nothing, [0.2, 0.5, 0.3]])
    found = calibration(np.array([1, 1, 1]), np.array([1, 1, -1]), probability)
    assert found["pairs"] == 1
    assert found["log_loss"] == pytest.approx(-np.log(0.5))
    assert calibration(np.array([1]), np.array([1]), np.array([nothing])) is None


def test_calibrated_probabilities_have_next_to_no_error():
    rng = np.random.default_rng(0)
    probability = rng.dirichlet(np.ones(3), 50_000)
    human = (rng.random((50_000, 1)) > probability.cumsum(1)).sum(1).clip(max=2)
    found = calibration(human, probability.argmax(1), probability)
    assert found["expected_calibration_error"] < 0.01
