"""What a second build does after a change or a kill; as a script, the build that is killed."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from embeddings import build, contents, encoding, vector_store
from embeddings.build import build_tables
from embeddings.tables import read_table

TABLES = ("product.parquet", "query.parquet")
AT_ONCE = 4


class Grouped:
    """Encodes a text as its length, its image's red and the lengths of all texts of the call.

    The last one tells whether two builds made the same calls.
    """

    dim = 3
    normalized = False
    reads_images = True

    def __init__(self, fingerprint="grouped-1", *, seconds_a_call=0.0):
        self.fingerprint = fingerprint
        self.seconds_a_call = seconds_a_call
        self.asked = []

    def encode_products(self, titles, images=None):
        reds = [im.getpixel((0, 0))[0] if im else -1 for im in images or [None] * len(titles)]
        return self._encode(titles, reds)

    def encode_queries(self, texts):
        return self._encode(texts, [0] * len(texts))

    def _encode(self, texts, numbers):
        time.sleep(self.seconds_a_call)
        self.asked += texts
        total = sum(map(len, texts))
        rows = [[len(text), number, total] for text, number in zip(texts, numbers, strict=True)]
        return np.array(rows, np.float32)


def png(red):
    file = io.BytesIO()
    Image.new("RGB", (2, 2), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write(folder, *, titles, queries, images=None):
    folder.mkdir(exist_ok=True)
    images = pa.array(images or [None] * len(titles), pa.binary())
    titles = pa.array(titles, pa.string())
    catalog = {"product_id": list(range(len(titles))), "title": titles, "image": images}
    pq.write_table(pa.table(catalog), folder / "catalog.parquet")
    pq.write_table(pa.table({"query": queries}), folder / "relevance.parquet")


@pytest.fixture
def data(tmp_path):
    """Twenty products with images, one of them broken, twelve without, and ten queries."""
    images = [png(number % 17) for number in range(19)] + [png(0)[:45]] + [None] * 12
    titles = ["x" * (number * 7 % 11) or None for number in range(32)]
    write(
        tmp_path / "data",
        titles=titles,
        images=images,
        queries=["y" * (number + 1) for number in range(10)],
    )
    return tmp_path / "data"


@pytest.fixture
def output(tmp_path):
    return tmp_path / "tables"


@pytest.fixture
def small(monkeypatch):
    """Let calls and parts be small."""
    monkeypatch.setattr(contents, "_AT_ONCE", AT_ONCE)
    monkeypatch.setattr(encoding, "_TEXTS_AT_ONCE", AT_ONCE)
    monkeypatch.setattr(vector_store, "_SECONDS_A_PART", 0.0)


def content(folder):
    return [(folder / name).read_bytes() for name in TABLES]


def parts(output):
    return list((output / ".parts").glob("*.parquet"))


def counts(output):
    summary = json.loads((output / "summary.json").read_text())
    return summary["encoded"], summary["reused"]


def killed_build(data, output, *, at_parts):
    """Start a build in a process of its own and kill it when it has saved so many parts."""
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, __file__, data, output], env=os.environ | {"PYTHONPATH": str(root)}
    )
    try:
        while len(parts(output)) < at_parts:
            assert process.poll() is None, "the build ended before it was killed"
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (output / "product.parquet").exists()


def test_a_killed_build_goes_on_and_gives_the_same_bytes(data, output, tmp_path, small):
    whole = Grouped()
    build_tables(data, tmp_path / "whole", whole)
    killed_build(data, output, at_parts=2)  # among the images
    killed_build(data, output, at_parts=6)  # among the titles
    saved = len(parts(output))
    again = Grouped()
    build_tables(data, output, again)
    assert content(output) == content(tmp_path / "whole")
    assert len(again.asked) == len(whole.asked) - counts(output)[1]
    assert counts(output)[1] >= (saved - 2) * AT_ONCE
    assert sorted(path.name for path in output.iterdir()) == [*TABLES, "summary.json"]


def test_a_failed_build_keeps_what_was_saved(data, output, small, monkeypatch):
    encoder = Grouped()
    monkeypatch.setattr(encoder, "encode_queries", lambda texts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_tables(data, output, encoder)
    products = len(encoder.asked)
    again = Grouped()
    build_tables(data, output, again)
    assert len(again.asked) == 10
    assert counts(output) == (10, products)


@pytest.mark.parametrize("failing", ["write_table", "write_text"])
def test_a_build_that_stops_at_the_exchange_can_be_repeated(
    data, output, tmp_path, monkeypatch, failing
):
    build_tables(data, tmp_path / "whole", Grouped())
    build_tables(data, output, Grouped("grouped-0"))
    calls = []
    real = getattr(build, failing)

    def stopped(path, written):
        calls.append(path)
        if len(calls) == (2 if failing == "write_table" else 1):
            raise KeyboardInterrupt
        real(path, written)

    with monkeypatch.context() as patched:
        patched.setattr(build, failing, stopped)
        with pytest.raises(KeyboardInterrupt):
            build_tables(data, output, Grouped())
    stays = failing == "write_table"
    found = {read_table(output / name).fingerprint for name in TABLES}
    assert found == {"grouped-0" if stays else "grouped-1"}
    assert (output / "summary.json").exists() == stays
    again = Grouped()
    build_tables(data, output, again)
    assert content(output) == content(tmp_path / "whole")
    assert (again.asked == []) != stays


def test_only_what_changed_is_encoded(data, output):
    write(data, titles=["a", "bb", "ccc"], queries=["q", "rr"])
    build_tables(data, output, Grouped())
    write(data, titles=["ccc", "new one", "a", "a"], queries=["rr", "sss"])
    encoder = Grouped()
    build_tables(data, output, encoder)
    assert encoder.asked == ["new one", "sss"]
    assert counts(output) == (2, 3)
    product, query = (read_table(output / name) for name in TABLES)
    assert product.embedding[:, 0].tolist() == [3, 7, 1, 1]
    assert query.ids.to_pylist() == ["rr", "sss"]
    assert query.embedding[:, 0].tolist() == [2, 3]


def test_an_updated_table_says_what_a_new_one_would(data, output, tmp_path):
    titles = [f"{'very ' * (number % 6)}fresh milk number {number}" for number in range(40)]
    write(data, titles=titles[:30], queries=["milk"])
    build_tables(data, output)
    write(data, titles=titles[10:], queries=["milk", "bread"])
    build_tables(data, output)
    assert counts(output) == (11, 21)
    build_tables(data, tmp_path / "new")
    for name in TABLES:
        updated, new = (read_table(folder / name) for folder in (output, tmp_path / "new"))
        assert updated.ids.equals(new.ids)
        cosine = (updated.embedding.astype(float) * new.embedding.astype(float)).sum(axis=1)
        assert cosine.min() > 0.999


def test_a_product_and_a_query_of_one_text_are_two_contents(data, output):
    write(data, titles=["milk"], queries=["milk"])
    build_tables(data, output, Grouped())
    assert read_table(output / "product.parquet").embedding.tolist() == [[4, -1, 4]]
    assert read_table(output / "query.parquet").embedding.tolist() == [[4, 0, 4]]


def test_nothing_is_taken_from_another_encoder(data, output, small, monkeypatch):
    build_tables(data, output, Grouped("grouped-0"))
    encoder = Grouped()
    with monkeypatch.context() as patched:
        patched.setattr(encoder, "encode_queries", lambda texts: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_tables(data, output, encoder)
    assert parts(output)
    other = Grouped("grouped-2")
    build_tables(data, output, other)
    assert len(other.asked) == len(encoder.asked) + 10
    assert counts(output)[1] == 0


def test_tables_that_do_not_tell_their_contents_are_made_again(data, output):
    build_tables(data, output, Grouped())
    for name in TABLES:
        table = pq.read_table(output / name).drop_columns(["content"])
        pq.write_table(table, output / name)
    (output / "product.parquet").write_bytes(b"damaged")
    write(data, titles=["a"], queries=["q"])
    encoder = Grouped()
    build_tables(data, output, encoder)
    assert encoder.asked == ["a", "q"]


def test_left_over_parts_of_whole_tables_are_removed(data, output, capsys):
    build_tables(data, output, Grouped())
    (output / ".parts").mkdir()
    build_tables(data, output, Grouped())
    assert "nothing to do" in capsys.readouterr().err
    assert not (output / ".parts").exists()


if __name__ == "__main__":
    contents._AT_ONCE = encoding._TEXTS_AT_ONCE = AT_ONCE
    vector_store._SECONDS_A_PART = 0.0
    build_tables(Path(sys.argv[1]), Path(sys.argv[2]), Grouped(seconds_a_call=0.2))
