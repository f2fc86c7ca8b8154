"""The command that builds named datasets."""

import importlib.metadata
import json
from importlib.metadata import EntryPoint
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features import prepare_data
from features.errors import BadInputError
from features.schema import DatasetSchema

calls: list[Path | None] = []


def toy(output: Path, *, source: Path | None) -> None:
    """Two requests with three impressions, one of them clicked."""
    calls.append(source)
    when = pa.array([0, 1, 1], pa.timestamp("us"))
    pq.write_table(
        pa.table(
            {
                "request_id": [1, 2, 2],
                "user_id": [5, 5, 5],
                "query": ["tea"] * 3,
                "product_id": [1, 1, 2],
                "requested_at": when,
                "clicked": [True, False, False],
            }
        ),
        output / "impressions.parquet",
    )
    pq.write_table(pa.table({"product_id": [1, 2]}), output / "catalog.parquet")
    pq.write_table(pa.table({"product_id": [1]}), output / "purchases.parquet")
    schema = DatasetSchema(name="toy", caveat="Only a toy.")
    (output / "dataset.toml").write_text(schema.to_toml())


def graded(output: Path, *, source: Path | None) -> None:
    """Three products, one of them with an image, and graded queries; nobody searched or bought."""
    catalog = {
        "product_id": [1, 2, 3],
        "title": ["a", "b", "c"],
        "aisle": ["tea", None, "tea"],
        "image": pa.array([None, None, b"x"], pa.binary()),
    }
    pq.write_table(pa.table(catalog), output / "catalog.parquet")
    pairs = {"query": ["q", "q", "r", "r"], "product_id": [1, 2, 1, 3], "label": [2, 0, 1, 2]}
    pq.write_table(pa.table(pairs), output / "relevance.parquet")
    (output / "dataset.toml").write_text(DatasetSchema(name="graded").to_toml())


def failing(output: Path, *, source: Path | None) -> None:
    (output / "catalog.parquet").write_bytes(b"half")
    raise BadInputError("the source is odd")


@pytest.fixture(autouse=True)
def datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        def __init__(self, name: str, builder: object) -> None:
            self.name, self.builder = name, builder

        def load(self) -> object:
            return self.builder

    points = [Point("toy", toy), Point("graded", graded), Point("failing", failing)]
    monkeypatch.setattr(prepare_data, "entry_points", lambda group: points)
    calls.clear()


def test_it_writes_a_folder_with_a_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "data" / "toy"
    assert prepare_data.main(["toy", "--output", str(output)]) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert summary["impressions"] == 3
    assert summary["requests"] == 2
    assert summary["clicks"] == 1
    assert summary["click_rate"] == pytest.approx(1 / 3)
    assert (summary["products"], summary["purchases"], summary["judgements"]) == (2, 1, 0)
    assert summary["first_request"] == "1970-01-01T00:00:00"
    assert summary["caveat"] == "Only a toy."
    printed = capsys.readouterr().out
    assert "33.333%" in printed
    assert "Only a toy." in printed


def test_a_dataset_without_impressions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "graded"
    assert prepare_data.main(["graded", "--output", str(output)]) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["products"], summary["products_with_aisle"]) == (3, 2)
    assert summary["products_with_image"] == 1
    assert (summary["judgements"], summary["judged_queries"]) == (4, 2)
    assert summary["labels"] == [1, 1, 2]
    for name in ("purchases", "impressions", "requests", "clicks", "click_rate"):
        assert summary[name] == 0
    assert summary["first_request"] == summary["last_request"] == ""
    printed = capsys.readouterr().out
    assert "moderately relevant" in printed
    assert "2 (50.0%)" in printed
    assert "impressions" not in printed
    assert "purchases" not in printed


def test_an_older_summary_is_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "graded"
    assert prepare_data.main(["graded", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    (output / "summary.json").write_text('{"name": "graded", "products": 3}')
    assert prepare_data.main(["graded", "--output", str(output)]) == 0
    assert capsys.readouterr().out == printed


def test_a_standing_dataset_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "toy"
    assert prepare_data.main(["toy", "--output", str(output)]) == 0
    assert prepare_data.main(["toy", "--output", str(output)]) == 0
    assert len(calls) == 1


def test_a_source_folder_is_handed_on(tmp_path: Path) -> None:
    source = tmp_path / "source"
    arguments = ["toy", "--output", str(tmp_path / "toy"), "--source", str(source)]
    assert prepare_data.main(arguments) == 2
    source.mkdir()
    assert prepare_data.main(arguments) == 0
    assert calls == [source]


def test_another_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert prepare_data.main(["toy", "--output", str(tmp_path)]) == 2
    assert "exists and is not the dataset 'toy'" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_unknown_name_names_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare_data.main(["toyy", "--output", str(tmp_path / "x")]) == 2
    assert "no dataset is named 'toyy'; did you mean 'toy'?" in capsys.readouterr().err


def test_a_failed_build_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare_data.main(["failing", "--output", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.endswith("prepare-data: the source is odd\n")
    assert list(tmp_path.iterdir()) == []


def test_list_names_the_datasets(capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare_data.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == ["failing", "graded", "toy"]


def test_name_and_output_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare_data.main(["toy"]) == 2
    assert "prepare-data NAME --output DIR" in capsys.readouterr().err


def test_the_installed_project_offers_the_default_dataset() -> None:
    try:
        offered = importlib.metadata.distribution("dashclip-ranker").entry_points
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("dashclip-ranker is not installed")
    point = EntryPoint(
        "complete-journey", "experiments.datasets.complete_journey:build", "dashclip.datasets"
    )
    assert point in list(offered)
    assert callable(point.load())
