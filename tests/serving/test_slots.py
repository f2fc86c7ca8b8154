import json
import shutil
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tiny_export import export_tiny

from features.errors import BadInputError
from serving.exported import ExportedRanker
from serving.manifest import GOLDEN, MANIFEST, TORCHSCRIPT, Manifest, describe_file
from serving.slots import Slot

_OPENED: list[str] | None = None


def _note(event, arguments):
    if _OPENED is not None and event == "open":
        _OPENED.append(str(arguments[0]))


sys.addaudithook(_note)


@pytest.fixture(scope="module")
def another_exported(ranker_data, random_tables, tmp_path_factory) -> Path:
    """A ranker that `tiny_exported` is not."""
    return export_tiny(ranker_data, random_tables, tmp_path_factory.mktemp("another"), seed=1)


@pytest.fixture
def folders(tiny_exported, another_exported, tmp_path):
    """Copies ``a`` and ``b`` of two exported rankers, and ``link`` to the first."""
    shutil.copytree(tiny_exported, tmp_path / "a")
    shutil.copytree(another_exported, tmp_path / "b")
    (tmp_path / "link").symlink_to("a")
    return tmp_path


def point(folders, target):
    """Let ``link`` point to a folder, at one stroke."""
    (folders / "next").symlink_to(target)
    (folders / "next").rename(folders / "link")


def fingerprint(folder):
    return json.loads((folder / MANIFEST).read_text())["fingerprint"]


def damage(folder):
    content = bytearray((folder / TORCHSCRIPT).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / TORCHSCRIPT).unlink()
    (folder / TORCHSCRIPT).write_bytes(content)


def falsify(folder):
    """Change an expected answer, and sign the folder anew."""
    golden = json.loads((folder / GOLDEN).read_text())
    first = next(item for item in golden["requests"] if item["probabilities"])
    first["probabilities"][0] += 0.01
    (folder / GOLDEN).write_text(json.dumps(golden))
    manifest = Manifest.load(folder)
    manifest.files[GOLDEN] = describe_file(folder / GOLDEN)
    manifest.save(folder)


def test_a_slot_serves_what_its_folder_holds(folders):
    slot = Slot("control", folders / "link")
    slot.current.check_golden()
    described = slot.describe()
    assert described.pop("loaded_at").endswith("+00:00")
    assert described == {
        "name": "control",
        "fingerprint": fingerprint(folders / "a"),
        "dataset": "tiny",
        "table_dtype": "int8",
        "swaps": 0,
        "failed_loads": 0,
        "last_error": None,
    }


@pytest.mark.parametrize(("harm", "sentence"), [(damage, "SHA-256 differs"), (falsify, "golden")])
def test_a_slot_does_not_begin_with_what_is_wrong(folders, harm, sentence):
    harm(folders / "a")
    with pytest.raises(BadInputError, match=sentence):
        Slot("control", folders / "link")
    with pytest.raises(BadInputError, match="no exported ranker there"):
        Slot("control", folders / "nowhere")


def test_a_poll_of_what_did_not_change_opens_no_file(folders):
    global _OPENED
    slot = Slot("control", folders / "link")
    ranker = slot.current
    _OPENED = []
    try:
        for _ in range(100):
            slot.poll()
        opened = [path for path in _OPENED if str(folders) in path]
    finally:
        _OPENED = None
    assert opened == []
    assert slot.current is ranker
    assert slot.describe()["swaps"] == 0


def test_a_moved_link_swaps_and_moved_back_rolls_back(folders):
    slot = Slot("control", folders / "link")
    for swaps, target in enumerate(("b", "a", "b"), start=1):
        point(folders, target)
        slot.poll()
        slot.poll()
        assert slot.describe()["fingerprint"] == fingerprint(folders / target)
        assert slot.describe()["swaps"] == swaps
    slot.current.check_golden()


def test_a_replaced_folder_swaps_and_one_that_is_away_is_waited_for(folders):
    slot = Slot("control", folders / "a")
    before = slot.current
    (folders / "a").rename(folders / "old")
    for _ in range(2):
        slot.poll()
        assert slot.current is before
    (folders / "a").mkdir()  # a folder without a manifest is not there yet
    slot.poll()
    (folders / "a").rmdir()
    assert slot.describe()["failed_loads"] == 0
    (folders / "b").rename(folders / "a")
    slot.poll()
    assert slot.describe()["fingerprint"] == fingerprint(folders / "a")
    assert slot.current is not before
    before.check_golden()  # still whole for a batch that holds it


def test_the_same_folder_back_again_is_no_change(folders):
    slot = Slot("control", folders / "a")
    before = slot.current
    (folders / "a").rename(folders / "away")
    slot.poll()
    (folders / "away").rename(folders / "a")
    slot.poll()
    assert slot.current is before


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (damage, "SHA-256 differs"),
        (falsify, "a probability differs by 0.01"),
        (lambda folder: (folder / TORCHSCRIPT).unlink(), "is missing from the exported ranker"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "not valid JSON"),
    ],
)
def test_the_old_one_serves_when_the_new_one_is_wrong(folders, harm, sentence):
    slot = Slot("control", folders / "link")
    before = slot.current
    harm(folders / "b")
    point(folders, "b")
    for _ in range(3):  # tried once
        slot.poll()
        assert slot.current is before
        assert slot.describe()["failed_loads"] == 1
        assert sentence in slot.describe()["last_error"]
    assert slot.describe()["swaps"] == 0
    before.check_golden()
    point(folders, "a")
    slot.poll()
    assert slot.describe()["last_error"] is None
    assert slot.describe()["swaps"] == 1


def test_a_mended_folder_is_tried_again(folders, another_exported):
    slot = Slot("control", folders / "link")
    damage(folders / "b")
    point(folders, "b")
    slot.poll()
    shutil.copy(another_exported / TORCHSCRIPT, folders / "mended")
    (folders / "mended").rename(folders / "b" / TORCHSCRIPT)  # the manifest stays as it is
    slot.poll()
    assert slot.describe()["fingerprint"] == fingerprint(another_exported)


def test_a_folder_that_is_being_replaced_is_no_failure(folders, monkeypatch):
    slot = Slot("control", folders / "link")
    point(folders, "b")
    really_open = ExportedRanker.open

    def interrupted(place):
        point(folders, "a")
        raise BadInputError("ranker.pt: is missing")

    monkeypatch.setattr(ExportedRanker, "open", interrupted)
    slot.poll()
    assert slot.describe()["failed_loads"] == 0
    monkeypatch.setattr(ExportedRanker, "open", really_open)
    point(folders, "b")
    slot.poll()
    assert slot.describe()["fingerprint"] == fingerprint(folders / "b")


def test_whatever_goes_wrong_serving_goes_on(folders, monkeypatch):
    slot = Slot("control", folders / "link")

    def exhausted(place):
        raise MemoryError

    monkeypatch.setattr(ExportedRanker, "open", exhausted)
    point(folders, "b")
    slot.poll()
    assert slot.describe()["last_error"] == "MemoryError"


def mapped(place):
    """Return whether this process maps a file of the folder."""
    return str(place / TORCHSCRIPT) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc of Linux")
def test_the_old_tables_are_freed_when_the_last_batch_lets_go(folders):
    slot = Slot("control", folders / "link")
    batch_holds = slot.current
    old = weakref.ref(batch_holds.module)
    assert mapped(folders / "a")
    point(folders, "b")
    slot.poll()
    batch_holds.check_golden()
    assert mapped(folders / "a")
    assert mapped(folders / "b")
    del batch_holds
    assert old() is None
    assert not mapped(folders / "a")


def test_no_batch_fails_and_none_is_mixed_over_many_swaps(folders):
    slot = Slot("control", folders / "link")
    rankers = {fingerprint(folders / name): name for name in ("a", "b")}
    requests = [item.request for item in slot.current.golden]
    expected = {
        name: ExportedRanker.open(folders / name).score_raw(requests) for name in rankers.values()
    }
    assert np.abs(expected["a"] - expected["b"]).max() > 0.01
    done = threading.Event()

    def score():
        seen = set()
        while not done.is_set():
            ranker = slot.current
            name = rankers[ranker.manifest.fingerprint]
            assert np.array_equal(ranker.score_raw(requests), expected[name])
            seen.add(name)
        return seen

    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(score) for _ in range(2)]
        try:
            for swap in range(20):
                point(folders, "ab"[(swap + 1) % 2])
                slot.poll()
        finally:
            done.set()
        assert [answer.result() for answer in answers] == [{"a", "b"}] * 2
    assert slot.describe()["swaps"] == 20
    assert slot.describe()["failed_loads"] == 0


def test_polls_at_the_same_time_swap_once(folders):
    slot = Slot("control", folders / "link")
    point(folders, "b")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: slot.poll(), range(8)))
    assert slot.describe()["swaps"] == 1
