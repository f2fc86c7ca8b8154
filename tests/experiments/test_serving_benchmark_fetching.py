"""Feature fetching from a real Redis server."""

import shutil

import numpy as np
import pytest

pytest.importorskip("redis", reason="the Redis client is not installed")

from experiments.serving_fetching import (
    PREFIXES,
    RedisPy,
    ServerUse,
    Thin,
    open_redis,
    remove_tables,
    running_redis,
    write_tables,
)
from features.errors import BadInputError
from ranking.pretrained_embeddings import PretrainedTable

pytestmark = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="redis-server is not installed"
)

ROWS, DIM = 5_000, 6  # more than one command writes


def table(seed):
    rng = np.random.default_rng(seed)
    ids = rng.permutation(ROWS) * 997_000_009 - (1 << 40)  # some of them below 0
    return PretrainedTable(ids=ids, weight=rng.normal(size=(ROWS, DIM)).astype(np.float32))


TABLES = {"product": table(0), "query": table(1)}


@pytest.fixture(scope="module")
def url():
    with running_redis(None) as found:
        write_tables(found, TABLES)
        yield found


@pytest.fixture(params=[RedisPy, Thin])
def client(request, url):
    found = request.param(url, DIM)
    yield found
    found.close()


def expected(name, rows):
    return TABLES[name].weight[rows].astype(np.float16)


@pytest.mark.parametrize("products", [[7], [3, 4999, 0, 3], list(range(0, ROWS, 3))])
def test_rows_come_in_the_order_asked_for(client, products):
    found = client.fetch(TABLES["product"].ids[products], TABLES["query"].ids[[11]])()
    assert found.dtype == np.float16
    assert np.array_equal(found[:-1], expected("product", products))
    assert np.array_equal(found[-1:], expected("query", [11]))


def test_one_answer_after_the_other(client):
    for row in (1, 2, 3):
        found = client.fetch(TABLES["product"].ids[:row], TABLES["query"].ids[[row]])()
        assert np.array_equal(found[:-1], expected("product", range(row)))
        assert np.array_equal(found[-1], expected("query", row))


def test_a_row_that_is_not_there_is_zeros(url):
    client = RedisPy(url, DIM)
    ids = np.array([TABLES["product"].ids[5], 12345])
    found = client.fetch(ids, TABLES["query"].ids[:1])()
    client.close()
    assert np.array_equal(found[0], expected("product", 5))
    assert not found[1].any()


def test_the_server_keeps_two_bytes_a_number(url):
    client = open_redis(url)
    assert client.dbsize() == 2 * ROWS
    first = PREFIXES["query"] + int(TABLES["query"].ids[0]).to_bytes(8, "little", signed=True)
    assert client.strlen(first) == 2 * DIM
    use = ServerUse.now(client)
    assert use.rss_mb > 1
    assert use.cpu_seconds > 0
    client.close()


def test_what_was_written_is_removed_and_nothing_else():
    with running_redis(None) as url:
        client = open_redis(url)
        client.set("mine", "kept")
        write_tables(url, TABLES)
        remove_tables(url, {name: found.ids for name, found in TABLES.items()})
        assert client.keys("*") == [b"mine"]
        client.close()


def test_the_server_is_gone_afterwards():
    with running_redis(None) as url:
        open_redis(url).close()
    with pytest.raises(BadInputError, match="no Redis server answers"):
        open_redis(url)


def test_an_address_without_a_server_is_named():
    with pytest.raises(BadInputError, match=r"redis://127\.0\.0\.1:1/0: no Redis server answers"):
        open_redis("redis://127.0.0.1:1/0")


def test_without_the_program_it_is_said_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadInputError, match="install redis-server, or name"), running_redis(None):
        pass
