"""The client without Python is built with CMake and held to what Python computes."""

import hashlib
import importlib.util
import json
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from features.errors import BadInputError
from serving.exported import ExportedRanker
from serving.protocol import Limits, RefusedError, read_request
from serving.raw_requests import to_batch

_SOURCE = Path(__file__).parents[2] / "serving" / "client"
_TOLERANCE = 1e-6  # one float32 in another order of sums; equal bits on most machines
_UNKNOWN_PRODUCT = 5
_TEXTS = st.sampled_from(["Alder", "Birch", "", "Käse", "牛乳 ✓", "\x00\n\"'"]) | st.text()
_IDS = st.integers(-(1 << 63), (1 << 63) - 1)


@pytest.fixture(scope="session")
def client(tmp_path_factory):
    """The program, built from its sources."""
    for program in ("cmake", "c++"):
        if shutil.which(program) is None:
            pytest.skip(f"the client cannot be built: there is no {program}")
    build = tmp_path_factory.mktemp("client")
    options = {
        "CMAKE_PREFIX_PATH": torch.utils.cmake_prefix_path,
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CXX_FLAGS_RELEASE": "-O1",  # for the time that compiling takes
    }
    defined = [f"-D{name}={value}" for name, value in options.items()]
    made = _run(["cmake", "-S", _SOURCE, "-B", build, *defined])
    for package in ("nlohmann_json", "OpenSSL"):
        if f"{package} was not found" in made.stderr:
            pytest.skip(f"the client cannot be built: there are no headers of {package}")
    assert made.returncode == 0, made.stderr
    built = _run(["cmake", "--build", build])
    assert built.returncode == 0, built.stdout + built.stderr
    assert "warning" not in built.stdout + built.stderr
    return build / "dashclip-rank"


@pytest.fixture(scope="session")
def operators():
    """The library of fbgemm that holds the lookup of quantised tables."""
    package = importlib.util.find_spec("fbgemm_gpu")
    return Path(package.submodule_search_locations[0]) / "fbgemm_gpu_tbe_inference.so"


@pytest.fixture(scope="module")
def ranker(tiny_exported):
    return ExportedRanker.open(tiny_exported)


@pytest.fixture(scope="module")
def process(client, operators, tiny_exported):
    """One running client that answers each line that it is sent."""
    command = [client, "--operators", operators, tiny_exported]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    ) as running:
        yield running
        running.stdin.close()
        assert running.wait(timeout=60) == 0


def _run(command, given=None):
    return subprocess.run(
        [str(part) for part in command], input=given, capture_output=True, encoding="utf-8"
    )


def _expected(ranker, request):
    return ranker.score(_of_service(request, ranker))


def _of_service(request, ranker):
    """The batch that the HTTP service makes of a request."""
    raw = read_request(json.dumps(request).encode(), Limits(candidates=100, history=100))
    return to_batch([raw], ranker.manifest.inputs)


def _assert_equal(answer, expected):
    np.testing.assert_allclose(answer["probabilities"], expected, rtol=0, atol=_TOLERANCE)
    mine = np.array(answer["probabilities"], np.float32)
    assert answer["order"] == np.argsort(-mine, kind="stable").tolist()


def test_golden_requests_give_the_probabilities_of_the_export(
    client, operators, tiny_exported, ranker, tmp_path
):
    lines = [json.dumps(golden.request, ensure_ascii=False) for golden in ranker.golden]
    file = tmp_path / "requests.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    ended = _run([client, "--operators", operators, tiny_exported, file])
    assert (ended.returncode, ended.stderr) == (0, "")
    answers = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(answers) == len(ranker.golden) > 0
    for answer, golden in zip(answers, ranker.golden, strict=True):
        _assert_equal(answer, golden.probabilities)


def _values(kind):
    number = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.integers(-9, 9)
    known = {"int64": _IDS, "string": _TEXTS, "float32": number}[kind]
    return st.none() | known


@st.composite
def _requests(draw, inputs):
    products = draw(st.lists(st.integers(0, 59).map(lambda n: 1000 + 7 * n) | _IDS, max_size=12))
    history = draw(st.lists(st.integers(0, 59).map(lambda n: 1000 + 7 * n) | _IDS, max_size=9))
    number = len(products)
    request = {
        "query": draw(st.sampled_from(["whole milk", "dish soap"]) | _TEXTS),
        "history": history,
        "history_age_days": [draw(st.integers(0, 90)) for _ in history],
        "features": {f.name: draw(_values(f.type)) for f in inputs.request if draw(st.booleans())},
        "candidates": {
            "product_id": products,
            "features": {
                f.name: draw(st.lists(_values(f.type), min_size=number, max_size=number))
                for f in inputs.candidate
                if draw(st.booleans())
            },
        },
    }
    optional = ("history_age_days", "features")
    return {k: v for k, v in request.items() if k not in optional or draw(st.booleans())}


def _ask(process, request, *, ascii_only=True):
    process.stdin.write(json.dumps(request, ensure_ascii=ascii_only) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_request_gives_the_probabilities_of_the_service(process, ranker, data):
    request = data.draw(_requests(ranker.manifest.inputs))
    answer = _ask(process, request, ascii_only=data.draw(st.booleans()))
    _assert_equal(answer, _expected(ranker, request))


def test_what_is_left_out_is_missing(process, ranker):
    inputs, products = ranker.manifest.inputs, [1000, 1007, _UNKNOWN_PRODUCT]
    requests = [
        {"query": "whole milk", "candidates": {"product_id": products}},
        {
            "query": "whole milk",
            "user_id": None,
            "history": None,
            "history_age_days": None,
            "features": None,
            "candidates": {"product_id": products, "features": None},
        },
        {
            "query": "whole milk",
            "user_id": 3,
            "history": [],
            "features": {f.name: None for f in inputs.request},
            "candidates": {
                "product_id": products,
                "features": {f.name: [None] * 3 for f in inputs.candidate},
            },
        },
        {
            "query": "whole milk",
            "candidates": {
                "product_id": products,
                "features": {f.name: None for f in inputs.candidate},
            },
        },
    ]
    answers = [_ask(process, request) for request in requests]
    assert answers[1:] == answers[:1] * 3
    _assert_equal(answers[0], _expected(ranker, requests[0]))


def _broken(**changes):
    request = {"query": "a", "candidates": {"product_id": [1, 2]}} | changes
    return {key: value for key, value in request.items() if value is not ...}


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ([], "must be an object, got a list"),
        (_broken(query=...), "'query' is missing"),
        (_broken(query=3), "query: must be a string, got 3"),
        (_broken(candidates=...), "'candidates' is missing"),
        (_broken(candidates={"product_id": [1.0]}), "candidates.product_id: must be an integer"),
        (_broken(candidates={"product_id": [1 << 63]}), "candidates.product_id"),
        (_broken(candidates={"product_id": 1}), "candidates.product_id: must be a list, got 1"),
        (_broken(candidates={"product_id": [], "x": 1}), 'unknown key "x"'),
        (
            _broken(candidates={"product_id": [1], "features": {"nothing": [1]}}),
            'unknown feature "nothing"',
        ),
        (_broken(history=[1], history_age_days=[1, 2]), "has 2 values for 1 purchases"),
        (_broken(history=[1], history_age_days=[1 << 15]), "history_age_days: must be"),
        (_broken(history=["1"]), "history: must be an integer"),
        (_broken(user_id="me"), "user_id: must be an integer"),
        (_broken(features=[]), "features: must be an object"),
        (_broken(queri="a"), 'unknown key "queri"'),
        (_broken(candidates={"features": {}}), "'product_id' is missing"),
    ],
)
def test_what_the_service_refuses_is_refused(
    client, operators, tiny_exported, ranker, request_, said
):
    with pytest.raises((BadInputError, RefusedError)):
        _of_service(request_, ranker)
    command = [client, "--operators", operators, tiny_exported]
    _assert_refused(_run(command, json.dumps(request_)), "request 1: ", said)


def test_features_of_a_wrong_type_or_length_are_refused(client, operators, tiny_exported, ranker):
    command = [client, "--operators", operators, tiny_exported]
    wrong = {"int64": 1.5, "string": 1, "float32": "1"}
    for feature in ranker.manifest.inputs.candidate:
        for column, said in (([wrong[feature.type]], "must be"), ([None] * 2, "has 2 values for")):
            features = {feature.name: column}
            request = _broken(candidates={"product_id": [1], "features": features})
            with pytest.raises(BadInputError):
                _of_service(request, ranker)
            _assert_refused(_run(command, json.dumps(request)), feature.name, said)


@pytest.mark.parametrize(
    "text", ["{", "nonsense", '{"query": "\ud83d"}', "[" * 100_000, '{"query": 1e999}', "\x00"]
)
def test_what_is_no_json_is_refused(client, operators, tiny_exported, text):
    command = [client, "--operators", operators, tiny_exported]
    given = text.encode("utf-8", "surrogatepass")
    ended = subprocess.run([str(part) for part in command], input=given, capture_output=True)
    assert ended.returncode == 2
    assert b"request 1: not valid JSON: " in ended.stderr


def test_answers_stand_before_a_bad_request(client, operators, tiny_exported):
    good = json.dumps(_broken(), indent=2)  # over several lines
    ended = _run([client, "--operators", operators, tiny_exported], f"{good}\n{good} {{}}\n{good}")
    assert ended.returncode == 2
    assert len(ended.stdout.splitlines()) == 2
    assert ended.stderr.startswith("dashclip-rank: request 3: ")


def _assert_refused(ended, *said):
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("dashclip-rank: ")
    assert ended.stderr.count("\n") == 1
    for part in said:
        assert part in ended.stderr


def test_a_model_with_another_checksum_is_not_loaded(client, tiny_exported, tmp_path):
    folder = shutil.copytree(tiny_exported, tmp_path / "exported")
    content = bytearray((folder / "ranker.pt").read_bytes())
    content[-1] ^= 1
    (folder / "ranker.pt").write_bytes(content)
    _assert_refused(_run([client, folder], "{}"), "ranker.pt: is damaged", "SHA-256")


def test_a_file_that_is_no_model_is_refused(client, tiny_exported, tmp_path):
    (tmp_path / "ranker.pt").write_bytes(b"nothing")
    manifest = json.loads((tiny_exported / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"]["ranker.pt"]["sha256"] = hashlib.sha256(b"nothing").hexdigest()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    _assert_refused(_run([client, tmp_path], "{}"), "ranker.pt: cannot be loaded: ")


def test_wrong_arguments_are_refused(client, operators, tiny_exported, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    cases = {
        "--help says more": [],
        "at most one file": ["a", "b", "c"],
        "unknown option '--x'": ["--x"],
        "--repeat: a value is missing": ["--repeat"],
        "--repeat: must be an integer of 1 or more, got '0'": ["--repeat", "0", "a"],
        "nowhere/manifest.json: cannot be read": [tmp_path / "nowhere"],
        "is no manifest of an exported ranker": [tmp_path],
        "nowhere.json: cannot be read": [tiny_exported, tmp_path / "nowhere.json"],
        "nowhere.so": ["--operators", tmp_path / "nowhere.so", tiny_exported],
        "--operators gives the libraries": [tiny_exported],
        "there is no request": ["--operators", operators, tiny_exported, "-"],
    }
    for said, arguments in cases.items():
        _assert_refused(_run([client, *arguments], ""), said)


def test_help(client):
    ended = _run([client, "--help"])
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("usage: dashclip-rank ")
    assert all(len(line) <= 100 for line in ended.stdout.splitlines())


def test_latency_is_told(client, operators, tiny_exported):
    request = json.dumps(_broken())
    ended = _run([client, "--repeat", "50", "--operators", operators, tiny_exported], request)
    latency = json.loads(ended.stdout)["latency_ms"]
    assert latency["repeats"] == 50
    assert 0 < latency["p50"] <= latency["p99"] < math.inf
