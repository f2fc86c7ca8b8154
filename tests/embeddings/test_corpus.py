from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_dashclip import tiny_catalog, tiny_model, tiny_tokenizer

from embeddings.catalog import read_catalog
from embeddings.config import DashClipTraining
from embeddings.corpus import Corpus
from embeddings.freezing import FrozenDepth
from embeddings.starts import Start
from features.errors import BadInputError

GIB = 1 << 30


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return tiny_catalog(folder, products=36, without_image=(1,), without_title=(2, 7), broken=(3,))


def corpus_of(data, model, work, **changes):
    config = replace(DashClipTraining(), **changes)
    start = Start(model=model, tokenizer=tiny_tokenizer())
    return Corpus(read_catalog(data), start, config, work, False)


def depth(title=2, query=2, image=1):
    return FrozenDepth(title=title, query=query, image=image)


def test_pairs_have_both_image_and_title(data, tmp_path):
    model = tiny_model()
    corpus = corpus_of(data, model, tmp_path)
    corpus.products(model, depth())
    train, held_out = corpus.pairs(0.3)
    assert sorted([*train, *held_out]) == [r for r in range(36) if r not in (1, 2, 3, 7)]
    assert 3 <= len(held_out) <= 17  # about 10 of 32
    assert corpus.images_read == 34
    assert corpus.faults.broken == 1
    assert len(corpus.pairs(0.0)[1]) == 0
    again = corpus_of(data, model, tmp_path)
    again.products(model, depth())
    np.testing.assert_array_equal(again.pairs(0.3)[1], held_out)


def test_no_title_is_on_both_sides(tmp_path):
    """72 products share 36 titles."""
    data = tiny_catalog(tmp_path / "data", products=72)
    model = tiny_model()
    corpus = corpus_of(data, model, tmp_path)
    corpus.products(model, depth())
    titles = read_catalog(data).titles.to_pylist()
    assert len(set(titles)) == 36
    train, held_out = ({titles[row] for row in rows} for rows in corpus.pairs(0.5))
    assert train
    assert held_out
    assert not train & held_out


def test_distinct_titles(tmp_path):
    catalog = {
        "product_id": pa.array([1, 2, 3, 4], pa.int64()),
        "title": pa.array(["red shirt", None, " red shirt ", "sock"]),
    }
    pq.write_table(pa.table(catalog), tmp_path / "catalog.parquet")
    rows, titles = corpus_of(tmp_path, tiny_model(images=False), tmp_path).distinct_titles()
    assert rows.tolist() == [0, 3]
    assert titles == ["red shirt", "sock"]


def test_titles_are_numbered_by_their_text(data, tmp_path):
    model = tiny_model(images=False)
    products = corpus_of(data, model, tmp_path).products(model, depth(image=0))
    assert products.images is None
    titles = read_catalog(data).titles.to_pylist()
    numbers = products.title_of.tolist()
    assert [number < 0 for number in numbers] == [title is None for title in titles]
    for row in (0, 5, 20):
        ids, mask = products.titles.ids(products.title_of[row : row + 1])
        assert ids[mask].tolist() == tiny_tokenizer()(titles[row])["input_ids"]


def test_what_was_computed_is_used_again(data, tmp_path):
    model = tiny_model()
    corpus = corpus_of(data, model, tmp_path)
    first = corpus.products(model, depth())
    again = corpus.products(model, depth(query=3))
    assert again.titles is first.titles
    assert again.images is first.images
    other = corpus.products(model, depth(title=1))
    assert other.titles.depth == 1
    assert corpus.products(model, depth(title=1, image=0)).images.depth == 0


def test_images_leave_titles_what_they_do_not_take(data, tmp_path):
    model = tiny_model()
    whole = corpus_of(data, model, tmp_path).products(model, depth())
    assert whole.images.bytes == 36 * 5 * 32 * 2
    images_only = (whole.images.bytes + whole.titles.bytes - 1) / GIB
    for cache_gib, kept in ((0.0, (False, False)), (images_only, (True, False))):
        corpus = corpus_of(data, model, tmp_path, cache_gib=cache_gib)
        products = corpus.products(model, depth())
        assert (products.images.bytes > 0, products.titles.bytes > 0) == kept
        rows = torch.tensor([0, 1, 2, 35])
        with torch.no_grad():
            found = products.embed(model, rows)
            torch.testing.assert_close(found, whole.embed(model, rows), rtol=0, atol=2e-2)


@torch.no_grad()
def test_queries_go_through_their_own_encoder(data, tmp_path):
    model = tiny_model()
    texts = ["red shirt", "sock", "an unknown word"]
    bank = corpus_of(data, model, tmp_path, cache_gib=0.0).queries(model, depth(), texts)
    ids = torch.tensor([tiny_tokenizer()(texts[0])["input_ids"]])
    states = model.embed_text(ids, query=True)
    states = model.run_text(states, torch.ones_like(ids), query=True)
    torch.testing.assert_close(bank.pooled(torch.tensor([0])), states.mean(1))


def test_too_many_broken_images(data, tmp_path):
    model = tiny_model()
    corpus = corpus_of(data, model, tmp_path, max_broken_images=0.02)
    with pytest.raises(BadInputError, match=r"1 of 35 images are broken, more than 2%.* 1003"):
        corpus.products(model, depth())


def test_what_was_spooled_is_removed(data, tmp_path):
    model = tiny_model()
    corpus = corpus_of(data, model, tmp_path / "work", cache_gib=0.0)
    corpus.products(model, depth())
    assert list((tmp_path / "work").glob("*.arrow"))
    corpus.close()
    assert not (tmp_path / "work").exists()
    corpus.close()
