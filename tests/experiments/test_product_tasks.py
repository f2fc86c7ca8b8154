"""The product tasks on a small dataset whose structure a fake encoder sees, or does not."""

import io
import json
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from embeddings.catalog import read_catalog
from embeddings.relevance import write_training_queries
from experiments import product_tasks as module
from experiments.product_task_data import (
    embed_products,
    product_variants,
    read_aisles,
    read_pairs,
)
from experiments.product_tasks import DOCUMENT, PAGE, main, product_tasks
from features.errors import BadInputError

AISLES = ("bread", "cheese", "fruit", "soap", "tea", "wine")
QUERIES = 60
DIM = 16


def vector(text: str) -> np.ndarray:
    """Return the unit vector that stands for ``text`` everywhere."""
    made = np.random.default_rng(zlib.crc32(text.encode())).normal(size=DIM)
    return made / np.linalg.norm(made)


class FakeEncoder:
    """Sees the first word of a text (or the colour of an image) through so much noise."""

    dim = DIM
    normalized = True

    def __init__(self, noise: float, *, reads_images: bool = True) -> None:
        self.noise = noise
        self.reads_images = reads_images
        self.fingerprint = f"fake-{noise}"

    def encode_products(self, titles, images=None):
        return self._noisy([vector(t.partition(" ")[0]) for t in titles], titles)

    def encode_queries(self, texts):
        return self._noisy([vector(text.partition(" ")[0]) for text in texts], texts)

    def _noisy(self, vectors, seeds):
        made = [v + self.noise * vector(f"noise {s}") for v, s in zip(vectors, seeds, strict=True)]
        return np.array(made, np.float32).reshape(-1, DIM)


class FakeModel(FakeEncoder):
    """One that encodes titles and images on their own as well."""

    def encode_titles(self, texts):
        return self.encode_products(texts)

    def encode_images(self, images):
        return np.array(
            [
                [0] * DIM if image is None else [*image.getpixel((0, 0))] * 5 + [1]
                for image in images
            ],
            np.float32,
        )


def write_dataset(
    folder: Path,
    *,
    aisles: bool = True,
    relevance: bool = True,
    images: bool = True,
    each: int = 20,
) -> Path:
    """Write products titled "aisle number", the last aisle with 3 of them, and graded pairs."""
    folder.mkdir()
    aisle = [name for name in AISLES for _ in range(each)][: (len(AISLES) - 1) * each + 3]
    count = len(aisle)
    catalog = {
        "product_id": pa.array(100 + np.arange(count)),
        "title": pa.array([f"{name} {row}" for row, name in enumerate(aisle)]),
    }
    if aisles:  # the first product's is unknown
        catalog["aisle"] = pa.array([None, *aisle[1:]])
    if images:  # every tenth product has none
        pictures = [png(AISLES.index(name)) for name in aisle]
        catalog["image"] = pa.array(
            [None if row % 10 == 0 else picture for row, picture in enumerate(pictures)]
        )
    pq.write_table(pa.table(catalog), folder / "catalog.parquet")
    if relevance:
        rng = np.random.default_rng(0)
        query = np.repeat(np.arange(QUERIES), 9)
        product = np.concatenate([rng.permutation(count)[:9] for _ in range(QUERIES)])
        near = np.array([AISLES.index(aisle[row]) for row in product]) - query % len(AISLES)
        labels = {
            "query": pa.array([f"{AISLES[q % len(AISLES)]} wanted {q}" for q in query]),
            "product_id": pa.array(100 + product),
            "label": pa.array(np.select([near == 0, np.abs(near) == 1], [2, 1], 0), pa.int8()),
            "source": pa.array(["derived"] * len(query)),
        }
        pq.write_table(pa.table(labels), folder / "relevance.parquet")
    (folder / "dataset.toml").write_text('name = "shelf"\ncaveat = "made up for tests"\n')
    return folder


def png(shade: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (4, 4), (40 * shade, 255 - 40 * shade, 7)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("product-tasks") / "data")


@pytest.fixture(scope="module")
def done(dataset: Path, tmp_path_factory: pytest.TempPathFactory):
    """The document of a run, and its folder."""
    output = tmp_path_factory.mktemp("product-tasks") / "output"
    document = product_tasks(
        dataset,
        output,
        trained=FakeModel(0.2),
        untrained=FakeModel(3.0),
        seeds=2,
        command="the command",
    )
    return document, output


def test_the_trained_encoder_wins_where_it_sees_more(done):
    document, _ = done
    aisle = {(row["encoder"], row["embedding"]): row for row in document["aisle"]["rows"]}
    assert list(aisle) == [
        (encoder, embedding)
        for embedding in ("image-text", "text only", "image only")
        for encoder in ("untrained start", "trained")
    ]
    assert aisle["trained", "image-text"]["macro_f1"]["mean"] > 0.95
    assert aisle["untrained start", "image-text"]["macro_f1"]["mean"] < 0.6
    gains = {row["of"]: row["macro_f1"] for row in document["aisle"]["differences"]}
    gain = gains["image-text: trained − untrained start"]  # noqa: RUF001
    assert gain["values"] == pytest.approx(
        np.subtract(
            aisle["trained", "image-text"]["macro_f1"]["values"],
            aisle["untrained start", "image-text"]["macro_f1"]["values"],
        )
    )
    assert gain["mean"] > 0.35
    assert gains["trained: image-text − text only"]["mean"] == 0  # noqa: RUF001
    cosines = document["relevance"]["cosines"]
    assert cosines["trained"]["auc_hr_ir"] > cosines["untrained start"]["auc_hr_ir"]


def test_the_document_names_classes_and_keys(done):
    document, output = done
    assert json.loads((output / DOCUMENT).read_text()) == document
    assert list(document) == [
        *("dataset", "caveat", "encoders", "seeds", "skipped", "aisle", "relevance"),
        *("command", "versions"),
    ]
    aisle = document["aisle"]
    assert aisle["left_out"] == {"wine": 3}
    assert [row["name"] for row in aisle["classes"]] == list(AISLES[:-1])
    assert [row["products"] for row in aisle["classes"]] == [19, 20, 20, 20, 20]
    assert [row["low_support"] for row in aisle["classes"]] == [True, False, False, False, False]
    assert aisle["products"] == 99
    assert aisle["test_products"] in (19, 20)
    row = aisle["rows"][0]
    assert set(row["recall"]) == set(AISLES[:-1])
    assert row["recall_low_support"]["mean"] == pytest.approx(row["recall"]["bread"])
    others = [row["recall"][name] for name in AISLES[1:-1]]
    assert row["recall_other"]["mean"] == pytest.approx(np.mean(others))
    relevance = document["relevance"]
    assert [(row["features"], row["encoder"]) for row in relevance["rows"]] == [
        ("concatenated", "untrained start"),
        ("concatenated", "trained"),
        ("with product and cosine", "untrained start"),
        ("with product and cosine", "trained"),
    ]
    assert relevance["sources"] == ["derived"]
    assert sum(relevance["pairs"].values()) == 9 * relevance["queries"]


def test_the_page_holds_pictures_tables_and_what_made_it(done):
    _, output = done
    page = (output / PAGE).read_text(encoding="utf-8")
    assert page.count("<svg") == 3  # the map and two densities
    assert "Products by aisle: image-text, trained" in page
    assert "Cosines by relevance: untrained start" in page
    assert "made up for tests" in page
    assert "indirectly seen" in page
    assert "the command" in page
    assert "fake-0.2" in page
    assert "scikit-learn" in page
    assert "wine (3)" in page
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_without_aisles_it_does_the_other_task(tmp_path: Path, capfd):
    data = write_dataset(tmp_path / "data", aisles=False, images=False)
    document = product_tasks(
        data, tmp_path / "out", trained=None, untrained=FakeEncoder(0.1), seeds=1
    )
    assert document["aisle"] is None
    assert document["skipped"] == [module._NO_AISLES]
    assert "No aisle prediction" in capfd.readouterr().err
    page = (tmp_path / "out" / PAGE).read_text()
    assert page.count("<svg") == 1
    assert "No aisle prediction" in page
    assert document["relevance"]["differences"] == []


def test_without_relevance_it_does_the_other_task(tmp_path: Path):
    data = write_dataset(tmp_path / "data", relevance=False, images=False)
    document = product_tasks(
        data,
        tmp_path / "out",
        trained=FakeModel(0.1),
        untrained=FakeEncoder(0.3, reads_images=False),
        seeds=1,
    )
    assert document["relevance"] is None
    assert document["skipped"] == [module._NO_PAIRS]
    # Without images nothing is made of images only; a text encoder makes one row.
    assert [(row["encoder"], row["embedding"]) for row in document["aisle"]["rows"]] == [
        ("trained", "image-text"),
        ("untrained start", "text only"),
        ("trained", "text only"),
    ]


def test_with_neither_it_refuses_and_writes_nothing(tmp_path: Path):
    data = write_dataset(tmp_path / "data", aisles=False, relevance=False)
    with pytest.raises(BadInputError, match="nothing to do"):
        product_tasks(data, tmp_path / "out", trained=None, untrained=FakeEncoder(0.1))
    with pytest.raises(BadInputError, match="seeds must be 1 or more, got 0"):
        product_tasks(data, tmp_path / "out", trained=None, untrained=FakeEncoder(0.1), seeds=0)
    assert not (tmp_path / "out").exists()


def test_pairs_are_those_of_queries_that_the_model_has_not_seen(dataset: Path, tmp_path: Path):
    catalog = read_catalog(dataset)
    seen = [f"{AISLES[q % len(AISLES)]} wanted {q}" for q in range(40)]
    write_training_queries(tmp_path, seen)
    pairs = read_pairs(dataset, catalog, model=tmp_path)
    assert pairs is not None
    assert len(pairs.queries) == 20
    assert not set(pairs.queries) & set(seen)
    titles = catalog.titles.to_pylist()
    for query, product, label in zip(pairs.query, pairs.product, pairs.label, strict=True):
        same = pairs.queries[query].partition(" ")[0] == titles[product].partition(" ")[0]
        assert same == (label == 2)

    some = read_pairs(dataset, catalog, model=tmp_path, most=100)
    assert some is not None
    assert len(some.queries) == 11  # whole queries of 9 pairs
    assert len(some.query) == 99
    assert read_pairs(dataset, catalog, model=tmp_path, most=89) is None  # 9 queries are too few


def test_aisles_are_capped_and_small_ones_left_out(dataset: Path):
    catalog = read_catalog(dataset)
    task = read_aisles(catalog, most=50)
    assert task is not None
    assert len(task.rows) + sum(task.left_out.values()) == 50
    assert (np.diff(task.rows) > 0).all()
    titles = catalog.titles.to_pylist()
    for row, aisle in zip(task.rows, task.classes, strict=True):
        assert titles[row].startswith(task.names[aisle])


def test_products_are_encoded_once_in_order_with_their_images(dataset: Path):
    catalog = read_catalog(dataset)
    encoder = FakeModel(0.1)
    rows = np.array([3, 10, 11, 102])
    found = embed_products(catalog, rows, product_variants(encoder, images=True), images=True)
    titles = [catalog.titles.to_pylist()[row] for row in rows]
    np.testing.assert_array_equal(found["image-text"], encoder.encode_products(titles))
    assert found["image only"][:, 0].tolist() == [0, 0, 0, 200]  # bread, none, bread, wine
    assert found["image only"][:, 1].tolist() == [255, 0, 255, 55]


def test_the_command_reports_bad_input_in_one_sentence(tmp_path: Path, monkeypatch, capsys):
    missing, output = tmp_path / "missing", tmp_path / "out"
    monkeypatch.setattr(
        "sys.argv", ["product_tasks", "--data", str(missing), "--output", str(output)]
    )
    assert main() == 2
    assert str(missing) in capsys.readouterr().err
    assert not output.exists()
