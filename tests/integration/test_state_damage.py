"""The file of a node's state: what is wrong with it, how it is built again, and what does not belong to it."""

import contextlib
import random
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest
import pytest_asyncio
from nats.errors import NoRespondersError

from tests.support.cluster import Cluster, cluster_on, until
from tests.support.recorded import entries_in_log, oplog, sql

STATE = "state.duckdb"
LOG = "log.sqlite"
KEYS = 400
VALUES = {f"key-{i:03}": random.Random(i).randbytes(1000).hex() for i in range(KEYS)}
KV = "SELECT key_text, md5(value), epoch, seq, expires_at FROM kv ORDER BY key"
DUCKDB_BLOCK_BYTES = 256 << 10
DUCKDB_HEADERS_BYTES = 3 * 4096


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def templates(
    nats_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[dict[str, Path]]:
    """Data directories of stopped nodes n1 with VALUES: one with its whole log, one whose log was trimmed."""
    folder = tmp_path_factory.mktemp("template")
    for name, log_keep_bytes in (("whole", 1 << 30), ("trimmed", 10_000)):
        knobs: dict[str, Any] = {
            "fold_interval_ms": 20, "log_keep_bytes": log_keep_bytes, "log_bytes_max": log_keep_bytes
        }  # fmt: skip
        async with cluster_on(nats_url, folder / name, nodes=1, **knobs) as cluster:
            await put_values(cluster)
            assert await sql(cluster, "SELECT count(*) FROM kv") == [[KEYS]]
            for i in range(200):  # entries are deleted after some dozens of others
                await cluster.bus.ok("put", key=f"last-{i}", value="1")
            code, text = await cluster.stop("n1")
            assert code == 0, text
    assert entries_in_log(folder / "whole/data/n1")[1] == 1
    assert entries_in_log(folder / "trimmed/data/n1")[1] > KEYS
    yield {name: folder / name / "data" / "n1" for name in ("whole", "trimmed")}


@pytest.fixture
async def cluster(nats_url: str, tmp_path: Path) -> AsyncIterator[Cluster]:
    """No process yet."""
    async with cluster_on(nats_url, tmp_path, nodes=0) as cluster:
        yield cluster


async def put_values(cluster: Cluster) -> None:
    items = [*VALUES.items()]
    for at in range(0, KEYS, 50):
        ops = [{"op": "put", "key": k, "value": v} for k, v in items[at : at + 50]]
        await cluster.until_ok("batch", ops=ops)


async def assert_values(cluster: Cluster) -> None:
    ops = [{"op": "get", "key": key} for key in VALUES]
    found: dict[str, str | None] = {}
    for at in range(0, KEYS, 200):
        results = (await cluster.until_ok("batch", ops=ops[at : at + 200]))["results"]
        found |= {result["key"]: result.get("value") for result in results}
    assert found == VALUES


async def refusal(cluster: Cluster, data: Path, *options: str, id: str = "n1") -> str:
    """Start a node on this directory, which must end with 1: the one line for its user."""
    cluster.start_node(id, *options, data=data)
    return await line_at_exit(cluster, id)


async def line_at_exit(cluster: Cluster, id: str = "n1") -> str:
    code, text = await cluster.wait_exit(id)
    lines = [line for line in text.splitlines() if line.startswith("bus-kv: ")]
    assert code == 1, text
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0]


# ---- damage ----


def _change(state: Path, *statements: str) -> object:
    with duckdb.connect(str(state)) as db:
        for statement in statements:
            db.execute(statement)
    return None


def _scribble(path: Path, at: int, bytes_count: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        old = file.read(bytes_count)
        file.seek(at)
        file.write(bytes(byte ^ 0xA5 for byte in old))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "garbage": (lambda state: state.write_bytes(b"this is no database\n" * 50_000), "is damaged"),
    "empty": (lambda state: state.write_bytes(b""), "is damaged"),
    "half of it": (
        lambda state: state.write_bytes(state.read_bytes()[: state.stat().st_size // 2]),
        "is damaged"),
    "headers overwritten": (lambda state: _scribble(state, 0, DUCKDB_HEADERS_BYTES), "is damaged"),
    "another database": (
        lambda state: _change(state.with_suffix(".new"), "CREATE TABLE t (a INTEGER)")
        or state.with_suffix(".new").replace(state), "is damaged"),
    "no format": (
        lambda state: _change(state, "DELETE FROM meta WHERE name = 'format_version'"),
        "does not say its format"),
    "newer format": (
        lambda state: _change(state, "UPDATE meta SET value = '99' WHERE name = 'format_version'"),
        "format 99, newer than"),
    "of another node": (
        lambda state: _change(state, "UPDATE meta SET value = 'x' WHERE name = 'incarnation'"),
        "belongs to another log"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "says"), DAMAGE.values(), ids=DAMAGE.keys())
async def test_a_damaged_state_is_refused(
    cluster: Cluster, templates: dict[str, Path], tmp_path: Path,
    damage: Callable[[Path], object], says: str,
) -> None:  # fmt: skip
    data = shutil.copytree(templates["whole"], tmp_path / "copy")
    damage(data / STATE)
    line = await refusal(cluster, data)
    assert str(data / STATE) in line
    assert says in line
    assert "--rebuild" in line


# ---- a node that has served before ----


@pytest.fixture
async def single(nats_url: str, tmp_path: Path) -> AsyncIterator[Cluster]:
    """VALUES are on disk; the log has them too."""
    async with cluster_on(nats_url, tmp_path, nodes=1, fold_interval_ms=20) as cluster:
        await put_values(cluster)
        assert await sql(cluster, "SELECT count(*) FROM kv") == [[KEYS]]
        yield cluster


async def test_a_damaged_value_is_never_served(single: Cluster) -> None:
    await single.stop("n1")
    state = single.data("n1") / STATE
    with duckdb.connect(str(state)) as db:
        (block,) = db.execute(
            "SELECT max(block_id) FROM pragma_storage_info('kv_1') WHERE column_name = 'value'"
        ).fetchall()[0]
    _scribble(state, DUCKDB_HEADERS_BYTES + block * DUCKDB_BLOCK_BYTES + 50_000)
    single.start_node("n1")
    await _read_until_the_end(single)
    line = await line_at_exit(single)
    assert f"{state} is damaged" in line
    assert "--rebuild" in line


async def _read_until_the_end(cluster: Cluster) -> None:
    """Ask for everything until the node ends; what it answers has to be true."""
    ops = [{"op": "get", "key": key} for key in VALUES]

    async def has_ended() -> bool:
        for at in range(0, KEYS, 200):
            with contextlib.suppress(NoRespondersError, TimeoutError):
                reply = await cluster.bus.ask("batch", ops=ops[at : at + 200], timeout_s=1)
                for result in reply.fields.get("results", ()):
                    assert "code" in result or result["value"] == VALUES[result["key"]]
        return not cluster.is_running("n1")

    await until(has_ended)


async def test_a_state_is_built_again_from_the_whole_log(single: Cluster) -> None:
    await single.bus.ok("put", key="key-000", value="1", request_id="me:1", ttl_ms=600_000)
    put = {"key": "key-000", "value": VALUES["key-000"], "request_id": "me:2"}
    first = await single.bus.ok("put", **put)
    before, data = await oplog(single, page_rows=200), await sql(single, KV)
    await single.stop("n1")
    state = single.data("n1") / STATE
    garbage = b"this is no database" * 1000
    state.write_bytes(garbage)
    single.start_node("n1", "--rebuild")
    await single.until_ok("get", key="key-000")
    assert state.with_name(f"{STATE}.1.damaged").read_bytes() == garbage
    await assert_values(single)
    assert await oplog(single, page_rows=200) == before
    assert await sql(single, KV) == data
    assert await single.bus.ok("put", **put) == first
    # And it starts as ever.
    single.kill("n1")
    single.start_node("n1")
    await assert_values(single)
    assert await oplog(single, page_rows=200) == before


async def test_a_rebuild_without_damage_keeps_everything(single: Cluster) -> None:
    before = await oplog(single, page_rows=200)
    for number in (1, 2):
        single.kill("n1")
        single.start_node("n1", "--rebuild")
        await assert_values(single)
        assert await oplog(single, page_rows=200) == before
        assert (single.data("n1") / f"{STATE}.{number}.damaged").exists()


# ---- files that do not belong together ----


async def test_a_rebuild_from_a_trimmed_log_is_refused_and_touches_nothing(
    cluster: Cluster, templates: dict[str, Path], tmp_path: Path
) -> None:
    data = shutil.copytree(templates["trimmed"], tmp_path / "copy")
    whole = (data / STATE).read_bytes()
    _, first, _ = entries_in_log(data)
    line = await refusal(cluster, data, "--rebuild")
    assert f"{data / LOG} has shard s1 after seq {first - 1} only" in line
    assert (data / STATE).read_bytes() == whole
    assert [*data.glob("*.damaged*")] == []


async def test_a_state_that_is_gone_beside_a_trimmed_log_is_missed(
    cluster: Cluster, templates: dict[str, Path], tmp_path: Path
) -> None:
    """A new state must not be taken for the old one, at the first start or any other."""
    data = shutil.copytree(templates["trimmed"], tmp_path / "copy")
    (data / STATE).unlink()
    for _ in range(2):
        line = await refusal(cluster, data)
        assert f"{data / LOG} has shard s1 after seq" in line
        assert f"put the right {STATE}" in line


async def test_an_older_copy_of_the_log_is_refused(single: Cluster, tmp_path: Path) -> None:
    await single.stop("n1")
    log = single.data("n1") / LOG
    shutil.copy(log, tmp_path / "older")
    single.start_node("n1")
    await single.until_ok("put", key="key-000", value="1")
    assert await sql(single, "SELECT value_text FROM kv WHERE key_text = 'key-000'") == [["1"]]
    await single.stop("n1")
    shutil.copy(tmp_path / "older", log)
    line = await refusal(single, single.data("n1"))
    assert str(log) in line
    assert "older copy" in line


async def test_an_older_copy_of_the_state_beside_a_trimmed_log_is_refused(
    cluster: Cluster, templates: dict[str, Path], tmp_path: Path
) -> None:
    """Between what the state has and what the log has, entries are missing."""
    data = shutil.copytree(templates["trimmed"], tmp_path / "copy")
    _change(data / STATE, "UPDATE marks SET last = 100")
    line = await refusal(cluster, data)
    assert f"{data / LOG} has shard s1 after seq" in line
    assert "the state has it up to 100" in line
