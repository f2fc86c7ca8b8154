import asyncio
import json

import numpy as np
import pytest
import uvloop

from experiments.load_swaps import Model, Verdict, point


def model(tmp_path, name, rows):
    return Model(folder=tmp_path, fingerprint=name, probabilities=np.array(rows, np.float32))


def answer(name, probabilities):
    return json.dumps({"model": name, "probabilities": probabilities}).encode()


class Generator:
    """Has two connections; request ``i`` goes out on connection ``i % 2``."""

    open_connections = frozenset({0, 1})

    def carrier(self, request):
        return request % 2


@pytest.fixture
def verdict(tmp_path):
    first = model(tmp_path, "a", [[0.25, 0.5], [0.125, 0.75]])
    second = model(tmp_path, "b", [[0.5, 0.25], [0.75, 0.125]])
    return Verdict(models={"a": first, "b": second}, generator=Generator())


def test_answers_must_be_those_of_the_model_they_name(verdict):
    verdict(0, 200, answer("a", [0.25, 0.5]))
    verdict(3, 200, answer("b", [0.75, 0.125 + 5e-7]))  # requests come in turn: 3 is row 1
    verdict(2, 429, b"busy")
    assert verdict.wrong == 0
    assert verdict.largest == pytest.approx(5e-7)
    assert verdict.by_model == {"a": 1, "b": 1}
    verdict(0, 200, answer("a", [0.5, 0.25]))  # the other's
    verdict(0, 200, answer("c", [0.25, 0.5]))  # unknown
    verdict(0, 200, answer("a", [0.25]))  # a candidate short
    verdict(0, 200, answer("a", [0.25, 0.5 + 3e-6]))
    assert verdict.wrong == 4


def test_a_swap_is_done_when_every_connection_has_the_new_model(verdict):
    async def answers_come():
        waiting = asyncio.create_task(verdict.until("b"))
        await asyncio.sleep(0)  # it begins
        for number in range(50):
            verdict(2 * number, 200, answer("b", [0.5, 0.25]))
        await asyncio.sleep(0.02)
        assert not waiting.done()  # nothing on the other connection
        verdict(1, 200, answer("a", [0.125, 0.75]))
        await asyncio.sleep(0.02)
        assert not waiting.done()  # the old model there
        verdict(3, 200, answer("b", [0.75, 0.125]))
        return await waiting

    assert uvloop.run(answers_come())
    assert verdict.wrong == 0


def test_the_served_folder_is_moved_in_one_step(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    served = tmp_path / "served"
    for name in ("one", "two", "one"):
        point(served, tmp_path / name)
        assert (served / "file").read_text() == name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "served", "two"]
