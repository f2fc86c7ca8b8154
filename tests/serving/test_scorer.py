"""Scoring tables from Python gives what the run itself predicted."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embeddings.build import build_tables
from features.batch import RecordFiles
from features.errors import BadInputError
from features.requests import RequestsManifest
from ranking import RankerConfig, TrainingConfig, train_ranker
from ranking.bundle import Bundle
from ranking.training import predict
from serving import Scorer


@pytest.fixture(scope="module")
def scorer(tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorer")
    build_tables(tiny_dataset, folder / "tables")
    config = RankerConfig(training=TrainingConfig(batch_rows=256, threads=1))
    train_ranker(tiny_dataset, folder / "run", tables=folder / "tables", config=config)
    return Scorer.open(folder / "run" / "bundle")


@pytest.fixture(scope="module")
def tables(tiny_dataset):
    return tuple(pq.read_table(tiny_dataset / f"{n}.parquet") for n in ("impressions", "purchases"))


def test_scores_equal_the_predictions_of_the_training_code(scorer, tiny_dataset, tables):
    impressions, purchases = tables
    manifest = RequestsManifest.load(tiny_dataset / "requests")
    files = RecordFiles.open([manifest.path(week) for week in manifest.weeks])
    expected = predict(scorer.bundle.ranker, scorer.bundle.schema, files)
    records = pa.concat_tables([pq.read_table(manifest.path(week)) for week in manifest.weeks])
    flat = {
        (request, product): position
        for position, (request, product) in enumerate(
            (request, product)
            for request, products in zip(
                records["request_id"].to_pylist(), records["product_id"].to_pylist(), strict=True
            )
            for product in products
        )
    }
    keys = zip(
        impressions["request_id"].to_pylist(), impressions["product_id"].to_pylist(), strict=True
    )
    order = [flat[key] for key in keys]
    scores = scorer.score(impressions, purchases)
    np.testing.assert_allclose(scores, expected.probability[order], atol=1e-6)


def test_the_order_of_rows_and_the_kind_of_table_do_not_matter(scorer, tables):
    impressions, purchases = tables
    scores = scorer.score(impressions, purchases)
    order = np.random.default_rng(0).permutation(len(impressions))
    shuffled = impressions.take(pa.array(order)).to_pandas()
    again = scorer.score(shuffled, purchases.to_pandas())
    np.testing.assert_allclose(again, scores[order], atol=1e-6)


def test_without_purchases_the_history_is_empty_and_changes_the_scores(scorer, tables):
    impressions, purchases = tables
    without = scorer.score(impressions.drop_columns(["user_id", "requested_at", "clicked"]))
    assert np.isfinite(without).all()
    assert np.abs(without - scorer.score(impressions, purchases)).max() > 1e-4


def test_one_row_none_and_unknown_products(scorer, tables):
    impressions, purchases = tables
    assert scorer.score(impressions.slice(0, 1), purchases).shape == (1,)
    assert scorer.score(impressions.slice(0, 0), purchases).shape == (0,)
    place = impressions.schema.get_field_index("product_id")
    unknown = impressions.slice(0, 1).set_column(place, "product_id", pa.array([-5], pa.int64()))
    assert 0 < scorer.score(unknown, purchases)[0] < 1


@pytest.mark.parametrize("column", ["query", "product_id", "user_id"])
def test_a_missing_column_is_named(scorer, tables, column):
    impressions, purchases = tables
    with pytest.raises(BadInputError, match=f"impressions: column '{column}' is missing"):
        scorer.score(impressions.drop_columns([column]), purchases)
    with pytest.raises(BadInputError, match="purchases: column 'purchased_at' is missing"):
        scorer.score(impressions, purchases.drop_columns(["purchased_at"]))


def test_a_folder_without_a_bundle_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="no bundle there"):
        Bundle.open(tmp_path)
