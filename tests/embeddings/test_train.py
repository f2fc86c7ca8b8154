"""``train-dashclip`` from a dataset folder to a saved model, and every way it may be stopped."""

import json
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_dashclip import tiny_blip, tiny_catalog, tiny_dashclip, tiny_labels
from torch.utils.checkpoint import checkpoint

from embeddings.alignment import Alignment
from embeddings.catalog import read_catalog
from embeddings.config import (
    AlignmentConfig,
    CroppingConfig,
    DashClipTraining,
    PretrainingConfig,
    StartConfig,
)
from embeddings.open_encoder import open_encoder
from embeddings.relevance import query_hashes, read_relevance, split_queries, unseen
from embeddings.train import train_dashclip
from embeddings.train_cli import main
from features.config_file import to_toml
from features.errors import BadInputError
from features.monitor import Monitor

PRODUCTS = 30
NO_IMAGE, NO_TITLE = (1, 7), (2, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def start(folder):
    return tiny_dashclip(folder / "start", dropout=0.1)


@pytest.fixture(scope="module")
def data(folder):
    return tiny_catalog(
        folder / "data", products=PRODUCTS, without_image=NO_IMAGE, without_title=NO_TITLE
    )


@pytest.fixture(scope="module")
def configure(start):
    """Returns a configuration of few steps: 2 epochs of 2 and 2 of 4."""

    def configuration(pretraining=None, alignment=None, **changes):
        plain = {
            "start": StartConfig(checkpoint=str(start)),
            "pretraining": PretrainingConfig(
                **{"epochs": 2, "batch": 8, "queue": 16, "held_out": 0.2} | (pretraining or {})
            ),
            "alignment": AlignmentConfig(
                **{"epochs": 2, "batch": 16, "mined_products": 0} | (alignment or {})
            ),
            "precision": "float32",
            "threads": 1,
            "checkpoint_seconds": 0.0,
        }
        return DashClipTraining(**plain | changes)

    return configuration


@pytest.fixture(scope="module")
def trained(folder, data, configure):
    """A model and its figures; read only."""
    figures = train_dashclip(data, folder / "trained", config=configure(), command="train-dashclip")
    return folder / "trained", figures


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.equal(other[name]), name


def without_seconds(folder):
    figures = json.loads((folder / "training.json").read_text())
    del figures["peak_rss_mb"], figures["command"]
    for stage in figures["stages"]:
        del stage["seconds"], stage["pairs_per_second"]
    return figures


# --- a whole run


def test_what_a_run_leaves_behind(trained):
    folder, figures = trained
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("training_queries.parquet", "start", "training.json", "training.toml", "run.json"),
        *("checkpoint", "tensorboard"),
    }
    assert json.loads((folder / "training.json").read_text()) == json.loads(json.dumps(figures))
    assert (figures["products"], figures["products_with_image"]) == (30, 28)
    assert (figures["processes"], figures["broken_images"]) == (1, 0)
    first, second = figures["stages"]
    assert [first["name"], second["name"]] == ["stage 1", "stage 2"]
    assert first["examples_an_epoch"] < 27  # one in five titles is held out
    assert first["examples"] == 2 * (first["examples_an_epoch"] // 8 * 8)
    assert len(first["evaluations"]) == 3
    assert first["best"] in (1, 2)
    assert second["examples"] == 2 * (second["examples_an_epoch"] // 16 * 16)
    for stage in figures["stages"]:
        assert stage["losses"][-1][0] == stage["examples"]
    assert sorted(path.name for path in (folder / "tensorboard").iterdir()) == [
        *("stage-1", "stage-2")
    ]


def test_the_model_loads_with_one_call_and_differs_from_its_start(trained):
    folder, _ = trained
    trained_model, start = open_encoder(folder), open_encoder(folder / "start")
    assert trained_model.reads_images
    queries = trained_model.encode_queries(["red shirt", "bag"])
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, rtol=1e-5)
    assert np.abs(queries - start.encode_queries(["red shirt", "bag"])).max() > 1e-3


def test_frozen_weights_stay_bit_for_bit_and_the_others_move(trained):
    folder, _ = trained
    before, after = weights(folder / "start"), weights(folder)
    moved = {name for name in before if not after[name].equal(before[name])}
    frozen = (
        *("text_encoder.embeddings", "text_encoder.encoder.layer.0.", "query_encoder.embeddings"),
        *("text_encoder.encoder.layer.1.", "query_encoder.encoder.layer.1."),
        *("query_encoder.encoder.layer.0.", "vision_model.embeddings"),
        "vision_model.encoder.layers.0.",
    )
    assert moved == {name for name in before if not name.startswith(frozen)}


def test_the_training_queries_are_noted_and_the_others_are_unseen(trained, data):
    folder, figures = trained
    relevance = read_relevance(data, read_catalog(data))
    training, held_out = split_queries(relevance, held_out=0.2)
    noted = pq.read_table(folder / "training_queries.parquet")["hash"].to_pylist()
    assert noted == sorted(query_hashes(training.judged_queries()).tolist())
    assert unseen(relevance, folder).judged_queries() == held_out.judged_queries()
    assert figures["training_queries"] == len(noted)
    assert 0.05 < len(held_out.judged_queries()) / len(relevance.queries) < 0.4


def test_checkpointed_gradients_give_the_same_weights(
    trained, data, configure, tmp_path, monkeypatch
):
    calls = []

    def counted(*arguments, **options):
        calls.append(options)
        return checkpoint(*arguments, **options)

    monkeypatch.setattr("embeddings.train.checkpoint", counted)
    train_dashclip(data, tmp_path / "model", config=configure(gradient_checkpointing=True))
    assert calls[0] == {"use_reentrant": False}
    assert len(calls) > 50
    assert_same_weights(tmp_path / "model", trained[0])


def test_computing_frozen_layers_each_time_gives_nearly_the_same(
    trained, data, configure, tmp_path
):
    # What is kept is in float16.
    train_dashclip(data, tmp_path / "model", config=configure(cache_gib=0.0))
    one, other = (
        json.loads((f / "training.json").read_text()) for f in (tmp_path / "model", trained[0])
    )
    for stage, expected in zip(one["stages"], other["stages"], strict=True):
        np.testing.assert_allclose(stage["losses"], expected["losses"], rtol=0.02)
    assert not (tmp_path / "model" / "work").exists()


# --- datasets that have not everything


def test_without_labels_stage_1_only(configure, tmp_path):
    data = tiny_catalog(tmp_path / "data", relevance=False, broken=(3,))
    train_dashclip(data, tmp_path / "model", config=configure())
    figures = without_seconds(tmp_path / "model")
    assert [stage["name"] for stage in figures["stages"]] == ["stage 1"]
    assert figures["training_queries"] == 0
    assert pq.read_table(tmp_path / "model" / "training_queries.parquet").num_rows == 0
    # Stopped once stage 1 was done, it reads no image again and says the same.
    (tmp_path / "model" / "training.json").unlink()
    train_dashclip(data, tmp_path / "model", config=configure())
    assert without_seconds(tmp_path / "model") == figures
    assert (figures["products_with_image"], figures["broken_images"]) == (23, 1)


def test_without_images_title_crops_and_stage_2(configure, tmp_path):
    data = tiny_catalog(tmp_path / "data", images=False)
    start = StartConfig(checkpoint=str(tiny_dashclip(tmp_path / "start", images=False)))
    figures = train_dashclip(data, tmp_path / "model", config=configure(start=start))
    assert [stage["name"] for stage in figures["stages"]] == ["title crops", "stage 2"]
    model = tmp_path / "model"
    assert not open_encoder(model).reads_images
    # The weights are the mean of what each stage ended with.
    crops = load_file(model / "checkpoint" / "title-crops.safetensors")
    aligned = load_file(model / "checkpoint" / "state.safetensors")
    for name, weight in weights(model).items():
        expected = weight
        if name in crops:
            expected = (crops[name] + aligned[f"model/{name}"]) / 2
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)
    # Stopped while the model was written, it is written again, and not averaged twice.
    whole = weights(model)
    (model / "training.json").unlink()
    train_dashclip(data, model, config=configure(start=start))
    assert all(weight.equal(whole[name]) for name, weight in weights(model).items())


def test_a_stage_of_no_epochs_is_left_out(data, configure, tmp_path):
    config = configure(pretraining={"epochs": 0}, alignment={"epochs": 1})
    figures = train_dashclip(data, tmp_path / "model", config=config)
    assert [stage["name"] for stage in figures["stages"]] == ["stage 2"]
    assert figures["products_with_image"] == 28


def test_neither_images_nor_labels_is_refused(configure, tmp_path):
    data = tiny_catalog(tmp_path / "data", images=False, relevance=False)
    start = StartConfig(checkpoint=str(tiny_dashclip(tmp_path / "start", images=False)))
    with pytest.raises(BadInputError, match="data: nothing to train on: neither products with"):
        train_dashclip(
            data,
            tmp_path / "model",
            config=configure(start=start, cropping=CroppingConfig(epochs=0)),
        )


def test_a_start_of_weights_that_are_no_numbers(data, configure, tmp_path):
    start = tiny_dashclip(tmp_path / "start")
    state = weights(start)
    state["query_proj.bias"][0] = torch.nan
    save_file(state, start / "model.safetensors", metadata={"format": "pt"})
    config = configure(start=StartConfig(checkpoint=str(start)), pretraining={"epochs": 0})
    with pytest.raises(BadInputError, match="stage 2: the loss became nan in epoch 1, step 1"):
        train_dashclip(data, tmp_path / "model", config=config)


# --- labels of a model


def test_labels_of_a_model_train_the_second_stage(folder, data, configure, tmp_path):
    labels = tiny_labels(data, tmp_path / "labels")
    runs = {}
    for name, source in (("all", "all"), ("llm", "llm")):
        config = configure(pretraining={"epochs": 0}, alignment={"epochs": 1, "labels": source})
        runs[name] = train_dashclip(data, tmp_path / name, config=config, labels=labels)
    relevance = read_relevance(data, read_catalog(data))
    training, held_out = split_queries(relevance)
    # The dataset has a label of each pair, so that the model's own query alone is new.
    assert runs["all"]["training_pairs"] == len(training) + 1
    assert runs["llm"]["training_pairs"] == len(training) // 2 + 1
    assert runs["all"]["training_queries"] == len(training.judged_queries()) + 1
    assert runs["all"]["stages"][0]["losses"] != runs["llm"]["stages"][0]["losses"]
    for name in runs:
        assert unseen(relevance, tmp_path / name).judged_queries() == held_out.judged_queries()


def test_a_query_is_known_to_a_model_whose_labels_did_not_count(data, configure, tmp_path):
    # Its human label may be what the grader learnt from.
    labels = tmp_path / "labels"
    labels.mkdir()
    pairs = {"query": ["red shirt", "shirt", "bag"], "product_id": [1000, 1000, 1001]}
    table = pa.table({**pairs, "label": [2, 2, 0], "source": ["llm"] * 3})
    pq.write_table(table, labels / "part-00000.parquet")
    config = configure(
        pretraining={"epochs": 0}, alignment={"epochs": 1, "batch": 1, "labels": "llm"}
    )
    figures = train_dashclip(data, tmp_path / "model", config=config, labels=labels)
    relevance = read_relevance(data, read_catalog(data))
    trained = [
        query for query in pairs["query"] if query in split_queries(relevance)[0].judged_queries()
    ]
    assert figures["training_queries"] == len(trained) < 4
    held_out = split_queries(relevance)[1]
    assert unseen(relevance, tmp_path / "model").judged_queries() == held_out.judged_queries()


# --- the command


@pytest.fixture
def train(configure, tmp_path):
    """Returns the exit status of the command."""

    def run(data, *arguments, output="model", **changes):
        config = tmp_path / "training.toml"
        config.write_text(to_toml(configure(**changes)))
        paths = ["--data", str(data), "--output", str(tmp_path / output)]
        return main([*paths, "--config", str(config), *arguments])

    return run


def test_the_command_shows_what_it_does_and_does_it_once(trained, data, train, tmp_path, capfd):
    assert train(data) == 0
    shown, said = capfd.readouterr()
    assert "stage 1: itm loss" in shown
    assert "stage 2: pairs/s" in shown
    before, after = said.index("stage 1, before training: itm loss"), said.index("after epoch 2")
    assert before < said.index("stage 1: 8 of") < after < said.index("stage 2: 16 of")
    assert_same_weights(tmp_path / "model", trained[0])
    # Again: the figures, and no work.
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "model").rglob("*")}
    assert train(data) == 0
    shown_again, said = capfd.readouterr()
    assert shown_again == shown
    assert "this model is trained already" in said
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "model").rglob("*")}
    # Another configuration, or other data, is another run.
    assert train(data, "--seed", "7") == 2
    assert "its configuration differs" in capfd.readouterr().err
    assert train(tiny_catalog(tmp_path / "other", products=24)) == 2
    assert "its data differs" in capfd.readouterr().err
    assert train(data, "--labels", str(tiny_labels(data, tmp_path / "labels"))) == 2
    assert "its folder of labels differs" in capfd.readouterr().err


@pytest.mark.parametrize("stop", ["stage 1", "stage 2"])
def test_ctrl_c_and_the_same_command_again(
    trained, data, train, tmp_path, monkeypatch, capfd, stop
):
    step = Monitor.step

    def interrupt(monitor, *, done, seconds, figures):
        step(monitor, done=done, seconds=seconds, figures=figures)
        if monitor._what == stop and done > 20:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Monitor, "step", interrupt)
    assert train(data) == 130
    assert "give the same command again to go on" in capfd.readouterr().err
    monkeypatch.setattr(Monitor, "step", step)
    assert train(data) == 0
    assert_same_weights(tmp_path / "model", trained[0])
    assert without_seconds(tmp_path / "model") == without_seconds(trained[0])


@pytest.mark.parametrize("gib", [1.0, 2e-5])
def test_stages_that_freeze_different_layers_go_on_alike(
    data, configure, tmp_path, monkeypatch, gib
):
    # What is kept of frozen layers, and what there is no room for, is as in a run without a stop.
    config = configure(pretraining={"frozen_layers": 0.0, "epochs": 1}, cache_gib=gib)
    train_dashclip(data, tmp_path / "whole", config=config)

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Alignment, "loss", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_dashclip(data, tmp_path / "model", config=config)
    train_dashclip(data, tmp_path / "model", config=config)
    assert_same_weights(tmp_path / "model", tmp_path / "whole")
    assert without_seconds(tmp_path / "model") == without_seconds(tmp_path / "whole")


def relabelled(folder):
    table = pq.read_table(folder / "relevance.parquet")
    label = table["label"].to_numpy().copy()
    label[5] = 3
    pq.write_table(table.set_column(2, "label", [label]), folder / "relevance.parquet")


def test_bad_input_is_one_sentence(train, tmp_path, capfd):
    def refused(*arguments, **changes):
        assert train(*arguments, **changes) == 2
        error = capfd.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("train-dashclip: ")
        return error

    data = tiny_catalog(tmp_path / "data", broken=(3, 4, 5))
    assert refused(tmp_path / "nowhere").endswith("nowhere: no such dataset folder")
    assert (
        "3 of 24 images are broken, more than 10%; among them those of products 1003, 1004, 1005"
        in refused(data)
    )
    other = refused(data, "--start", str(bart_checkpoint(tmp_path / "bart")), output="another")
    assert other.endswith("is a checkpoint of architecture 'bart'; expected blip, bert or dashclip")
    lacking = tiny_blip(tmp_path / "lacking")
    state = {k: v for k, v in weights(lacking).items() if not k.startswith("itm_head")}
    save_file(state, lacking / "model.safetensors", metadata={"format": "pt"})
    # A start that was refused does not stand in the way of the next one.
    assert "it lacks the weight 'itm_head.bias'" in refused(
        data, "--start", str(lacking), output="another"
    )
    toml = tmp_path / "wrong.toml"
    toml.write_text("[alignment]\nlearning_rat = 1.0\n")
    assert "unknown key 'learning_rat'" in (found := refused(data, "--config", str(toml)))
    assert "learning_rate" in found
    toml.write_text('[alignment]\nlabels = "people"\n')
    said = refused(data, "--config", str(toml))
    assert said.endswith("'labels' must be one of all, human, llm, got 'people'")
    assert "holds no part-*.parquet" in refused(data, "--labels", str(data), output="third")
    relabelled(data)
    assert "column 'label', row 6: is 3, expected 0, 1 or 2" in refused(data, output="third")
    (data / "catalog.parquet").unlink()
    assert refused(data).endswith("catalog.parquet: no such file; it holds the products to encode")


def bart_checkpoint(folder):
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bart"}')
    return folder


def test_a_folder_of_something_else_is_left_alone(data, train, tmp_path, capfd):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert train(data, output="mine") == 2
    assert "exists and is no run of train-dashclip" in capfd.readouterr().err
    assert train(data, output="mine/notes.txt") == 2
    assert "is a file; name a folder" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_few_broken_images_count_as_missing(train, tmp_path, capfd):
    data = tiny_catalog(tmp_path / "data", broken=(3, 9))
    assert train(data) == 0
    said = capfd.readouterr().err
    assert said.count("product 1003: its image counts as missing") == 1
    figures = json.loads((tmp_path / "model" / "training.json").read_text())
    assert (figures["products_with_image"], figures["broken_images"]) == (22, 2)
