"""SQL as a client of the bus has it: what it sees, what is refused, and that it disturbs nobody."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.support.cluster import Cluster, Reply, assert_failure, cluster_on, until

pytestmark = pytest.mark.asyncio(loop_scope="module")
ENDLESS = (
    "SELECT count(*) FROM range(1000000000) a, range(1000000000) b WHERE a.range * b.range = 3"
)
SQL_TIMEOUT_MS = 800
HANGS_S = 30.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(
    nats_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Cluster]:
    """Three nodes; any of them may get a question, one has the data."""
    folder = tmp_path_factory.mktemp("sql")
    async with cluster_on(nats_url, folder, nodes=3, sql_timeout_ms=SQL_TIMEOUT_MS) as cluster:
        yield cluster


async def ask(cluster: Cluster, query: str, codec: str = "json") -> Reply:
    return await cluster.bus.ask("sql", codec=codec, timeout_s=HANGS_S, query=query)


@pytest.mark.parametrize("codec", ["json", "cbor"])
async def test_a_query_sees_what_was_acknowledged_before(cluster: Cluster, codec: str) -> None:
    # Twenty times, so that every node is asked.
    for i in range(20):
        key = f"seen-{codec}-{i}"
        put = await cluster.bus.ok("put", codec=codec, key=key, value=f"{i}")
        kv = await ask(
            cluster, f"SELECT epoch, seq, value_text FROM kv WHERE key_text = '{key}'", codec
        )
        assert kv.fields["rows"] == [[*put["version"], f"{i}"]]
        await cluster.bus.ok("delete", codec=codec, key=key)
        log = await ask(
            cluster, f"SELECT op FROM oplog WHERE key_text = '{key}' ORDER BY seq", codec
        )
        assert (log.fields["columns"], log.fields["rows"]) == (["op"], [["put"], ["delete"]])


async def test_bytes_travel_in_both_codecs(cluster: Cluster) -> None:
    await cluster.bus.ok("put", codec="cbor", key=b"raw\xff", value=b"\x00\xfe")
    query = "SELECT value, value_text FROM kv WHERE key = from_hex('726177ff')"
    cbor = await ask(cluster, query, "cbor")
    assert cbor.fields["rows"] == [[b"\x00\xfe", None]]
    json = await ask(cluster, query)
    assert json.fields["rows"] == [[{"b64": "AP4="}, None]]


HOSTILE = [
    "DROP TABLE kv", "DELETE FROM kv", "INSERT INTO kv VALUES (1)", "UPDATE kv SET value = NULL",
    "ATTACH '/tmp/x.db'", "DETACH state", "COPY kv TO '/tmp/x'", "EXPORT DATABASE '/tmp/x'",
    "SELECT * FROM read_csv('/etc/passwd')", "SELECT * FROM '/etc/passwd'",
    "SELECT content FROM read_text('/etc/passwd')", "SELECT * FROM glob('/*')",
    "SELECT * FROM state.meta", "SELECT * FROM state.kv_1", "SELECT * FROM memory.main.kv",
    "SELECT * FROM information_schema.tables", "SELECT * FROM duckdb_settings()",
    "SELECT getenv('PATH')", "SELECT current_setting('temp_directory')", "PRAGMA database_list",
    "SET memory_limit = '1TB'", "CALL pragma_version()", "INSTALL httpfs", "LOAD httpfs",
    "CHECKPOINT", "BEGIN", "CREATE VIEW v AS SELECT 1", "SELECT 1; SELECT 2",
    "EXPLAIN ANALYZE SELECT 1",
]  # fmt: skip


@pytest.mark.parametrize("codec", ["json", "cbor"])
async def test_a_hostile_statement_is_refused(cluster: Cluster, codec: str) -> None:
    for query in HOSTILE:
        assert_failure(await ask(cluster, query, codec), "SQL_REFUSED", 403)
    assert (await ask(cluster, "SELECT 1 AS one")).fields == {"columns": ["one"], "rows": [[1]]}


@pytest.mark.parametrize(
    "query", ["SELEC 1", "SELECT nothing FROM kv", "SELECT repeat('x', 1000) FROM range(100000)"]
)
async def test_a_wrong_query_is_told_so(cluster: Cluster, query: str) -> None:
    reply = await ask(cluster, query)
    assert reply.code in ("SQL_FAILED", "SQL_REFUSED")
    assert "\n" not in reply.message


async def test_an_endless_query_ends_and_writes_go_on(cluster: Cluster) -> None:
    query = asyncio.create_task(ask(cluster, ENDLESS))
    count = 0
    while not query.done():
        await cluster.bus.ok("put", key=f"meanwhile-{count}", value="1")
        count += 1
    assert_failure(await query, "SQL_FAILED", 400, says="longer than")
    assert count > 10


async def test_more_queries_than_there_is_room_for_are_all_answered(cluster: Cluster) -> None:
    """Two run, some wait, the rest is refused; and when they are gone the next one is served."""
    replies = await asyncio.gather(*(ask(cluster, ENDLESS) for _ in range(25)))
    for reply in replies:
        assert reply.code in ("SQL_FAILED", "SHARD_UNAVAILABLE", "OVERLOADED"), reply.fields

    async def is_served() -> bool:
        return (await ask(cluster, "SELECT 1")).code is None

    await until(is_served, HANGS_S)
