"""The retrieval table on small dataset folders, and the command from end to end."""

import io
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_checkpoints import save_checkpoint

from embeddings.relevance import write_training_queries
from embeddings.retrieval import METRICS
from embeddings.text_encoder import TextEncoder
from experiments import retrieval_cli, retrieval_table
from experiments.retrieval_rows import DASHCLIP, Methods, measure_rows
from experiments.retrieval_table import benchmark_retrieval
from experiments.retrieval_task import RetrievalTask
from features.errors import BadInputError

NAMES = [
    *("Random", "BM25", "BM25 (stemmed)", "CLIP (text)", "CLIP (image)", "BLIP (text)"),
    *("BLIP (image)", "FLAVA (text)", "FLAVA (image)", "MiniLM (untrained)"),
    *("our model, untrained", DASHCLIP),
]
NOWHERE = {"clip": "/no/clip", "blip": "/no/blip.pth", "flava": "/no/flava"}
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}

# One shirt and one hat of each colour; the last hat has no title, the last shirt no image.
TITLES = ["red shirt", "red hat", "green shirt", "green hat", "blue shirt", None]


def jpeg(colour):
    content = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(content, "PNG")
    return content.getvalue()


def write_colours(folder, *, images=True):
    """Write a dataset in which a query is a colour, in the dataset's own held-out set."""
    folder.mkdir(parents=True)
    pictures = [jpeg(COLOURS[colour]) for colour in COLOURS for _ in range(2)]
    pictures[4] = None
    catalog = {"product_id": [10, 11, 12, 13, 14, 15], "title": TITLES}
    if images:
        catalog["image"] = pa.array(pictures, pa.binary())
    pq.write_table(pa.table(catalog), folder / "catalog.parquet")
    pairs = [(colour, 10 + row, row // 2 == number) for number, colour in enumerate(COLOURS)
             for row in range(6)]  # fmt: skip
    query, product, label = zip(*pairs, strict=True)
    relevance = {
        "query": [*query, "old"],
        "product_id": [*product, 10],
        "label": [*(2 * int(hit) for hit in label), 1],
        "source": ["human"] * len(query) + ["derived"],
        "split": ["test"] * len(query) + ["train"],
    }
    pq.write_table(pa.table(relevance), folder / "relevance.parquet")
    (folder / "dataset.toml").write_text('name = "colours"\ncaveat = "Invented | for tests."\n')
    return folder


class Colours:
    """Knows colours by their name and, if it reads images, by their look."""

    fingerprint = "colours"
    dim = 3
    normalized = False

    def __init__(self, *, reads_images):
        self.reads_images = reads_images

    def encode_products(self, titles, images=None):
        vectors = self.encode_queries(titles)
        for row, image in enumerate(images or []):
            if image is not None:
                vectors[row] += np.array(image.getpixel((0, 0))) / 255
        return vectors

    def encode_queries(self, texts):
        named = [[5.0 * (colour in text) for colour in COLOURS] for text in texts]
        return np.array(named, np.float32).reshape(-1, 3)


@pytest.fixture
def colours(tmp_path):
    return write_colours(tmp_path / "colours")


def row_of(document, name):
    return next(row for row in document["rows"] if row["name"] == name)


def test_rows_stand_in_the_papers_order_and_missing_ones_say_why(colours, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "Stemmer", None)
    document = benchmark_retrieval(
        colours, tmp_path / "out", methods=Methods(checkpoints=NOWHERE), ks=(2,), command="it"
    )
    assert [row["name"] for row in document["rows"]] == NAMES
    status = {row["name"]: row["status"] for row in document["rows"]}
    assert [name for name in NAMES if status[name] == "measured"] == [
        *("Random", "BM25", "MiniLM (untrained)")
    ]
    missing = row_of(document, "CLIP (text)")
    assert missing["note"] == "/no/clip: no such folder"
    assert [missing[key] for key in (*METRICS, "interval", "unjudged")] == [None] * 6
    assert row_of(document, "BLIP (image)")["note"] == "/no/blip.pth: no such file"
    assert "pip install 'dashclip-ranker[retrieval]'" in row_of(document, NAMES[2])["note"]
    assert document["ratios"] == {}


def test_figures_by_hand(colours, tmp_path):
    document = benchmark_retrieval(
        colours, tmp_path / "out", methods=Methods(checkpoints=NOWHERE), ks=(2, 6)
    )
    assert (document["k"], document["queries"], document["products"]) == (2, 3, 6)
    assert document["retrieved"] == 6
    assert document["labels"] == ["derived", "human"]
    assert document["perfect"] == dict.fromkeys(METRICS, 1)
    # Each query has 2 of the 6 products, both of grade 2: a third by chance.
    random = row_of(document, "Random")
    assert [random[metric] for metric in METRICS] == pytest.approx([1 / 3] * 4)
    assert random["interval"]["recall"] == pytest.approx([1 / 3] * 2)
    # By its titles BM25 finds both of red and green, and of blue the titled one. Nothing else holds
    # the word, so that the red shirt, the first row of the catalog, comes next.
    bm25 = row_of(document, "BM25")
    assert bm25["recall"] == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert bm25["precision"] == bm25["graded_relevance"] == pytest.approx(5 / 6)
    assert bm25["ndcg"] == pytest.approx((2 + 1 / (1 + 1 / np.log2(3))) / 3)
    low, high = bm25["interval"]["recall"]
    assert (low, high) == (0.5, 1)  # all three draws blue; none of them
    assert bm25["unjudged"] == 0
    [other] = document["other_k"]
    assert other["k"] == 6
    assert row_of(other, "BM25")["recall"] == 1
    assert row_of(other, "BM25")["precision"] == pytest.approx(1 / 3)


def test_the_trained_model_is_compared_with_the_best_other_row(colours, tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    write_training_queries(model, ["old"])
    opened = []

    def open_encoder(folder):
        opened.append(folder)
        return Colours(reads_images=True)

    monkeypatch.setattr(retrieval_table, "open_encoder", open_encoder)
    methods = Methods(checkpoints=NOWHERE, untrained=Colours(reads_images=False))
    document = benchmark_retrieval(colours, tmp_path / "out", model=model, methods=methods, ks=(2,))
    assert opened == [model]
    assert [row_of(document, DASHCLIP)[metric] for metric in METRICS] == [1, 1, 1, 1]
    assert row_of(document, DASHCLIP)["note"] == ""
    untrained = row_of(document, "our model, untrained")
    assert untrained["recall"] == pytest.approx(5 / 6)
    assert untrained["note"] == ("reads titles only; 1 of 6 products have no title and rank last")
    ratio = document["ratios"]["recall"]
    assert ratio["baseline"] == "BM25"
    assert ratio["ratio"] == pytest.approx(6 / 5)
    assert ratio["interval"] == [1, 2]
    text = (tmp_path / "out" / "retrieval.md").read_text(encoding="utf-8")
    assert "- Recall@2: × 1.200 [1.000, 2.000] of the best other row, BM25" in text  # noqa: RUF001
    assert "| DashCLIP (image-text) | 1.000 [1.000, 1.000] |" in text
    assert "**Mind the data.** Invented | for tests." in text


def test_image_rows_rank_products_without_an_image_last(colours, tmp_path):
    checkpoint = save_checkpoint("clip", tmp_path / "clip")
    task = RetrievalTask.read(colours)
    methods = Methods(checkpoints={"clip": str(checkpoint)})
    rows = {row.name: row for row in measure_rows(task, methods, (6,))}
    assert rows["CLIP (image)"].note == "1 of 6 products have no image and rank last"
    assert rows["CLIP (text)"].note == "1 of 6 products have no title and rank last"
    assert rows["CLIP (image)"].scores[6]["recall"].tolist() == [1, 1, 1]


def test_products_without_a_vector_follow_in_the_catalogs_order(colours):
    task = RetrievalTask.read(colours)
    products = task.encode_images(lambda images: np.ones((len(images), 2), np.float32))
    assert products.places.tolist() == [0, 1, 2, 3, 5]
    ranking = task.rank(np.ones((3, 2), np.float32), products, 6, "exact")
    assert ranking.tolist() == [[0, 1, 2, 3, 5, 4]] * 3


def test_no_images_is_a_line(tmp_path):
    data = write_colours(tmp_path / "colours", images=False)
    checkpoint = str(save_checkpoint("flava", tmp_path / "flava"))
    methods = Methods(checkpoints={"flava": checkpoint}, trained=Colours(reads_images=True))
    task = RetrievalTask.read(data)
    rows = {row.name: row for row in measure_rows(task, methods, (2,))}
    assert rows["FLAVA (image)"].scores is None
    assert rows["FLAVA (image)"].note == "no images in this dataset"
    assert rows["FLAVA (text)"].scores is not None
    assert rows[DASHCLIP].note == (
        "no images in this dataset: titles only; "
        "1 of 6 products have no title or image and rank last"
    )


def test_a_query_of_unknown_words_gets_the_first_products(colours):
    pytest.importorskip("bm25s", reason="bm25s is an optional extra")
    table = pq.read_table(colours / "relevance.parquet").to_pydict()
    table["query"] = ["#?" if query == "red" else query for query in table["query"]]
    pq.write_table(pa.table(table), colours / "relevance.parquet")
    rows = measure_rows(RetrievalTask.read(colours), Methods(checkpoints={}), (2,))
    bm25 = next(row for row in rows if row.name == "BM25")
    assert bm25.scores[2]["recall"].tolist() == [1, 0.5, 1]  # "#?", blue, green


def test_missing_bm25s_is_a_line(colours, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    rows = measure_rows(RetrievalTask.read(colours), Methods(checkpoints={}), (2,))
    bm25 = next(row for row in rows if row.name == "BM25")
    assert bm25.scores is None
    assert bm25.note.startswith("bm25s is not installed; install it with: pip install")


def test_stems_find_other_forms(tmp_path):
    pytest.importorskip("Stemmer", reason="PyStemmer is an optional extra")
    data = write_colours(tmp_path / "colours")
    table = pq.read_table(data / "relevance.parquet").to_pydict()
    table["query"] = [f"{query}s" for query in table["query"]]
    pq.write_table(pa.table(table), data / "relevance.parquet")
    rows = measure_rows(RetrievalTask.read(data), Methods(checkpoints={}), (2,))
    recall = {row.name: row.scores[2]["recall"].mean() for row in rows if row.scores}
    assert recall["BM25"] == pytest.approx(1 / 3)
    assert recall["BM25 (stemmed)"] == pytest.approx(5 / 6)


def test_nothing_is_left_of_a_run_that_fails(colours, tmp_path):
    methods = Methods(checkpoints={"clip": str(colours)})
    with pytest.raises(BadInputError, match=r"holds no config\.json"):
        benchmark_retrieval(colours, tmp_path / "out", methods=methods)
    assert not list(tmp_path.glob("*out*"))


def test_a_model_that_saw_every_query_is_refused(tiny_dataset, tmp_path):
    queries = set(pq.read_table(tiny_dataset / "relevance.parquet").column("query").to_pylist())
    write_training_queries(tmp_path, sorted(queries))
    with pytest.raises(BadInputError, match="was trained on all its queries"):
        RetrievalTask.read(tiny_dataset, model=tmp_path)


# --- the command


def run(monkeypatch, *arguments):
    nowhere = [f"--{family}={name}" for family, name in NOWHERE.items()]
    command = ["benchmark-retrieval", *map(str, arguments), *nowhere]
    monkeypatch.setattr(sys, "argv", command)
    return retrieval_cli.main()


def test_the_command_writes_json_and_report(tiny_dataset, tmp_path, monkeypatch, capsys):
    model = tmp_path / "model"
    model.mkdir()
    for file in TextEncoder.packaged().folder.iterdir():
        if file.name != "config.json":
            (model / file.name).symlink_to(file)
    (model / "config.json").write_bytes(
        (TextEncoder.packaged().folder / "config.json").read_bytes()
    )
    write_training_queries(model, ["whole milk", "dish soap"])
    output = tmp_path / "out"
    arguments = ("--data", tiny_dataset, "--model", model, "--output", output, "--k", "5", "10")
    assert run(monkeypatch, *arguments) == 0
    document = json.loads((output / "retrieval.json").read_text())
    assert (document["k"], document["queries"], document["products"]) == (5, 10, 60)
    assert [row["name"] for row in document["rows"]] == NAMES
    trained, start = (row_of(document, name) for name in (DASHCLIP, "MiniLM (untrained)"))
    assert {key: trained[key] for key in METRICS} == {key: start[key] for key in METRICS}
    assert document["ratios"]["ndcg"]["ratio"] <= 1
    assert document["command"].startswith("benchmark-retrieval --data ")
    shown = capsys.readouterr().out
    assert "Graded Rel@5" in shown
    assert "Graded Rel@10" in shown
    assert "/no/clip: no such folder" in shown

    before = (output / "retrieval.json").read_bytes()
    assert run(monkeypatch, *arguments) == 0  # replaces its own results, with the same figures
    assert (output / "retrieval.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--k", "0"), "K must be 1 or more, got 0"),
        (("--model", "/no/model"), "/no/model: no such model folder"),
        (("--data", "/no/data"), "/no/data"),
    ],
)
def test_bad_input_ends_with_2_and_one_sentence(
    arguments, message, tiny_dataset, tmp_path, monkeypatch, capsys
):
    given = ("--data", tiny_dataset, "--output", tmp_path / "out", *arguments)
    assert run(monkeypatch, *given) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_not_replaced(tiny_dataset, tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert run(monkeypatch, "--data", tiny_dataset, "--output", tmp_path) == 2
    assert "holds 'notes.txt', which is no retrieval result" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_missing_faiss_is_told_before_any_work(tiny_dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "faiss", None)
    given = ("--data", tiny_dataset, "--output", tmp_path / "out", "--search", "faiss")
    assert run(monkeypatch, *given) == 2
    assert "dashclip-ranker[faiss]" in capsys.readouterr().err
