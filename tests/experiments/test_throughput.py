"""The driver's export, commands, turns and table; contestants are tiny stand-in programs."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from experiments import throughput
from experiments.flat_table import FlatTable, Vocabularies
from features.errors import BadInputError


def options(tmp_path: Path, **given: Path | int) -> throughput.Options:
    return throughput.Options(**({"data": tmp_path, "output": tmp_path} | given))


def printing(tmp_path: Path, name: str, line: str, status: int = 0) -> throughput.Contestant:
    script = tmp_path / f"{name}.py"
    script.write_text(f"import sys\nprint('noise')\nprint({line!r})\nsys.exit({status})\n")
    return throughput.Contestant(name=name, command=(sys.executable, str(script)))


def test_export_standardises_and_fills_missing_values(tmp_path: Path) -> None:
    table = FlatTable(
        sparse=("a",),
        dense=("x", "constant"),
        codes=np.array([[1], [2], [0]], dtype=np.int32),
        values=np.array([[1, 5], [3, 5], [np.nan, 5]], dtype=np.float32),
        clicked=np.array([True, False, False]),
        lengths=np.array([3], dtype=np.int32),
        weight=np.ones(3, dtype=np.float32),
    )
    vocabularies = Vocabularies(values={"a": pa.array(["p", "q"])})
    throughput.export_rows(table, vocabularies, tmp_path / "rows.npz")
    with np.load(tmp_path / "rows.npz") as written:
        assert written["codes"].tolist() == [[1], [2], [0]]
        assert written["vocabulary"].tolist() == [3]
        assert written["clicked"].tolist() == [True, False, False]
        # Mean 2, standard deviation 1.
        assert written["dense"].tolist() == [[-1, 0], [1, 0], [0, 0]]
        assert written["dense"].dtype == np.float32


def test_contestants_get_the_same_sizes(tmp_path: Path) -> None:
    given = options(
        tmp_path, fuxictr_python=Path("fuxi"), deepctr_python=Path("deep"), cross_layers=2
    )
    found = throughput.contestants(given, tmp_path / "rows.npz", range(40, 42))
    sizes = "--embedding-dim 16 --cross-layers 2 --deep 128,64 --batch-size 8192 --threads 2"
    assert len(found) == 7
    assert all(sizes in " ".join(one.command) for one in found)
    assert "--weeks 40 41 --variant two-tower" in " ".join(found[1].command)
    scripts = {one.command[1] for one in found if one.command[0] in {"fuxi", "deep"}}
    assert {Path(script).is_file() for script in scripts} == {True}


def test_peer_without_environment_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = throughput.contestants(options(tmp_path), tmp_path / "rows.npz", range(1, 2))
    assert [one.name for one in found] == [
        "ours, dcn",
        "ours, two-tower",
        "ours, recipe",
    ]
    assert "DeepCTR-Torch DCN, matrix: left out" in capsys.readouterr().err


def test_measure_reads_the_last_line(tmp_path: Path) -> None:
    one = printing(tmp_path, "fast", json.dumps({"peer": "fast", "rows_per_second": 12}))
    assert throughput.measure(one, threads=1) == {"peer": "fast", "rows_per_second": 12.0}


@pytest.mark.parametrize(
    ("line", "status"), [("{}", 0), ("not json", 0), ("[1]", 0), ('{"rows_per_second": 1}', 3)]
)
def test_failed_contestant_is_named(tmp_path: Path, line: str, status: int) -> None:
    with pytest.raises(BadInputError, match=f"broken: .* ended with status {status}"):
        throughput.measure(printing(tmp_path, "broken", line, status), threads=1)


def test_ratios_are_of_the_first_contestants_median() -> None:
    runs = {
        "ours": [{"rows_per_second": speed} for speed in (100.0, 300.0, 200.0)],
        "peer": [{"rows_per_second": speed} for speed in (50.0, 80.0, 90.0)],
    }
    ours, peer = throughput.summarize(runs)
    assert (ours["rows_per_second"], ours["first_to_this"]) == (200, 1)
    assert (peer["rows_per_second"], peer["first_to_this"]) == (80, 2.5)


def test_contestants_take_turns_and_the_result_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [
        printing(tmp_path, name, json.dumps({"rows_per_second": speed}))
        for name, speed in (("ours", 10), ("peer", 4))
    ]
    turns: list[str] = []
    measure = throughput.measure

    def noting(one: throughput.Contestant, threads: int) -> dict[str, object]:
        turns.append(one.name)
        return measure(one, threads)

    monkeypatch.setattr(throughput, "_export", lambda _: (tmp_path / "rows.npz", range(1, 2)))
    monkeypatch.setattr(throughput, "contestants", lambda *_: both)
    monkeypatch.setattr(throughput, "measure", noting)
    throughput.run(options(tmp_path, rounds=2))
    assert turns == ["ours", "peer", "ours", "peer"]
    written = json.loads((tmp_path / "throughput.json").read_text())
    assert written["settings"]["batch_size"] == 8192
    assert [row["first_to_this"] for row in written["rows"]] == [1, 2.5]
