from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.labeling.agreement import label_counts
from embeddings.labeling.grades import Grades, Pairs, grade_all
from embeddings.labeling.judgements import SCHEMA, judgements, read_judgements
from features.errors import BadInputError

ROWS = [
    ("milk", 2, "Whole milk", 2),
    ("bread", 1, "Bread", 0),
    ("milk", 1, "Bread", 0),
    ("milk", 2, "Whole milk", 1),
    ("bread", 1, "Bread", 0),
    ("bread", 1, "Bread", 1),
]


def table(rows):
    names = SCHEMA.names
    return pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))).cast(SCHEMA)


def test_judgements_are_gathered_by_pair():
    found = judgements(Path("part.parquet"), table(ROWS))
    assert found.pairs.queries == ["bread", "milk", "milk"]
    assert found.product_id.tolist() == [1, 1, 2]
    assert found.pairs.titles == ["Bread", "Bread", "Whole milk"]
    assert found.pair.tolist() == [0, 0, 0, 1, 2, 2]
    # (0 + 0 + 1) / 3 is 0; (2 + 1) / 2 = 1.5 goes up to 2.
    assert found.label.tolist() == [0, 0, 2]
    assert label_counts(found).tolist() == [[2, 1, 0], [1, 0, 0], [0, 1, 1]]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 2), st.integers(0, 2)), min_size=1))
def test_no_judgement_is_lost(rows):
    rows = [(query, product, f"title {product}", label) for query, product, label in rows]
    found = judgements(Path("part.parquet"), table(rows))
    again = [
        (found.pairs.queries[p], found.product_id[p], found.pairs.titles[p], label)
        for p, label in zip(found.pair, found.given, strict=True)
    ]
    assert sorted(again) == sorted(rows)
    assert len(found) == len({row[:2] for row in rows})
    for pair, label in enumerate(found.label):
        mean = found.given[found.pair == pair].mean()
        assert label == int(mean + 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda full: full.slice(0, 0), "the table is empty"),
        (lambda full: full.drop_columns(["title"]), "column 'title' is missing"),
        (
            lambda full: full.set_column(3, "label", pa.array([3] * len(full), pa.int8())),
            "column 'label': 3 is none of 0, 1 and 2",
        ),
    ],
)
def test_a_bad_part_is_one_sentence(tmp_path, make, message):
    path = tmp_path / "evaluation.parquet"
    pq.write_table(make(table(ROWS)), path)
    with pytest.raises(BadInputError, match=message) as error:
        read_judgements(tmp_path, "evaluation")
    assert str(path) in str(error.value)
    with pytest.raises(BadInputError, match=r"`label-relevance split` writes it"):
        read_judgements(tmp_path, "validation")


class Backwards:
    """Grades the last pair first, by the length of its title, and leaves one of a chunk out."""

    model = fingerprint = "backwards"
    prompt_version = ""
    chunk_pairs = 3

    def grade(self, pairs):
        for position in reversed(range(1, len(pairs))):
            label = len(pairs.titles[position]) % 3
            yield Grades(
                position=np.array([position]),
                label=np.array([label], np.int8),
                probability=np.eye(3, dtype=np.float32)[[label]],
            )


def test_grades_come_in_the_order_of_the_pairs():
    titles = ["", "a", "bb", "", "a", "bb", "", "a"]
    told = []
    pairs = Pairs(queries=["q"] * 8, titles=titles)
    found = grade_all(Backwards(), pairs, on_graded=told.append)
    assert found.position.tolist() == list(range(8))
    assert found.label.tolist() == [-1, 1, 2, -1, 1, 2, -1, 1]
    assert np.isnan(found.probability[[0, 3, 6]]).all()
    assert found.probability[1].tolist() == [0, 1, 0]
    assert sum(told) == 5
