"""The parts of the serving benchmark, by numbers that are checked by hand."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_ranker import tiny_batch, tiny_ranker

from experiments.serving_cases import FETCHED, FUSED, QUICK, THIN, Case, Plan, find_case
from experiments.serving_document import fetching_over_dense, headline
from experiments.serving_models import FetchedRanker, dense_arguments
from experiments.serving_roofline import (
    Rates,
    Work,
    bytes_of_row,
    from_json,
    limit,
    matrix_products,
    to_json,
)
from experiments.serving_timing import closed_loop, latencies, open_loop
from experiments.serving_workload import FeaturePool, Ranks, RequestSource, grown_ids, grown_table
from ranking.pretrained_embeddings import PretrainedTable
from serving.embedding_table import TABLE_DTYPES, EmbeddingTable
from serving.online_ranker import OnlineRanker


def source(rows=50, seed=0):
    pool = FeaturePool.of(tiny_batch([3, 5], [0, 0]))
    return RequestSource(pool, np.arange(rows) + 1000, np.arange(rows) + 9000, seed)


class TestCases:
    def test_the_compared_ways_are_measured_in_all_shapes_and_under_load(self):
        plan = Plan(candidates=(1, 100), histories=(0, 300), loads=(0.5,))
        cases = plan.cases([FUSED, THIN])
        fused = [case for case in cases if case.variant == FUSED]
        assert [(c.candidates, c.history, c.popularity, c.load) for c in fused] == [
            (1, 0, "zipf", None),
            (100, 0, "zipf", None),
            (1, 300, "zipf", None),
            (100, 300, "zipf", None),
            (100, 300, "uniform", None),
            (100, 300, "zipf", 0.5),
        ]
        assert [(c.candidates, c.history, c.popularity) for c in cases if c.variant == THIN] == [
            (100, 300, "zipf"),
            (100, 300, "uniform"),
        ]

    def test_every_case_has_a_name_of_its_own(self):
        cases = Plan().cases([FUSED, FETCHED, THIN])
        assert len({case.key for case in cases}) == len(cases)

    def test_find_case_takes_zipf_and_no_load_unless_told_otherwise(self):
        cases = [case.about() for case in QUICK.cases([FUSED, FETCHED])]
        found = find_case(cases, FETCHED, (100, 300))
        assert found == Case(variant=FETCHED, candidates=100, history=300).about()
        assert find_case(cases, FETCHED, (100, 300), popularity="uniform")["load"] is None
        assert find_case(cases, THIN, (100, 300)) is None


class TestWorkload:
    def test_requests_have_the_shape_asked_for_and_known_ids(self):
        for batch in source().draw(7, 40, "zipf", 20):
            assert batch.lengths.tolist() == [7]
            assert batch.history_lengths.tolist() == [40]
            assert len(set(batch.product.tolist())) == 7
            assert set(batch.product.tolist()) <= set(range(1000, 1050))
            assert set(batch.history.tolist()) <= set(range(1000, 1050))
            assert 9000 <= int(batch.query) < 9050
            assert batch.history_age.diff().min() >= 0
            assert batch.candidate_sparse.shape == (2, 7)
            assert batch.request_dense.shape == (2, 1)

    def test_the_same_seed_draws_the_same_whatever_was_drawn_before(self):
        first, second = source(), source()
        second.draw(3, 3, "uniform", 4)
        assert torch.equal(
            first.draw(5, 6, "zipf", 3)[2].product, second.draw(5, 6, "zipf", 3)[2].product
        )

    def test_zipf_draws_rank_k_in_proportion_to_one_over_k(self):
        drawn = Ranks(4, "zipf").draw(np.random.default_rng(0), 100_000)
        share = np.bincount(drawn, minlength=4) / len(drawn)
        expected = np.array([12, 6, 4, 3]) / 25
        np.testing.assert_allclose(share, expected, atol=0.01)

    def test_uniform_draws_all_alike(self):
        drawn = Ranks(4, "uniform").draw(np.random.default_rng(0), 100_000)
        np.testing.assert_allclose(np.bincount(drawn) / len(drawn), 0.25, atol=0.01)

    @pytest.mark.parametrize("popularity", ["zipf", "uniform"])
    def test_different_ranks_may_be_all_there_are_and_no_more(self, popularity):
        ranks = Ranks(30, popularity)
        drawn = ranks.draw_different(np.random.default_rng(1), 30)
        assert sorted(drawn) == list(range(30))
        with pytest.raises(ValueError, match="31 different ranks of 30"):
            ranks.draw_different(np.random.default_rng(1), 31)

    def test_a_grown_table_keeps_its_rows_and_gains_random_ones_of_their_length(self):
        rng = np.random.default_rng(0)
        weight = (3 * rng.normal(size=(400, 16))).astype(np.float16)
        table = PretrainedTable(ids=np.arange(400), weight=weight)
        grown = grown_table(table, 2000, 0)
        assert grown.weight.dtype == np.float16
        assert np.array_equal(grown.weight[:400], weight)
        assert np.array_equal(grown.ids, grown_ids(table, 2000))
        assert len(set(grown.ids.tolist())) == 2000
        assert grown.weight[400:].astype(np.float32).std() == pytest.approx(3, rel=0.05)
        smaller = grown_table(table, 10, 0)
        assert smaller.ids.tolist() == list(range(10))
        assert smaller.weight.shape == (10, 16)


class TestTiming:
    def test_percentiles_are_latencies_that_occurred(self):
        found = latencies(np.arange(1, 1001, dtype=float))
        assert [found[f"p{p}_ms"] for p in (50, 90, 99, 999)] == [500, 900, 990, 999]
        assert found["mean_ms"] == 500.5
        assert found["max_ms"] == 1000
        assert found["requests"] == 1000

    def test_closed_loop_tells_stages_apart(self):
        def serve(_number):
            time.sleep(0.002)
            middle = time.perf_counter_ns()
            time.sleep(0.001)
            return [middle, time.perf_counter_ns()]

        found = closed_loop(serve, ("a", "b"), different=3, requests=20, seconds=5)
        assert found["requests"] == 20
        assert 2 <= found["stages_ms"]["a"]["p50"] < 10
        assert 1 <= found["stages_ms"]["b"]["p50"] < 9
        assert found["p50_ms"] >= 3
        assert found["cpu_ms"] < found["mean_ms"]

    def test_closed_loop_ends_in_time(self):
        def serve(_number):
            time.sleep(0.01)
            return [time.perf_counter_ns()]

        found = closed_loop(serve, ("a",), different=1, requests=10_000, seconds=0.1)
        assert 1 <= found["requests"] <= 11

    def test_open_loop_counts_the_wait_behind_a_slow_answer(self):
        served = []

        def serve(number):
            served.append(number)
            if len(served) == 100 + 50:  # after the warm-up
                time.sleep(0.3)
            return [time.perf_counter_ns()]

        found = open_loop(serve, different=7, rate=500, seconds=0.4, seed=0)
        assert found["requests"] == 200
        assert found["max_ms"] >= 300
        # One answer alone was slow, and about 150 requests were to arrive meanwhile.
        assert found["p50_ms"] > 20


class TestLimits:
    def test_products_are_those_of_the_dense_layers(self):
        ranker = tiny_ranker(purchase_history=True)
        shapes = matrix_products(ranker, tiny_batch([10], [5]))
        width, rank = ranker.dcn_tower.cross.first_layer()[0].shape[::-1]
        assert (10, rank, width) in shapes  # the second layer of the DCN tower's cross network
        assert shapes[-1] == (10, 6, 1)  # the head
        by_count = {}
        for count in (10, 20, 30):
            products = matrix_products(ranker, tiny_batch([count], [5]))
            by_count[count] = sum(m * k * n for m, k, n in products)
        # What is done once a request is paid once: candidates cost the same each.
        assert by_count[30] - by_count[20] == by_count[20] - by_count[10]

    @pytest.mark.parametrize(
        ("dtype", "size"), [("float32", 1024), ("float16", 512), ("int8", 260), ("int4", 132)]
    )
    def test_bytes_of_a_row(self, dtype, size):
        assert bytes_of_row(256, dtype) == size

    def test_bytes_of_a_row_are_those_of_the_served_table(self):
        for dtype in TABLE_DTYPES:
            table = EmbeddingTable(torch.randn(7, 16), dtype)
            assert table.weight.nbytes == 7 * bytes_of_row(16, dtype)

    def test_the_limit_by_hand(self):
        work = Work(
            weight_bytes=2_000,
            multiply_adds={10: 5_000},
            products_ms={10: 0.25},
            request_rows=3,
            candidate_rows=2,
            trained_dim=16,
            dim=256,
        )
        rates = Rates(gather={"zipf": 1e9, "uniform": 5e8}, stream=1e9, weights=4e9, square=1e8)
        found = limit(
            work, rates, candidates=10, history=5, table_dtype="int8", popularity="uniform"
        )
        assert found["row_bytes"] == 16 * 260 + 23 * 20
        assert found["rows_ms"] == pytest.approx(1e3 * 4620 / 5e8)
        assert found["weights_ms"] == pytest.approx(5e-4)
        assert found["arithmetic_ms"] == pytest.approx(0.1)
        assert found["limit_ms"] == pytest.approx(0.00924 + 0.0005 + 0.1)
        assert found["limit_at_shapes_ms"] == pytest.approx(0.00924 + 0.25)
        assert from_json(to_json(work, rates)) == (work, rates)

    def test_rates_are_measured(self):
        rates = Rates.measure(1_000, 4_096, 0)
        assert min(*rates.gather.values(), rates.stream, rates.weights, rates.square) > 1e6


class TestFetchedRanker:
    @pytest.mark.parametrize("history", [0, 4])
    def test_it_gives_the_fused_ranker_s_probabilities(self, history):
        ranker = tiny_ranker()
        batch = tiny_batch([6], [history])
        online = OnlineRanker(ranker, "float32")
        encoded = ranker.encode(batch)
        lookups = ranker.frozen_lookups(encoded)
        arguments = dense_arguments(batch, lookups["product"], lookups["query"], lookups["history"])
        with torch.no_grad():
            found = FetchedRanker(online)(*arguments)
        torch.testing.assert_close(found, ranker.score(batch), rtol=1e-5, atol=1e-6)


class TestHeadline:
    def test_ratios_by_hand(self):
        def case(variant, popularity, **measured):
            about = Case(variant=variant, candidates=100, history=300, popularity=popularity)
            return about.about() | measured

        cases = []
        for popularity in ("zipf", "uniform"):
            fused = {"p50_ms": 0.6, "p99_ms": 0.8, "limit_ms": 0.3, "limit_at_shapes_ms": 0.5}
            stages = {"fetch": {"mean": 3.0}, "decode": {"mean": 1.0}, "dense": {"mean": 0.5}}
            fetched = {"p99_ms": 4.8, "stages_ms": stages}
            cases += [case(FUSED, popularity, **fused), case(FETCHED, popularity, **fetched)]
            cases.append(case(THIN, popularity, **fetched | {"p99_ms": 1.6}))
        found = headline(cases, (100, 300))["uniform"]
        assert found["fused_p50_over_limit"] == pytest.approx(2)
        assert found["fused_p50_over_limit_at_shapes"] == pytest.approx(1.2)
        assert found["fetched_over_fused_p99"] == pytest.approx(6)
        assert found["delay_ms_to_wanted"] == 0  # 4.8 ms are more than 5 times 0.8 ms
        assert found["fetched_thin_over_fused_p99"] == pytest.approx(2)
        assert found["fetching_over_dense"] == pytest.approx(8)
        assert fetching_over_dense(cases[1]) == pytest.approx(8)


def test_a_plan_without_the_headline_s_shape_takes_its_largest():
    assert replace(QUICK, candidates=(1, 10), histories=(0, 30)).headline == (10, 30)
    assert QUICK.headline == (100, 300)
