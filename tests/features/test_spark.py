"""Request records by Spark, in local mode: what DuckDB gives, byte for byte."""

import datetime as dt
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from features.errors import BadInputError
from features.requests import build_requests
from features.spark_engine import SparkEngine

ROOT = Path(__file__).parents[2]
COMMAND = (
    "import sys; from features.cli import main; sys.argv[0] = 'build-features'; {}sys.exit(main())"
)
NOON = dt.datetime(2024, 3, 31, 12)
DAY = dt.timedelta(days=1)
INSTANT = dt.timedelta(microseconds=1)
# A tiny dataset is through before Java has compiled anything.
QUICK = {
    "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.shuffle.partitions": "2",
    "spark.ui.enabled": "false",
}


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A session on two threads of this machine, which the engine finds and uses."""
    pytest.importorskip("pyspark", reason="Spark is not installed (the extra `spark`)")
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java 17, which is not here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        from pyspark.sql import SparkSession

        settings = {
            "spark.master": "local[2]",
            "spark.driver.memory": "1g",
            "spark.executorEnv.PYTHONPATH": str(ROOT),
            "spark.log.level": "OFF",
            "spark.ui.showConsoleProgress": "false",
        }
        builder = SparkSession.builder
        for key, value in (settings | QUICK).items():
            builder = builder.config(key, value)
        session = builder.getOrCreate()
        yield session
        session.stop()


def same_folders(found: Path, expected: Path) -> None:
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in found.iterdir()) == names
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def write(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(content), path)


@pytest.fixture
def edges(tmp_path: Path) -> Path:
    """A dataset of what is easily got wrong, in folders whose names are patterns to Spark."""
    folder = tmp_path / "a [b]{c} é%2B+d"
    bought = [
        (1, 10, NOON),  # at the request: its own basket
        (1, 11, NOON - INSTANT),
        (1, 20, NOON - DAY),
        (1, 9, NOON - DAY),  # a tie, by product
        (1, 20, NOON - DAY),  # bought twice
        (1, 12, NOON - 84 * DAY),  # the oldest that counts
        (1, 13, NOON - 84 * DAY - INSTANT),
        (2, 14, NOON - 50 * DAY),
    ]
    asked = [  # request, user, time; user 3 never bought
        (7, 1, NOON),
        (6, 1, NOON),  # a basket of two searches
        (9, 2, NOON + 12 * DAY),
        (8, 3, NOON - 20 * DAY),
        (5, 1, NOON + 84 * DAY),
    ]
    write(
        folder,
        {
            "catalog.parquet": {"product_id": [1, 2, 3], "title": ["one", "", "three"]},
            "purchases.parquet/day=2/b.parquet": {
                "user_id": pa.array([row[0] for row in bought[4:]], pa.int16()),
                "purchased_at": pa.array([row[2] for row in bought[4:]], pa.timestamp("ns")),
                "product_id": [row[1] for row in bought[4:]],
            },
            "purchases.parquet/day=1/a.parquet": {
                "user_id": [row[0] for row in bought[:4]],
                "product_id": pa.array([row[1] for row in bought[:4]], pa.uint32()),
                "purchased_at": pa.array([row[2] for row in bought[:4]], pa.timestamp("us")),
            },
        },
    )
    candidates = [(request, product) for product in (3, 1, 2) for request in asked]
    shops = {7: 4, 6: None, 9: 5, 8: 4, 5: None}
    prices = [1.5, float("nan"), None, -0.0, 0.0] * 3
    content = {
        "request_id": [request for (request, _, _), _ in candidates],
        "user_id": [user for (_, user, _), _ in candidates],
        "requested_at": [time for (_, _, time), _ in candidates],
        "query": [f'it\'s "{request}" é' for (request, _, _), _ in candidates],
        "product_id": [product for _, product in candidates],
        "clicked": [product == 2 for _, product in candidates],
        "the shop": [shops[request] for (request, _, _), _ in candidates],
        'a "brand"': ["x", None, ""] * 5,
        "price": prices,
    }
    table = pa.table(content)
    (folder / "impressions.parquet").mkdir()
    pq.write_table(table.slice(0, 7), folder / "impressions.parquet" / "2.parquet")
    narrow = table.slice(7).select(table.column_names[::-1])
    narrow = narrow.set_column(0, "price", narrow["price"].cast(pa.float32()))
    pq.write_table(narrow, folder / "impressions.parquet" / "1.parquet", row_group_size=3)
    (folder / "dataset.toml").write_text(
        'name = "edges"\n[features.sparse]\nrequest = ["the shop"]\n'
        'candidate = [\'a "brand"\']\n[features.dense]\ncandidate = ["price"]\n'
    )
    return folder


def test_edges(spark: Any, edges: Path, tmp_path: Path) -> None:
    expected = build_requests(edges, tmp_path / "expected", history_cap=4)
    found = build_requests(edges, tmp_path / "found", history_cap=4, engine=SparkEngine())
    same_folders(found.folder, expected.folder)
    assert list(found.weeks) == [1, 3, 5, 15]
    rows = [row for week in found.weeks for row in pq.read_table(found.path(week)).to_pylist()]
    assert [(r["request_id"], r["purchase_history"], r["purchase_age_days"]) for r in rows] == [
        (8, [], []),
        (6, [11, 9, 20, 20], [0, 1, 1, 1]),
        (7, [11, 9, 20, 20], [0, 1, 1, 1]),
        (9, [14], [62]),
        (5, [10], [84]),
    ]
    assert not list(edges.parent.glob("*/spark-warehouse"))


def test_zones_and_a_build_that_was_stopped(spark: Any, edges: Path, tmp_path: Path) -> None:
    for name, unit, zone in (("purchased_at", "ns", "UTC"), ("requested_at", "ms", "Asia/Tokyo")):
        table = "purchases" if name == "purchased_at" else "impressions"
        for path in (edges / f"{table}.parquet").rglob("*.parquet"):
            found = pq.read_table(path, partitioning=None)
            times = pc.assume_timezone(found[name].cast(pa.timestamp("us")), "UTC")
            zoned = times.cast(pa.timestamp(unit, zone), safe=False)
            position = found.column_names.index(name)
            pq.write_table(found.set_column(position, name, zoned), path)
    expected = build_requests(edges, tmp_path / "expected")
    output = tmp_path / "found"

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_requests(edges, output, engine=SparkEngine(), progress=stop)
    kept = {path: path.stat().st_mtime_ns for path in output.glob("week-*.parquet")}
    assert kept
    assert not (output / "manifest.json").exists()
    if len(kept) == len(expected.weeks):  # it was faster than the interruption
        (output / "week-0005.parquet").unlink()
        del kept[output / "week-0005.parquet"]
    seen: list[tuple[int, int]] = []
    build_requests(
        edges, output, engine=SparkEngine(), progress=lambda *counts: seen.append(counts)
    )
    assert seen[-1] == (4, 4)
    assert len(seen) <= 4 - len(kept)  # a task may outlive the interruption
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    same_folders(output, expected.folder)


def change(column: str, row: int, value: Any, kind: pa.DataType | None = None) -> Callable:
    """Set one value of a table, ``row`` counted from 1."""

    def change_table(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        values[row - 1] = value
        position = table.column_names.index(column)
        return table.set_column(position, column, pa.array(values, kind or table[column].type))

    return change_table


BROKEN = {
    "null": ("purchases", change("user_id", 17, None)),
    "time": ("purchases", change("purchased_at", 4, dt.datetime(1970, 1, 20))),
    "infinite": ("impressions", change("aisles_bought", 6, 1e39)),
    "empty": ("impressions", lambda table: table.slice(0, 0)),
    "twice": ("impressions", lambda table: pa.concat_tables([table, table.slice(0, 1)])),
    "two values": ("impressions", change("requested_at", 2, dt.datetime(2024, 2, 1))),
    "null and value": ("impressions", change("aisles_bought", 2, None)),
    "before week 1": ("dataset.toml", "2024-01-08"),
    "beyond 64 bits": ("impressions", change("store", 1, 2**63, pa.uint64())),
    "damaged page": ("impressions", None),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_input_is_refused_in_the_same_words(
    spark: Any, tiny_dataset: Path, tmp_path: Path, case: str
) -> None:
    data = shutil.copytree(tiny_dataset, tmp_path / "data")
    name, damage = BROKEN[case]
    path = data / f"{name}.parquet"
    if name == "dataset.toml":
        toml = data / name
        toml.write_text(toml.read_text().replace("2024-01-01", str(damage)))
    elif damage is None:
        content = bytearray(path.read_bytes())
        content[4:30] = bytes(26)
        path.write_bytes(content)
    else:
        assert callable(damage)
        pq.write_table(damage(pq.read_table(path)), path)
    said = []
    for engine in (None, SparkEngine()):
        with pytest.raises(BadInputError) as caught:
            build_requests(data, data / "requests", engine=engine)
        assert not (data / "requests").exists()
        assert "\n" not in str(caught.value)
        said.append(str(caught.value))
    if case in ("beyond 64 bits", "damaged page"):  # each engine has words of its own
        said = [message.partition("cannot be read: ")[0] for message in said]
        assert said[0] == f"{data}: "
    assert said[0] == said[1]


def run(
    *arguments: object, before: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COMMAND.format(before), *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"SPARK_LOCAL_IP": "127.0.0.1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_command_gives_what_duckdb_gives(
    spark: Any, tiny_dataset: Path, tiny_requests: Path, tmp_path: Path
) -> None:
    output = tmp_path / "found"
    arguments = ("--data", tiny_dataset, "--output", output, "--engine", "spark")
    defaults = "\n".join(f"{key} {value}" for key, value in QUICK.items())
    (tmp_path / "spark-defaults.conf").write_text(defaults)
    quick = {"SPARK_DRIVER_MEMORY": "1g", "SPARK_CONF_DIR": str(tmp_path)}
    done = run(*arguments, "--master", "local[1]", **quick)
    assert done.returncode == 0, done.stderr
    assert "tiny: request records in" in done.stdout
    assert "pandas" not in done.stderr
    same_folders(output, tiny_requests)


def test_the_command_says_what_to_install(tiny_dataset: Path, tmp_path: Path) -> None:
    arguments = ("--data", tiny_dataset, "--output", tmp_path / "out", "--engine", "spark")
    without = run(*arguments, before="sys.modules['pyspark'] = None; ")
    assert without.returncode == 2
    assert without.stderr == (
        "build-features: Spark is not installed; install it with: "
        "pip install 'dashclip-ranker[spark]'\n"
    )
    pytest.importorskip("pyspark", reason="Spark is not installed (the extra `spark`)")
    for environment in ({"PATH": "", "JAVA_HOME": ""}, {"JAVA_HOME": str(tmp_path)}):
        without = run(*arguments, **environment)
        assert without.returncode == 2
        assert without.stderr == (
            "build-features: Spark needs Java 17 or newer: install it, for example the package "
            "openjdk-17-jre-headless, or let JAVA_HOME name it\n"
        )
    assert not (tmp_path / "out").exists()


def test_a_master_without_spark(tiny_dataset: Path) -> None:
    done = run("--data", tiny_dataset, "--master", "local[2]")
    assert done.returncode == 2
    assert done.stderr == "build-features: --master is Spark's; give --engine spark with it\n"
