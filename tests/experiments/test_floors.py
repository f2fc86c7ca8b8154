"""The flat table against hand-made records, and floors that find a planted effect."""

import datetime as dt
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments import floors
from experiments.flat_table import FlatTable, Vocabularies
from experiments.hashed_logistic import BUCKET_BITS, FeatureHasher, HashedLogistic, fit_tuned
from features.errors import BadInputError
from features.manifest import FORMAT, RequestsManifest
from features.schema import DatasetSchema

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


def planted_requests(requests: int, seed: int) -> list[Request]:
    """Clicks are likely for products 0 to 9 of 40, and at low prices, and never otherwise."""
    random = np.random.default_rng(seed)
    made: list[Request] = []
    for _ in range(requests):
        products = np.sort(random.choice(40, size=8, replace=False))
        prices = random.uniform(0, 10, size=8)
        chance = 0.05 + 0.5 * (products < 10) + 0.3 * (prices < 2)
        clicks = random.random(8) < chance
        rows = zip(products.tolist(), prices.tolist(), clicks.tolist(), strict=True)
        candidates = [(product, "x", price, click) for product, price, click in rows]
        made.append((int(random.integers(3)), 1.0, candidates))
    return made


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("planted") / "data"
    write_records(data / "requests", {week: planted_requests(400, week) for week in range(1, 5)})
    return data


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
    assert table.clicked.tolist() == [True, False, False, False, True]
    # store 7 -> 1, 8 -> 2; product 5 (twice) -> 1, 9 -> 2; brand b (twice) -> 1, a -> 2.
    # Week 2 brings product 77, brand "new" and a missing brand: all unknown.
    assert table.codes.tolist() == [[1, 1, 1], [1, 2, 2], [2, 1, 1], [1, 1, 0], [1, 0, 0]]
    np.testing.assert_array_equal(
        table.values, np.array([[0.5, 1], [0.5, 2], [1.5, np.nan], [2.5, 3], [2.5, 4]])
    )
    assert (table.codes.dtype, table.values.dtype) == (np.int32, np.float32)


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
    )
    buckets = FeatureHasher.fit(table).transform(table)[:, 0]
    # 10,000 values in 2^20 buckets: about 10^8 / 2^21 = 48 collide.
    assert 10_000 - len(np.unique(buckets)) < 90
    assert 0.45 < (buckets >= 1 << (BUCKET_BITS - 1)).mean() < 0.55


def test_adagrad_step_by_hand() -> None:
    model = HashedLogistic(base_rate=0.5, learning_rate=0.1)
    # Two rows share bucket 3; probabilities are 0.5, so errors are -0.5 and 0.5 and cancel there.
    model.train_step(np.array([[3, 4], [3, 5]], dtype=np.int32), np.array([True, False]))
    # Squared gradients: 1 + 0.5^2 = 1.25.
    assert model.weight[4] == pytest.approx(0.1 * 0.5 / 1.25**0.5)
    assert model.weight[5] == pytest.approx(-0.1 * 0.5 / 1.25**0.5)
    assert model.weight[3] == 0
    assert model.bias == 0
    # Both rows of the next batch have bucket 3: gradient 2 x 0.5, squares 1 + 0 + 1.
    model.train_step(np.array([[3, 6], [3, 6]], dtype=np.int32), np.array([False, False]))
    assert model.weight[3] == pytest.approx(-0.1 * 1 / 2**0.5)
    assert model.bias == pytest.approx(-0.1 * 1 / 2**0.5)


def test_logistic_regression_learns_the_planted_effect(
    planted: Path, schema: DatasetSchema
) -> None:
    split = floors.load_split(
        RequestsManifest.load(planted / "requests"), schema, eval_week=4, weeks=3
    )
    lines: list[str] = []
    hasher = FeatureHasher.fit(split.train)
    model = fit_tuned(hasher, split.train, split.validation, seed=0, report=lines.append)
    row = floors.score("it", split.test.clicked, model.predict(hasher.transform(split.test)))
    assert row.auc > 0.75
    assert row.normalized_log_loss < 0.85
    assert "training on all weeks" in lines[-1]


def test_vocabularies_do_not_know_validation_and_evaluation_weeks(
    tmp_path: Path, schema: DatasetSchema
) -> None:
    late: list[Request] = [(1, 1.0, [(50, "x", 1.0, True), (51, "x", 1.0, False)])]
    weeks = {week: planted_requests(20, week) for week in (1, 2)} | {3: late, 4: late}
    manifest = write_records(tmp_path / "requests", weeks)
    split = floors.load_split(manifest, schema, eval_week=4, weeks=3)
    assert split.test.codes[:, split.test.sparse.index("product")].tolist() == [0, 0]


def test_command_writes_both_floors(planted: Path, tmp_path: Path) -> None:
    pytest.importorskip("lightgbm", reason="LightGBM comes with the extra 'floors'")
    floors.run(floors.Options(data=planted, output=tmp_path / "out", threads=1))
    written = json.loads((tmp_path / "out" / "floors.json").read_text())
    assert written["dataset"] == "tiny"
    assert (written["eval_week"], written["train_weeks"]) == (4, [1, 2, 3])
    assert [row["variant"] for row in written["rows"]] == ["hashed logistic regression", "LightGBM"]
    for row in written["rows"]:
        assert row["rows"] == 3200
        assert row["auc"] > 0.75
        assert 0 < row["normalized_log_loss"] < 0.9
        assert row["seconds"] >= 0


def test_score_is_one_for_the_base_rate() -> None:
    clicked = np.array([True, False, False, False])
    row = floors.score("base", clicked, np.full(4, 0.25))
    assert row.normalized_log_loss == pytest.approx(1)
    assert row.auc == 0.5


def test_one_class_only_is_refused(tmp_path: Path, schema: DatasetSchema) -> None:
    none: list[Request] = [(1, 1.0, [(1, "x", 1.0, False)])]
    weeks = {1: planted_requests(5, 1), 2: planted_requests(5, 2), 3: none, 4: none}
    manifest = write_records(tmp_path / "requests", weeks)
    with pytest.raises(BadInputError, match="no row is clicked in weeks 3 to 3"):
        floors.load_split(manifest, schema, eval_week=4, weeks=3)


def test_missing_lightgbm_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(BadInputError, match=r"pip install 'dashclip-ranker\[floors\]'"):
        floors.import_lightgbm()
