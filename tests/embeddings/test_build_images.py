import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from embeddings import contents
from embeddings.build import build_tables
from embeddings.tables import read_table
from features.errors import BadInputError


class Colours:
    """Encodes a product as [length of its title, its image's red]; remembers what it was asked."""

    fingerprint = "colours-1"
    dim = 2
    normalized = False
    reads_images = True

    def __init__(self):
        self.calls = []

    @property
    def asked(self):
        return sorted(product for call in self.calls for product in call)

    def encode_products(self, titles, images=None):
        reds = [im.getpixel((0, 0))[0] if im else -1 for im in images or [None] * len(titles)]
        self.calls.append(list(zip(titles, reds, strict=True)))
        return np.array([[len(title), red] for title, red in self.calls[-1]], np.float32)

    def encode_queries(self, texts):
        return np.array([[len(text), 0] for text in texts], np.float32)


def png(red):
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


BROKEN = png(9)[:45]


def write(folder, *products):
    """Write a dataset of products (id, title, image)."""
    folder.mkdir(exist_ok=True)
    ids, titles, images = zip(*products, strict=True)
    texts, blobs = pa.array(titles, pa.string()), pa.array(images, pa.binary())
    catalog = pa.table({"product_id": ids, "title": texts, "image": blobs})
    pq.write_table(catalog, folder / "catalog.parquet")
    pq.write_table(pa.table({"query": ["red"]}), folder / "relevance.parquet")


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def output(tmp_path):
    return tmp_path / "tables"


def rows(output):
    product = read_table(output / "product.parquet")
    return dict(zip(product.ids.to_pylist(), product.embedding.tolist(), strict=True))


def summary(output):
    return json.loads((output / "summary.json").read_text())


def test_a_title_or_an_image_is_enough(data, output):
    write(data, (1, "ab", png(7)), (2, "abc", None), (3, None, png(8)), (4, " ", None))
    build_tables(data, output, Colours())
    assert rows(output) == {1: [2, 7], 2: [3, -1], 3: [0, 8]}
    counts = summary(output)
    assert (counts["products"], counts["products_left_out"]) == (3, 1)
    assert counts["products_without_title"] == 2
    assert counts["encoded"] == 4


def test_the_same_title_and_image_are_encoded_once(data, output):
    write(
        data, (1, "a", png(7)), (2, "a", png(7)), (3, "a", png(8)), (4, "b", png(7)), (5, "a", None)
    )
    encoder = Colours()
    build_tables(data, output, encoder)
    assert encoder.asked == [("a", -1), ("a", 7), ("a", 8), ("b", 7)]
    assert rows(output) == {1: [1, 7], 2: [1, 7], 3: [1, 8], 4: [1, 7], 5: [1, -1]}


def test_images_come_in_lists_of_one_length(data, output, monkeypatch):
    monkeypatch.setattr(contents, "_AT_ONCE", 3)
    products = [(red, "x" * (red % 5), png(red)) for red in range(8)]
    write(data, *products)
    encoder = Colours()
    build_tables(data, output, encoder)
    assert [len(call) for call in encoder.calls] == [3, 3, 2]
    assert rows(output) == {red: [red % 5, red] for red in range(8)}


def test_catalogs_are_longer_than_what_is_read_at_once(data, output):
    products = [(number, f"{number % 7}", png(number % 251)) for number in range(600)]
    write(data, *products)
    build_tables(data, output, Colours())
    assert rows(output) == {number: [1, number % 251] for number in range(600)}


def test_broken_images_are_named_counted_and_missing(data, output, capsys):
    fine = [(number, "fine", png(number)) for number in range(20, 40)]
    write(data, *fine, (1, "ab", BROKEN), (2, "ab", None), (3, None, BROKEN))
    build_tables(data, output, Colours(), max_broken_images=0.1)
    found = rows(output)
    assert found[1] == found[2] == [2, -1]
    assert 3 not in found
    assert summary(output)["broken_images"] == 2
    said = capsys.readouterr().err
    assert "product 1: its image counts as missing" in said
    assert "product 3: its image counts as missing" in said
    assert "2 of 22 images are broken" in said
    assert "22 products (1 without anything to encode left out, 2 broken images)" in said


def test_too_many_broken_images_stop_the_run(data, output):
    write(data, (1, "a", png(1)), (2, "b", BROKEN), (3, "c", png(3)))
    with pytest.raises(BadInputError, match=r"1 of 3 images are broken, more than 10%.* 2$"):
        build_tables(data, output, Colours())
    assert not output.exists()
    build_tables(data, output, Colours(), max_broken_images=0.4)
    assert rows(output)[2] == [1, -1]


def test_broken_images_are_counted_again_where_little_changed(data, output, capsys):
    products = [(number, "fine", png(number)) for number in range(20, 40)]
    write(data, *products, (1, "ab", BROKEN))
    build_tables(data, output, Colours())
    write(data, *products, (1, "ab", BROKEN), (2, "new", png(2)))
    capsys.readouterr()
    encoder = Colours()
    build_tables(data, output, encoder)
    assert encoder.asked == [("new", 2)]
    assert "1 of 22 images are broken" in capsys.readouterr().err
    assert summary(output)["broken_images"] == 1


def test_images_that_are_known_are_not_decoded(data, output, monkeypatch):
    write(data, (1, "a", png(1)), (2, "b", png(2)))
    build_tables(data, output, Colours())
    write(data, (1, "a", png(1)), (2, "b", png(3)))
    decoded = []
    decode = contents.ImageFaults.decode

    def watched(faults, ids, blobs):
        decoded.extend(ids)
        return decode(faults, ids, blobs)

    monkeypatch.setattr(contents.ImageFaults, "decode", watched)
    build_tables(data, output, Colours())
    assert decoded == [2]
    assert rows(output) == {1: [1, 1], 2: [1, 3]}


def test_a_catalog_without_anything(data, output):
    write(data, (1, None, None), (2, " ", BROKEN))
    with pytest.raises(BadInputError, match="neither a title nor a readable image is in any row"):
        build_tables(data, output, Colours(), max_broken_images=1)


def test_an_encoder_of_images_reads_a_catalog_of_titles(data, output):
    write(data, (1, "ab", None), (2, None, None), (3, "ab", None))
    table = pq.read_table(data / "catalog.parquet").drop_columns(["image"])
    pq.write_table(table, data / "catalog.parquet")
    encoder = Colours()
    build_tables(data, output, encoder)
    assert encoder.asked == [("ab", -1)]
    assert rows(output) == {1: [2, -1], 3: [2, -1]}


def test_an_encoder_of_texts_does_not_look_at_images(data, output):
    write(data, (1, "ab", BROKEN), (2, None, png(2)))
    encoder = Colours()
    encoder.reads_images = False
    build_tables(data, output, encoder)
    assert encoder.asked == [("ab", -1)]
    assert rows(output) == {1: [2, -1]}


def test_an_image_column_of_another_type(data, output):
    write(data, (1, "ab", None))
    pq.write_table(
        pa.table({"product_id": [1], "title": ["a"], "image": ["a.jpg"]}), data / "catalog.parquet"
    )
    with pytest.raises(BadInputError, match="column 'image' is string, expected binary"):
        build_tables(data, output, Colours())
