import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embeddings.catalog import read_catalog
from embeddings.labeling import label as label_module
from embeddings.labeling import pair_files
from embeddings.labeling.cli import main
from embeddings.labeling.config import CrossEncoderConfig, EndpointConfig, write_grader_config
from embeddings.labeling.estimate import duration
from embeddings.labeling.grades import UNGRADED, Grades, Pairs, grade_all
from embeddings.labeling.label import label
from embeddings.labeling.label_files import SCHEMA
from embeddings.labeling.options import Label
from embeddings.labeling.pair_files import Titles
from embeddings.relevance import read_relevance
from features.errors import BadInputError
from tests.tiny_bert import save_tiny_bert
from tests.tiny_labels import FIRST_ID, PRODUCTS, QUERIES, write_tiny_labels

PAIRS = [(query, FIRST_ID + product) for query in QUERIES for product in range(len(PRODUCTS))]


class WordGrader:
    """Two for a title that holds all words of the query, one for some, nought for none."""

    model = "words"
    prompt_version = "words-1"
    chunk_pairs = 10

    def __init__(self, fingerprint="words", unreadable=(), fail_at=None):
        self.fingerprint = fingerprint
        self.asked = []
        self.unreadable = set(unreadable)
        self.fail_at = fail_at

    def grade(self, pairs):
        asked = list(zip(pairs.queries, pairs.titles, strict=True))
        for position in reversed(range(len(asked))):
            if self.fail_at is not None and len(self.asked) >= self.fail_at:
                raise BadInputError("the endpoint is gone")
            self.asked.append(asked[position])
            found = answer(*asked[position])
            if asked[position] in self.unreadable:
                found = UNGRADED
            probability = np.full((1, 3), np.nan, np.float32)
            if found != UNGRADED:
                probability[:] = 0.125
                probability[0, found] = 0.75
            yield Grades(
                position=np.array([position]),
                label=np.array([found], np.int8),
                probability=probability,
            )


def answer(query, title):
    words, held = set(query.split()), set(title.lower().split())
    return 2 if words <= held else int(bool(words & held))


def write_pairs(path, pairs):
    queries, products = zip(*pairs, strict=True)
    pq.write_table(pa.table({"query": queries, "product_id": products}), path)
    return path


def true_labels(pairs):
    return {(q, p): answer(q, PRODUCTS[p - FIRST_ID]) for q, p in pairs}


def labels_of(output):
    rows = [
        row for path in sorted(output.glob("part-*")) for row in pq.read_table(path).to_pylist()
    ]
    counted = Counter((row["query"], row["product_id"]) for row in rows)
    assert set(counted.values()) <= {1}
    return {(row["query"], row["product_id"]): row["label"] for row in rows}


@pytest.fixture
def asked(tmp_path):
    """What is asked for: 1,440 pairs in chunks."""
    data = write_tiny_labels(tmp_path / "data")
    pairs = write_pairs(tmp_path / "pairs.parquet", PAIRS)
    return Label(data=data, grader=tmp_path / "g.toml", output=tmp_path / "out", pairs=pairs)


@pytest.fixture
def use(monkeypatch):
    """Have `label` open a given grader."""

    def set_grader(grader):
        monkeypatch.setattr(label_module, "open_grader", lambda _path, _ledger: grader)
        return grader

    return set_grader


@pytest.fixture
def small_chunks(monkeypatch):
    """Have 1,440 pairs make three chunks."""
    real = pair_files._keep

    def rewritten(*arguments, **options):
        selection = real(*arguments, **options)
        table = pq.read_table(selection.path)
        pq.write_table(table, selection.path, row_group_size=500)
        return selection

    monkeypatch.setattr(pair_files, "_keep", rewritten)


def test_rows_fit_into_relevance_parquet_and_tell_where_they_are_from(asked, use):
    use(WordGrader())
    told = []
    figures = label(asked, "the command", on_labelled=lambda *count: told.append(count[:2]))
    part = pq.read_table(asked.output / "part-00000.parquet")
    assert part.schema.equals(SCHEMA)
    assert labels_of(asked.output) == true_labels(PAIRS)
    assert part.slice(0, 1).to_pylist() == [
        {
            "query": "apple juice",
            "product_id": FIRST_ID,
            "label": 2,
            "source": "llm",
            "model": "words",
            "prompt_version": "words-1",
            "probability": 0.75,
            "probabilities": [0.125, 0.125, 0.75],
        }
    ]
    assert sum(count for count, _ in told) == len(PAIRS)
    assert {total for _, total in told} == {len(PAIRS)}
    assert figures["complete"]
    assert figures["pairs"] == figures["labelled"] == sum(figures["labels"].values()) == 1440
    counts = Counter(true_labels(PAIRS).values())
    assert list(figures["labels"].values()) == [counts[0], counts[1], counts[2]]
    assert figures["probability"]["mean"] == pytest.approx(0.75)
    assert figures["probability"]["p50"] == pytest.approx(0.75, abs=1e-3)
    assert figures["run"]["asked"] == 1440
    assert figures["run"]["from_cache"] == 0
    assert figures["run"]["estimate"]["pairs"] == 1440
    assert figures["run"]["command"] == "the command"
    assert figures["grader"]["fingerprint"] == "words"
    assert json.loads((asked.output / "labels.json").read_text()) == figures


def test_labels_are_read_as_relevance(asked, use):
    use(WordGrader())
    label(asked)
    read = read_relevance(asked.data, read_catalog(asked.data), labels=asked.output, source="llm")
    assert len(read) == len(PAIRS)
    assert Counter(read.label.tolist()) == Counter(true_labels(PAIRS).values())


def test_an_answer_serves_all_products_of_one_title(asked, use, tmp_path):
    catalog = pq.read_table(asked.data / "catalog.parquet")
    titles = [f"{'Alder' if i % 2 else 'Birch'} soap" for i in range(len(PRODUCTS))]
    catalog = catalog.set_column(1, "title", pa.array(titles))
    pq.write_table(catalog, asked.data / "catalog.parquet")
    grader = use(WordGrader())
    figures = label(asked)
    assert sorted(grader.asked) == sorted({(q, t) for q in QUERIES for t in set(titles)})
    assert figures["labelled"] == len(PAIRS)
    assert figures["run"]["asked"] == 2 * len(QUERIES)


def test_a_run_that_was_stopped_asks_nothing_again(asked, use, small_chunks):
    first = use(WordGrader(fail_at=700))
    with pytest.raises(BadInputError, match="the endpoint is gone"):
        label(asked)
    kept = json.loads((asked.output / "labels.json").read_text())
    assert not kept["complete"]
    assert kept["labelled"] == 700  # also those of the chunk in which it stopped
    assert kept["ungraded"] is None
    assert labels_of(asked.output).items() <= true_labels(PAIRS).items()
    second = use(WordGrader())
    figures = label(asked)
    assert len(second.asked) == len(PAIRS) - 700
    assert not set(first.asked) & set(second.asked)
    assert labels_of(asked.output) == true_labels(PAIRS)
    assert figures["complete"]
    third = use(WordGrader())
    assert label(asked, "another") == figures
    assert not third.asked


def test_ctrl_c_loses_no_answer(asked, use):
    grader = use(WordGrader())

    def interrupt(*_):
        if len(grader.asked) > 600:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label(asked, on_labelled=interrupt)
    assert not list(asked.output.glob("part-*"))
    again = use(WordGrader())
    label(asked)
    assert not set(grader.asked) & set(again.asked)
    assert labels_of(asked.output) == true_labels(PAIRS)


def test_answers_that_cannot_be_read_are_no_labels(asked, use, small_chunks, capsys):
    lost = [(QUERIES[0], PRODUCTS[3]), (QUERIES[20], PRODUCTS[4])]
    keys = {(query, FIRST_ID + PRODUCTS.index(title)) for query, title in lost}
    grader = use(WordGrader(unreadable=lost))
    label_module.run(asked, "first")
    captured = capsys.readouterr()
    assert "2 pairs have no label" in captured.err
    figures = json.loads((asked.output / "labels.json").read_text())
    assert (figures["labelled"], figures["ungraded"]) == (1438, 2)
    assert "1,438" in captured.out
    listed = pq.read_table(asked.output / "_ungraded.parquet").to_pylist()
    assert {tuple(row.values()) for row in listed} == keys
    assert labels_of(asked.output) == {k: v for k, v in true_labels(PAIRS).items() if k not in keys}
    again = use(WordGrader(unreadable=lost[:1]))
    assert label(asked)["ungraded"] == 1
    assert sorted(again.asked) == sorted(lost)
    use(WordGrader())
    figures = label(asked)
    assert (figures["labelled"], figures["ungraded"]) == (1440, 0)
    assert not (asked.output / "_ungraded.parquet").exists()
    assert labels_of(asked.output) == true_labels(PAIRS)
    assert len(grader.asked) == 1440


def test_a_grader_without_any_readable_answer_is_bad_input(asked, use):
    use(WordGrader(unreadable=[(query, title) for query in QUERIES for title in PRODUCTS]))
    with pytest.raises(BadInputError, match="none of its answers for 1,440 pairs could be read"):
        label(asked)


def test_a_limit_may_be_raised(asked, use, small_chunks):
    first = use(WordGrader())
    assert label(replace(asked, limit=700))["labelled"] == 700
    assert labels_of(asked.output) == true_labels(PAIRS[:700])
    second = use(WordGrader())
    figures = label(replace(asked, limit=1100))
    assert (figures["pairs"], figures["labelled"]) == (1100, 1100)
    assert len(first.asked) == 700
    assert len(second.asked) == 400
    assert labels_of(asked.output) == true_labels(PAIRS[:1100])
    use(WordGrader())
    label(replace(asked, limit=10))
    assert labels_of(asked.output) == true_labels(PAIRS[:1100])
    with pytest.raises(BadInputError, match="--limit must be 1 or more, got 0"):
        label(replace(asked, limit=0))


def test_a_cache_serves_other_folders_but_no_other_grader(asked, use, tmp_path):
    asked = replace(asked, cache=tmp_path / "shared.sqlite")
    use(WordGrader())
    label(replace(asked, limit=100))
    second = use(WordGrader())
    figures = label(replace(asked, output=tmp_path / "second"))
    assert len(second.asked) == figures["run"]["asked"] == 1340
    assert figures["run"]["from_cache"] == 100
    assert labels_of(tmp_path / "second") == true_labels(PAIRS)
    third = use(WordGrader("other words"))
    label(replace(asked, output=tmp_path / "third", limit=50))
    assert len(third.asked) == 50


def test_other_labels_in_the_folder_are_refused(asked, use, tmp_path):
    use(WordGrader())
    label(replace(asked, limit=10))
    pairs = write_pairs(tmp_path / "pairs-2.parquet", PAIRS[:5])
    with pytest.raises(BadInputError, match="out: was begun with another choice of pairs; choose"):
        label(replace(asked, pairs=pairs))
    use(WordGrader("other"))
    with pytest.raises(BadInputError, match="out: was begun with another grader"):
        label(asked)
    use(WordGrader())
    catalog = pq.read_table(asked.data / "catalog.parquet").slice(1)
    pq.write_table(catalog, asked.data / "catalog.parquet")
    with pytest.raises(BadInputError, match="out: was begun with another catalog"):
        label(asked)
    with pytest.raises(BadInputError, match="data: exists and is no folder of labels"):
        label(replace(asked, output=asked.data))
    with pytest.raises(BadInputError, match="is a file; name a folder"):
        label(replace(asked, output=pairs))
    with pytest.raises(BadInputError, match=r"no\.parquet: no such file; it holds the pairs"):
        label(replace(asked, output=tmp_path / "new", pairs=tmp_path / "no.parquet"))


def test_one_run_at_a_time(asked, use):
    use(WordGrader())
    asked.output.mkdir()
    with (asked.output / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BadInputError, match="out: another run is at work there"):
            label(asked)
    label(replace(asked, limit=1))


def test_what_a_local_grader_will_take_is_measured(asked, use, monkeypatch):
    use(WordGrader())
    seen = []

    def refuse(expected):
        seen.append(expected)
        raise BadInputError("not now")

    with pytest.raises(BadInputError, match="not now"):
        label(asked, approve=refuse)
    (expected,) = seen
    assert expected.pairs == 1440
    assert expected.cost == 0
    assert 0 < expected.hours < 0.01
    assert expected.basis.endswith("pairs/s, measured")
    again = use(WordGrader())
    label(asked)
    assert len(again.asked) == 1440 - 288  # what was measured is not asked again


def endpoint_options(asked, **prices):
    write_grader_config(
        asked.grader, EndpointConfig(model="m", base_url="http://x.invalid", **prices)
    )
    return asked


def test_an_endpoint_s_cost_is_asked_for_above_the_limit(asked, capsys):
    options = endpoint_options(asked, input_price=1000.0, output_price=0.0, max_output_tokens=10)
    with pytest.raises(BadInputError) as refused:
        label_module.run(options, "")
    sentence = str(refused.value)
    assert sentence.startswith("1,440 pairs to grade, ")
    assert "14,400 written, cost " in sentence
    assert sentence.endswith("above --ask-above-cost 10; give --yes to start it")
    assert not list(asked.output.glob("part-*"))
    cost = float(sentence.split("cost ")[1].split()[0].replace(",", ""))
    read = int(sentence.split(" tokens read")[0].split()[-1].replace(",", ""))
    assert cost == pytest.approx(read / 1000, abs=0.01)
    assert "1,440 pairs to grade" in capsys.readouterr().err


@pytest.mark.parametrize(("reply", "said"), [(b"n\n", "not started"), (b"y\n", "x.invalid")])
def test_on_a_terminal_one_is_asked(asked, reply, said):
    options = endpoint_options(asked, input_price=1000.0, retries=0, timeout_seconds=0.2)
    ours, theirs = pty.openpty()
    arguments = ["label", "--data", options.data, "--grader", options.grader]
    arguments += ["--output", options.output, "--pairs", options.pairs]
    process = subprocess.Popen(
        [sys.executable, "-m", "embeddings.labeling.cli", *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(theirs)
    seen = b""
    with process:
        while b"go on?" not in seen:
            seen += os.read(ours, 1000)
        assert b"go on? [y/N] " in seen
        os.write(ours, reply)
        try:
            while more := os.read(ours, 1000):
                seen += more
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 2
    assert said in seen.decode()


def test_durations():
    assert [duration(hours) for hours in (25.04, 1.0, 0.5, 1 / 60, 5 / 3600, 0)] == [
        *("25.0 hours", "1.0 hours", "30 minutes", "1 minutes", "5 seconds", "0 seconds"),
    ]


KILLED = """
import sys
from embeddings.labeling import label, pair_files
pair_files.CHUNK_PAIRS = 2048
label._LOST_SECONDS = 0.0
from embeddings.labeling.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory):
    """A folder with a random cross-encoder."""
    from embeddings.labeling.pair_classifier import load_pair_classifier

    folder = tmp_path_factory.mktemp("grader")
    encoder = save_tiny_bert(folder / "encoder")
    load_pair_classifier(str(encoder), max_tokens=24).save(folder / "model")
    config = CrossEncoderConfig(model="model", max_tokens=24, threads=1)
    write_grader_config(folder / "grader.toml", config)
    return folder


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_of_a_local_grader_goes_on(tmp_path, cross_encoder, how, monkeypatch):
    data = write_tiny_labels(tmp_path / "data")
    queries = [f"{query} {extra}" for extra in ("", *QUERIES[:3]) for query in QUERIES]
    pairs = [(query, FIRST_ID + p) for query in queries for p in range(len(PRODUCTS))]
    output = tmp_path / "out"
    path = write_pairs(tmp_path / "pairs.parquet", pairs)
    arguments = ["label", "--data", data, "--grader", cross_encoder, "--output", output]
    command = [sys.executable, "-c", KILLED, *map(str, arguments), "--pairs", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(output.glob("part-*")) and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(how)
        said = process.communicate()[1]
    assert process.returncode == (130 if how == signal.SIGTERM else -how)
    if how == signal.SIGTERM:
        assert "interrupted; give the same command again to go on" in said
    assert not (output / "labels.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in output.glob("part-*")}
    assert 0 < len(kept) < 3
    assert main([*map(str, arguments), "--pairs", str(path)]) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    found = labels_of(output)
    assert len(found) == len(pairs) == 5_760
    figures = json.loads((output / "labels.json").read_text())
    assert figures["run"]["labelled"] == len(pairs) - 2048 * len(kept)
    assert figures["run"]["asked"] <= figures["run"]["labelled"]
    grader = label_module.open_grader(cross_encoder)
    some = pairs[::97]
    titles = Titles(read_catalog(data)).of(np.array([product for _, product in some]))
    expected = grade_all(grader, Pairs(queries=[query for query, _ in some], titles=titles)).label
    assert [found[pair] for pair in some] == expected.tolist()
