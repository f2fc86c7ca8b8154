"""Request records compared column by column."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from experiments.scaling_spark import compare_records
from features.manifest import RequestsManifest


def test_a_copy_is_the_same(tiny_requests: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_requests, tmp_path / "copy")
    one, other = RequestsManifest.load(tiny_requests), RequestsManifest.load(copy)
    columns = len(pq.read_schema(one.path(1)).names)
    assert compare_records(one, other) == {
        "compared": 6 * columns,
        "different": 0,
        "same_manifest": True,
        "same_bytes": 6,
    }


def test_what_differs_is_counted(tiny_requests: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_requests, tmp_path / "copy")
    one, other = RequestsManifest.load(tiny_requests), RequestsManifest.load(copy)
    columns = len(pq.read_schema(one.path(1)).names)
    table = pq.read_table(other.path(1))
    later = pc.add(table["user_id"], 1)
    pq.write_table(table.set_column(1, "user_id", later), other.path(1))
    pq.write_table(pq.read_table(other.path(2)).slice(1), other.path(2))
    ages = pq.read_table(other.path(3)).column("purchase_age_days")
    wide = ages.cast(pa.list_(pa.int32()))
    table = pq.read_table(other.path(3))
    position = table.column_names.index("purchase_age_days")
    pq.write_table(table.set_column(position, "purchase_age_days", wide), other.path(3))
    found = compare_records(one, other)
    # One column of week 1; every column of week 2; the schema of week 3.
    assert found["different"] == 1 + columns + 1
    assert found["compared"] == 5 * columns + 1
    assert found["same_bytes"] == 3
