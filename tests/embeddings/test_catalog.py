import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embeddings.catalog import read_catalog
from features.errors import BadInputError


def catalog_of(folder, **columns):
    pq.write_table(pa.table(columns), folder / "catalog.parquet")
    return read_catalog(folder)


def test_aisles_are_numbered_by_name(tmp_path):
    aisles = pa.array(["Snack", None, "Dairy", "  ", " Snack ", "Éclair", ""])
    catalog = catalog_of(tmp_path, product_id=list(range(7)), title=["a"] * 7, aisle=aisles)
    assert catalog.aisle_names == ["Dairy", "Snack", "Éclair"]
    assert catalog.aisles().tolist() == [1, -1, 0, -1, 1, 2, -1]
    assert catalog.aisles().dtype == "int32"
    assert catalog.aisles() is catalog.aisles()


def test_aisles_in_a_dictionary(tmp_path):
    aisles = pa.array(["b", "a", None, "b"]).dictionary_encode()
    catalog = catalog_of(tmp_path, product_id=list(range(4)), title=["x"] * 4, aisle=aisles)
    assert (catalog.aisles().tolist(), catalog.aisle_names) == ([1, 0, -1, 1], ["a", "b"])


def test_a_catalog_need_not_have_aisles(tmp_path):
    catalog = catalog_of(tmp_path, product_id=[1, 2], title=["x", "y"])
    assert (catalog.aisles().tolist(), catalog.aisle_names) == ([-1, -1], [])
    empty = catalog_of(tmp_path, product_id=[1], title=["x"], aisle=pa.array([None], pa.string()))
    assert (empty.aisles().tolist(), empty.aisle_names) == ([-1], [])


def test_aisles_that_are_no_text(tmp_path):
    catalog = catalog_of(tmp_path, product_id=[1], title=["x"], aisle=[7])
    with pytest.raises(BadInputError, match=r"catalog\.parquet: column 'aisle' is int64, expected"):
        catalog.aisles()


def test_every_product_comes_with_title_and_image(tmp_path):
    titles = ["milk", None, " juice ", " "]
    images = pa.array([b"1", b"2", None, None], pa.binary())
    catalog = catalog_of(tmp_path, product_id=[4, 3, 2, 1], title=titles, image=images)
    assert catalog.has_images
    assert list(catalog.with_images()) == [
        ([4, 3, 2, 1], ["milk", "", "juice", ""], [b"1", b"2", None, None])
    ]


def test_a_catalog_need_not_have_images(tmp_path):
    catalog = catalog_of(tmp_path, product_id=[1, 2], title=["x", None])
    assert not catalog.has_images
    assert list(catalog.with_images()) == [([1, 2], ["x", ""], [None, None])]


def test_many_products_come_in_batches_and_in_order(tmp_path):
    ids = list(range(1000, 0, -1))
    images = pa.array([str(number).encode() for number in ids], pa.large_binary())
    table = pa.table({"product_id": ids, "title": [f"t{i}" for i in ids], "image": images})
    pq.write_table(table, tmp_path / "catalog.parquet", row_group_size=300)
    batches = list(read_catalog(tmp_path).with_images())
    assert len(batches) > 1
    rows = [row for batch in batches for row in zip(*batch, strict=True)]
    assert rows == [(number, f"t{number}", str(number).encode()) for number in ids]


def test_images_that_are_no_bytes(tmp_path):
    catalog = catalog_of(tmp_path, product_id=[1], title=["x"], image=["a.jpg"])
    with pytest.raises(BadInputError, match="column 'image' is string, expected binary"):
        list(catalog.with_images())
