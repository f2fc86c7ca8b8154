"""Tables that several processes make are those of one, byte for byte, also after a kill."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tables_processes import Grouped, small_calls
from tiny_dashclip import tiny_catalog, tiny_dashclip

from embeddings.build import build_tables, encode_share
from embeddings.contents import Share
from embeddings.open_encoder import open_encoder

ROOT = Path(__file__).parents[2]
TABLES = ("product.parquet", "query.parquet")


def png(red):
    file = io.BytesIO()
    Image.new("RGB", (2, 2), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def data(tmp_path):
    """Thirty products with images, three of them broken and two of those alike, and twelve bare."""
    broken = png(0)[:45]
    images = [png(number % 17) for number in range(27)] + [broken] * 3 + [None] * 12
    titles = ["x" * (number * 7 % 11) or None for number in range(28)] + ["only broken"] * 2
    titles += ["x" * (number * 5 % 23) for number in range(12)]
    folder = tmp_path / "data"
    folder.mkdir()
    catalog = {
        "product_id": list(range(42)),
        "title": pa.array(titles, pa.string()),
        "image": pa.array(images, pa.binary()),
    }
    pq.write_table(pa.table(catalog), folder / "catalog.parquet")
    queries = ["y" * (number + 1) for number in range(10)]
    pq.write_table(pa.table({"query": queries}), folder / "relevance.parquet")
    return folder


def same_tables(found, expected):
    for name in TABLES:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    assert sorted(path.name for path in found.iterdir()) == [*TABLES, "summary.json"]


def summary(folder):
    counts = json.loads((folder / "summary.json").read_text())
    del counts["seconds"], counts["encoded_per_second"]
    return counts


def run(*command, **options):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(("kill_at", "world"), [(0, 2), (5, 3)])
def test_processes_make_the_calls_of_one(data, tmp_path, monkeypatch, kill_at, world):
    with monkeypatch.context() as patch:
        small_calls(patch.setattr)
        build_tables(data, tmp_path / "one", Grouped())
    output = tmp_path / "several"
    done = run(ROOT / "tests" / "tables_processes.py", data, output, kill_at, world)
    same_tables(output, tmp_path / "one")
    found, alone = summary(output), summary(tmp_path / "one")
    assert found["broken_images"] == alone["broken_images"] == 3
    encoded, reused = found.pop("encoded"), found.pop("reused")
    assert encoded + reused == alone.pop("encoded") + alone.pop("reused")
    assert found == alone
    assert bool(reused) == bool(kill_at)
    if not kill_at:
        assert done.stderr.count("its image counts as missing") == 2  # two are alike
        assert done.stderr.count("3 of 30 images are broken and count as missing") == 1


def test_shares_in_any_order_are_the_whole(data, tmp_path, monkeypatch):
    small_calls(monkeypatch.setattr)
    build_tables(data, tmp_path / "one", Grouped())
    output = tmp_path / "shares"
    encoded = [
        encode_share(data, output, Grouped(), Share(number=number, of=3)) for number in (2, 0, 1)
    ]
    assert all(encoded)
    assert encode_share(data, output, Grouped(), Share(number=0, of=2)) == 0
    build_tables(data, output, Grouped())
    same_tables(output, tmp_path / "one")
    assert summary(output)["encoded"] == 1  # the title of the broken images
    assert summary(output)["encoded"] + sum(encoded) == summary(tmp_path / "one")["encoded"]
    assert encode_share(data, output, Grouped(), Share()) == 0


@pytest.fixture
def model(tmp_path):
    tiny_catalog(tmp_path / "photos", products=30, without_image=(1, 7), broken=(4,))
    return tiny_dashclip(tmp_path / "model", images=True)


def test_torchrun_with_a_real_encoder(model, tmp_path):
    photos, output = tmp_path / "photos", tmp_path / "tables"
    build_tables(photos, tmp_path / "one", open_encoder(model))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    command = ("-m", "embeddings.cli", "--data", photos, "--output", output, "--model", model)
    done = run(*torchrun, *command, cwd=ROOT)
    same_tables(output, tmp_path / "one")
    assert summary(output) == summary(tmp_path / "one")
    assert done.stderr.count("contents encoded in") == 1


def test_spark_executors_with_a_real_encoder(model, tmp_path, monkeypatch):
    sql = pytest.importorskip("pyspark.sql", reason="Spark is not installed (the extra `spark`)")
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java 17, which is not here")
    from embeddings.spark_build import build_tables_on_spark

    photos, output = tmp_path / "photos", tmp_path / "tables"
    build_tables(photos, tmp_path / "one", open_encoder(model))
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    builder = sql.SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
    builder = builder.config("spark.driver.extraJavaOptions", "-XX:TieredStopAtLevel=1")
    spark = builder.config("spark.executorEnv.PYTHONPATH", str(ROOT)).getOrCreate()
    try:
        build_tables_on_spark(spark, photos, output, model, shares=2)
    finally:
        spark.stop()
    same_tables(output, tmp_path / "one")
    assert summary(output)["encoded"] == 1  # the title of the broken image
