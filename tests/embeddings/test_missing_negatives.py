"""Tuples that have fewer negatives than others: what `SamplingConfig.proxies` leaves out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_dashclip import tiny_catalog, tiny_start

from embeddings.alignment import Alignment
from embeddings.catalog import read_catalog
from embeddings.config import AlignmentConfig, DashClipTraining
from embeddings.corpus import Corpus
from embeddings.freezing import freeze
from embeddings.losses import product_query_contrast
from embeddings.relevance import Relevance, read_relevance
from embeddings.sampling import SamplingConfig, TupleSampler

IR, MR, HR = 0, 1, 2


def sampler_of(judged, **config):
    """Return a sampler without proxies of {(query, product): label}."""
    pairs = sorted(judged)
    relevance = Relevance(
        queries=[f"query {number}" for number in range(1 + max(query for query, _ in pairs))],
        query=np.array([query for query, _ in pairs], np.int32),
        product=np.array([product for _, product in pairs], np.int64),
        label=np.array([judged[pair] for pair in pairs], np.int8),
    )
    aisles = np.arange(1 + max(product for _, product in pairs), dtype=np.int32)
    return TupleSampler(relevance, aisles, SamplingConfig(proxies=False, **config), seed=0)


def rows(sampler):
    return [
        row
        for block in sampler.blocks(0)
        for row in zip(
            block.product.tolist(), block.positive.tolist(), block.negative.tolist(), strict=True
        )
    ]


@given(
    st.dictionaries(
        st.tuples(st.integers(0, 11), st.integers(0, 5)), st.sampled_from([IR, MR, HR]), min_size=1
    )
)
@settings(max_examples=100, deadline=None)
def test_without_proxies_every_negative_was_judged(judged):
    if set(judged.values()) == {IR}:
        return
    for product, positive, negatives in rows(sampler_of(judged, negatives=3)):
        below = {IR, MR} if judged[positive, product] == HR else {IR}
        pool = {query for (query, of), label in judged.items() if of == product and label in below}
        found = [query for query in negatives if query != -1]
        assert len(negatives) == 3
        assert len(set(found)) == len(found) == min(3, len(pool))
        assert set(found) <= pool


def test_ten_irrelevant_queries_stay_ten():
    judged = {(query, 0): IR for query in range(10)} | {(10, 0): HR, (11, 1): HR}
    found = {product: negatives for product, _, negatives in rows(sampler_of(judged))}
    assert sorted(found[0]) == list(range(10))
    assert found[1] == [-1] * 10


def test_a_product_that_all_queries_are_relevant_to_needs_no_proxy():
    assert rows(sampler_of({(0, 0): HR, (1, 0): MR}, negatives=1)) == [(0, 0, [1]), (0, 1, [-1])]


def test_the_loss_masks_what_is_missing():
    cosine = torch.tensor([[0.5, 0.1, 0.3], [0.2, 0.9, 0.4]], requires_grad=True)
    positive, negatives = torch.tensor([0, 1]), torch.tensor([[2, -1], [-1, -1]])
    loss = product_query_contrast(cosine, positive, negatives, 0.1)
    # Row 0: -log(e^5 / (e^5 + e^3)); row 1 has nothing to tell its positive from.
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-2)), 0.0])
    loss.sum().backward()
    share = math.exp(-2) / (1 + math.exp(-2)) / 0.1
    assert cosine.grad[0].tolist() == pytest.approx([-share, 0, share])
    assert cosine.grad[1].tolist() == [0, 0, 0]


def test_shared_negatives_are_untouched_by_missing_ones():
    cosine = torch.tensor([[0.5, 0.1, 0.3]])
    shared = torch.tensor([[False, True, True]])
    found = product_query_contrast(
        cosine, torch.tensor([0]), torch.tensor([[2, -1]]), 1.0, shared=shared
    )
    # The positive 0.5 against its own negative 0.3 and the shared 0.1, each of them once.
    assert found.item() == pytest.approx(math.log(1 + math.exp(-0.2) + math.exp(-0.4)))


def test_the_stage_trains_on_tuples_with_fewer_negatives(tmp_path):
    data = tiny_catalog(tmp_path / "data", images=False)
    start = tiny_start(images=False)
    catalog = read_catalog(data)
    relevance = read_relevance(data, catalog)
    config = AlignmentConfig(
        sampling=SamplingConfig(negatives=40, proxies=False),
        shared_negatives=False,
        symmetric=False,
        mined_products=0,
    )
    depth = freeze(start.model, config.frozen_layers, Alignment.name)
    corpus = Corpus(catalog, start, DashClipTraining(), tmp_path / "work", False)
    sampler = TupleSampler(relevance, catalog.aisles(), config.sampling, seed=0)
    queries = corpus.queries(start.model, depth, relevance.queries)
    stage = Alignment(start.model, config, corpus.products(start.model, depth), queries, sampler)
    batch = next(stage.batches(0, 8))
    assert (batch[2] == -1).any(axis=1).all()
    loss, figures = stage.loss(batch, epoch=0.0, seed=0)
    # The same tuple by tuple, with what is there and nothing else.
    alone = []
    for product, positive, negative, mined in zip(*batch, strict=True):
        known = negative[negative >= 0][None]
        one = product[None], positive[None], known, mined[None]
        alone.append(stage.loss(one, epoch=0.0, seed=0)[0])
    assert loss.item() == pytest.approx(torch.stack(alone).mean().item(), rel=1e-5)
    assert figures["loss"] == pytest.approx(loss.item())
