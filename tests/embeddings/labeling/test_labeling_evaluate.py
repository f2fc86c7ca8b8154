import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from embeddings.labeling.agreement import rater_agreement
from embeddings.labeling.cli import main
from embeddings.labeling.evaluate import EVALUATION, PAGE, evaluate_graders
from embeddings.labeling.evaluation_page import FLOOR, HUMANS, page
from embeddings.labeling.grades import Grades
from embeddings.labeling.judgements import read_judgements
from embeddings.labeling.stored_grades import StoredGrades
from features.errors import BadInputError
from tests.tiny_labels import write_tiny_split


class Words:
    """Grades by how many words of the query the title has; knows nothing else.

    Args:
        shift: added to the label, so that another shift is another, worse grader.
        silent: leaves every fifth pair of a chunk without a grade.
        stops_after: chunks after which it cannot go on.
    """

    prompt_version = "words-1"
    chunk_pairs = 4

    def __init__(self, *, shift=0, silent=False, stops_after=None):
        self.model = f"words-{shift}"
        self.fingerprint = f"{self.model}-{silent}"
        self.asked = []
        self._shift, self._silent, self._stops_after = shift, silent, stops_after

    def grade(self, pairs):
        if self._stops_after is not None and len(self.asked) >= 4 * self._stops_after:
            raise BadInputError("the grader cannot go on")
        self.asked += list(zip(pairs.queries, pairs.titles, strict=True))
        label = np.array([self._label(*pair) for pair in self.asked[-len(pairs) :]], np.int8)
        label = np.clip(label + self._shift, 0, 2).astype(np.int8)
        if self._silent:
            label[::5] = -1
        probability = np.full((len(pairs), 3), 0.1, np.float32)
        probability[np.arange(len(pairs)), np.maximum(label, 0)] = 0.8
        backwards = np.arange(len(pairs))[::-1]
        for position in np.array_split(backwards, 2):
            yield Grades(
                position=position, label=label[position], probability=probability[position]
            )

    def _label(self, query, title):
        words, found = query.split(), title.lower().split()
        return round(2 * sum(word in found for word in words) / len(words))


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return write_tiny_split(tmp_path_factory.mktemp("labels"), raters=3, noise=0.1)


def judge(split, output, **graders):
    return evaluate_graders(
        {name: (lambda grader=grader: grader) for name, grader in graders.items()}, split, output
    )


def test_figures_of_a_grader(split, tmp_path):
    grader = Words()
    content = judge(split, tmp_path, words=grader)
    truth = read_judgements(split, "evaluation")
    label = np.array(
        [grader._label(*pair) for pair in zip(truth.pairs.queries, truth.pairs.titles, strict=True)]
    )
    found = content["graders"]["words"]["evaluation"]
    assert found["accuracy"] == pytest.approx((label == truth.label).mean())
    assert found["pairs"] == len(truth) == content["evaluation_pairs"]
    right = (label == truth.label).mean()
    assert found["calibration"]["expected_calibration_error"] == pytest.approx(abs(right - 0.8))
    assert found["pairs_per_second"] > 0
    assert content["graders"]["words"]["model"] == "words-0"
    assert json.loads((tmp_path / EVALUATION).read_text()) == content


def test_floor_and_humans_stand_beside_it(split, tmp_path):
    content = judge(split, tmp_path, words=Words())
    truth, tuning = (read_judgements(split, part) for part in ("evaluation", "fine_tuning"))
    most = np.bincount(tuning.label).argmax()
    assert content["floor"]["accuracy"] == pytest.approx((truth.label == most).mean())
    assert content["floor"]["quadratic_kappa"] == 0
    shares = np.bincount(tuning.label) / len(tuning)
    expected = -np.log(shares[truth.label]).mean()
    assert content["floor"]["calibration"]["log_loss"] == pytest.approx(expected)
    agreed = rater_agreement(truth)
    assert content["humans"]["agreement"]["fleiss_kappa"] == pytest.approx(agreed.fleiss_kappa)
    assert content["humans"]["evaluation"]["pairs"] == len(truth.given)
    assert content["humans"]["evaluation"]["accuracy"] > content["floor"]["accuracy"]


def test_the_best_is_chosen_on_the_validation_part(split, tmp_path):
    content = judge(split, tmp_path, worse=Words(shift=1), better=Words(), mute=Words(silent=True))
    validation = {
        name: found["validation"]["quadratic_kappa"] for name, found in content["graders"].items()
    }
    assert content["best"] == max(validation, key=validation.get) == "better"
    assert set(content["differences"]) == {"worse", "mute", FLOOR}
    graders = {name: found["evaluation"] for name, found in content["graders"].items()}
    for name in ("worse", "mute"):
        lead = content["differences"][name]["accuracy"]
        expected = graders["better"]["accuracy"] - graders[name]["accuracy"]
        assert lead["difference"] == pytest.approx(expected)
    assert graders["mute"]["ungraded"] == 4  # of 15 in chunks of 4, 4, 4 and 3


def test_a_grader_is_not_asked_again(split, tmp_path):
    first = judge(split, tmp_path, words=Words())
    again = Words()
    content = judge(split, tmp_path, words=again)
    assert again.asked == []
    assert content == first
    other = Words(shift=1)
    judge(split, tmp_path, words=other)
    assert (
        len(other.asked)
        == first["evaluation_pairs"] + first["graders"]["words"]["validation"]["pairs"]
    )


def test_a_stopped_run_goes_on_where_it_was(split, tmp_path):
    stopped = Words(stops_after=2)
    with pytest.raises(BadInputError, match="cannot go on"):
        judge(split, tmp_path / "out", words=stopped)
    assert not (tmp_path / "out" / EVALUATION).exists()
    rest = Words()
    content = judge(split, tmp_path / "out", words=rest)
    whole = Words()
    uninterrupted = judge(split, tmp_path / "whole", words=whole)
    assert len(stopped.asked) == 8
    assert stopped.asked + rest.asked == whole.asked
    for part in ("validation", "evaluation"):
        for one in (content, uninterrupted):
            one["graders"]["words"][part].pop("pairs_per_second")
    assert content == uninterrupted


def test_grades_are_saved_with_their_pairs(split, tmp_path):
    truth = read_judgements(split, "evaluation")
    stored = StoredGrades(tmp_path, "evaluation", Words(silent=True), truth.pairs)
    told = []
    stored.complete(told.append)
    assert sum(told) == len(stored) == len(truth)
    table = pq.read_table(stored.folder).sort_by("position").to_pydict()
    assert table["query"] == truth.pairs.queries
    assert table["title"] == truth.pairs.titles
    assert table["label"] == stored.grades.label.tolist()
    assert -1 in table["label"]
    found = StoredGrades(tmp_path, "evaluation", Words(silent=True), truth.pairs)
    assert (found.folder, len(found)) == (stored.folder, len(stored))
    np.testing.assert_array_equal(found.grades.probability, stored.grades.probability)
    assert found.seconds == pytest.approx(stored.seconds)
    other = StoredGrades(tmp_path, "evaluation", Words(shift=1), truth.pairs)
    assert (other.folder != stored.folder, len(other)) == (True, 0)


def test_without_several_raters_nothing_is_said_of_people(tmp_path):
    split = write_tiny_split(tmp_path)
    content = judge(split, tmp_path / "out", words=Words())
    assert content["humans"] is None
    shown = page(content)
    assert "How far people agree is unknown" in shown
    assert HUMANS not in shown


def test_the_page_shows_the_figures(split, tmp_path):
    content = judge(split, tmp_path, words=Words(), **{"<mute>": Words(silent=True)})
    shown = page(content)
    for name in ("words", "<mute>"):
        assert f"{content['graders'][name]['evaluation']['kappa']:.3f}" in shown
    assert "over &lt;mute&gt;" in shown
    assert "<mute>" not in shown
    assert shown.count("<svg") == 2
    assert HUMANS in shown
    assert content["split_fingerprint"] in shown


def test_the_command_names_the_best(split, tmp_path, capsys):
    (tmp_path / "cosine.toml").write_text('kind = "similarity"\n')
    arguments = ["--split", str(split), "--output"]
    grader = str(tmp_path / "cosine")
    assert main(["fine-tune", *arguments, grader, "--grader", f"{grader}.toml"]) == 0
    capsys.readouterr()
    assert main(["evaluate", *arguments, str(tmp_path / "out"), "--graders", grader]) == 0
    printed = capsys.readouterr()
    content = json.loads((tmp_path / "out" / EVALUATION).read_text())
    assert content["best"] == "cosine"
    assert "Best: cosine, by quadratic kappa" in (tmp_path / "out" / PAGE).read_text()
    assert f"{content['graders']['cosine']['evaluation']['quadratic_kappa']:.3f}" in printed.out
    assert HUMANS in printed.out
    assert "best: cosine, by quadratic kappa on the validation part" in printed.err


@pytest.mark.parametrize(
    ("graders", "message"),
    [
        (["a/g.toml", "b/g.toml"], "have one name, 'g'"),
        (["a/g.toml", "none.toml"], "no such file; it says which grader it is"),
        (["a/unknown.toml"], "kind 'cosine'"),
    ],
)
def test_bad_graders_are_one_sentence(split, tmp_path, capsys, graders, message):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "g.toml").write_text('kind = "similarity"\n')
    (tmp_path / "a" / "unknown.toml").write_text('kind = "cosine"\n')
    paths = [str(tmp_path / path) for path in graders]
    arguments = ["evaluate", "--split", str(split), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--graders", *paths]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("label-relevance: ")
    assert not (tmp_path / "out").exists()
