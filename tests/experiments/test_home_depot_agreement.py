"""What means of grades tell of the people behind them, held against grades that are known."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import dirichlet_multinomial
from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score, mean_absolute_error

from embeddings.labeling.agreement import agreement_figures
from experiments.home_depot_agreement import JSON, OTHERS, OWN, REST, main
from experiments.home_depot_grades import SCORES, Bounds, means, sums_of_three
from experiments.home_depot_models import (
    COUNTS,
    SETS,
    Dirichlet,
    Threshold,
    fit,
    of_sums,
)

CUTS = (1.75, 2.5)
DIRICHLET = Dirichlet(weights=(0.4, 0.8, 1.4))


def drawn(seed, sets, pairs=60):
    """Return the grades of three people, [P, 3], of pairs that have some of the sets only."""
    rng = np.random.default_rng(seed)
    chance = rng.dirichlet(np.ones(len(sets)))
    rows = np.array(SETS)[rng.choice(sets, pairs, p=chance)]
    return np.concatenate([rows, [[1, 1, 1], [2, 3, 3], [3, 3, 3]]])  # never one label alone


def bounds_of(grades):
    sums = np.bincount(grades.sum(1), minlength=10)[3:]
    return Bounds(sums, {"dirichlet": DIRICHLET})


def label(mean):
    return (mean >= CUTS[0]).astype(int) + (mean >= CUTS[1])


def scores(right, given):
    return {
        "accuracy": accuracy_score(right, given),
        "macro_f1": f1_score(right, given, labels=[0, 1, 2], average="macro", zero_division=0),
        "kappa": cohen_kappa_score(right, given, labels=[0, 1, 2]),
        "quadratic_kappa": cohen_kappa_score(right, given, labels=[0, 1, 2], weights="quadratic"),
        "mean_absolute_error": mean_absolute_error(right, given),
    }


def own_and_rest(grades):
    """Return the scores of every person of every pair, on both labels."""
    given = (grades - 1).ravel()
    mean = np.repeat(grades.mean(1), 3)
    others = ((grades.sum(1, keepdims=True) - grades) / 2).ravel()
    return scores(label(mean.round(6)), given), scores(label(others), given)


def counts_of(grades):
    return np.stack([(grades == grade).sum(1) for grade in (1, 2, 3)], axis=1)


def test_means_and_who_can_have_given_them():
    given = np.array([2.33, 2.33, 1.75, 3.0, 2.67, 1.5])
    assert sums_of_three(given).tolist() == [0, 0, 0, 0, 2, 1, 1]
    found = {row["mean"]: row for row in means(given)}
    assert found[2.33] == {
        "mean": 2.33,
        "pairs": 2,
        "fewest": 3,
        "readings": [[1, 3, 3], [2, 2, 3]],
    }
    assert found[1.75]["fewest"] == found[1.5]["fewest"] == 4
    assert found[1.75]["readings"] == [[1, 1, 2, 3], [1, 2, 2, 2]]
    assert found[3.0]["readings"] == [[3, 3, 3]]


def test_bounds_by_hand():
    # Mean 2, ten times: either all say 2, or each says another grade.
    found = Bounds(np.array([0, 0, 0, 10, 0, 0, 0]), {}).own(CUTS)
    assert found["accuracy"] == {"least": pytest.approx(1 / 3), "most": pytest.approx(1)}
    assert found["mean_absolute_error"] == {"least": pytest.approx(0), "most": pytest.approx(2 / 3)}
    found = Bounds(np.array([0, 0, 0, 10, 0, 0, 0]), {}).agreement()
    assert found["agreement"] == {"least": pytest.approx(0), "most": pytest.approx(1)}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_what_is_so_lies_within_the_bounds(seed):
    grades = drawn(seed, range(len(SETS)))
    bounds = bounds_of(grades)
    own, rest = own_and_rest(grades)
    agreed = agreement_figures(counts_of(grades), np.ones(len(grades)))
    everywhere = [
        (bounds.own(CUTS), own),
        (bounds.rest(CUTS), rest),
        (bounds.agreement(), agreed),
    ]
    for found, so in everywhere:
        for name, bound in found.items():
            # Between two of the tried mixtures a figure may be a little beyond both.
            assert bound["least"] - 0.01 <= so[name] <= bound["most"] + 0.01
            assert bound["least"] - 0.01 <= bound["dirichlet"] <= bound["most"] + 0.01


def test_means_that_have_one_reading_leave_nothing_open():
    certain = [at for at, grades in enumerate(SETS) if sum(grades) in (3, 4, 8, 9)]
    grades = drawn(3, certain)
    bounds = bounds_of(grades)
    for found, so in zip((bounds.own(CUTS), bounds.rest(CUTS)), own_and_rest(grades), strict=True):
        for name in SCORES:
            assert found[name]["least"] == pytest.approx(so[name])
            assert found[name]["most"] == pytest.approx(so[name])
            assert found[name]["dirichlet"] == pytest.approx(so[name])


def test_the_dirichlet_model_is_that_of_scipy():
    expected = dirichlet_multinomial.pmf(COUNTS, list(DIRICHLET.weights), 3)
    np.testing.assert_allclose(DIRICHLET.joint().sum(1), expected)


@pytest.mark.parametrize("model", [DIRICHLET, Threshold(cuts=(-1.5, -0.3), error=0.8)])
def test_a_fourth_person_is_like_the_three(model):
    joint = model.joint()
    assert joint.sum() == pytest.approx(1)
    np.testing.assert_allclose(joint.sum(0), joint.sum(1) @ COUNTS / 3)


def test_the_threshold_model_is_what_it_says():
    rng = np.random.default_rng(0)
    seen = rng.normal(size=(400_000, 1)) + rng.normal(0, 0.8, (400_000, 3))
    sums = (3 + np.searchsorted([-1.5, -0.3], seen).sum(1)).astype(int)
    found = of_sums(Threshold(cuts=(-1.5, -0.3), error=0.8))
    np.testing.assert_allclose(np.bincount(sums, minlength=10)[3:] / 400_000, found, atol=0.003)


@pytest.mark.parametrize("model", [DIRICHLET, Threshold(cuts=(-1.5, -0.3), error=0.8)])
def test_a_model_is_found_again_by_its_sums(model):
    found = fit(1e6 * of_sums(model))[type(model).__name__.lower()]
    np.testing.assert_allclose(of_sums(found), of_sums(model), atol=1e-4)
    np.testing.assert_allclose(found.joint(), model.joint(), atol=2e-3)


def test_the_experiment_writes_its_figures(tmp_path, capsys):
    grades = DIRICHLET.joint().sum(1)
    rows = np.random.default_rng(1).choice(len(SETS), 300, p=grades / grades.sum())
    mean = [*np.array(SETS)[rows].mean(1).round(2).tolist(), 1.75]
    table = {
        "query": [f"query {i}" for i in range(301)],
        "product_id": list(range(301)),
        "title": ["title"] * 301,
        "relevance": mean,
    }
    pq.write_table(pa.table(table), tmp_path / "relevance.parquet")
    arguments = ["--source", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    document = json.loads((tmp_path / "out" / JSON).read_text())
    assert (document["pairs"], document["pairs_of_three"]) == (301, 300)
    found = document["one_person"]["dataset"]
    assert set(found) == {OWN, REST, OTHERS}
    assert set(found[OTHERS]["accuracy"]) == {"threshold", "dirichlet"}
    accuracy = found[OWN]["accuracy"]
    assert 0 < accuracy["least"] < accuracy["dirichlet"] < accuracy["most"] < 1
    assert document["cuts"]["dataset"] == [1.75, 2.5]
    printed = capsys.readouterr()
    assert "123 or 222" in printed.out
    assert "Left out: 1 of 301 pairs" in printed.err


def test_bad_input_is_one_sentence(tmp_path, capsys):
    arguments = ["--source", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "holds neither train.csv nor relevance.parquet" in capsys.readouterr().err
    table = {"query": ["a"], "product_id": [1], "title": ["b"], "relevance": [1.75]}
    pq.write_table(pa.table(table), tmp_path / "relevance.parquet")
    assert main(arguments) == 2
    assert "no relevance is the mean of three grades" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
