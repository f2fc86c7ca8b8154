"""The whole serving benchmark on a tiny ranker, with a real Redis server."""

import json
import shutil

import pytest

pytest.importorskip("redis", reason="the Redis client is not installed")

from tiny_ranker import tiny_batch

from experiments.serving_benchmark import benchmark_serving, filled_redis
from experiments.serving_cases import FETCHED, FUSED, THIN, Plan, Variant, find_case
from experiments.serving_cli import main
from experiments.serving_fetching import open_redis, running_redis
from experiments.serving_worker import Results, Task
from experiments.serving_workload import FeaturePool
from features.errors import BadInputError
from serving.inputs import InputSpec

pytestmark = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="redis-server is not installed"
)

PLAN = Plan(
    rows=300,
    candidates=(1, 5),
    histories=(0, 6),
    loads=(0.5,),
    requests=20,
    seconds=1.0,
    load_seconds=0.1,
    quality_requests=50,
)
EXACT = Variant(mode="fused", runtime="torchscript", table_dtype="float32")
VARIANTS = (FUSED, FETCHED, THIN, EXACT)
SHAPE = (5, 6)


@pytest.fixture(scope="module")
def done(tiny_exported, ranker_data, tmp_path_factory):
    """The folder and the document of a finished benchmark."""
    folder = tmp_path_factory.mktemp("serving")
    run = tiny_exported.parent / "run"
    document = benchmark_serving(
        tiny_exported,
        run,
        ranker_data,
        folder,
        PLAN,
        variants=VARIANTS,
        command="benchmark-serving",
    )
    return folder, document


def test_the_document_is_written_as_it_is_returned(done):
    folder, document = done
    assert json.loads((folder / "serving.json").read_text()) == json.loads(json.dumps(document))


def test_every_case_has_its_percentiles(done):
    _, document = done
    keys = ("mode", "runtime", "table_dtype", "candidates", "history")
    assert all(key in case for key in keys for case in document["cases"])
    for case in [*document["cases"], *document["load"]]:
        assert 0 < case["p50_ms"] <= case["p90_ms"] <= case["p99_ms"] <= case["p999_ms"]
    shapes = [(c["candidates"], c["history"], c["popularity"]) for c in document["cases"]]
    # Two ways in four shapes and uniformly, the thin client and float32 in one and uniformly.
    assert len(document["cases"]) == 2 * 5 + 2 * 2
    assert shapes.count((*SHAPE, "zipf")) == shapes.count((*SHAPE, "uniform")) == 4
    assert [(case["mode"], case["load"]) for case in document["load"]] == [
        ("fused", 0.5),
        ("fetched", 0.5),
    ]


def test_fetched_embeddings_give_the_probabilities_of_fused_ones(done):
    _, document = done
    differences = {
        (about["mode"], about["table_dtype"], about["client"]): about["largest_difference"]
        for about in document["variants"]
    }
    assert differences["fused", "float32", ""] == 0
    # The tiny tables are float16, as are the values in Redis: nothing is lost on the way.
    assert differences["fetched", "float16", "redis-py"] < 1e-5
    assert differences["fetched", "float16", "thin"] < 1e-5
    assert 0 < differences["fused", "int8", ""] < 0.05


def test_stages_sum_up_to_the_latency(done):
    _, document = done
    fetched = find_case(document["cases"], FETCHED, SHAPE)
    stages = fetched["stages_ms"]
    assert list(stages) == ["fetch", "decode", "pool", "dense"]
    assert sum(stage["mean"] for stage in stages.values()) == pytest.approx(fetched["mean_ms"])
    assert list(find_case(document["cases"], FUSED, SHAPE)["stages_ms"]) == ["lookups", "dense"]


def test_the_server_s_work_and_memory_are_told(done):
    _, document = done
    assert find_case(document["cases"], FETCHED, SHAPE)["redis_cpu_ms"] > 0
    fetched = next(about for about in document["variants"] if about["client"] == "redis-py")
    assert fetched["redis_rss_mb"] > 1
    assert fetched["rss_mb"] is None or fetched["rss_mb"] > 10


def test_every_type_of_tables_has_its_auc(done):
    _, document = done
    quality = document["quality"]
    assert quality["requests"] == 50
    assert abs(quality["tables"]["float32"]["auc_change"]) < 1e-9
    sizes = [quality["tables"][d]["table_bytes"] for d in ("float32", "float16", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True)


def test_the_page_and_the_tables_show_the_headline(done):
    folder, document = done
    page, text = (folder / "report.html").read_text(), (folder / "serving.md").read_text()
    ratio = f"{document['headline']['zipf']['fetched_over_fused_p99']:.3f}"
    assert ratio in page
    assert ratio in text
    assert page.count("<svg") == 3
    assert "http" not in page.split("</style>")[1].replace("https://arxiv", "")
    for name in ("latency", "stages", "load"):
        assert (folder / f"{name}.svg").read_text().startswith("<svg ")


def test_a_second_run_measures_only_what_is_missing(done, tiny_exported, ranker_data, capsys):
    folder, document = done
    run = tiny_exported.parent / "run"
    case = next(iter(sorted((folder / "cases").glob("fused-torchscript-int8-1-0-*.json"))))
    before = {path: path.stat().st_mtime_ns for path in (folder / "cases").iterdir()}
    case.unlink()
    again = benchmark_serving(tiny_exported, run, ranker_data, folder, PLAN, variants=VARIANTS)
    changed = {p for p in (folder / "cases").iterdir() if p.stat().st_mtime_ns != before[p]}
    assert changed == {case}
    assert find_case(again["cases"], FETCHED, SHAPE) == find_case(document["cases"], FETCHED, SHAPE)
    assert "Fused and fetched" in capsys.readouterr().out


def test_other_settings_are_not_mixed_with_these(done):
    folder, _ = done
    other = Results.of(folder / "cases", {"plan": "another"})
    assert other.load(FUSED.name) is None


def test_a_foreign_redis_is_left_as_it_was(tiny_exported, tmp_path):
    task = Task(
        run=tiny_exported.parent / "run",
        plan=PLAN,
        inputs=InputSpec(request=(), candidate=()),
        pool=FeaturePool.of(tiny_batch([1], [1])),
        results=Results.of(tmp_path, {}),
        core=None,
    )
    with running_redis(None) as url:
        client = open_redis(url)
        client.set("mine", "kept")
        with filled_redis(task, url, None) as found:
            assert found == url
            assert client.dbsize() == 2 * PLAN.rows + 1
        assert client.keys("*") == [b"mine"]
        client.close()


def test_a_bundle_of_another_run_is_refused(tiny_exported, ranker_data, tmp_path):
    run = shutil.copytree(tiny_exported.parent / "run", tmp_path / "run")
    path = run / "bundle" / "bundle.json"
    path.write_text(path.read_text().replace('"provenance": {', '"provenance": {"other": 1, '))
    with pytest.raises(BadInputError, match="was not exported from"):
        benchmark_serving(tiny_exported, run, ranker_data, tmp_path / "out", PLAN)
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_sentence_and_status_2(tmp_path, capsys):
    assert main(["--bundle", str(tmp_path / "none")]) == 2
    assert "no exported ranker there" in capsys.readouterr().err
