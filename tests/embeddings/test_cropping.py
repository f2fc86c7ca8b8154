"""Title crops against plain arithmetic on what the encoder says of the same texts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_dashclip import tiny_catalog, tiny_start, tiny_tokenizer

from embeddings.catalog import read_catalog
from embeddings.config import CroppingConfig, DashClipTraining
from embeddings.corpus import Corpus
from embeddings.cropping import TitleCrops, crop
from embeddings.dashclip_encoder import DashClipEncoder
from embeddings.freezing import freeze


@given(st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=9), st.integers(0))
def test_a_crop_is_a_few_words_of_the_title_in_their_order(words, seed):
    cropped = crop(" ".join(words), np.random.default_rng(seed)).split()
    assert 1 <= len(cropped) <= min(4, len(words))
    rest = iter(words)
    assert all(word in rest for word in cropped)


def test_half_the_crops_stand_side_by_side():
    rng = np.random.default_rng(0)
    title = "a b c d e f g h i j k l"
    crops = [crop(title, rng) for _ in range(2000)]
    assert {len(c.split()) for c in crops} == {1, 2, 3, 4}
    two = [c for c in crops if len(c.split()) == 2]
    beside = np.mean([c in title for c in two])
    # Of those drawn apart 11 of 66 pairs stand side by side by chance.
    assert beside == pytest.approx(0.5 + 0.5 * 11 / 66, abs=0.08)


def test_the_loss_contrasts_titles_and_crops_both_ways(tmp_path):
    catalog = read_catalog(tiny_catalog(tmp_path, products=12, images=False, without_title=(3,)))
    start = tiny_start(images=False)
    depth = freeze(start.model, 0.5, TitleCrops.name)
    corpus = Corpus(catalog, start, DashClipTraining(cache_gib=0), tmp_path / "work", False)
    rows, titles = corpus.distinct_titles()
    assert sorted(titles) == sorted(set(catalog.titles.drop_null().to_pylist()))
    products = corpus.products(start.model, depth)
    stage = TitleCrops(
        start.model, CroppingConfig(), products, rows, titles, corpus.tokenize, seed=0
    )
    places = np.array([0, 2, 5, 7])
    loss, figures = stage.loss((places,), epoch=0.0, seed=9)
    rng = np.random.default_rng(9)
    crops = [crop(titles[place], rng) for place in places]
    said = DashClipEncoder.of(start.model, tiny_tokenizer(), "tiny", precision="float32")
    encoded = said.encode_products([titles[place] for place in places])
    cosine = encoded.astype(np.float64) @ said.encode_queries(crops).T / 0.05
    expected = [
        np.log(np.exp(side[i]).sum()) - side[i, i] for side in (cosine, cosine.T) for i in range(4)
    ]
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-4)
    assert figures == {"loss": loss.item()}
    loss.backward()
    reached = {name for name, p in start.model.named_parameters() if p.grad is not None}
    assert reached == {name for name, p in start.model.named_parameters() if p.requires_grad}


def test_an_epoch_takes_each_title_once(tmp_path):
    stage = TitleCrops(
        None, CroppingConfig(), None, np.arange(11), ["red shoe"] * 11, lambda texts: [], seed=0
    )
    epochs = [[batch[0].tolist() for batch in stage.batches(epoch, 4)] for epoch in (0, 0, 1)]
    assert epochs[0] == epochs[1] != epochs[2]
    assert [len(batch) for batch in epochs[0]] == [4, 4]
    assert len({*epochs[0][0], *epochs[0][1]}) == 8
