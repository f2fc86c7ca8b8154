from collections import Counter, defaultdict
from itertools import islice
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.relevance import Relevance
from embeddings.sampling import SamplingConfig, Tuples, TupleSampler
from features.errors import BadInputError

IR, MR, HR = 0, 1, 2


def relevance_of(judged, queries=None):
    """Return the pairs of {(query, product): label}."""
    pairs = sorted(judged)
    count = 1 + max((query for query, _ in pairs), default=0) if queries is None else queries
    return Relevance(
        queries=[f"query {number}" for number in range(count)],
        query=np.array([query for query, _ in pairs], np.int32),
        product=np.array([product for _, product in pairs], np.int64),
        label=np.array([judged[pair] for pair in pairs], np.int8),
    )


def sampler_of(judged, aisles=None, *, seed=0, queries=None, **config):
    products = 1 + max((product for _, product in judged), default=0)
    aisles = np.full(products, -1, np.int32) if aisles is None else np.array(aisles, np.int32)
    return TupleSampler(relevance_of(judged, queries), aisles, SamplingConfig(**config), seed=seed)


def rows(blocks):
    """Return (product, positive, negatives) of every tuple."""
    return [
        row
        for block in blocks
        for row in zip(
            block.product.tolist(), block.positive.tolist(), block.negative.tolist(), strict=True
        )
    ]


def by_label(judged, product, *labels):
    return {query for (query, of), label in judged.items() if of == product and label in labels}


def equal(one, other):
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("product", "positive", "negative")
    )


# What the rules say of any dataset --------------------------------------------------------------

CONFIG = {"positives": 5, "negatives": 3, "block_products": 4}  # at most 3 HR and 2 MR


@st.composite
def datasets(draw):
    queries, products = draw(st.integers(2, 12)), draw(st.integers(1, 9))
    pairs = st.tuples(st.integers(0, queries - 1), st.integers(0, products - 1))
    judged = draw(st.dictionaries(pairs, st.sampled_from([IR, MR, HR]), min_size=1, max_size=60))
    used = {query for query, _ in judged}
    for product in range(products):  # each has a query that is not relevant to it
        if used and used == by_label(judged, product, MR, HR):
            judged[min(used), product] = IR
    aisles = [draw(st.integers(-1, 2)) for _ in range(products)]
    return judged, aisles, draw(st.integers(0, 5))


def has_positives(judged):
    return any(label != IR for label in judged.values())


@given(datasets())
@settings(max_examples=150, deadline=None)
def test_positives_keep_their_rules(dataset):
    judged, aisles, seed = dataset
    if not has_positives(judged):
        return
    sampler = sampler_of(judged, aisles, seed=seed, **CONFIG)
    found = defaultdict(list)
    for product, positive, _ in rows(sampler.blocks(0)):
        found[product].append(positive)
    assert sum(map(len, found.values())) == len(sampler)
    assert set(found) == {product for (_, product), label in judged.items() if label != IR}
    for product, positives in found.items():
        assert len(set(positives)) == len(positives)
        high, moderate = (by_label(judged, product, label) for label in (HR, MR))
        expected_high = min(len(high), 3)
        most_moderate = ceil(expected_high / 2) if high else 2
        assert len(high & set(positives)) == expected_high
        assert len(moderate & set(positives)) == min(len(moderate), most_moderate)
        assert set(positives) <= high | moderate


@given(datasets())
@settings(max_examples=150, deadline=None)
def test_negatives_keep_their_rules(dataset):
    judged, aisles, seed = dataset
    if not has_positives(judged):
        return
    used = {query for query, _ in judged}
    sampler = sampler_of(judged, aisles, seed=seed, queries=20, **CONFIG)
    for product, positive, negatives in rows(sampler.blocks(0)):
        irrelevant, moderate = (by_label(judged, product, label) for label in (IR, MR))
        is_high = judged[positive, product] == HR
        pool = irrelevant | moderate if is_high else irrelevant
        relevant = by_label(judged, product, MR, HR)
        chosen = set(negatives)
        assert len(negatives) == 3
        assert positive not in chosen
        assert chosen <= used
        assert not chosen & (relevant - pool)
        if len(pool) < 3:
            assert pool <= chosen
        elif moderate & chosen:
            assert len(pool & chosen) == 3
        else:  # all three were IR: one became a proxy
            assert len(irrelevant & chosen) >= 2
        if len(chosen) < 3:  # nothing but repeating a query was left
            assert used - relevant <= chosen


@given(datasets(), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_a_resumed_epoch_goes_on_as_it_would_have(dataset, start):
    judged, aisles, seed = dataset
    if not has_positives(judged):
        return
    blocks = list(sampler_of(judged, aisles, seed=seed, **CONFIG).blocks(7))
    again = sampler_of(judged, aisles, seed=seed, **CONFIG)
    assert again.block_count == len(blocks)
    resumed = list(again.blocks(7, start))
    assert len(resumed) == max(0, len(blocks) - start)
    assert all(equal(*pair) for pair in zip(blocks[start:], resumed, strict=True))


@given(datasets())
@settings(max_examples=100, deadline=None)
def test_relevant_pairs_are_found(dataset):
    judged, aisles, _ = dataset
    if not has_positives(judged):
        return
    sampler = sampler_of(judged, aisles, queries=14)
    product, query = np.meshgrid(np.arange(len(aisles) + 2), np.arange(14), indexing="ij")
    expected = [[judged.get((q, p), IR) != IR for q in range(14)] for p in range(len(aisles) + 2)]
    assert sampler.is_relevant(product, query).tolist() == expected
    assert sampler.is_relevant(product[:, :1], np.arange(14)).tolist() == expected


# Small cases, by hand ----------------------------------------------------------------------------


def labels(product, first, *, ir=0, mr=0, hr=0):
    """Judge queries from number ``first`` on for a product: IR ones, then MR, then HR."""
    kinds = [IR] * ir + [MR] * mr + [HR] * hr
    return {(first + number, product): label for number, label in enumerate(kinds)}


def copies(judged, count):
    """Judge the queries of product 0 alike for ``count`` products."""
    return {(query, product): judged[query, 0] for query, _ in judged for product in range(count)}


def positives_of(judged, product, **config):
    chosen = {
        positive
        for of, positive, _ in rows(sampler_of(judged, **config).blocks(0))
        if of == product
    }
    return [len(chosen & by_label(judged, product, label)) for label in (HR, MR)]


@pytest.mark.parametrize(
    ("high", "moderate", "expected"),
    [
        (200, 200, [73, 37]),
        (73, 37, [73, 37]),
        (200, 5, [73, 5]),
        (10, 200, [10, 5]),
        (3, 200, [3, 2]),
        (1, 200, [1, 1]),
        (0, 200, [0, 37]),
        (0, 20, [0, 20]),
        (200, 0, [73, 0]),
    ],
)
def test_at_most_110_positives_two_to_one(high, moderate, expected):
    judged = labels(0, 0, ir=1, mr=moderate, hr=high)
    assert positives_of(judged, 0) == expected
    assert len(sampler_of(judged)) == sum(expected)


def test_the_numbers_of_other_sizes():
    for positives, high, moderate in ((110, 73, 37), (2, 1, 1), (3, 2, 1), (4, 3, 1), (6, 4, 2)):
        config = SamplingConfig(positives=positives)
        assert (config.most_high, config.most_moderate) == (high, moderate)
    for wrong in ({"positives": 1}, {"negatives": 0}, {"block_products": 0}):
        with pytest.raises(BadInputError, match="is at least"):
            SamplingConfig(**wrong)


def test_an_hr_positive_has_ir_and_mr_negatives_and_an_mr_positive_ir_ones():
    # Product 0: queries 0 to 3 IR, 4 to 5 MR, 6 HR. Product 1, elsewhere: query 9 HR.
    judged = labels(0, 0, ir=4, mr=2, hr=1) | labels(1, 9, hr=1)
    sampler = sampler_of(judged, [0, 1], negatives=5)
    for _, positive, negatives in rows(sampler.blocks(0)):
        if positive == 6:
            assert set(negatives) < {0, 1, 2, 3, 4, 5}
        elif positive in (4, 5):
            assert set(negatives) == {0, 1, 2, 3, 9}


def test_where_all_are_ir_one_becomes_a_proxy():
    judged = copies(labels(0, 0, ir=6, hr=1), 600) | labels(600, 9, hr=1)
    aisles = [0] * 600 + [1]
    left_out = Counter()
    for product, _, negatives in rows(sampler_of(judged, aisles, negatives=6).blocks(0)):
        if product < 600:
            assert 9 in negatives
            [gone] = set(range(6)) - set(negatives)
            left_out[gone] += 1
    assert sorted(left_out) == list(range(6))
    assert min(left_out.values()) > 60  # of 100


def test_proxies_are_hr_queries_of_another_aisle():
    judged = {(2 * product, product): HR for product in range(9)}
    judged |= {(2 * product + 1, product): MR for product in range(9)}
    aisles = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for product, _, negatives in rows(sampler_of(judged, aisles, negatives=3).blocks(0)):
        proxies = [query for query in negatives if judged.get((query, product)) is None]
        assert len(proxies) >= 2
        assert all(query % 2 == 0 and aisles[query // 2] != aisles[product] for query in proxies)


@pytest.mark.parametrize(
    ("aisles", "expected"),
    [
        ([0, 0, 1, -1], {2, 3}),  # a missing aisle differs from a known one
        ([-1, 0, 1, 1], {1, 2, 3}),
        ([-1, -1, 0, 0], {1, 2, 3}),
        ([-1, -1, -1, -1], {1, 2, 3}),  # where both are missing, any other product serves
        ([0, 0, 0, 0], {1, 2, 3}),  # no other aisle at all: any other product
    ],
)
def test_missing_and_lonely_aisles(aisles, expected):
    judged = {(product, product): HR for product in range(4)}
    negatives = Counter()
    for epoch in range(300):
        for product, _, [negative] in rows(sampler_of(judged, aisles, negatives=1).blocks(epoch)):
            if product == 0:
                negatives[negative] += 1
    assert set(negatives) == expected
    assert min(negatives.values()) > 200 / len(expected)


def test_mr_queries_serve_where_another_aisle_has_no_hr_query():
    judged = {(0, 0): HR, (1, 1): HR, (2, 2): MR, (3, 2): IR}
    found = {
        negative
        for epoch in range(50)
        for product, _, [negative] in rows(sampler_of(judged, [0, 0, 1], negatives=1).blocks(epoch))
        if product == 0
    }
    assert found == {2}


def test_a_product_alone_takes_any_query_that_is_not_relevant():
    judged = labels(0, 0, ir=2, hr=2)
    for _, _, negatives in rows(sampler_of(judged, negatives=4).blocks(0)):
        assert set(negatives) == {0, 1}


def test_a_proxy_is_never_relevant_to_the_product():
    # Of product 1, the only one of another aisle, all HR queries but 49 are relevant to 0 as well.
    judged = {(query, product): HR for query in range(50) for product in (0, 1)} | {(60, 2): HR}
    del judged[49, 0]
    found = rows(sampler_of(judged, [0, 1, 0], negatives=1).blocks(0))
    assert {query for product, _, [query] in found if product == 0} == {49, 60}


def test_queries_held_out_are_never_drawn():
    judged = labels(0, 10, hr=2) | labels(1, 20, hr=1)
    for _, positive, negatives in rows(sampler_of(judged, queries=1000, negatives=8).blocks(0)):
        assert {positive, *negatives} <= {10, 11, 20}


def test_nothing_to_draw_from():
    with pytest.raises(BadInputError, match="no product has a moderately or highly relevant query"):
        sampler_of(labels(0, 0, ir=5))
    with pytest.raises(BadInputError, match="no product has a moderately or highly relevant query"):
        sampler_of({})
    said = "product in row 2 has no negative query: all 2 queries to train on are relevant to it"
    with pytest.raises(BadInputError, match=said):
        sampler_of({(0, 1): HR, (1, 1): MR, (1, 0): IR})


def test_tuples_are_sliced():
    tuples = next(sampler_of(labels(0, 0, ir=1, hr=5), negatives=2).blocks(0))
    part = tuples[1:3]
    assert isinstance(part, Tuples)
    assert (len(tuples), len(part)) == (5, 2)
    assert np.array_equal(part.negative, tuples.negative[1:3])
    assert (tuples.product.dtype, tuples.positive.dtype) == (np.int64, np.int32)
    assert (tuples.negative.dtype, tuples.negative.shape) == (np.int32, (5, 2))
    assert tuples.negative.flags.c_contiguous


# What holds on average -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def large():
    """300 products in 5 aisles, some without, each with 60 of 400 queries judged."""
    random = np.random.default_rng(0)
    judged = {
        (int(query), product): int(random.choice([IR, MR, HR], p=[0.4, 0.3, 0.3]))
        for product in range(300)
        for query in random.choice(400, 60, replace=False)
    }
    return judged, random.integers(-1, 5, 300).tolist()


def test_two_high_positives_to_a_moderate_one(large):
    judged, aisles = large
    found = rows(sampler_of(judged, aisles).blocks(0))
    high = sum(judged[positive, product] == HR for product, positive, _ in found)
    assert 1.9 < high / (len(found) - high) < 2.1


def test_one_negative_of_an_mr_positive_is_a_proxy(large):
    judged, aisles = large
    irrelevant = [by_label(judged, product, IR) for product in range(300)]
    shares = defaultdict(list)
    for product, positive, negatives in rows(sampler_of(judged, aisles).blocks(0)):
        unjudged = sum((query, product) not in judged for query in negatives)
        shares[judged[positive, product]].append(unjudged)
        if len(irrelevant[product]) >= 10 and judged[positive, product] == MR:
            assert unjudged <= 1
            assert len(irrelevant[product].intersection(negatives)) >= 9
    # A proxy is one of the IR queries of its product, or of those not judged for it: 340 of 364.
    assert 0.85 < np.mean(shares[MR]) < 1.05
    assert np.mean(shares[HR]) < 0.05  # ten IR in a row are rare: (4 / 7) ^ 10


def test_proxies_come_from_other_aisles(large):
    judged, aisles = large
    judged = {pair: label for pair, label in judged.items() if label == HR}
    of_aisle = defaultdict(set)
    for query, product in judged:
        of_aisle[aisles[product]].add(query)
    found = rows(sampler_of(judged, aisles, positives=4, block_products=50).blocks(0))
    for product, _, negatives in islice(found, 200):
        others = set().union(*(of_aisle[a] for a in of_aisle if a == -1 or a != aisles[product]))
        assert set(negatives) <= others
        assert len(set(negatives)) == 10


def test_every_judged_negative_is_as_likely():
    judged = copies(labels(0, 0, ir=2, mr=13, hr=1), 1500) | labels(1500, 50, hr=1)
    seen = Counter()
    for product, positive, negatives in rows(sampler_of(judged).blocks(0)):
        if product < 1500 and judged[positive, product] == HR:
            seen.update(negatives)
    assert set(seen) == set(range(15))
    assert all(abs(count - 1000) < 100 for count in seen.values())  # 5 standard deviations


def test_every_positive_is_as_likely():
    judged = copies(labels(0, 0, ir=1, mr=6, hr=9), 900)
    found = rows(sampler_of(judged, positives=5).blocks(0))
    seen = Counter(positive for _, positive, _ in found)
    assert all(abs(seen[query] - 300) < 75 for query in range(1, 7))  # 2 of 6 MR
    assert all(abs(seen[query] - 300) < 75 for query in range(7, 16))  # 3 of 9 HR


def test_tuples_of_a_block_are_shuffled_and_epochs_differ(large):
    judged, aisles = large
    sampler = sampler_of(judged, aisles, block_products=100)
    first, second = (list(sampler.blocks(epoch)) for epoch in (0, 1))
    assert len(first) == sampler.block_count == 3
    assert sum(map(len, first)) == sum(map(len, second)) == len(sampler)
    for block in first:
        assert len(set(block.product.tolist())) == 100
        assert (np.diff(block.product) == 0).mean() < 0.1
    assert set(first[0].product.tolist()) != set(second[0].product.tolist())
    other = sampler_of(judged, aisles, block_products=100, seed=1)
    assert not equal(first[0], next(other.blocks(0)))
    assert all(map(equal, first, sampler.blocks(0)))


def test_blocks_draw_apart():
    judged = copies(labels(0, 0, ir=1, mr=6, hr=9), 20)
    one, other = sampler_of(judged, positives=5, block_products=10).blocks(0)
    assert one.positive.tolist() != other.positive.tolist()
