from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from embeddings.labeling.agreement import against_the_others, rater_agreement
from embeddings.labeling.judgements import SCHEMA, judgements

RATINGS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=12)


def judged(ratings):
    """Return the judgements of one pair each for a list of lists of labels."""
    rows = [
        (f"query {pair:03d}", pair, "title", label)
        for pair, labels in enumerate(ratings)
        for label in labels
    ]
    names = SCHEMA.names
    table = pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
    return judgements(Path("part.parquet"), table.cast(SCHEMA))


def test_agreement_by_hand():
    # All agree on the first pair, none on the second: mean 0.5. Chance: 16/36 + 1/36 + 1/36 = 0.5.
    found = rater_agreement(judged([[0, 0, 0], [0, 1, 2]]))
    assert (found.pairs, found.judgements) == (2, 6)
    assert found.agreement == pytest.approx(0.5)
    assert found.fleiss_kappa == pytest.approx(0)


def test_full_agreement_is_1_and_one_label_alone_says_nothing():
    found = rater_agreement(judged([[0, 0], [2, 2, 2], [1, 1]]))
    assert (found.agreement, found.fleiss_kappa) == (1, 1)
    assert (found.quadratic_kappa, found.krippendorff_alpha) == (1, 1)
    found = rater_agreement(judged([[1, 1], [1, 1]]))
    assert found.agreement == 1
    assert np.isnan([found.fleiss_kappa, found.quadratic_kappa, found.krippendorff_alpha]).all()


def test_pairs_with_one_judgement_do_not_count():
    assert rater_agreement(judged([[0], [2], [1]])) is None
    assert rater_agreement(judged([[0], [2, 1], [1, 1]])) == rater_agreement(
        judged([[2, 1], [1, 1]])
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=20))
def test_two_raters_give_cohens_kappa_of_both_orders(ratings):
    first, second = zip(*(ratings + [(b, a) for a, b in ratings]), strict=True)
    assume(len(set(first)) > 1)
    found = rater_agreement(judged([list(pair) for pair in ratings]))
    expected = cohen_kappa_score(first, second, weights="quadratic")
    assert found.quadratic_kappa == pytest.approx(expected, abs=1e-9)
    assert found.fleiss_kappa == pytest.approx(cohen_kappa_score(first, second), abs=1e-9)
    assert found.agreement == pytest.approx(np.mean([a == b for a, b in ratings]))


@settings(max_examples=30, deadline=None)
@given(RATINGS)
def test_alpha_and_agreement_are_those_of_plain_loops(ratings):
    several = [labels for labels in ratings if len(labels) > 1]
    everything = [label for labels in several for label in labels]
    assume(len(set(everything)) > 1)
    found = rater_agreement(judged(ratings))
    observed = sum(
        (a - b) ** 2 / (len(labels) - 1) for labels in several for a, b in permutations(labels, 2)
    ) / len(everything)
    expected = np.mean([(a - b) ** 2 for a, b in permutations(everything, 2)])
    assert found.krippendorff_alpha == pytest.approx(1 - observed / expected)
    same = [np.mean([a == b for a, b in combinations(labels, 2)]) for labels in several]
    assert found.agreement == pytest.approx(np.mean(same))


@settings(max_examples=30, deadline=None)
@given(RATINGS, st.randoms(use_true_random=False))
def test_the_order_of_judgements_does_not_matter(ratings, random):
    shuffled = [random.sample(labels, len(labels)) for labels in ratings]
    random.shuffle(shuffled)
    one, other = rater_agreement(judged(ratings)), rater_agreement(judged(shuffled))
    if one is None:
        assert other is None
        return
    for name in ("agreement", "fleiss_kappa", "quadratic_kappa", "krippendorff_alpha"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), nan_ok=True)


def test_each_judgement_stands_beside_the_mean_of_the_others():
    others, own, pair = against_the_others(judged([[0, 1, 2], [1], [2, 1]]))
    # (1 + 2) / 2 = 1.5 is 2, (0 + 2) / 2 is 1, (0 + 1) / 2 = 0.5 is 1: halves go up.
    assert list(zip(pair, own, others, strict=True)) == [
        (0, 0, 2),
        (0, 1, 1),
        (0, 2, 1),
        (2, 2, 1),
        (2, 1, 2),
    ]
