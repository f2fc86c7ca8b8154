"""The figures of a GPU, by the same code on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import needs_gpu

from experiments import scaling_gpu, scaling_gpu_step
from experiments.scaling_gpu_step import Options, lookup_bytes, measure_device
from experiments.scaling_results import ScalingConfig
from experiments.scaling_step import make_ranker, make_records
from experiments.synthetic_world import schema
from features.batch import RequestBatch


def options(**changes: object) -> Options:
    small = {
        "device": "cpu",
        "batch_rows": 960,
        "rows": 9_600,
        "products": 500,
        "dimension": 8,
        "history": 5,
        "tables": "frozen",
        "on_device": 1.0,
        "threads": 1,
        "rounds": 1,
    }
    return Options(**small | changes)


def check_figures(found: dict[str, Any]) -> None:
    assert found["rows_per_second"] > 1_000
    assert found["step_rows_per_second"] > 1_000
    for part, speed in (("lookup", "bytes_per_second"), ("dense", "operations_per_second")):
        assert found[part]["share"] == found[part][speed] / found[part]["peak"]
        assert 0 < found[part]["share"] < 1.5


@pytest.mark.parametrize("tables", ["frozen", "fine-tuned"])
def test_a_device_is_measured(tables: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scaling_gpu_step._COPIED_BYTES, "cpu", 1 << 22)
    monkeypatch.setitem(scaling_gpu_step._MATRIX, "cpu", 256)
    monkeypatch.setattr(scaling_gpu_step, "_CALLS", 1)
    found = measure_device(options(tables=tables))
    check_figures(found)
    assert found["device"].endswith("threads")


@needs_gpu
@pytest.mark.parametrize("tables", ["frozen", "fine-tuned"])
@pytest.mark.parametrize("on_device", [1.0, 0.1])
def test_a_gpu_is_measured(tables: str, on_device: float) -> None:
    found = measure_device(
        options(
            device="cuda",
            tables=tables,
            on_device=on_device,
            products=2_000_000,
            dimension=64,
            rows=96_000,
        )
    )
    check_figures(found)
    assert sum(found["places"].values()) > 2
    assert (set(found["places"]) == {"device"}) == (on_device == 1)


def test_bytes_of_a_lookup_by_hand() -> None:
    """2 requests of 24 candidates with 5 purchases each, 8 float16 numbers a row."""
    records = make_records(scaling_gpu_step._sizes(options(rows=48)))
    ranker = make_ranker(scaling_gpu_step._sizes(options()), records)
    batch = ranker.encode(RequestBatch.from_records(records, schema()))
    read = (48 + 10 + 2) * 8 * 2
    written = (48 + 2 + 2) * 8 * 4
    assert lookup_bytes(batch, ranker) == read + written


def test_time_is_of_one_call() -> None:
    calls: list[int] = []
    taken = scaling_gpu_step.seconds(lambda: calls.append(1), torch.device("cpu"), rounds=2)
    assert len(calls) == 3 * 5
    assert 0 < taken < 1e-3


CONFIG = ScalingConfig(output=Path(), impressions=1, seed=0, data=Path(), threads=1)


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    part = scaling_gpu.measure(CONFIG)
    assert [(check.name, check.measured) for check in part.checks] == [("GPU", "none at hand")]
    assert part.checks[0].passed


def test_the_part_compares_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = iter(range(100))

    def run(device: str, batch: int, tables: str, on_device: float, *, threads: int) -> Any:
        speed = 100.0 * (1 if device == "cpu" else 8) * on_device * (1 + next(turns) // 6)
        return {
            "device": f"a {device}",
            "rows_per_second": speed,
            "step_rows_per_second": 2 * speed,
            "lookup": {"share": 0.5},
            "dense": {"share": 0.25},
        }

    monkeypatch.setattr(scaling_gpu, "_has_gpu", lambda: True)
    monkeypatch.setattr(scaling_gpu, "_run", run)
    part = scaling_gpu.measure(CONFIG)
    found = {check.name: check.measured for check in part.checks}
    assert found["GPU"] == "a cuda"
    assert found["cpu: rows/s"] == 200  # the median of 100, 200 and 300
    assert found["gpu, large batches: rows/s of steps, without reading"] == 3_200
    assert found["gpu over cpu, steps"] == 8
    assert found["tables beyond memory over tables in it, steps"] == pytest.approx(0.1)
    assert part.figures["contestants"]["gpu"]["lookup"] == {"share": 0.5}
