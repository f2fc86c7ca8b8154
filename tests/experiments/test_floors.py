"""The flat table against hand-made records, and floors that find a planted effect."""

import datetime as dt
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from experiments import floors
from experiments.flat_table import FlatTable, Vocabularies
from experiments.hashed_logistic import BUCKET_BITS, FeatureHasher, HashedLogistic, fit_tuned
from features.errors import BadInputError
from features.manifest import FORMAT, RequestsManifest
from features.sampling import sample_requests
from features.schema import DatasetSchema
from ranking.run import TrainingData

SCHEMA = """
name = "tiny"
[weeks]
first_day = 2017-01-02
evaluate = 4
train = 3
[features.sparse]
request = ["store"]
candidate = ["product", "brand"]
[features.dense]
request = ["spend"]
candidate = ["price"]
"""

# One entry a request: store, spend, and per candidate (product, brand, price, clicked).
Request = tuple[int, float, list[tuple[int, str | None, float | None, bool]]]

WEEK_1: list[Request] = [
    (7, 0.5, [(5, "b", 1.0, True), (9, "a", 2.0, False)]),
    (8, 1.5, [(5, "b", None, False)]),
]
WEEK_2: list[Request] = [(7, 2.5, [(5, "new", 3.0, False), (77, None, 4.0, True)])]


def write_records(folder: Path, weeks: dict[int, list[Request]]) -> RequestsManifest:
    folder.mkdir(parents=True)
    (folder.parent / "dataset.toml").write_text(SCHEMA)
    counts = {}
    for week, requests in weeks.items():
        products, brands, prices, clicked = (
            [[candidate[i] for candidate in request[2]] for request in requests] for i in range(4)
        )
        table = pa.table(
            {
                "request_id": pa.array(range(len(requests)), pa.int64()),
                "requested_at": pa.array([dt.datetime(2017, 1, 2)] * len(requests)),
                "store": pa.array([request[0] for request in requests], pa.int64()),
                "spend": pa.array([request[1] for request in requests], pa.float64()),
                "product": pa.array(products, pa.list_(pa.int64())),
                "clicked": pa.array(clicked, pa.list_(pa.bool_())),
                "brand": pa.array(brands, pa.list_(pa.string())),
                "price": pa.array(prices, pa.list_(pa.float64())),
            }
        )
        pq.write_table(table, folder / f"week-{week:04d}.parquet", row_group_size=2)
        flat = [click for clicks in clicked for click in clicks]
        counts[week] = {"requests": len(requests), "rows": len(flat), "positives": sum(flat)}
    manifest = {
        "format": FORMAT,
        "dataset": "tiny",
        "fingerprint": "0",
        "window_days": 84,
        "history_cap": 1000,
        "unknown_products": 0,
        "weeks": counts,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return RequestsManifest.load(folder)


def training_data(
    manifest: RequestsManifest,
    schema: DatasetSchema,
    sample: RequestsManifest | None = None,
    weeks: int = 3,
) -> TrainingData:
    """Train on the weeks before week 4, evaluate week 4."""
    return TrainingData(
        schema=schema,
        manifest=manifest,
        sample=sample or manifest,
        train=tuple(range(4 - weeks, 4)),
        validation=None,
        evaluate=4,
    )


def planted_requests(requests: int, seed: int, scale: float = 1.0) -> list[Request]:
    """Clicks are likely for products 0 to 9 of 40, and at low prices, and seldom otherwise."""
    random = np.random.default_rng(seed)
    made: list[Request] = []
    for _ in range(requests):
        products = np.sort(random.choice(40, size=8, replace=False))
        prices = random.uniform(0, 10, size=8)
        chance = 0.05 + 0.5 * (products < 10) + 0.3 * (prices < 2)
        clicks = random.random(8) < chance * scale
        rows = zip(products.tolist(), prices.tolist(), clicks.tolist(), strict=True)
        candidates = [(product, "x", price, click) for product, price, click in rows]
        made.append((int(random.integers(3)), 1.0, candidates))
    return made


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("planted") / "data"
    write_records(data / "requests", {week: planted_requests(400, week) for week in range(1, 5)})
    return data


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> tuple[RequestsManifest, RequestsManifest]:
    """Records of which about a third of the requests has a click, and a fifth of the others."""
    folder = tmp_path_factory.mktemp("sampled")
    weeks = {week: planted_requests(600, week, scale=0.2) for week in range(1, 5)}
    manifest = write_records(folder / "requests", weeks)
    sample = sample_requests(manifest, folder / "sample", keep=0.2, weeks=[1, 2, 3])
    return manifest, sample


@pytest.fixture
def schema(planted: Path) -> DatasetSchema:
    return DatasetSchema.load(planted)


def test_flat_table_repeats_the_request_for_each_candidate(
    tmp_path: Path, schema: DatasetSchema
) -> None:
    manifest = write_records(tmp_path / "requests", {1: WEEK_1, 2: WEEK_2})
    vocabularies = Vocabularies.fit(manifest, [1], schema)
    table = FlatTable.read(manifest, [1, 2], schema, vocabularies)

    assert table.sparse == ("store", "product", "brand")
    assert table.dense == ("spend", "price")
    assert table.lengths.tolist() == [2, 1, 2]
    assert table.weight.tolist() == [1] * 5
    assert table.clicked.tolist() == [True, False, False, False, True]
    # store 7 -> 1, 8 -> 2; product 5 (twice) -> 1, 9 -> 2; brand b (twice) -> 1, a -> 2.
    # Week 2 brings product 77, brand "new" and a missing brand: all unknown.
    assert table.codes.tolist() == [[1, 1, 1], [1, 2, 2], [2, 1, 1], [1, 1, 0], [1, 0, 0]]
    np.testing.assert_array_equal(
        table.values, np.array([[0.5, 1], [0.5, 2], [1.5, np.nan], [2.5, 3], [2.5, 4]])
    )
    assert (table.codes.dtype, table.values.dtype) == (np.int32, np.float32)


def test_the_weight_of_a_request_is_that_of_its_candidates(
    tmp_path: Path, schema: DatasetSchema
) -> None:
    manifest = write_records(tmp_path / "requests", {1: WEEK_1, 2: WEEK_2})
    path = manifest.path(1)
    weight = pa.array([1.0, 2.5], pa.float32())
    pq.write_table(pq.read_table(path).append_column("weight", weight), path)
    vocabularies = Vocabularies.fit(manifest, [1], schema)
    table = FlatTable.read(manifest, [2, 1], schema, vocabularies)
    assert table.weight.tolist() == [1, 1, 1, 1, 2.5]
    assert table.weight.dtype == np.float32
    assert (table.sparse, table.dense) == (("store", "product", "brand"), ("spend", "price"))


def test_vocabulary_ranks_by_frequency_and_counts_the_unknown_value(
    tmp_path: Path, schema: DatasetSchema
) -> None:
    manifest = write_records(tmp_path / "requests", {1: WEEK_1, 2: WEEK_2})
    vocabularies = Vocabularies.fit(manifest, [1, 2], schema)
    assert vocabularies.values["store"].to_pylist() == [7, 8]
    assert vocabularies.values["product"].to_pylist() == [5, 9, 77]
    assert vocabularies.values["brand"].to_pylist() == ["b", "a", "new"]
    assert vocabularies.sizes.tolist() == [3, 4, 4]


def test_missing_week_and_missing_column_are_named(tmp_path: Path, schema: DatasetSchema) -> None:
    manifest = write_records(tmp_path / "requests", {1: WEEK_1})
    with pytest.raises(BadInputError, match="holds no week 2"):
        Vocabularies.fit(manifest, [1, 2], schema)
    path = manifest.path(1)
    pq.write_table(pq.read_table(path).drop_columns(["brand"]), path)
    with pytest.raises(BadInputError, match=r"week-0001\.parquet: column 'brand' is missing"):
        Vocabularies.fit(manifest, [1], schema)


def test_hasher_gives_a_missing_value_and_each_field_their_own_bucket() -> None:
    table = FlatTable(
        sparse=("a", "b"),
        dense=("x",),
        codes=np.array([[1, 1], [1, 1], [2, 1]], dtype=np.int32),
        values=np.array([[1.0], [np.nan], [1.0]], dtype=np.float32),
        clicked=np.zeros(3, dtype=np.bool_),
        lengths=np.array([3], dtype=np.int32),
        weight=np.ones(3, dtype=np.float32),
    )
    buckets = FeatureHasher.fit(table).transform(table)
    assert buckets.shape == (3, 3)
    assert buckets.min() >= 0
    assert buckets.max() < 1 << BUCKET_BITS
    assert len({buckets[0, 0], buckets[0, 1], buckets[0, 2]}) == 3
    assert buckets[0, 0] == buckets[1, 0] != buckets[2, 0]
    assert buckets[0, 2] == buckets[2, 2] != buckets[1, 2]


def test_hashes_spread_evenly() -> None:
    table = FlatTable(
        sparse=("a",),
        dense=(),
        codes=np.arange(10_000, dtype=np.int32)[:, None],
        values=np.empty((10_000, 0), dtype=np.float32),
        clicked=np.zeros(10_000, dtype=np.bool_),
        lengths=np.array([10_000], dtype=np.int32),
        weight=np.ones(10_000, dtype=np.float32),
    )
    buckets = FeatureHasher.fit(table).transform(table)[:, 0]
    # 10,000 values in 2^20 buckets: about 10^8 / 2^21 = 48 collide.
    assert 10_000 - len(np.unique(buckets)) < 90
    assert 0.45 < (buckets >= 1 << (BUCKET_BITS - 1)).mean() < 0.55


def test_adagrad_step_by_hand() -> None:
    model = HashedLogistic(base_rate=0.5, learning_rate=0.1)
    # Two rows share bucket 3; probabilities are 0.5, so errors are -0.5 and 0.5 and cancel there.
    ones = np.ones(2, dtype=np.float32)
    model.train_step(np.array([[3, 4], [3, 5]], dtype=np.int32), np.array([True, False]), ones)
    # Squared gradients: 1 + 0.5^2 = 1.25.
    assert model.weight[4] == pytest.approx(0.1 * 0.5 / 1.25**0.5)
    assert model.weight[5] == pytest.approx(-0.1 * 0.5 / 1.25**0.5)
    assert model.weight[3] == 0
    assert model.bias == 0
    # Both rows of the next batch have bucket 3: gradient 2 x 0.5, squares 1 + 0 + 1.
    model.train_step(np.array([[3, 6], [3, 6]], dtype=np.int32), np.array([False, False]), ones)
    assert model.weight[3] == pytest.approx(-0.1 * 1 / 2**0.5)
    assert model.bias == pytest.approx(-0.1 * 1 / 2**0.5)


def test_a_row_of_weight_2_is_the_row_twice() -> None:
    buckets = np.array([[3, 4], [3, 5], [6, 5]], dtype=np.int32)
    clicked = np.array([True, False, False])
    twice = [0, 1, 1, 2]
    weighted, repeated = (HashedLogistic(base_rate=0.3, learning_rate=0.1) for _ in range(2))
    for _ in range(3):
        weighted.train_step(buckets, clicked, np.array([1, 2, 1], dtype=np.float32))
        repeated.train_step(buckets[twice], clicked[twice], np.ones(4, dtype=np.float32))
    assert weighted.weight[3] != 0
    np.testing.assert_allclose(weighted.weight, repeated.weight, rtol=1e-5, atol=1e-7)
    assert weighted.bias == pytest.approx(repeated.bias)


def test_weights_stay_with_their_rows_in_an_epoch() -> None:
    """Rows of weight 0 in two parts of it change nothing, whatever their buckets are."""
    random = np.random.default_rng(0)
    buckets = random.integers(0, 50, (600, 2)).astype(np.int32)
    silent = np.arange(600) % 3 == 0
    buckets[silent] += 1000
    clicked = random.random(600) < 0.4
    weight = np.where(silent, 0, 1).astype(np.float32)
    model = HashedLogistic(base_rate=0.4, learning_rate=0.1)
    parts = [slice(0, 250), slice(250, 600)]
    model.train_epoch([(buckets[p], clicked[p], weight[p]) for p in parts], seed=0)
    assert model.weight[1000:].tolist() == [0.0] * (len(model.weight) - 1000)
    assert np.count_nonzero(model.weight[:50]) > 40


def test_logistic_regression_learns_the_planted_effect(
    planted: Path, schema: DatasetSchema
) -> None:
    manifest = RequestsManifest.load(planted / "requests")
    split = floors.load_split(training_data(manifest, schema))
    hasher = FeatureHasher.fit(split.train)
    model = fit_tuned(hasher, split.train, split.validation, seed=0)
    probability = model.predict(hasher.transform(split.test))
    assert roc_auc_score(split.test.clicked, probability) > 0.75


@pytest.mark.parametrize("name", list(floors.LEARNERS))
def test_learners_find_the_planted_effect_and_say_their_size(
    planted: Path, schema: DatasetSchema, name: str
) -> None:
    if name == "lightgbm":
        pytest.importorskip("lightgbm", reason="LightGBM comes with the extra 'floors'")
    data = training_data(RequestsManifest.load(planted / "requests"), schema)
    split = floors.load_split(data, seed=3, threads=1)
    probability, size = floors.LEARNERS[name](split)
    assert probability.shape == (data.manifest.weeks[4].rows,) == (3200,)
    assert roc_auc_score(split.test.clicked, probability) > 0.75
    assert probability.mean() == pytest.approx(split.test.clicked.mean(), rel=0.1)
    assert 1000 < size < 10_000_000
    assert size == 4 << BUCKET_BITS or name == "lightgbm"
    again, _ = floors.LEARNERS[name](floors.load_split(data, seed=3, threads=1))
    assert again.tolist() == probability.tolist()


@pytest.mark.parametrize("name", list(floors.LEARNERS))
def test_learners_of_a_sample_predict_the_rate_of_all_requests(
    sampled: tuple[RequestsManifest, RequestsManifest], schema: DatasetSchema, name: str
) -> None:
    """Without the weights they would predict twice as many clicks."""
    if name == "lightgbm":
        pytest.importorskip("lightgbm", reason="LightGBM comes with the extra 'floors'")
    manifest, sample = sampled
    split = floors.load_split(training_data(manifest, schema, sample))
    assert len(split.train) == sample.weeks[1].rows + sample.weeks[2].rows
    assert len(split.validation) == sample.weeks[3].rows
    assert len(split.test) == manifest.weeks[4].rows
    assert split.train.clicked.mean() > 1.7 * split.test.clicked.mean()
    probability, _ = floors.LEARNERS[name](split)
    assert probability.mean() == pytest.approx(split.test.clicked.mean(), rel=0.25)


def test_vocabularies_do_not_know_validation_and_evaluation_weeks(
    tmp_path: Path, schema: DatasetSchema
) -> None:
    late: list[Request] = [(1, 1.0, [(50, "x", 1.0, True), (51, "x", 1.0, False)])]
    weeks = {week: planted_requests(20, week) for week in (1, 2)} | {3: late, 4: late}
    manifest = write_records(tmp_path / "requests", weeks)
    split = floors.load_split(training_data(manifest, schema))
    assert split.test.codes[:, split.test.sparse.index("product")].tolist() == [0, 0]


def test_one_class_only_is_refused(tmp_path: Path, schema: DatasetSchema) -> None:
    none: list[Request] = [(1, 1.0, [(1, "x", 1.0, False)])]
    weeks = {1: planted_requests(5, 1), 2: planted_requests(5, 2), 3: none, 4: none}
    manifest = write_records(tmp_path / "requests", weeks)
    with pytest.raises(BadInputError, match="no row is clicked in weeks 3 to 3"):
        floors.load_split(training_data(manifest, schema))


def test_one_training_week_is_too_few(planted: Path, schema: DatasetSchema) -> None:
    manifest = RequestsManifest.load(planted / "requests")
    with pytest.raises(BadInputError, match=r"2 or more training weeks .*, got 1"):
        floors.load_split(training_data(manifest, schema, weeks=1))


def test_missing_lightgbm_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(BadInputError, match=r"pip install 'dashclip-ranker\[floors\]'"):
        floors.import_lightgbm()
