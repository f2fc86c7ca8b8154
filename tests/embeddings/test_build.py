import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embeddings import cli
from embeddings.build import build_tables
from embeddings.catalog import read_catalog, read_queries
from embeddings.tables import read_table
from embeddings.text_encoder import TextEncoder
from features import console
from features.errors import BadInputError

TITLES = ["apple juice", "milk", None, "apple juice", "  ", " milk "]
IDS = [11, 12, 13, 14, 15, 16]


class Lengths:
    """Encodes a text as [its length, its first letter's number]; remembers what it was asked."""

    fingerprint = "lengths-1"
    dim = 2
    normalized = False
    reads_images = False

    def __init__(self):
        self.titles, self.queries = [], []

    def encode_products(self, titles, images=None):
        assert images is None
        self.titles += titles
        return self._encode(titles)

    def encode_queries(self, texts):
        self.queries += texts
        return self._encode(texts)

    @staticmethod
    def _encode(texts):
        return np.array([[len(text), ord(text[0]) - ord("a")] for text in texts], np.float32)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "catalog.parquet", product_id=IDS, title=TITLES)
    write(folder / "impressions.parquet", query=["juice", "bread", "juice", None, " "])
    return folder


def write(path, **columns):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path)


def test_products_and_queries_get_their_vectors(data, tmp_path):
    build_tables(data, tmp_path / "tables", Lengths())
    product = read_table(tmp_path / "tables" / "product.parquet")
    assert product.ids.to_pylist() == [11, 12, 14, 16]
    assert product.embedding.tolist() == [[11, 0], [4, 12], [11, 0], [4, 12]]
    assert product.embedding.dtype == np.float16
    query = read_table(tmp_path / "tables" / "query.parquet")
    assert query.ids.to_pylist() == ["bread", "juice"]
    assert query.embedding.tolist() == [[5, 1], [5, 9]]
    assert {product.fingerprint, query.fingerprint} == {"lengths-1"}
    assert not product.normalized


def test_the_summary(data, tmp_path):
    build_tables(data, tmp_path / "tables", Lengths())
    summary = json.loads((tmp_path / "tables" / "summary.json").read_text())
    assert summary.pop("seconds") >= 0
    assert summary.pop("encoded_per_second") > 0
    assert len(bytes.fromhex(summary.pop("dataset_fingerprint"))) == 32
    assert summary == {
        "encoder_fingerprint": "lengths-1",
        "dimension": 2,
        "products": 4,
        "products_without_title": 2,
        "products_left_out": 2,
        "distinct_titles": 2,
        "broken_images": 0,
        "queries": 2,
        "encoded": 4,
        "reused": 0,
    }


def test_each_text_is_encoded_once(data, tmp_path):
    encoder = Lengths()
    build_tables(data, tmp_path / "tables", encoder)
    assert sorted(encoder.titles) == ["apple juice", "milk"]
    assert sorted(encoder.queries) == ["bread", "juice"]


def test_many_texts_come_back_in_the_order_of_the_ids(data, tmp_path):
    titles = [f"{'x' * (number % 17)}y{number}" for number in range(5000)]
    write(data / "catalog.parquet", product_id=list(range(5000)), title=titles)
    build_tables(data, tmp_path / "tables", Lengths())
    embedding = read_table(tmp_path / "tables" / "product.parquet").embedding
    assert embedding[:, 0].tolist() == [len(title) for title in titles]


def test_queries_of_a_folder_and_of_the_labels(data):
    (data / "impressions.parquet").unlink()
    write(data / "impressions.parquet" / "a.parquet", query=["juice"])
    write(data / "impressions.parquet" / "b.parquet", query=pa.array(["é"]).dictionary_encode())
    write(data / "impressions.parquet" / ".partial.parquet", query=["unfinished"])
    write(data / "relevance.parquet", query=["bread", "juice"])
    assert read_queries(data) == ["bread", "juice", "é"]


def test_labels_are_enough(data):
    (data / "impressions.parquet").rename(data / "relevance.parquet")
    assert read_queries(data) == ["bread", "juice"]


def test_the_same_tables_are_kept(data, tmp_path, capsys):
    build_tables(data, tmp_path / "tables", Lengths())
    before = (tmp_path / "tables" / "product.parquet").stat().st_mtime_ns
    again = Lengths()
    build_tables(data, tmp_path / "tables", again)
    assert again.titles == []
    assert (tmp_path / "tables" / "product.parquet").stat().st_mtime_ns == before
    assert "nothing to do" in capsys.readouterr().err


def test_another_encoder_or_dataset_replaces_the_tables(data, tmp_path, capsys):
    build_tables(data, tmp_path / "tables", Lengths())
    other = Lengths()
    other.fingerprint = "lengths-2"
    build_tables(data, tmp_path / "tables", other)
    assert read_table(tmp_path / "tables" / "query.parquet").fingerprint == "lengths-2"
    assert "are replaced" in capsys.readouterr().err
    write(data / "relevance.parquet", query=["milk"])
    build_tables(data, tmp_path / "tables", other)
    assert len(read_table(tmp_path / "tables" / "query.parquet")) == 3


@pytest.mark.parametrize("name", ["notes.txt", "summary.json"])
def test_a_folder_that_holds_something_else_is_left_alone(data, tmp_path, name):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / name).write_text('{"mine": 1}')
    with pytest.raises(BadInputError, match="holds something other than embedding tables"):
        build_tables(data, tmp_path / "tables", Lengths())
    assert (tmp_path / "tables" / name).read_text() == '{"mine": 1}'


def test_an_output_that_is_a_file(data, tmp_path):
    (tmp_path / "tables").write_text("")
    with pytest.raises(BadInputError, match="tables: is a file; name a folder"):
        build_tables(data, tmp_path / "tables", Lengths())


def test_an_encoder_that_gives_nan_is_named(data, tmp_path):
    encoder = Lengths()
    encoder.encode_queries = lambda texts: np.array([[1, 2], [1, np.nan]], np.float32)
    with pytest.raises(BadInputError, match="encoder lengths-1: its vector of 'juice' holds a val"):
        build_tables(data, tmp_path / "tables", encoder)
    assert list(tmp_path.iterdir()) == [data]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"product_id": [1], "titel": ["a"]}, "column 'title' is missing; did you mean 'titel'"),
        ({"product_id": [1.5], "title": ["a"]}, "column 'product_id' is double, expected an int"),
        ({"product_id": [1], "title": [2]}, "column 'title' is int64, expected text"),
        ({"product_id": [1, None], "title": ["a", "b"]}, "column 'product_id', row 2: is null"),
        ({"product_id": [3, 1, 1], "title": ["a"] * 3}, "product 1 stands in 2 rows"),
        ({"product_id": pa.array([], pa.int64()), "title": pa.array([], pa.string())}, "is empty"),
        ({"product_id": [1], "title": [" "]}, "column 'title' holds no text"),
    ],
)
def test_a_broken_catalog(data, tmp_path, columns, said):
    write(data / "catalog.parquet", **columns)
    with pytest.raises(BadInputError, match=rf"catalog\.parquet: .*{said}"):
        build_tables(data, tmp_path / "tables", Lengths())
    assert not (tmp_path / "tables").exists()


def test_missing_folders_and_files(data, tmp_path):
    with pytest.raises(BadInputError, match="absent: no such dataset folder"):
        read_catalog(tmp_path / "absent")
    (data / "catalog.parquet").write_text("not Parquet")
    with pytest.raises(BadInputError, match=r"catalog\.parquet: cannot be read"):
        read_catalog(data)
    (data / "catalog.parquet").unlink()
    with pytest.raises(BadInputError, match=r"catalog\.parquet: no such file"):
        read_catalog(data)


def test_broken_queries(data):
    path = data / "impressions.parquet"
    write(path, query=[1])
    with pytest.raises(BadInputError, match="column 'query' is int64, expected text"):
        read_queries(data)
    write(path, query=[None, " "])
    with pytest.raises(BadInputError, match="column 'query' holds no text"):
        read_queries(data)
    path.unlink()
    with pytest.raises(BadInputError, match="neither impressions"):
        read_queries(data)
    path.mkdir()
    with pytest.raises(BadInputError, match="the folder holds no Parquet files"):
        read_queries(data)


def test_a_terminal_sees_the_speed(data, tmp_path, monkeypatch):
    screen = console.Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(console, "stderr", screen)
    build_tables(data, tmp_path / "tables", Lengths())
    shown = screen.file.getvalue()
    assert "items/s" in shown
    assert re.search(r"titles.*2/2", shown)
    assert re.search(r"queries.*2/2", shown)


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["build-tables", *map(str, arguments)])
    return cli.main()


def test_the_command_twice_gives_the_same_tables(data, tmp_path, monkeypatch):
    for name in ("one", "two"):
        assert run(monkeypatch, "--data", data, "--output", tmp_path / name) == 0
    for table in ("product.parquet", "query.parquet"):
        assert (tmp_path / "one" / table).read_bytes() == (tmp_path / "two" / table).read_bytes()
    read = read_table(tmp_path / "one" / "product.parquet")
    assert read.fingerprint == TextEncoder.packaged().fingerprint
    assert (read.dim, read.normalized) == (384, True)
    np.testing.assert_allclose(np.linalg.norm(read.embedding.astype(float), axis=1), 1, atol=1e-3)


def test_the_command_says_what_is_wrong(data, tmp_path, monkeypatch, capsys):
    model = tmp_path / "absent"
    output = tmp_path / "tables"
    assert run(monkeypatch, "--data", data, "--output", output, "--model", model) == 2
    assert capsys.readouterr().err == f"build-tables: {model}: no such model folder\n"
    assert not output.exists()
