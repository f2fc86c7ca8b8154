"""Fine-tuning of the cross-encoder: what is learnt, kept, calibrated, and carried on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score

from embeddings.labeling import cli, cross_encoder_training, tuning
from embeddings.labeling.config import CrossEncoderConfig, read_grader_config, write_grader_config
from embeddings.labeling.cross_encoder_training import FineTuning, fit_temperature
from embeddings.labeling.fine_tune import fine_tune
from embeddings.labeling.fine_tuned_folder import agreement
from embeddings.labeling.grades import grade_all
from embeddings.labeling.judgements import read_judgements
from embeddings.labeling.open_grader import open_grader
from embeddings.labeling.tuning import targets
from features.errors import BadInputError
from tests.tiny_bert import POSITIONS, save_tiny_bert
from tests.tiny_labels import write_tiny_split

WEIGHTS = ("model/model.safetensors", "model/head.safetensors")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a split, an encoder, and ``grader.toml`` to start from."""
    folder = tmp_path_factory.mktemp("fine-tune")
    write_tiny_split(folder, raters=2, noise=0.1)
    save_tiny_bert(folder / "bert")
    write_grader_config(folder / "grader.toml", config())
    return folder


@pytest.fixture(scope="module")
def tuned(given: Path) -> Path:
    """A fine-tuned grader."""
    fine_tune(given / "split", given / "tuned", grader=given / "grader.toml")
    return given / "tuned"


def config(**changes):
    plain = {
        "model": "bert",
        "max_tokens": POSITIONS,
        "epochs": 3,
        "batch": 8,
        "learning_rate": 0.01,
        "threads": 1,
    }
    return CrossEncoderConfig(**plain | changes)


def start(folder: Path, given: Path, **changes) -> Path:
    """Write a configuration beside the encoder of ``given``."""
    path = given / f"{folder.name}.toml"
    write_grader_config(path, config(**changes))
    return path


def test_the_pairs_are_learnt(given, tmp_path):
    grader = start(tmp_path, given, epochs=40, frozen_layers=0.0, learning_rate=2e-3)
    figures = fine_tune(given / "split", tmp_path / "out", grader=grader)
    training = read_judgements(given / "split", "fine_tuning")
    entropy = -np.log(np.bincount(training.given, minlength=3) / len(training.given)).mean()
    assert figures["losses"][0][1] > 0.8 * entropy
    assert figures["losses"][-1][1] < 0.5 * entropy


def test_the_epoch_with_the_lowest_validation_loss_is_kept(tuned, given):
    figures = json.loads((tuned / "metrics.json").read_text())
    losses = [entry["loss"] for entry in figures["evaluations"]]
    assert len(losses) == 4
    assert figures["best"] == 1 + int(np.argmin(losses[1:]))
    validation = read_judgements(given / "split", "validation")
    probability = grade_all(open_grader(tuned), validation.pairs).probability.astype(float)
    powers = probability ** figures["temperature"]  # undo the calibration
    plain = powers / powers.sum(1, keepdims=True)
    loss = -(targets(validation) * np.log(plain)).sum(1).mean()
    np.testing.assert_allclose(loss, min(losses[1:]), rtol=1e-4)


def test_the_figures_are_those_of_scikit_learn(tuned, given):
    found = json.loads((tuned / "metrics.json").read_text())["validation"]
    validation = read_judgements(given / "split", "validation")
    label = grade_all(open_grader(tuned), validation.pairs).label
    expected = {
        "accuracy": accuracy_score(validation.label, label),
        "macro_f1": f1_score(
            validation.label, label, average="macro", labels=[0, 1, 2], zero_division=0
        ),
        "kappa": cohen_kappa_score(validation.label, label),
        "quadratic_kappa": cohen_kappa_score(validation.label, label, weights="quadratic"),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["pairs"] == len(validation)
    assert found["ungraded"] == 0


def test_kappa_is_0_where_chance_agrees_fully():
    alike = np.ones(4, np.int8)
    assert agreement(alike, alike)["kappa"] == 0


def test_several_humans_make_shares(given):
    judged = read_judgements(given / "split", "fine_tuning")
    shares = targets(judged)
    assert set(np.unique(shares).tolist()) == {0.0, 0.5, 1.0}
    for pair in (0, 7, len(judged) - 1):
        said = judged.given[judged.pair == pair]
        np.testing.assert_array_equal(shares[pair], np.bincount(said, minlength=3) / 2)


def test_the_temperature_undoes_what_made_logits_too_sure():
    logits = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    shares = torch.softmax(torch.from_numpy(logits), dim=1).numpy()
    assert fit_temperature(logits * 3, shares) == pytest.approx(3, rel=1e-3)
    assert fit_temperature(logits / 4, shares) == pytest.approx(0.25, rel=1e-3)


def test_lower_layers_and_word_vectors_stay(tuned, given):
    before = load_file(given / "bert" / "model.safetensors")
    after = load_file(tuned / WEIGHTS[0])
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert {name.split(".")[2] for name in changed} == {"2", "3"}


def test_an_epoch_has_each_pair_once_at_most_in_whole_batches(given):
    judged = read_judgements(given / "split", "fine_tuning")

    class Tokens:
        def tokenize(self, queries, titles):
            return [[0] * (1 + i % 7) for i in range(len(queries))], np.ones(len(queries), int)

    stage = FineTuning(Tokens(), config(), judged, judged)
    first, again, other = (list(stage.batches(epoch, 8)) for epoch in (0, 0, 1))
    rows = np.concatenate([batch[0] for batch in first])
    assert {len(batch[0]) for batch in first} == {8}
    assert len(rows) == len(judged) // 8 * 8 == len(set(rows.tolist()))
    np.testing.assert_array_equal(rows, np.concatenate([batch[0] for batch in again]))
    assert rows.tolist() != np.concatenate([batch[0] for batch in other]).tolist()
    lengths = [np.ptp(1 + batch[0] % 7) for batch in first]
    assert max(lengths) < 6  # pairs of like length are together


@pytest.mark.parametrize("step", [1, 5, 11])
def test_a_stopped_run_ends_as_if_it_had_not_been(given, tuned, tmp_path, monkeypatch, step):
    monkeypatch.setattr(tuning, "_CHECKPOINT_SECONDS", 0.0)
    steps = 0

    def stop(stage):
        nonlocal steps
        steps += 1
        if steps == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FineTuning, "after_step", stop)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(given / "split", tmp_path / "out", grader=given / "grader.toml")
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert not (tmp_path / "out" / "grader.toml").exists()
    fine_tune(given / "split", tmp_path / "out", grader=given / "grader.toml")
    for name in WEIGHTS:
        assert (tmp_path / "out" / name).read_bytes() == (tuned / name).read_bytes()


def test_a_run_stopped_before_its_last_file_is_finished(given, tuned, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cross_encoder_training, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(given / "split", tmp_path / "out", grader=given / "grader.toml")
    assert (tmp_path / "out" / "checkpoint").is_dir()
    fine_tune(given / "split", tmp_path / "out", grader=given / "grader.toml")
    assert (tmp_path / "out" / WEIGHTS[0]).read_bytes() == (tuned / WEIGHTS[0]).read_bytes()
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_the_evaluation_part_is_not_read(given, tuned, tmp_path):
    split = tmp_path / "split"
    split.mkdir()
    for part in ("fine_tuning", "validation"):
        name = f"{part}.parquet"
        (split / name).write_bytes((given / "split" / name).read_bytes())
    fine_tune(split, tmp_path / "out", grader=given / "grader.toml")
    assert (tmp_path / "out" / WEIGHTS[1]).read_bytes() == (tuned / WEIGHTS[1]).read_bytes()


def test_a_fine_tuned_grader_goes_on_from_its_head(given, tuned, tmp_path):
    again = fine_tune(given / "split", tmp_path / "out", grader=tuned)
    before = json.loads((tuned / "metrics.json").read_text())
    kept = before["evaluations"][before["best"]]["loss"]
    assert again["evaluations"][0]["loss"] == pytest.approx(kept, rel=1e-5)
    assert read_grader_config(tmp_path / "out") == config(model="model")


def test_a_finished_run_is_not_repeated(given, tuned, capsys):
    before = (tuned / "metrics.json").stat().st_mtime_ns
    figures = fine_tune(given / "split", tuned, grader=given / "grader.toml")
    assert figures == json.loads((tuned / "metrics.json").read_text())
    assert (tuned / "metrics.json").stat().st_mtime_ns == before
    assert "is fine-tuned already" in capsys.readouterr().err


def test_another_run_in_the_folder_is_refused(given, tuned, tmp_path):
    grader = start(tmp_path, given, seed=1)
    with pytest.raises(BadInputError, match=r"holds another run \(its configuration differs\)"):
        fine_tune(given / "split", tuned, grader=grader)
    other = write_tiny_split(tmp_path, seed=5)
    with pytest.raises(BadInputError, match=r"holds another run \(its data differs\)"):
        fine_tune(other, tuned, grader=given / "grader.toml")


def test_a_folder_or_file_of_something_else_is_left_alone(given, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    with pytest.raises(BadInputError, match="mine: exists and is no run"):
        fine_tune(given / "split", tmp_path / "mine", grader=given / "grader.toml")
    with pytest.raises(BadInputError, match="notes: is a file"):
        fine_tune(given / "split", tmp_path / "mine" / "notes", grader=given / "grader.toml")
    assert (tmp_path / "mine" / "notes").read_text() == "keep"


def test_a_loss_that_is_no_number_ends_the_run(given, tmp_path):
    grader = start(tmp_path, given, learning_rate=1e30)
    with pytest.raises(BadInputError, match=r"loss became .*: lower the learning rate"):
        fine_tune(given / "split", tmp_path / "out", grader=grader)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"epochs": 0}, "'epochs' must be 1 or more, got 0"),
        ({"frozen_layers": 1.5}, "'frozen_layers' must be 1 or less, got 1.5"),
        ({"warmup": 2.0}, "'warmup' must be 1 or less, got 2.0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, sentence):
    with pytest.raises(BadInputError, match=sentence):
        config(**changes)


def test_the_command_shows_the_figures(given, tuned, capsys):
    arguments = ["fine-tune", "--split", str(given / "split"), "--output", str(tuned)]
    assert cli.main([*arguments, "--grader", str(given / "grader.toml")]) == 0
    shown = capsys.readouterr().out
    assert "validation: macro f1" in shown
    assert "training pairs per second" in shown


def test_the_command_says_what_is_missing(given, tmp_path, capsys):
    arguments = ["fine-tune", "--output", str(tmp_path / "out"), "--split", str(tmp_path)]
    assert cli.main(arguments) == 2
    assert "fine_tuning.parquet: no such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    arguments[-1] = str(given / "split")
    assert cli.main([*arguments, "--grader", str(tmp_path / "none.toml")]) == 2
    assert "none.toml: no such file" in capsys.readouterr().err
