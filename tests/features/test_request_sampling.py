"""Samples of request records: who is kept, what each counts, and when a sample is made anew."""

import datetime as dt
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.batch import RequestBatch
from features.errors import BadInputError
from features.manifest import FORMAT, RequestsManifest, WeekCounts
from features.sampling import sample_requests
from features.schema import DatasetSchema

COLUMNS = ["request_id", "requested_at", "query", "purchase_history", "product_id", "clicked"]


def write_week(folder: Path, week: int, clicks: list[list[bool]], group: int) -> WeekCounts:
    """Write a week whose requests have these clicks, one a candidate."""
    folder.mkdir(parents=True, exist_ok=True)
    number = len(clicks)
    table = {
        "request_id": pa.array(range(number), pa.int64()),
        "requested_at": pa.array([dt.datetime(2024, 1, 1)] * number, pa.timestamp("us")),
        "query": pa.array([f"query {i % 7}" for i in range(number)], pa.string()),
        "purchase_history": pa.array([[i] * (i % 3) for i in range(number)], pa.list_(pa.int64())),
        "product_id": pa.array(
            [[10 * i + place for place in range(len(c))] for i, c in enumerate(clicks)],
            pa.list_(pa.int64()),
        ),
        "clicked": pa.array(clicks, pa.list_(pa.bool_())),
    }
    pq.write_table(pa.table(table), folder / f"week-{week:04d}.parquet", row_group_size=group)
    return counts_of(clicks)


def counts_of(clicks: list[list[bool]]) -> WeekCounts:
    rows = [click for of_request in clicks for click in of_request]
    return WeekCounts(requests=len(clicks), rows=len(rows), positives=sum(rows))


def write_records(
    folder: Path, weeks: dict[int, list[list[bool]]], group: int = 100
) -> RequestsManifest:
    manifest = RequestsManifest(
        folder=folder,
        format=FORMAT,
        dataset="made-up",
        fingerprint="abc",
        window_days=84,
        history_cap=1000,
        unknown_products=0,
        weeks={week: write_week(folder, week, clicks, group) for week, clicks in weeks.items()},
    )
    manifest.save()
    return manifest


def made_up_clicks(requests: int, seed: int = 0, rate: float = 0.05) -> list[list[bool]]:
    """Requests of 0 to 6 candidates."""
    random = np.random.default_rng(seed)
    return [(random.random(n) < rate).tolist() for n in random.integers(0, 7, requests)]


@pytest.fixture
def records(tmp_path: Path) -> RequestsManifest:
    return write_records(tmp_path / "requests", {w: made_up_clicks(400, w) for w in (1, 2, 3)})


def stamps(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.iterdir())}


def test_a_sample_by_hand(tmp_path: Path) -> None:
    """Of two requests with clicks both are kept, of many without about a half."""
    clicks = [[False, True], [True], *([[False, False]] * 200)]
    manifest = write_records(tmp_path / "requests", {7: clicks})
    sample = sample_requests(manifest, tmp_path / "sample", keep=0.5, weeks=[7])
    found = pq.read_table(sample.path(7))
    assert found["request_id"].to_pylist()[:2] == [0, 1]
    assert found["weight"].to_pylist() == [1, 1, *([2] * (len(found) - 2))]
    assert 70 < len(found) - 2 < 130
    assert sample.weeks[7] == counts_of(found["clicked"].to_pylist())
    assert sample.weeks[7].positives == 2
    assert RequestsManifest.load(tmp_path / "sample") == sample


def test_clicked_requests_are_all_kept_in_order_with_their_columns(
    records: RequestsManifest, tmp_path: Path
) -> None:
    sample = sample_requests(records, tmp_path / "sample", keep=0.2, weeks=[1, 3])
    assert list(sample.weeks) == [1, 3]
    for week in (1, 3):
        whole, found = pq.read_table(records.path(week)), pq.read_table(sample.path(week))
        assert found.column_names == [*COLUMNS, "weight"]
        assert found.schema.field("weight") == pa.field("weight", pa.float32(), nullable=False)
        for name in COLUMNS:
            assert found.schema.field(name).type == whole.schema.field(name).type
        kept = found["request_id"].to_pylist()
        assert kept == sorted(set(kept))
        assert found.drop_columns(["weight"]).to_pylist() == whole.take(pa.array(kept)).to_pylist()
        clicked = [any(clicks) for clicks in whole["clicked"].to_pylist()]
        assert set(np.flatnonzero(clicked)) <= set(kept)
        assert found["weight"].to_pylist() == [1.0 if clicked[i] else 5.0 for i in kept]
        assert sample.weeks[week] == counts_of(found["clicked"].to_pylist())


@settings(deadline=None, max_examples=20)
@given(keep=st.floats(0.05, 1), week=st.integers(1, 500), rate=st.sampled_from([0.0, 0.02, 0.2]))
def test_weighted_sums_estimate_those_of_all_requests(
    tmp_path_factory: pytest.TempPathFactory, keep: float, week: int, rate: float
) -> None:
    """Within five standard deviations of a sum of independent draws."""
    folder = tmp_path_factory.mktemp("sampled")
    clicks = made_up_clicks(1000, seed=week, rate=rate)
    manifest = write_records(folder / "requests", {week: clicks})
    sample = sample_requests(manifest, folder / "sample", keep=keep, weeks=[week])
    found = pq.read_table(sample.path(week))
    weight = found["weight"].to_numpy().astype(np.float64)
    candidates = np.array([len(c) for c in found["clicked"].to_pylist()])
    unclicked = np.array([len(c) for c in clicks if not any(c)])
    for values, truth, spread in (
        (np.ones(len(weight)), len(clicks), len(unclicked)),
        (candidates, sum(map(len, clicks)), np.square(unclicked).sum()),
    ):
        deviation = np.sqrt(spread * (1 - keep) / keep)
        assert abs(weight @ values - truth) <= 5 * deviation + 1e-3
    positives = [weight[i] * sum(c) for i, c in enumerate(found["clicked"].to_pylist())]
    assert sum(positives) == manifest.weeks[week].positives


def test_everything_is_kept_with_weight_1(records: RequestsManifest, tmp_path: Path) -> None:
    sample = sample_requests(records, tmp_path / "sample", keep=1, weeks=[2])
    found = pq.read_table(sample.path(2))
    assert found["weight"].to_pylist() == [1.0] * 400
    assert found.drop_columns(["weight"]).to_pylist() == pq.read_table(records.path(2)).to_pylist()
    assert sample.weeks == {2: records.weeks[2]}


def test_a_smaller_share_keeps_part_of_what_a_larger_one_keeps(
    records: RequestsManifest, tmp_path: Path
) -> None:
    kept = []
    for keep in (0.1, 0.4):
        sample = sample_requests(records, tmp_path / f"{keep}", keep=keep, weeks=[1])
        kept.append(set(pq.read_table(sample.path(1))["request_id"].to_pylist()))
    assert kept[0] < kept[1]


def test_the_weeks_draw_each_for_itself(tmp_path: Path) -> None:
    clicks = [[False]] * 300
    manifest = write_records(tmp_path / "requests", {1: clicks, 2: clicks})
    both = sample_requests(manifest, tmp_path / "both", keep=0.5, weeks=[1, 2])
    alone = sample_requests(manifest, tmp_path / "alone", keep=0.5, weeks=[2])
    assert both.path(2).read_bytes() == alone.path(2).read_bytes()
    drawn = [pq.read_table(both.path(week))["request_id"].to_pylist() for week in (1, 2)]
    assert drawn[0] != drawn[1]


def test_row_groups_are_those_of_request_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small groups are gathered into full ones, the last one is what is left."""
    monkeypatch.setattr("features.sampling.ROW_GROUP", 10)
    manifest = write_records(tmp_path / "requests", {1: [[True]] * 33}, group=4)
    sample = sample_requests(manifest, tmp_path / "sample", keep=0.5, weeks=[1])
    with pq.ParquetFile(sample.path(1)) as file:
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert groups == [10, 10, 10, 3]
    assert pq.read_table(sample.path(1))["request_id"].to_pylist() == list(range(33))


@pytest.mark.parametrize("keep", [0.01, 1.0])
@pytest.mark.parametrize(
    "clicks",
    [
        [[]],
        [[], [True], [], [False, True], []],
        [[], [], [False]],
        [[True, False], [], [], [], [], [False]],
    ],
)
def test_requests_without_candidates(tmp_path: Path, clicks: list[list[bool]], keep: float) -> None:
    """They have no click, even next to a request that has one."""
    manifest = write_records(tmp_path / "requests", {1: clicks}, group=4)
    sample = sample_requests(manifest, tmp_path / "sample", keep=keep, weeks=[1])
    found = pq.read_table(sample.path(1))
    by_id = dict(zip(found["request_id"].to_pylist(), found["weight"].to_pylist(), strict=True))
    for request, of_request in enumerate(clicks):
        if any(of_request):
            assert by_id[request] == 1
        else:
            assert by_id.get(request, 1 / np.float32(keep)) == pytest.approx(1 / keep)
    assert sample.weeks[1] == counts_of(found["clicked"].to_pylist())


def test_a_week_that_keeps_nobody(tmp_path: Path) -> None:
    manifest = write_records(tmp_path / "requests", {1: [[False]] * 5, 2: []})
    sample = sample_requests(manifest, tmp_path / "sample", keep=1e-9, weeks=[1, 2])
    assert set(sample.weeks.values()) == {WeekCounts(requests=0, rows=0, positives=0)}
    assert len(pq.read_table(sample.path(1))) == 0


def test_the_weights_reach_the_batch(records: RequestsManifest, tmp_path: Path) -> None:
    sample = sample_requests(records, tmp_path / "sample", keep=0.25, weeks=[1])
    found = pq.read_table(sample.path(1))
    schema = DatasetSchema(name="made-up")
    batch = RequestBatch.from_records(found, schema)
    assert batch.weight.tolist() == found["weight"].to_pylist()
    assert set(batch.weight.tolist()) == {1.0, 4.0}
    whole = RequestBatch.from_records(pq.read_table(records.path(1)), schema)
    assert whole.weight.tolist() == [1.0] * 400


# When it is made anew.


def test_the_same_call_twice_writes_nothing(records: RequestsManifest, tmp_path: Path) -> None:
    first = sample_requests(records, tmp_path / "sample", keep=0.3, weeks=[2, 1])
    before = stamps(tmp_path / "sample")
    assert list(before) == ["manifest.json", "week-0001.parquet", "week-0002.parquet"]
    for weeks in ([1, 2], [2], [2, 2, 1]):
        assert sample_requests(records, tmp_path / "sample", keep=0.3, weeks=weeks) == first
    assert stamps(tmp_path / "sample") == before


def test_the_same_sample_has_the_same_bytes(records: RequestsManifest, tmp_path: Path) -> None:
    for name in ("one", "two"):
        sample_requests(records, tmp_path / name, keep=0.3, weeks=[1, 2])
    one, two = stamps(tmp_path / "one"), stamps(tmp_path / "two")
    assert {n: content for n, (_, content) in one.items()} == {n: c for n, (_, c) in two.items()}


def test_more_weeks_are_added(records: RequestsManifest, tmp_path: Path) -> None:
    sample_requests(records, tmp_path / "sample", keep=0.3, weeks=[3])
    before = stamps(tmp_path / "sample")
    sample = sample_requests(records, tmp_path / "sample", keep=0.3, weeks=[1])
    assert list(sample.weeks) == [1, 3]
    after = stamps(tmp_path / "sample")
    assert after["week-0003.parquet"] == before["week-0003.parquet"]
    assert RequestsManifest.load(tmp_path / "sample") == sample


def test_a_week_whose_file_is_gone_is_made_again(records: RequestsManifest, tmp_path: Path) -> None:
    first = sample_requests(records, tmp_path / "sample", keep=0.3, weeks=[1, 2])
    content = first.path(1).read_bytes()
    first.path(1).unlink()
    assert sample_requests(records, tmp_path / "sample", keep=0.3, weeks=[1, 2]) == first
    assert first.path(1).read_bytes() == content


@pytest.mark.parametrize(
    ("changes", "keep"),
    [
        ({}, 0.31),
        ({}, 0.30000001),
        ({"fingerprint": "other"}, 0.3),
        ({"window_days": 28}, 0.3),
        ({"history_cap": 5}, 0.3),
    ],
)
def test_a_sample_of_something_else_is_replaced(
    records: RequestsManifest, tmp_path: Path, changes: dict[str, object], keep: float
) -> None:
    output = tmp_path / "sample"
    old = sample_requests(records, output, keep=0.3, weeks=[1, 2])
    other = replace(records, **changes)
    sample = sample_requests(other, output, keep=keep, weeks=[2])
    assert list(sample.weeks) == [2]
    assert sample.fingerprint != old.fingerprint or changes.keys() & {"window_days", "history_cap"}
    assert RequestsManifest.load(output) == sample
    fresh = sample_requests(other, tmp_path / "fresh", keep=keep, weeks=[2])
    assert sample.path(2).read_bytes() == fresh.path(2).read_bytes()
    assert list(stamps(output)) == ["manifest.json", "week-0002.parquet"]


@pytest.mark.parametrize("named", [True, False])
def test_a_sample_of_another_format_is_replaced(
    records: RequestsManifest, tmp_path: Path, named: bool
) -> None:
    """The first manifests named no format."""
    output = tmp_path / "sample"
    sample_requests(records, output, keep=0.3, weeks=[1, 2])
    content = json.loads((output / "manifest.json").read_text())
    del content["format"]
    if named:
        content["format"] = FORMAT + 1
    (output / "manifest.json").write_text(json.dumps(content))
    before = stamps(output)
    sample = sample_requests(records, output, keep=0.3, weeks=[1])
    assert list(sample.weeks) == [1]
    assert RequestsManifest.load(output) == sample
    assert stamps(output)["week-0001.parquet"][0] != before["week-0001.parquet"][0]


def test_stopped_in_the_middle_it_starts_again(
    records: RequestsManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until all weeks are there, the folder holds no sample."""
    from features import sampling

    made = []

    def stop_at_the_second(*arguments: object) -> WeekCounts:
        if made:
            raise KeyboardInterrupt
        made.append(arguments)
        return sample_week(*arguments)

    sample_week = sampling._sample_week
    monkeypatch.setattr(sampling, "_sample_week", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        sample_requests(records, tmp_path / "sample", keep=0.3, weeks=[1, 2])
    monkeypatch.undo()
    with pytest.raises(BadInputError, match="holds no finished request records"):
        RequestsManifest.load(tmp_path / "sample")
    sample = sample_requests(records, tmp_path / "sample", keep=0.3, weeks=[1, 2])
    fresh = sample_requests(records, tmp_path / "fresh", keep=0.3, weeks=[1, 2])
    assert replace(sample, folder=fresh.folder) == fresh


# What is refused.


@pytest.mark.parametrize("keep", [0, -0.1, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(
    records: RequestsManifest, tmp_path: Path, keep: float
) -> None:
    with pytest.raises(BadInputError, match=rf"unclicked requests .* \(0, 1\], got {keep}"):
        sample_requests(records, tmp_path / "sample", keep=keep, weeks=[1])
    assert not (tmp_path / "sample").exists()


def test_a_missing_week_is_named_and_nothing_is_written(
    records: RequestsManifest, tmp_path: Path
) -> None:
    with pytest.raises(BadInputError, match="holds no week 9; it holds weeks 1 to 3"):
        sample_requests(records, tmp_path / "sample", keep=0.5, weeks=[1, 9])
    assert not (tmp_path / "sample").exists()


def test_a_damaged_manifest_is_named(records: RequestsManifest, tmp_path: Path) -> None:
    sample_requests(records, tmp_path / "sample", keep=0.5, weeks=[1])
    (tmp_path / "sample" / "manifest.json").write_text("{")
    with pytest.raises(BadInputError, match=r"manifest\.json: not a manifest of request records"):
        sample_requests(records, tmp_path / "sample", keep=0.5, weeks=[1])
