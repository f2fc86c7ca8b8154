"""Splits, classifiers and scores of the product tasks, on vectors with a planted structure."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from experiments.product_task_plots import (
    cosine_limits,
    density_plot,
    sample_rows,
    separation,
    spread_labels,
    tsne_map,
    tsne_plot,
)
from experiments.product_task_probes import (
    AISLE_PROBE,
    RELEVANCE_PROBE,
    ProbeConfig,
    aisle_split,
    concatenated,
    fit_predict,
    low_support,
    majority,
    probe,
    relevance_split,
    scores,
    summary,
    with_product_and_cosine,
)


def planted(classes: int, each: int, *, dim: int = 12, seed: int = 0):
    """Return [classes * each, dim] unit vectors near one centre a class, and the classes."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    vectors = rng.normal(size=(classes, dim))[labels] + 0.3 * rng.normal(size=(len(labels), dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), labels


def graded_pairs(queries: int, each: int, *, dim: int = 8, seed: int = 0):
    """Return vectors of query and product and labels by their cosine alone, and the queries."""
    rng = np.random.default_rng(seed)
    query = np.repeat(np.arange(queries), each)
    label = rng.integers(0, 3, len(query))
    q = rng.normal(size=(queries, dim))[query]
    away = rng.normal(size=q.shape)
    away -= (away * q).sum(1, keepdims=True) / (q * q).sum(1, keepdims=True) * q
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (q, away)]
    cosine = np.array([-0.6, 0.1, 0.8])[label][:, None]
    product = cosine * unit[0] + np.sqrt(1 - cosine**2) * unit[1]
    return unit[0].astype(np.float32), product.astype(np.float32), label, query


def all_rows(split):
    return np.concatenate([split.train, split.validation, split.test])


@given(
    counts=st.lists(st.integers(5, 40), min_size=2, max_size=12),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=50)
def test_an_aisle_split_takes_a_fifth_of_each_aisle(counts, seed):
    classes = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    split = aisle_split(classes, seed)
    assert np.array_equal(np.sort(all_rows(split)), np.arange(len(classes)))
    tested = np.bincount(classes[split.test], minlength=len(counts))
    for of_class, total in zip(tested, counts, strict=True):
        assert total // 5 <= of_class <= -(-total // 5)
    training = len(split.train) + len(split.validation)
    assert training // 10 <= len(split.validation) <= -(-training // 10)


def test_another_seed_splits_otherwise_and_the_same_seed_alike():
    classes = np.repeat(np.arange(4), 25)
    first, again, other = (aisle_split(classes, seed).test for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert set(first) != set(other)


@given(seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_relevance_split_parts_queries_and_drops_half_of_ir_in_training_only(seed):
    rng = np.random.default_rng(seed)
    query = np.repeat(np.arange(50), rng.integers(1, 9, 50))
    label = rng.integers(0, 3, len(query))
    split = relevance_split(query, label, seed)
    parts = [set(query[rows]) for rows in (split.train, split.validation, split.test)]
    assert len(parts[2]) == 10
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]
    # All pairs of the test queries are there; of the others all but half of IR.
    in_test = np.isin(query, list(parts[2]))
    assert np.array_equal(np.sort(split.test), np.flatnonzero(in_test))
    kept = np.bincount(label[np.concatenate([split.train, split.validation])], minlength=3)
    there = np.bincount(label[~in_test], minlength=3)
    assert kept.tolist() == [there[0] - there[0] // 2, there[1], there[2]]


def test_scores_by_hand_and_by_scikit_learn():
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    predicted = np.array([0, 0, 0, 1, 1, 0, 1, 1])
    # F1 of 0: 2 * 3 / (6 + 1 + 1) = 3/4; of 1: 2 * 1 / (2 + 3 + 1) = 1/3; of 2: 0.
    f1, recall = scores(labels, predicted, 3)
    assert f1 == pytest.approx((3 / 4 + 1 / 3 + 0) / 3)
    assert recall.tolist() == [0.75, 0.5, 0.0]

    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 7, (2, 500))
    f1, _ = scores(labels, predicted, 7)
    assert f1 == pytest.approx(f1_score(labels, predicted, average="macro"))


def test_a_class_without_a_test_row_has_no_recall_and_no_part_in_f1():
    f1, recall = scores(np.array([0, 0, 2]), np.array([0, 0, 1]), 3)
    assert f1 == pytest.approx((1 + 0) / 2)
    assert np.isnan(recall[1])
    assert recall[[0, 2]].tolist() == [1.0, 0.0]


def test_the_aisle_probe_learns_planted_classes_and_not_shuffled_ones():
    vectors, labels = planted(4, 60)
    splits = [aisle_split(labels, seed) for seed in range(2)]
    learnt = probe(vectors, labels, splits, classes=4, config=AISLE_PROBE)
    assert learnt.macro_f1.min() > 0.97

    shuffled = np.random.default_rng(1).permutation(labels)
    splits = [aisle_split(shuffled, seed) for seed in range(2)]
    chance = probe(vectors, shuffled, splits, classes=4, config=AISLE_PROBE)
    assert chance.macro_f1.max() < 0.45
    # Always one of four even classes: its F1 is 2 / (2 + 3) and the others' 0.
    assert majority(shuffled, splits, classes=4).macro_f1 == pytest.approx([0.1, 0.1], abs=0.01)


def test_a_linear_probe_of_the_concatenation_cannot_see_the_cosine():
    query, product, label, of_query = graded_pairs(100, 8)
    splits = [relevance_split(of_query, label, seed) for seed in range(2)]
    f1 = {
        build.__name__: probe(
            build(query, product), label, splits, classes=3, config=RELEVANCE_PROBE
        ).macro_f1.mean()
        for build in (concatenated, with_product_and_cosine)
    }
    assert f1["concatenated"] < 0.5
    assert f1["with_product_and_cosine"] > 0.9


def test_a_probe_is_reproducible_and_leaves_the_random_state_alone():
    vectors, labels = planted(3, 20)
    split = aisle_split(labels, 0)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    config = ProbeConfig(hidden=8, epochs=2)
    predicted = [
        fit_predict(vectors, labels, split, classes=3, config=config, seed=3) for _ in range(2)
    ]
    assert torch.equal(state, torch.random.get_rng_state())
    assert np.array_equal(*predicted)
    assert predicted[0].shape == split.test.shape


def test_test_rows_change_nothing_but_their_own_prediction():
    vectors, labels = planted(3, 20)
    split = aisle_split(labels, 0)
    config = ProbeConfig(hidden=8, epochs=5)
    before = fit_predict(vectors, labels, split, classes=3, config=config, seed=0)
    moved, relabelled = vectors.copy(), labels.copy()
    moved[split.test[1:]] *= 100
    relabelled[split.test] = 0
    after = fit_predict(moved, relabelled, split, classes=3, config=config, seed=0)
    assert after[0] == before[0]


def test_constant_features_do_no_harm():
    vectors, labels = planted(2, 20)
    vectors = np.concatenate([vectors, np.zeros_like(vectors)], axis=1)
    splits = [aisle_split(labels, 0)]
    assert probe(vectors, labels, splits, classes=2, config=AISLE_PROBE).macro_f1[0] == 1


def test_features_of_pairs_by_hand():
    query = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    product = np.array([[4.0, 3.0], [1.0, 2.0]], np.float32)
    assert concatenated(query, product).tolist() == [[3, 4, 4, 3], [0, 0, 1, 2]]
    both = with_product_and_cosine(query, product)
    assert both[0].tolist() == pytest.approx([3, 4, 4, 3, 12, 12, 24 / 25])
    assert both[1].tolist() == [0, 0, 1, 2, 0, 0, 0]


def test_low_support_is_below_the_median_class():
    assert low_support(np.array([5, 9, 20, 7, 100])).tolist() == [True, False, False, True, False]
    assert not low_support(np.array([6, 6, 6])).any()


def test_summary_of_one_and_of_several_seeds():
    assert summary(np.array([0.5])) == {"mean": 0.5, "std": None, "values": [0.5]}
    several = summary(np.array([1.0, 2.0, 3.0]))
    assert (several["mean"], several["std"]) == (2.0, 1.0)


def test_separation_by_hand():
    cosine = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.05, 0.35, 0.6], np.float32)
    label = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])
    found = separation(cosine, label)
    assert found["median"] == {
        "IR": pytest.approx(0.1),
        "MR": pytest.approx(0.4),
        "HR": pytest.approx(0.35),
    }
    assert found["auc_hr_ir"] == pytest.approx(7 / 9)  # .05 beats one of three, the others all
    assert found["auc_mr_ir"] == 1
    assert found["auc_hr_mr"] == pytest.approx(4 / 9)


def test_overlap_is_one_for_equal_and_none_for_distant_densities():
    values = np.random.default_rng(0).normal(0, 0.1, 500)
    same = separation(np.concatenate([values, values]), np.repeat([0, 2], 500))
    assert same["overlap_hr_ir"] == pytest.approx(1, abs=1e-3)
    apart = separation(np.concatenate([values, values + 3]), np.repeat([0, 2], 500))
    assert apart["overlap_hr_ir"] == pytest.approx(0, abs=1e-3)
    assert apart["median"]["MR"] is None
    assert apart["auc_mr_ir"] is None


def test_a_density_plot_names_the_grades_that_it_draws():
    rng = np.random.default_rng(0)
    cosine, label = rng.normal(0.3, 0.1, 90), np.repeat([0, 2, 2], 30)
    svg = density_plot(cosine, label, cosine_limits({"a": cosine}))
    assert svg.startswith("<svg")
    assert "IR, median" in svg
    assert "HR, median" in svg
    assert "MR, median" not in svg
    assert svg == density_plot(cosine, label, cosine_limits({"a": cosine}))
    assert "median" not in density_plot(np.full(9, 0.5), np.repeat([0, 1, 2], 3), (0.0, 1.0))


def test_a_map_names_the_most_frequent_aisles():
    vectors, labels = planted(20, 5)
    keep = (labels < 16) | (np.arange(len(labels)) % 5 < 2)  # the last four are small
    names = [f"aisle {letter}" for letter in "abcdefghijklmnopqrst"]
    points = tsne_map(vectors[keep])
    assert points.shape == (keep.sum(), 2)
    svg = tsne_plot(points, labels[keep], names)
    assert [name in svg for name in names] == [True] * 16 + [False] * 4
    assert svg.count("data:image/png;base64,") >= 1  # the points


def test_a_sample_is_sorted_and_without_repeats():
    rows = sample_rows(100, 10)
    assert len(rows) == 10
    assert (np.diff(rows) > 0).all()
    assert sample_rows(3, 10).tolist() == [0, 1, 2]


@given(st.lists(st.tuples(st.floats(0, 300), st.floats(0, 300)), min_size=2, max_size=12))
@settings(deadline=None, max_examples=50)
def test_labels_end_apart_and_in_the_frame(places):
    centres = np.array(places)
    sizes = np.tile([60.0, 10.0], (len(places), 1))
    spots = spread_labels(centres, sizes, np.array([300.0, 300.0]))
    assert (spots >= sizes / 2 - 1e-6).all()
    assert (spots <= 300 - sizes / 2 + 1e-6).all()
    for i in range(len(spots)):
        for j in range(i):
            assert (np.abs(spots[i] - spots[j]) >= sizes[0] - 0.01).any()


def test_labels_that_do_not_overlap_stay():
    centres = np.array([[50.0, 50.0], [50.0, 100.0]])
    spots = spread_labels(centres, np.full((2, 2), 20.0), np.array([200.0, 200.0]))
    assert np.array_equal(spots, centres)
