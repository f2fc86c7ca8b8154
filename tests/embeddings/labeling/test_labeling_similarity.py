"""The floor of all graders: a cosine, and cuts that scikit-learn fits."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from embeddings.labeling import Pairs
from embeddings.labeling.config import SimilarityConfig, write_grader_config
from embeddings.labeling.fine_tune import fine_tune
from embeddings.labeling.grades import grade_all
from embeddings.labeling.judgements import read_judgements
from embeddings.labeling.open_grader import open_grader
from embeddings.labeling.similarity import SimilarityGrader, cosines
from features.errors import BadInputError
from tests.tiny_bert import save_tiny_bert
from tests.tiny_labels import write_tiny_split


class Directions:
    """Encodes a text by the angle that it spells, in degrees."""

    fingerprint = "directions"
    dim = 2
    normalized = True
    reads_images = False

    def __init__(self):
        self.read = []

    def encode_queries(self, texts):
        self.read += texts
        angles = np.radians([float(text) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    def encode_products(self, titles, images=None):
        return self.encode_queries(titles)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a split of three judgements a pair, and an encoder."""
    folder = tmp_path_factory.mktemp("similarity")
    write_tiny_split(folder, raters=3, noise=0.2)
    save_tiny_bert(folder / "bert")
    write_grader_config(folder / "grader.toml", SimilarityConfig(model="bert"))
    return folder


@pytest.fixture(scope="module")
def fitted(given: Path) -> Path:
    """A grader whose cuts are fitted."""
    fine_tune(given / "split", given / "fitted", grader=given / "grader.toml")
    return given / "fitted"


def test_the_cosine_of_each_pair_reads_each_text_once():
    encoder = Directions()
    pairs = Pairs(queries=["0", "0", "90", "0"], titles=["60", "0", "60", "60"])
    np.testing.assert_allclose(cosines(encoder, pairs), [0.5, 1, np.sqrt(0.75), 0.5], atol=1e-6)
    assert sorted(encoder.read) == ["0", "0", "60", "90"]  # "0" as a query and as a title


def test_probabilities_are_the_softmax_of_lines():
    slope, intercept = np.array([0.0, 1.0, 2.0]), np.array([1.0, 0.0, 0.0])
    grader = SimilarityGrader(Directions(), slope, intercept, model="m")
    pairs = Pairs(queries=["0", "0"], titles=["90", "0"])  # cosines 0 and 1
    grades = grade_all(grader, pairs)
    powers = np.exp([[1.0, 0.0, 0.0], [1.0, 1.0, 2.0]])
    np.testing.assert_allclose(grades.probability, powers / powers.sum(1, keepdims=True), atol=1e-6)
    assert grades.label.tolist() == [0, 2]


def test_grades_come_in_chunks(monkeypatch):
    monkeypatch.setattr(SimilarityGrader, "chunk_pairs", 2)
    grader = SimilarityGrader(Directions(), np.arange(3.0), np.zeros(3), model="m")
    chunks = list(grader.grade(Pairs(queries=["0"] * 5, titles=["10"] * 5)))
    assert [chunk.position.tolist() for chunk in chunks] == [[0, 1], [2, 3], [4]]


def test_the_cuts_are_those_of_a_logistic_regression_on_every_judgement(given, fitted):
    from embeddings.text_encoder import TextEncoder

    training = read_judgements(given / "split", "fine_tuning")
    cosine = cosines(TextEncoder(given / "bert"), training.pairs)
    rows = [
        (cosine[pair], label) for pair, label in zip(training.pair, training.given, strict=True)
    ]
    x, y = np.array([[c] for c, _ in rows]), np.array([label for _, label in rows])
    oracle = LogisticRegression(C=1e6, max_iter=1000).fit(x, y)
    grades = grade_all(open_grader(fitted), training.pairs)
    np.testing.assert_allclose(grades.probability, oracle.predict_proba(cosine[:, None]), atol=1e-4)
    # As maximum likelihood has it, the mean probability of a label is its share.
    shares = np.bincount(y, minlength=3) / len(y)
    np.testing.assert_allclose(grades.probability[training.pair].mean(0), shares, atol=1e-3)


def test_the_folder_works_from_anywhere_and_has_its_figures(given, fitted, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    figures = json.loads((fitted / "metrics.json").read_text())
    validation = read_judgements(given / "split", "validation")
    grader = open_grader(fitted)
    label = grade_all(grader, validation.pairs).label
    assert figures["validation"]["accuracy"] == pytest.approx(np.mean(label == validation.label))
    assert figures["kind"] == "similarity"
    assert grader.prompt_version == ""
    assert grader.fingerprint != SimilarityGrader(Directions(), *np.ones((2, 3)), model="").model


def test_the_fingerprint_tells_cuts_apart():
    one, same, other = (
        SimilarityGrader(Directions(), np.array([0, 1, last]), np.zeros(3), model="m").fingerprint
        for last in (2.0, 2.0, 2.1)
    )
    assert one == same != other


def test_one_without_cuts_does_not_grade(given):
    with pytest.raises(BadInputError, match=r"cuts.json: no such file; .*`label-relevance fine"):
        open_grader(given / "grader.toml")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("nonsense", "not readable as cuts"),
        ('{"slope": [1, 2, 3]}', "not readable as cuts: 'intercept'"),
        ('{"slope": [1, 2], "intercept": [1, 2]}', "must hold 3 numbers"),
    ],
)
def test_cuts_that_are_none_are_refused(tmp_path, content, sentence):
    (tmp_path / "cuts.json").write_text(content)
    with pytest.raises(BadInputError, match=sentence):
        SimilarityGrader.open(SimilarityConfig(), tmp_path)


def test_an_encoder_that_is_not_there_is_refused(given, tmp_path):
    write_grader_config(tmp_path / "grader.toml", SimilarityConfig(model="none"))
    with pytest.raises(BadInputError, match="none: no such model folder"):
        fine_tune(given / "split", tmp_path / "out", grader=tmp_path / "grader.toml")


def test_a_part_without_one_of_the_labels_is_refused(given, tmp_path):
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    for part in ("fine_tuning", "validation"):
        table = pq.read_table(given / "split" / f"{part}.parquet")
        pq.write_table(table.filter(pc.field("label") > 0), tmp_path / f"{part}.parquet")
    with pytest.raises(BadInputError, match=r"fine_tuning.parquet: not every label is in it"):
        fine_tune(tmp_path, tmp_path / "out", grader=given / "grader.toml")
