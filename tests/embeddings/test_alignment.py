"""Stage 2 against equation 1 of the paper, written as a loop over the tuples."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_dashclip import tiny_catalog, tiny_start, tiny_tokenizer

from embeddings.alignment import Alignment
from embeddings.catalog import read_catalog
from embeddings.config import AlignmentConfig, DashClipTraining
from embeddings.corpus import Corpus
from embeddings.dashclip_encoder import DashClipEncoder
from embeddings.freezing import freeze
from embeddings.images import decode_image
from embeddings.relevance import read_relevance
from embeddings.sampling import SamplingConfig, TupleSampler
from embeddings.stage import StageLoop
from features.errors import BadInputError

NO_IMAGE, NO_TITLE = (1, 5), (2, 5)
CONFIG = AlignmentConfig(
    temperature=0.05,
    shared_negatives=False,
    symmetric=False,
    mined_products=0,
    sampling=SamplingConfig(negatives=4, block_products=5),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage2")
    tiny_catalog(folder, products=18, without_image=NO_IMAGE, without_title=NO_TITLE)
    catalog = read_catalog(folder)
    return catalog, read_relevance(folder, catalog)


@pytest.fixture
def made(data, tmp_path):
    def make(config=CONFIG, **shape):
        catalog, relevance = data
        start = tiny_start(**shape)
        depth = freeze(start.model, config.frozen_layers, Alignment.name)
        corpus = Corpus(catalog, start, DashClipTraining(cache_gib=0), tmp_path / "work", False)
        sampler = TupleSampler(relevance, catalog.aisles(), config.sampling, seed=0)
        products = corpus.products(start.model, depth)
        queries = corpus.queries(start.model, depth, relevance.queries)
        return Alignment(start.model, config, products, queries, sampler)

    return make


def cosines(stage, data):
    """Return the cosine of every product and every query, [N, Q]."""
    catalog, relevance = data
    said = DashClipEncoder.of(stage.model, tiny_tokenizer(), "tiny", precision="float32")
    images = [image for _, _, blobs in catalog.with_images() for image in blobs]
    images = [image and decode_image(image) for image in images]
    products = said.encode_products(catalog.titles.fill_null("").to_pylist(), images)
    return products.astype(np.float64) @ said.encode_queries(relevance.queries).T


def equation_1(cosine, batch, relevant=None):
    """Return the mean over the tuples; with ``relevant`` ([N, Q]) all queries of it compete."""
    product, positive, negative, _ = batch
    used = {*positive.tolist(), *negative[negative >= 0].tolist()}
    losses = []
    for p, q, others in zip(product, positive, negative, strict=True):
        against = [n for n in others if n >= 0]
        if relevant is not None:
            against += [n for n in used - {q, *against} if not relevant[p, n]]
        near = np.exp(cosine[p, q] / 0.05)
        losses.append(-np.log(near / (near + sum(np.exp(cosine[p, n] / 0.05) for n in against))))
    return np.mean(losses)


def backwards(cosine, batch, relevant):
    """Return the mean over the tuples of finding the product of the query in the batch."""
    product, positive, _, mined = batch
    there = {*product.tolist(), *mined.reshape(-1).tolist()}
    losses = []
    for p, q in zip(product, positive, strict=True):
        near = np.exp(cosine[p, q] / 0.05)
        others = [o for o in there if not relevant[o, q]]
        losses.append(-np.log(near / (near + sum(np.exp(cosine[o, q] / 0.05) for o in others))))
    return np.mean(losses)


def relevant_pairs(data):
    catalog, relevance = data
    relevant = np.zeros((len(catalog), len(relevance.queries)), bool)
    relevant[relevance.product, relevance.query] = relevance.label >= 1
    return relevant


def batch_of(stage, size=16, epoch=0):
    """Return a batch in which all three kinds of products stand: whole, without image, title."""
    for batch in stage.batches(epoch, size):
        if {1, 2, 5} & {*batch[0].tolist()}:
            return batch
    raise AssertionError


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_loss_is_equation_1(made, data, pooling):
    stage = made(pooling=pooling)
    batch = batch_of(stage)
    loss, figures = stage.loss(batch, epoch=0.0, seed=0)
    assert loss.item() == pytest.approx(equation_1(cosines(stage, data), batch), rel=1e-4)
    assert figures == {"loss": loss.item()}


def test_tuples_with_fewer_negatives(made, data):
    stage = made()
    product, positive, negative, mined = batch_of(stage)
    negative = np.where(np.arange(4) < np.arange(16)[:, None] % 5, negative, -1)
    batch = product, positive, negative, mined
    loss, _ = stage.loss(batch, epoch=0.0, seed=0)
    expected = equation_1(cosines(stage, data), batch)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_negatives_shared_in_the_batch(made, data):
    stage = made(replace(CONFIG, shared_negatives=True))
    batch = batch_of(stage)
    cosine = cosines(stage, data)
    expected = equation_1(cosine, batch, relevant_pairs(data))
    assert stage.loss(batch, epoch=0.0, seed=0)[0].item() == pytest.approx(expected, rel=1e-4)
    assert expected > equation_1(cosine, batch)


@pytest.mark.parametrize("shared", [False, True])
def test_products_contrasted_for_a_query_too(made, data, shared):
    stage = made(replace(CONFIG, symmetric=True, shared_negatives=shared))
    batch = batch_of(stage)
    cosine, relevant = cosines(stage, data), relevant_pairs(data)
    forward = equation_1(cosine, batch, relevant if shared else None)
    expected = (forward + backwards(cosine, batch, relevant)) / 2
    assert stage.loss(batch, epoch=0.0, seed=0)[0].item() == pytest.approx(expected, rel=1e-4)


def test_batches_join_blocks_and_hold_every_tuple_but_the_last_few(made):
    stage = made()
    batches = list(stage.batches(0, 20))
    tuples = [tuple(row) for p, q, n, _ in batches for row in np.column_stack([p, q, n]).tolist()]
    drawn = [
        tuple(row)
        for block in stage._sampler.blocks(0)
        for row in np.column_stack([block.product, block.positive, block.negative]).tolist()
    ]
    assert len(batches) == stage.examples // 20 == 2
    assert tuples == drawn[: len(tuples)]
    assert len(drawn) == stage.examples
    again = list(stage.batches(0, 20))
    assert all((a == b).all() for a, b in zip(batches[0], again[0], strict=True))
    assert any((a != b).any() for a, b in zip(batches[0], next(stage.batches(1, 20)), strict=True))


def train(stage, path):
    loop = StageLoop(
        stage, stage.model, checkpoint=path, seconds=1e9, patience=0, bfloat16=False, seed=0
    )
    losses = []
    loop.run(lambda progress, figures: losses.append(figures["loss"]))
    return losses


def test_the_loss_falls(made, tmp_path):
    config = replace(CONFIG, epochs=20, batch=16, learning_rate=5e-3)
    losses = train(made(config), tmp_path / "state")
    assert np.mean(losses[-3:]) < 0.3 * np.mean(losses[:3])


def test_parts_of_a_batch_make_the_step_of_the_whole(made, tmp_path):
    config = replace(CONFIG, epochs=2, batch=32, learning_rate=1e-3)
    start, whole, parts = made().model, made(config), made(replace(config, accumulate=4))
    losses = [train(stage, tmp_path / str(i)) for i, stage in enumerate((whole, parts))]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    for (name, one), other, before in zip(
        whole.model.named_parameters(), parts.model.parameters(), start.parameters(), strict=True
    ):
        if name.endswith(("key.bias", "qkv.bias")):
            continue  # a key's bias has no gradient but rounding, which Adam makes steps of
        moved = (one - before).norm()
        assert (one - other).norm() <= 1e-3 * moved, name


def test_gradients_reach_what_is_trained_and_nothing_else(made):
    stage = made()
    stage.loss(batch_of(stage), epoch=0.0, seed=0)[0].backward()
    reached = {name for name, p in stage.model.named_parameters() if p.grad is not None}
    trained = {name for name, p in stage.model.named_parameters() if p.requires_grad}
    assert reached == trained
    for name in ("query_proj.weight", "product_proj.bias", "text_encoder.encoder.layer.2"):
        assert any(found.startswith(name) for found in reached)
    for name in ("text_proj", "itm_head", "text_encoder.embeddings", "query_encoder.embeddings"):
        assert not any(found.startswith(name) for found in reached)


def test_nothing_is_watched_nor_kept_where_nothing_is_mined(made):
    stage = made()
    assert stage.evaluate() == {}
    assert stage.state() == {}


def test_mined_products_rank_high_and_compete(made, data):
    stage = made(replace(CONFIG, symmetric=True, mined_products=2, mining_depth=3))
    batch = batch_of(stage)
    cosine, relevant = cosines(stage, data), relevant_pairs(data)
    known = stage._sampler.products
    assert batch[3].shape == (16, 2)
    for query, rows in zip(batch[1], batch[3], strict=True):
        assert {*rows.tolist()} <= {*known[np.argsort(-cosine[known, query])[:3]].tolist()}
    expected = (equation_1(cosine, batch) + backwards(cosine, batch, relevant)) / 2
    assert stage.loss(batch, epoch=0.0, seed=0)[0].item() == pytest.approx(expected, rel=1e-4)


def test_products_are_mined_once_an_epoch_and_a_resumed_one_has_them(made):
    config = replace(CONFIG, symmetric=True, mined_products=2, mining_depth=3)
    stage, resumed = made(config), made(config)
    first = list(stage.batches(1, 16))
    with torch.no_grad():
        resumed.model.query_proj.weight.neg_()  # as if it had been trained in between
    for name, tensor in stage.state().items():
        resumed.state()[name].copy_(tensor)
    for batch, again in zip(first, resumed.batches(1, 16), strict=True):
        assert (batch[3] == again[3]).all()
    assert any(
        (batch[3] != again[3]).any()
        for batch, again in zip(first, resumed.batches(2, 16), strict=True)
    )


def test_mining_needs_the_contrast_of_products():
    with pytest.raises(BadInputError, match=r"'mined_products' .* 'symmetric' only"):
        replace(CONFIG, mined_products=1)
