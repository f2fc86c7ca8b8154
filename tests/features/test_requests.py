"""Building request records: their content, resume, leakage."""

import datetime as dt
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from tiny_dataset import write_tiny_dataset

from features import duckdb_engine, record_files
from features import requests as requests_module
from features.errors import BadInputError
from features.requests import RequestsManifest, build_requests

DAY = dt.timedelta(days=1)
MONDAY = dt.datetime(2024, 1, 1)


def read_all(manifest: RequestsManifest) -> pa.Table:
    return pa.concat_tables([pq.read_table(manifest.path(week)) for week in manifest.weeks])


@pytest.fixture
def two_requests(tmp_path: Path) -> Path:
    """A dataset of two searches a week apart, with its rows out of order."""
    folder = tmp_path / "data"
    folder.mkdir()
    catalog = {"product_id": [1, 2, 3], "title": ["one", "two", "three"]}
    purchases = {
        "user_id": [7, 7, 7],
        "product_id": [3, 2, 1],
        "purchased_at": [MONDAY - DAY, MONDAY, MONDAY + 8 * DAY],
    }
    impressions = {
        "request_id": [51, 50, 51, 50, 50],
        "user_id": [7] * 5,
        "query": ["tea", "milk", "tea", "milk", "milk"],
        "product_id": [9, 3, 1, 1, 2],
        "requested_at": [MONDAY + 8 * DAY, MONDAY, MONDAY + 8 * DAY, MONDAY, MONDAY],
        "clicked": [True, False, False, False, True],
        "store": pa.array([5, 4, 5, 4, 4], pa.int16()),
        "brand": ["x", None, "y", "y", "z"],
        "price": [1.0, 2.5, float("nan"), None, 4.0],
    }
    for name, table in (
        ("catalog", catalog),
        ("purchases", purchases),
        ("impressions", impressions),
    ):
        pq.write_table(pa.table(table), folder / f"{name}.parquet")
    (folder / "dataset.toml").write_text(
        'name = "two"\n[weeks]\nfirst_day = 2023-12-25\nevaluate = 3\n'
        '[features.sparse]\nrequest = ["store"]\ncandidate = ["brand"]\n'
        '[features.dense]\ncandidate = ["price"]\n'
    )
    return folder


def test_records_of_two_requests(two_requests: Path, tmp_path: Path) -> None:
    manifest = build_requests(two_requests, tmp_path / "out")
    records = read_all(manifest)
    assert records.to_pylist() == [
        {
            "request_id": 50,
            "user_id": 7,
            "requested_at": MONDAY,
            "query": "milk",
            "purchase_history": [3],
            "purchase_age_days": [1],
            "store": 4,
            "product_id": [1, 2, 3],
            "clicked": [False, True, False],
            "brand": ["y", "z", None],
            "price": [None, 4.0, 2.5],
        },
        {
            "request_id": 51,
            "user_id": 7,
            "requested_at": MONDAY + 8 * DAY,
            "query": "tea",
            "purchase_history": [2, 3],
            "purchase_age_days": [8, 9],
            "store": 5,
            "product_id": [1, 9],
            "clicked": [False, True],
            "brand": ["y", "x"],
            "price": [None, 1.0],
        },
    ]
    assert records.schema.field("store").type == pa.int64()
    assert records.schema.field("price").type == pa.list_(pa.float32())
    assert records.schema.field("purchase_age_days").type == pa.list_(pa.int16())
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == {
        "format": 2,
        "dataset": "two",
        "fingerprint": manifest.fingerprint,
        "window_days": 84,
        "history_cap": 1000,
        "unknown_products": 1,  # product 9
        "weeks": {
            "2": {"requests": 1, "rows": 3, "positives": 1},
            "3": {"requests": 1, "rows": 2, "positives": 1},
        },
    }
    assert RequestsManifest.load(tmp_path / "out") == manifest


def test_weeks_count_from_the_first_day_without_a_calendar(
    two_requests: Path, tmp_path: Path
) -> None:
    toml = two_requests / "dataset.toml"
    toml.write_text('name = "two"\n')
    assert list(build_requests(two_requests, tmp_path / "out").weeks) == [1, 2]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "America/New_York"])
def test_any_precision_and_zone_of_timestamps(
    two_requests: Path, tmp_path: Path, unit: str, zone: str | None
) -> None:
    expected = read_all(build_requests(two_requests, tmp_path / "expected"))
    for name, column in (("purchases", "purchased_at"), ("impressions", "requested_at")):
        path = two_requests / f"{name}.parquet"
        table = pq.read_table(path)
        instants = pc.assume_timezone(table[column], "UTC").cast(pa.timestamp(unit, zone or "UTC"))
        times = instants if zone else instants.cast(pa.timestamp(unit))
        pq.write_table(table.set_column(table.column_names.index(column), column, times), path)
    assert read_all(build_requests(two_requests, tmp_path / "out")).equals(expected)


def test_folders_of_files(two_requests: Path, tmp_path: Path) -> None:
    expected = read_all(build_requests(two_requests, tmp_path / "expected"))
    for name in ("purchases", "impressions"):
        path = two_requests / f"{name}.parquet"
        table = pq.read_table(path)
        path.unlink()
        path.mkdir()
        pq.write_table(table.slice(0, 2), path / "b.parquet")
        columns = table.column_names[::-1]
        pq.write_table(table.slice(2).select(columns), path / "a.parquet")
        (path / "_SUCCESS").touch()
    assert read_all(build_requests(two_requests, tmp_path / "out")).equals(expected)


def test_no_purchases_at_all(two_requests: Path, tmp_path: Path) -> None:
    path = two_requests / "purchases.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    records = read_all(build_requests(two_requests, tmp_path / "out"))
    assert records["purchase_history"].to_pylist() == [[], []]


def test_order_and_row_groups(tmp_path: Path) -> None:
    data = write_tiny_dataset(tmp_path / "data", requests=2500, weeks=1)
    manifest = build_requests(data, tmp_path / "out")
    file = pq.ParquetFile(manifest.path(1))
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert groups == [1024, 1024, 452]
    records = file.read()
    order = [("requested_at", "ascending"), ("request_id", "ascending")]
    assert records.equals(records.sort_by(order))
    assert all(ids == sorted(set(ids)) for ids in records["product_id"].to_pylist())


def test_slices_and_order_of_rows_change_nothing(
    tiny_dataset: Path, tiny_requests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shutil.copytree(tiny_dataset, tmp_path / "data")
    path = data / "impressions.parquet"
    table = pq.read_table(path)
    pq.write_table(table.sort_by([("product_id", "descending")]), path)
    monkeypatch.setattr(duckdb_engine, "_SLICE_ROWS", 90)
    monkeypatch.setattr(record_files, "ROW_GROUP", 8)
    shuffled = read_all(build_requests(data, tmp_path / "out"))
    assert shuffled.equals(read_all(RequestsManifest.load(tiny_requests)))


def test_counts_and_candidates_are_those_of_the_impressions(
    tiny_dataset: Path, tiny_requests: Path
) -> None:
    manifest = RequestsManifest.load(tiny_requests)
    records = read_all(manifest)
    rows = pq.read_table(tiny_dataset / "impressions.parquet")
    rows = rows.sort_by([("request_id", "ascending"), ("product_id", "ascending")])
    assert sum(c.requests for c in manifest.weeks.values()) == 600 == records.num_rows
    assert sum(c.rows for c in manifest.weeks.values()) == rows.num_rows
    assert sum(c.positives for c in manifest.weeks.values()) == pc.sum(rows["clicked"]).as_py()
    records = records.sort_by("request_id")
    for name in ("product_id", "clicked", "brand", "price", "title_match"):
        assert pc.list_flatten(records[name]).combine_chunks() == rows[name].combine_chunks(), name


def test_the_future_changes_nothing(
    tiny_dataset: Path, tiny_requests: Path, tmp_path: Path
) -> None:
    """Purchases and impressions at or after a cut are removed, altered and moved."""
    cut = MONDAY + 21 * DAY  # the start of week 4
    data = shutil.copytree(tiny_dataset, tmp_path / "data")
    path = data / "purchases.parquet"
    purchases = pq.read_table(path)
    before = pc.less(purchases["purchased_at"], pa.scalar(cut))
    later = purchases.filter(pc.invert(before)).slice(20)
    product = later.column_names.index("product_id")
    later = later.set_column(product, "product_id", pc.add(later["product_id"], 7))
    at_the_cut = later.set_column(2, "purchased_at", pa.array([cut] * later.num_rows))
    pq.write_table(pa.concat_tables([later, at_the_cut, purchases.filter(before)]), path)
    path = data / "impressions.parquet"
    impressions = pq.read_table(path)
    before = pc.less(impressions["requested_at"], pa.scalar(cut))
    later = impressions.filter(pc.invert(before))
    later = later.filter(pc.less(later["product_id"], 1200))
    clicked = later.column_names.index("clicked")
    later = later.set_column(clicked, "clicked", pc.invert(later["clicked"]))
    pq.write_table(pa.concat_tables([impressions.filter(before), later]), path)

    changed = build_requests(data, tmp_path / "out")
    for week in (1, 2, 3):
        kept = RequestsManifest.load(tiny_requests).path(week)
        assert changed.path(week).read_bytes() == kept.read_bytes()
    assert changed.path(4).read_bytes() != (tiny_requests / "week-0004.parquet").read_bytes()


KILLED_BUILD = """
import os, signal, sys
from pathlib import Path
from features.requests import build_requests

def kill(done, total):
    os.kill(os.getpid(), signal.SIGKILL)

build_requests(Path(sys.argv[1]), Path(sys.argv[2]), progress=kill)
"""


def test_a_killed_build_carries_on(tiny_dataset: Path, tiny_requests: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    root = Path(requests_module.__file__).parent.parent
    command = [sys.executable, "-c", KILLED_BUILD, str(tiny_dataset), str(output)]
    assert subprocess.run(command, cwd=root, check=False).returncode == -signal.SIGKILL
    with pytest.raises(BadInputError, match="no finished request records"):
        RequestsManifest.load(output)
    kept = {path: path.stat().st_mtime_ns for path in output.glob("week-*.parquet")}
    assert kept
    (output / ".week-0005.parquet.partial-1").touch()

    seen: list[tuple[int, int]] = []
    build_requests(tiny_dataset, output, progress=lambda *counts: seen.append(counts))
    assert seen == [(done, 6) for done in range(len(kept) + 1, 7)]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    expected = sorted(path.name for path in tiny_requests.iterdir())
    assert sorted(path.name for path in output.iterdir()) == expected
    for name in expected:
        assert (output / name).read_bytes() == (tiny_requests / name).read_bytes()


def test_weeks_of_another_build_are_not_kept(
    tiny_dataset: Path, tiny_requests: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_requests(tiny_dataset, output, window_days=7, progress=stop)
    build_requests(tiny_dataset, output)
    for path in tiny_requests.iterdir():
        assert (output / path.name).read_bytes() == path.read_bytes()


def test_a_complete_build_is_left_as_it_is_and_other_options_replace_it(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    first = build_requests(tiny_dataset, output)
    written = first.path(6).stat().st_mtime_ns

    def fail(done: int, total: int) -> None:
        pytest.fail("nothing is left to do")

    assert build_requests(tiny_dataset, output, progress=fail) == first
    assert first.path(6).stat().st_mtime_ns == written
    capped = build_requests(tiny_dataset, output, history_cap=1)
    assert capped.history_cap == 1
    assert pc.max(pc.list_value_length(read_all(capped)["purchase_history"])).as_py() == 1
    assert build_requests(tiny_dataset, output) == first
    first.path(6).unlink()
    assert build_requests(tiny_dataset, output).path(6).is_file()


def test_records_of_another_format_are_not_read_and_are_built_anew(
    tiny_dataset: Path, tiny_requests: Path, tmp_path: Path
) -> None:
    """A folder as it was written before ages were recorded: no format, no ages."""
    output = shutil.copytree(tiny_requests, tmp_path / "out")
    manifest = json.loads((output / "manifest.json").read_text())
    del manifest["format"]
    (output / "manifest.json").write_text(json.dumps(manifest))
    for path in output.glob("week-*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(["purchase_age_days"]), path)

    with pytest.raises(BadInputError) as caught:
        RequestsManifest.load(output)
    assert str(caught.value) == (
        f"{output / 'manifest.json'}: the request records have format 1, expected 2; build them "
        "again with build-features"
    )
    assert build_requests(tiny_dataset, output).format == 2
    for path in tiny_requests.iterdir():
        assert (output / path.name).read_bytes() == path.read_bytes()


def test_unfinished_weeks_of_another_format_are_not_kept(
    tiny_dataset: Path, tiny_requests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as earlier:
        earlier.setattr(requests_module, "FORMAT", 1)
        with pytest.raises(KeyboardInterrupt):
            build_requests(tiny_dataset, output, progress=stop)
    for path in output.glob("week-*.parquet"):
        path.write_bytes(b"")
    build_requests(tiny_dataset, output)
    for path in tiny_requests.iterdir():
        assert (output / path.name).read_bytes() == path.read_bytes()


def test_changed_labels_replace_the_records(two_requests: Path, tmp_path: Path) -> None:
    first = build_requests(two_requests, tmp_path / "out")
    path = two_requests / "impressions.parquet"
    table = pq.read_table(path)
    position = table.column_names.index("clicked")
    pq.write_table(table.set_column(position, "clicked", pc.invert(table["clicked"])), path)
    second = build_requests(two_requests, tmp_path / "out")
    assert second.fingerprint != first.fingerprint
    assert second.weeks[2].positives == 2


def test_options_below_one_and_unknown_weeks_are_refused(
    two_requests: Path, tmp_path: Path
) -> None:
    for option in ("window_days", "history_cap"):
        with pytest.raises(BadInputError, match=f"{option} must be 1 or more, got 0"):
            build_requests(two_requests, tmp_path / "out", **{option: 0})
    with pytest.raises(BadInputError, match=r"catalog.parquet: is a file, expected a folder"):
        build_requests(two_requests, two_requests / "catalog.parquet")
    manifest = build_requests(two_requests, tmp_path / "out")
    with pytest.raises(BadInputError, match="holds no week 4; it holds weeks 2 to 3"):
        manifest.path(4)


def test_a_foreign_manifest_is_not_overwritten(two_requests: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "something else"}')
    with pytest.raises(BadInputError, match="not a manifest of request records"):
        build_requests(two_requests, tmp_path)
    assert (tmp_path / "manifest.json").read_text() == '{"name": "something else"}'
